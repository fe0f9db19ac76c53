# SPDX-License-Identifier: Apache-2.0
"""Load a data set: read it, check it, cut it into transitions, and say in one line what it is."""

import os

import numpy as np

from common import envs, fail
from common.datasets import checks, env_only, mistakes, reading, reference_scores
from common.datasets.dataset import Dataset
from common.datasets.transitions import cut

INTEGER = "; README's table of methods says which take integer actions"
CONTINUOUS = "; README's table of methods says which do not need integer actions"


def load(dataset_id, env=None, env_steps=None, actions="continuous") -> Dataset:
    """Read a data set, check it, and print what was read in one line.

    Args:
        dataset_id: an id or a path, in one of the forms that reading.py lists.
        env: Gymnasium id to evaluate in instead of the recorded one ("package.module:Name-v0").
        env_steps: step limit of that env.
        actions: "continuous", "discrete" or "any": what the caller can learn from.

    Raises:
        SystemExit: code 2 after one clear line, for anything wrong with the id or the data.
    """
    if not isinstance(dataset_id, str | os.PathLike):
        fail(f"{dataset_id!r} is no data set id; docs/data.md lists the forms of an id")
    dataset_id = os.fspath(dataset_id)
    if env_steps is not None and env_steps < 1:
        fail(f"--env-steps {env_steps}: an episode needs at least one step")
    dataset = _dataset(dataset_id, reading.read(dataset_id, env, env_steps))
    if actions == "continuous" and dataset.num_actions is not None:
        fail(f"{dataset_id}: integer actions, but this method takes continuous ones only{INTEGER}")
    if actions == "discrete" and dataset.num_actions is None:
        fail(
            f"{dataset_id}: continuous actions, but this method takes integer ones only{CONTINUOUS}"
        )
    if dataset_id.startswith(env_only.PREFIX):
        dataset = env_only.emptied(dataset)
    print(_summary(dataset))
    return dataset


def _dataset(dataset_id, source):
    """Check the rows, scale the actions to [-1, 1], cut the rows into episodes."""
    keys, horizon, make_env = source.keys, source.horizon, source.make_env
    rows = checks.rows(dataset_id, source.rows)
    if source.is_own:
        mistakes.warn(dataset_id, rows, source.termination_ends_episode)
    count = len(rows["rewards"])
    env, spec, limit = None, None, horizon
    reference = checks.reference(dataset_id, source.reference)
    if make_env is not None:
        env = make_env()
        spec = env.spec
        limit = spec.max_episode_steps or horizon
        if limit is None:
            fail(f"{dataset_id}: {spec.id} has no step limit; set --env-steps")
        if reference == (None, None) and not source.score_is_success:
            reference = reference_scores.of_env_family(dataset_id, spec.id)
        checks.observations(dataset_id, rows, env, source)
    rows["actions"], num_actions, bounds = checks.actions(
        dataset_id, rows["actions"], env, source.bounds, source.action_space
    )
    if env is not None:
        envs.close(env)
    if "timeouts" not in rows:
        where = f"and every {horizon or limit} steps" if horizon or limit else "only"
        print(f"{dataset_id}: no 'timeouts' in it, so episodes are cut at terminals {where}")
    transitions, ends, returns = cut(rows, horizon or limit, source.termination_ends_episode)
    if not len(ends):
        fail(f"{dataset_id}: no row with a known next observation; store next_observations too")
    unused = {"observation_keys_left_out": list(source.left_out)} if source.left_out else {}
    record = {
        "observation_keys": list(keys),
        **unused,
        "env": spec and _env_name(spec),
        "action_box": [] if bounds is None else [np.asarray(bound).tolist() for bound in bounds],
        **_action_facts(source.action_space if env is None else envs.action_space(env)),
        "rows_left_out": count - len(transitions.reward),  # their next observation is unknown
        "env_facts": envs.remembered(
            env, transitions.observation.shape[1], num_actions, bounds, source.adapted
        ),
    }
    return Dataset(
        id=dataset_id,
        transitions=transitions,
        episode_ends=ends,
        episode_returns=returns,
        make_env=make_env and envs.flat_and_scaled(make_env, keys, bounds),
        horizon=None if limit is None else int(limit),
        ref_min_score=reference[0],
        ref_max_score=reference[1],
        num_actions=num_actions,
        score_is_success=source.score_is_success,
        record=record | source.facts,
    )


def _action_facts(space):
    """What the env adds to actions from 0 on, or the shape that it gives to flat actions."""
    if getattr(space, "start", 0):
        return {"first_action": int(space.start)}
    is_flat = space is None or space.dtype.kind != "f" or len(space.shape) == 1
    return {} if is_flat else {"action_shape": list(space.shape)}


def _env_name(spec):
    """The env's id and the wrappers that change it: "AdroitHandDoor-v1 + D4RLReward"."""
    return " + ".join([spec.id, *(wrapper.name for wrapper in spec.additional_wrappers)])


def _summary(dataset):
    t, returns = dataset.transitions, dataset.episode_returns
    action = dataset.num_actions or t.action.shape[1]
    if not len(t.reward):
        return f"data {dataset.id}: no rows yet, O={t.observation.shape[1]} A={action}"
    left_out = dataset.record["rows_left_out"]
    without = f" ({left_out:,} rows without a next observation left out)" if left_out else ""
    return (
        f"data {dataset.id}: {len(t.reward):,} transitions{without}, "
        f"{len(returns):,} episodes, return "
        f"{returns.min():.1f} / {returns.mean():.1f} / {returns.max():.1f} (min / mean / max), "
        f"{int(t.termination.sum()):,} terminations, {int(t.truncation.sum()):,} truncations, "
        f"O={t.observation.shape[1]}{_parts(dataset.record)} A={action}, "
        f"{sum(x.nbytes for x in t) / 1e6:.1f} MB"
    )


def _parts(record):
    """Which parts of a dict observation are used, and which are not; "" for arrays."""
    keys, unused = record["observation_keys"], record.get("observation_keys_left_out", ())
    if not keys:
        return ""
    without = f", without {', '.join(unused)}" if unused else ""
    return f" ({', '.join(keys)}{without})"
