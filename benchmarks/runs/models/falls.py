# SPDX-License-Identifier: Apache-2.0
"""Does a learned model predict that a policy falls?

    python benchmarks/runs/models/falls.py mopo RUN morel RUN

Twenty episodes begin in start states of the env. The run's policy, without noise, is followed for
300 steps at most in the simulator, and in the model from the same states. There each step is drawn
as in training. Printed are the mean lengths, the policy's mean return in the simulator, the
critics' mean value on 2,000 rows of the data, and how many steps end in a generation of 5,000
rollouts of 5 steps by the sampled policy.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from common import envs, experiment

EPISODES, STEPS = 20, 300


def in_simulator(env, act):
    """The start states, the mean length and the mean return of the episodes."""
    starts, lengths, returns = [], [], []
    for i in range(EPISODES):
        observation, _ = env.reset(seed=1000 + i)
        starts.append(observation)
        rewards = []
        while len(rewards) < STEPS:
            observation, reward, ended, *_ = env.step(np.asarray(act(np.float32(observation))))
            rewards.append(reward)
            if ended:
                break
        lengths.append(len(rewards))
        returns.append(sum(rewards))
    return np.float32(starts), np.mean(lengths), np.mean(returns)


def in_model(module, cfg, state, choose, observation, steps):
    """[steps, R] whether a rollout is alive before each step, and whether it ends there."""

    def one_step(carry, key):
        observation, alive = carry
        key_action, key_member, key_noise = jax.random.split(key, 3)
        action = choose(observation, key_action)
        mean, std = module.ensemble(state, observation, action)
        after, _ = module.sample_elite(state, observation, mean, std, key_member, key_noise, cfg)
        ends = alive & (module.ends(state, after) > 0)
        goes_on = alive & ~ends
        return (jnp.where(goes_on[:, None], after, observation), goes_on), (alive, ends)

    first = (observation, jnp.ones(len(observation), bool))
    return jax.lax.scan(one_step, first, jax.random.split(jax.random.key(0), steps))[1]


def look(name, folder):
    module = importlib.import_module(f"algorithms.{name}")
    cfg, dataset, state = experiment.load(module, folder)
    state = jax.tree.map(lambda x: x[0], state)
    data, env = dataset.transitions, dataset.make_env()
    low, high = envs.healthy_range(dataset.make_env, data)
    state = state._replace(healthy=(jnp.asarray(low), jnp.asarray(high)))
    act = jax.jit(lambda x: module.policy_fn(state, cfg)(module.policy_params(state), x, None))

    def sampled(observation, key):
        noise = jax.random.normal(key, (len(observation), data.action.shape[1]))
        return module.sample_policy(state.actor, observation, noise)[0]

    starts, length, returns = in_simulator(env, act)
    follow = jax.jit(
        lambda x: in_model(module, cfg, state, lambda observation, _: act(observation), x, STEPS)
    )
    alive, _ = follow(starts)
    rows = np.random.default_rng(0).choice(len(data.reward), 7000, replace=False)
    some = data.observation[rows[:2000]]
    value = state.critic.apply_fn(state.critic.params, some, act(some)).min(axis=0).mean()
    generation = jax.jit(lambda x: in_model(module, cfg, state, sampled, x, 5))
    steps, ends = generation(data.observation[rows[2000:]])
    print(
        f"{name} {folder}: {length:.0f} steps in the simulator, {alive.sum(axis=0).mean():.0f} in "
        f"the model, return {returns:.0f}, value on the data {value:.0f}, {ends.sum()} of "
        f"{steps.sum():,} steps end in a generation",
        flush=True,
    )


for algorithm, run in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    look(algorithm, run)
