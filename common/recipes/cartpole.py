# SPDX-License-Identifier: Apache-2.0
"""`local/cartpole/mixed-v0`: CartPole-v1 with integer actions, recorded on this machine.

A linear controller that could balance the pole for ever is disturbed: 40, 60, 80 or 100 % of its
actions are drawn at random, in turn from episode to episode. No level keeps the pole up to the end
of every episode and the last one is the random policy, so a policy can do far better than the data.
An episode ends where the pole or the cart leaves its limits, or after 500 steps.

Importing this module needs NumPy only.
"""

import itertools

import numpy as np

from common.recipes import minari_store

ID = "local/cartpole/mixed-v0"
ENV_ID = "CartPole-v1"
EPISODES, STEPS = 852, 99_979  # of the whole data set
NOISE = (0.4, 0.6, 0.8, 1.0)  # share of random actions
GAIN = np.array([0.05, 0.2, 1.0, 0.5])  # of position, speed, angle and angular speed

# Mean returns measured over 1000 episodes (seeds 0 to 999, gymnasium 1.4.0) by
# python -c "from common.recipes import cartpole; print(cartpole.reference_returns())"
# The mean return of the data set: 117.35.
RANDOM_RETURN = 22.68  # score 0
CONTROLLER_RETURN = 500.0  # without noise: score 100


def _play(env, generator, noise, seed=None):
    """One episode: observation [T + 1, 4], action, reward, termination, truncation [T] each."""
    observations, rows = [env.reset(seed=seed)[0]], []
    while not rows or not (rows[-1][2] or rows[-1][3]):
        action = int(GAIN @ observations[-1] > 0)
        if generator.random() < noise:
            action = int(generator.integers(2))
        observation, *rest = env.step(action)
        observations.append(observation)
        rows.append((action, *rest[:3]))
    return np.stack(observations), *map(np.array, zip(*rows, strict=True))


def reference_returns(episodes: int = 1000) -> tuple[float, float]:
    """Mean returns of random actions and of the controller without noise, seeds 0, 1, ..."""
    import gymnasium

    env, returns = gymnasium.make(ENV_ID), np.zeros(2)
    for seed, controlled in itertools.product(range(episodes), (0, 1)):
        generator = np.random.default_rng(seed)
        returns[controlled] += _play(env, generator, 1 - controlled, seed)[2].sum()
    return tuple((returns / episodes).round(2).tolist())


def make(dataset_id: str, episodes: int) -> None:
    """Record that many episodes and store them as a Minari data set."""
    minari_store.store(
        dataset_id=dataset_id,
        env_id=ENV_ID,
        reference=(RANDOM_RETURN, CONTROLLER_RETURN),
        algorithm="linear controller, 40 to 100 % of its actions drawn at random",
        description="CartPole-v1 played at four levels of noise, the last one random.",
        episodes=_episodes(episodes),
        steps=round(episodes / EPISODES * STEPS),
    )


def _episodes(count):
    """The first `count` episodes of one endless recording."""
    import gymnasium
    from tqdm import tqdm

    env, generator = gymnasium.make(ENV_ID), np.random.default_rng(0)
    env.reset(seed=0)
    for i in tqdm(range(count), "cartpole", disable=None, unit=" episodes", leave=False):
        yield _play(env, generator, NOISE[i % len(NOISE)])
