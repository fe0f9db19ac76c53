# SPDX-License-Identifier: Apache-2.0
"""What offline learning is about, in two data sets: each has a baseline that must fail.

**Overestimation.** One state, no end, discount 0.9, rewards a for actions a in [-1, 0]. Nothing
shows that actions above 0 cost 1 a step. The best action of the data is 0 and V = 0 there; the
slope extrapolates to action 1, worth 1 / (1 - 0.9) = 10 in the mind of an unconstrained critic.

**Stitching.** Half of the walks start well and end badly, half start elsewhere and end well; all
cross at (0, 0). The best behaviour goes from the first kind's start to the second kind's end.
"""

import importlib
import types

import flax.linen as nn
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import probes
import pytest

from algorithms import bc, rebrac
from common import datasets

# Ordinary settings; what a file does not name here is its Config's.
CAUTIOUS = {
    "atac": {"beta": 1.0, "warm_start": 1000, "actor_learning_rate": 1e-4},
    "awac": {},
    "bc": {},
    "bcq": {},
    "brac": {"alpha": 1.0, "alpha_training": "none", "divergence": "kl"},
    "cql": {"alpha": 5.0},
    "fisher_brc": {"survival_bonus": 0.0, "action_margin": 0.01},
    "fql": {},
    "idql": {},
    "iql": {},
    "ivr": {},
    "optidice": {"warm_start": 1000},
    "odice": {"lam": 0.5, "alpha": 0.1},  # with alpha 1 the weights vanish next to such rewards
    "qc": {"horizon": 1},
    "rebrac": {"actor_penalty": 1.0, "critic_penalty": 1.0},
    "td3_bc": {},
    "xql": {},
}
STITCHING = {
    "bcq": {},
    "cql": {"alpha": 1.0},
    "idql": {"expectile": 0.9},
    "iql": {"expectile": 0.9, "inverse_temperature": 10.0},
    "ivr": {"sql_alpha": 0.05},
    "odice": {"alpha": 0.1},
    "optidice": {"alpha": 0.05, "residual_fit": "mse", "warm_start": 1000},
    "qc": {"horizon": 1, "num_samples": 16, "q_agg": "min"},
    "rebrac": {"actor_penalty": 1.0, "critic_penalty": 0.1},
    "td3_bc": {},
    "xql": {"beta": 0.1, "inverse_temperature": 10.0},
}


# With ATOLL_SLOW=1: their values are learned as IQL's are, or an update takes many actions.
SLOWER = (
    "atac",
    "awac",
    "bcq",
    "brac",
    "fisher_brc",
    "fql",
    "idql",
    "ivr",
    "odice",
    "optidice",
    "qc",
    "xql",
)


# --- Overestimation -----------------------------------------------------------------------------
class Critic(nn.Module):
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, observation, action):
        x = jnp.concatenate([observation, action], axis=-1)
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(1)(x).squeeze(-1)


def create_td3(key, batch, cfg):
    state, critic = rebrac.create_state(key, batch, cfg), Critic(cfg.hidden)
    keys = jax.random.split(jax.random.key(0), cfg.num_critics)
    init = jax.vmap(critic.init, (0, None, None))
    params = init(keys, batch.observation, batch.action)
    apply_fn, adam = jax.vmap(critic.apply, (0, None, None)), optax.adam(cfg.critic_learning_rate)
    return state._replace(critic=rebrac.TrainState.create(apply_fn, params, adam))


# TD3: ReBRAC without its two penalties and without LayerNorm, which alone keeps Q(1) near 1 here.
# Its actor still follows the smaller of both Qs, which is the more cautious one, over mean |Q|.
td3 = types.SimpleNamespace(**vars(rebrac))
td3.create_state = create_td3


def after_overestimation(module, seed, **overrides):
    """(greedy action, Q of it)"""
    settings = {"discount": 0.9, "target_rate": 0.05} | overrides
    state = probes.train(module, probes.rewarding_left(), 10_000, seed, **settings)
    action = probes.act(module, state, 1, **settings)
    return action.item(), probes.q(state, 1, action) if "critic" in state._fields else 0.0


def test_td3_overestimates_unseen_actions():
    action, q = after_overestimation(td3, 0, actor_penalty=0.0, critic_penalty=0.0)
    assert action > 0.9 and q > 5, (action, q)


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", runs.slow_but(CAUTIOUS, {*CAUTIOUS} - {*SLOWER}))
def test_no_overestimation(name, seed):
    module = importlib.import_module(f"algorithms.{name}")
    action, q = after_overestimation(module, seed, **CAUTIOUS[name])
    assert action < 0.4 and q < 1.5, (action, q)


# --- Stitching ----------------------------------------------------------------------------------
def success(module, seed, data=None, **overrides):
    """Share of 50 closed-loop walks from the bad kind's start that come within 0.2 of (1, 1)."""
    settings = {"discount": 0.9, "target_rate": 0.02} | overrides
    data = probes.crossing() if data is None else data
    state = probes.train(module, data, 4000, seed, **settings)
    policy = probes.policy(module, state, **settings)
    position = probes.starts(np.random.default_rng(seed), 50)
    there = np.zeros(50, bool)
    for _ in range(30):
        position = probes.move(position, np.asarray(policy(position.astype(np.float32))))
        there |= np.linalg.norm(position - 1, axis=-1) < 0.2
    return there.mean()


def test_no_walk_of_the_data_shows_the_way():
    data = probes.crossing()
    ends = np.flatnonzero(data.termination + data.truncation)
    first = data.observation[np.append(0, ends[:-1] + 1)]
    assert len(ends) == 100 and data.termination.sum() == data.reward.sum() == 50
    assert ((first[:, 1] < 0) == (data.reward[ends] == 0)).all()
    inside = np.setdiff1d(np.arange(len(data.reward)), ends)
    assert np.array_equal(data.next_observation[inside], data.observation[inside + 1])
    assert np.array_equal(data.next_action[inside], data.action[inside + 1])
    assert np.array_equal(data.next_action[ends], data.action[ends])


def test_cloning_does_not_stitch():
    # A thousandfold penalty leaves behaviour cloning, whose average of both kinds leads nowhere.
    assert success(rebrac, 0, actor_penalty=1e3, critic_penalty=0.0) <= 0.5
    assert success(bc, 0) <= 0.5


def test_the_best_tenth_has_no_row_near_the_bad_kinds_way():
    """The best tenth are walks of the other kind: no row of theirs is near the bad kind's way.

    (In this plane their straight ways extrapolate well: the clone arrives, without having learned
    it. That is the plane's kindness, so it is no part of the test.)
    """
    data = probes.crossing()
    ends = np.flatnonzero(data.termination + data.truncation) + 1
    returns = np.add.reduceat(data.reward, np.append(0, ends[:-1]))
    whole = datasets.Dataset("crossing", data, ends, returns)
    best = datasets.filter_by_return(whole, 0.1)
    assert len(best.episode_ends) == 10 and (best.episode_returns == 1).all()
    x, y = best.transitions.observation.T
    assert not ((x < -0.3) & (y < -0.3)).any()
    assert ((data.observation < -0.3).all(axis=1)).mean() > 0.1


@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", runs.slow_but(STITCHING, {*STITCHING} - {*SLOWER}))
def test_stitching(name, seed):
    module = importlib.import_module(f"algorithms.{name}")
    data = probes.crossing()
    if name == "cql":  # its reward_scale: next to rewards of 0 and 1 the entropy term is large
        data = data._replace(reward=10 * data.reward)
    assert success(module, seed, data, **STITCHING[name]) >= 0.95
