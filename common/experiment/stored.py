# SPDX-License-Identifier: Apache-2.0
"""Read a run folder back, on any machine and from any working folder, with or without its data."""

import dataclasses
import functools
import inspect
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common import datasets, envs, fail
from common.experiment import best, checkpoints, config, devices, digests, yaml_files


def load(module, folder, which="last"):
    """Config, data set and saved State (arrays [S, ...]) of a run folder.

    The data set itself is read when its transitions are asked for, so nothing here needs it.

    Args:
        module: the algorithm's file, imported.
        folder: the run folder.
        which: "last" is the newest checkpoint, "best" what --keep best has kept, a number the
            checkpoint of that update.

    Raises:
        SystemExit: code 2 after one line.
    """
    cfg, dataset, state, _ = load_all(module, folder, which)
    return cfg, dataset, state


def load_all(module, folder, which="last"):
    """The same, and the update [S] at which each seed's parameters were saved."""
    folder = Path(os.path.expanduser(folder))
    _check_file(module, folder)
    cfg, options = config.read_run(folder, module.Config)
    dataset = StoredDataset(folder, cfg, options)
    example = dataset.example()
    numbers = {} if dataset.num_actions is None else {"num_actions": dataset.num_actions}
    create = jax.vmap(lambda key: module.create_state(key, example, cfg, **numbers))
    (keys,) = devices.streams(cfg.seeds, 1)
    manager, step = _manager(folder, which)
    state, meta = checkpoints.restore(manager, create(keys), keep=True, only=step)
    manager.close()
    if meta is None:
        fail(f"{folder}: no readable checkpoint in it")
    updates = meta.get("updates") or [meta["update"]] * len(cfg.seeds)
    return cfg, dataset, state, updates


def _check_file(module, folder):
    """Exit with code 2 after one line, where the run is of another algorithm's file.

    A copy of that file under another name will do, as long as its Config has the run's fields.
    """
    values = config.current_names(yaml_files.of_run(folder), config.renamed(module.Config))
    fields = {field.name for field in dataclasses.fields(module.Config)}
    file, name = Path(module.__file__), values["record"].get("algorithm")
    if name not in (None, file.stem) and {*values} - fields - {"record", *config.IN_YAML}:
        fail(f"{folder}: a run of {name}, whose settings {file.name} does not have")


def _manager(folder, which):
    """Orbax's manager and the number of the checkpoint; None is the newest."""
    if which == "best":
        if not (folder / best.FOLDER).is_dir():
            fail(f"{folder}: has no best checkpoint; train with --keep best")
        return checkpoints.manager(folder, best.FOLDER, kept=1), None
    manager = checkpoints.manager(folder)
    if which == "last":
        return manager, None
    steps = sorted(manager.all_steps())
    if not isinstance(which, int) or which not in steps:
        known = ", ".join(map(str, steps)) or "none"
        fail(
            f"{folder}: no checkpoint {which}; there are {known}, last, and best after --keep best"
        )
    return manager, which


class StoredDataset:
    """The data set of a run, as far as the run's record tells of it.

    It has what acting and evaluation need. `transitions`, `episode_ends` and `episode_returns` are
    read from the data set itself when they are asked for.
    """

    score = datasets.Dataset.score

    def __init__(self, folder, cfg, options):
        self.record = yaml_files.of_run(folder)["record"]
        self.id, self._options = cfg.dataset, options
        known = "shapes" in self.record  # runs before that need their data set
        source = self.record if known else vars(self._loaded)
        self.num_actions, self.horizon = source["num_actions"], source["horizon"]
        self.score_is_success = source["score_is_success"]
        reference = self.record.get("reference") or [None, None]
        self.ref_min_score, self.ref_max_score = reference
        if not self.record.get("env"):
            self.make_env = None

    def __getattr__(self, name):
        if name in ("transitions", "episode_ends", "episode_returns"):
            return getattr(self._loaded, name)
        raise AttributeError(name)

    def make_env(self, render_mode=None):
        """The env that the policy is evaluated in. It needs the data only where they tell it."""
        spec = self.record.get("env_facts", {}).get("spec")
        if spec is None:
            return self._loaded.make_env(render_mode)
        make = functools.partial(envs.make_remembered, spec, self._options.env)
        return envs.flat_and_scaled(lambda mode: make(render_mode=mode), *self._wrapped())(
            render_mode
        )

    def translator(self):
        """Between the env's own observations and actions and those of a policy."""
        facts = self.record.get("env_facts") or self._loaded.record["env_facts"]
        return envs.Translator(facts, *self._wrapped())

    def _wrapped(self):
        """Keys of the observation and bounds of the actions."""
        bounds = tuple(np.asarray(bound, np.float32) for bound in self.record["action_box"])
        return tuple(self.record["observation_keys"]), bounds or None

    def example(self):
        """One row of the data with zeros in it, for its shapes and types."""
        if "shapes" not in self.record:
            return jax.tree.map(lambda x: x[:1], self._loaded.transitions)
        shapes = self.record["shapes"]
        action = np.zeros((1, *shapes["action"]), np.float32)
        if self.num_actions is not None:
            action = np.zeros(1, np.int32)
        observation = np.zeros((1, *shapes["observation"]), np.float32)
        number = np.zeros(1, np.float32)
        return datasets.Transitions(
            observation, action, number, observation, action, number, number
        )

    @functools.cached_property
    def _loaded(self):
        """The data set itself. A file is looked for where it was when the run began."""
        id = self.record.get("data_file") or self.id
        id = id if Path(id).exists() else self.id
        dataset = datasets.load(id, self._options.env, self._options.env_steps, actions="any")
        was, now = self.record.get("digest"), digests.of_data(dataset.transitions)
        if was not in (None, now):
            print(f"WARNING: {id}: the run was trained on other data ({was}, now {now})")
        return dataset


# --- Acting -------------------------------------------------------------------------------------
def load_policy(module, folder, which="last", seed=None):
    """The policy of one seed of a run folder, which acts in the env's own terms.

    Args:
        module: the algorithm's file, imported.
        folder: the run folder.
        which: as in `load`.
        seed: one of the run's seeds (default: the first).
    """
    cfg, dataset, state, updates = load_all(module, folder, which)
    seed = cfg.seeds[0] if seed is None else seed
    if seed not in cfg.seeds:
        fail(f"{folder}: no seed {seed}; there are {', '.join(map(str, cfg.seeds))}")
    return Policy(module, cfg, dataset, state, cfg.seeds.index(seed), updates)


class Policy:
    """`act(observation)` for one environment; `reset()` before every episode."""

    def __init__(self, module, cfg, dataset, state, index, updates):
        self.dataset, self.record = dataset, dataset.record
        self._translator = dataset.translator()
        cpu = jax.local_devices(backend="cpu")[0]  # where evaluations act as well
        params = jax.tree.map(lambda x: x[index], module.policy_params(state))
        key = devices.streams(cfg.seeds, 3)[2][index]
        key = jax.random.fold_in(key, np.uint32(updates[index] or 0))
        self.params, self._key = jax.device_put((params, key), cpu)
        self._memory = initial_memory(module, cfg, dataset, 1)
        act = acting(module, cfg, dataset, state)

        def step(params, observation, key, number, past):
            return act(params, observation, jax.random.fold_in(key, number), *past)

        self._step = jax.jit(step)
        self.reset()

    def reset(self):
        """Begin an episode: forget the steps of the last one."""
        self._past, self._count = self._memory, 0

    def act(self, observation, reward=0.0):
        """The action for one observation of the env as it was recorded, in the env's own range.

        Args:
            observation: as the env gives it, an array or a dict.
            reward: of the step before; only policies with a memory use it.
        """
        flat = self._translator.flat(observation)
        return self._translator.action(self.act_flat(flat, reward))

    def act_flat(self, observation, reward=0.0):
        """The action in [-1, 1], or the integer, for one flat observation [O]."""
        past = ()
        if self._past is not None:
            past = self._past, np.full(1, reward, np.float32)
        number = np.uint32(self._count)
        action = self._step(self.params, observation[None], self._key, number, past)
        if self._past is not None:
            action, self._past = action
        self._count += 1
        action = np.asarray(action)[0]
        return action if action.dtype.kind != "f" else np.nan_to_num(action.clip(-1, 1))

    def export(self, file):
        """Write what acting needs into an npz file: the parameters, and facts about the env.

        The names are those of the parameters' places in `policy_params`.
        """
        arrays = {name: np.asarray(x) for name, x in checkpoints.names(self.params).items()}
        low, high = self.record["action_box"] or ([], [])
        arrays |= {"action_low": np.float32(low), "action_high": np.float32(high)}
        arrays |= {"observation_keys": np.array(self.record["observation_keys"], str)}
        with open(file, "wb") as out:  # a name alone would get the suffix npz
            np.savez(out, **arrays)


def acting(module, cfg, dataset, state):
    """The acting function of an algorithm's file, bound to the run's networks."""
    if not hasattr(module, "policy_fn"):
        fail(f"{module.__file__}: has no policy_fn(state, cfg), by which its policy is called")
    numbers = {}
    if "num_actions" in inspect.signature(module.policy_fn).parameters:
        numbers = {"num_actions": dataset.num_actions}
    return module.policy_fn(state, cfg, **numbers)


def initial_memory(module, cfg, dataset, count):
    """The memory with which `count` episodes begin, None for a policy without one."""
    if not hasattr(module, "initial_memory"):
        return None
    facts = dataset.record.get("acting") or {}
    needed = [*inspect.signature(module.initial_memory).parameters][3:]
    if missing := [name for name in needed if name not in facts]:
        fail(f"{dataset.id}: this run is older than the record of its {', '.join(missing)}")
    example = jax.tree.map(jnp.asarray, dataset.example())
    return module.initial_memory(count, example, cfg, **facts)
