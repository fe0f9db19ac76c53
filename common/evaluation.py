# SPDX-License-Identifier: Apache-2.0
"""Rollouts of all seeds' policies together, scored by the data set's reference scores.

S seeds x E episodes run at the same time, one complete episode per environment (never "the first E
to finish", which favours short episodes). There is one batched policy call per step, and
environments whose episode is over are no longer stepped. Episode i of every seed is reset with
`EVAL_SEED + i`, so all seeds and all evaluations have the same starts. Where so many environments
would take more than half of the free memory (OGBench's scenes are large), fewer of them play the
episodes in several rounds. That changes no number, unless an environment draws from NumPy's global
generator while it steps.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import psutil

from common import envs

EVAL_SEED = 10_000
FIRST_PHASES = ("clone_updates", "model_updates", "q_updates")  # Config fields


class _Played:
    """What became of the S E episodes so far."""

    def __init__(self, count):
        self.returns, self.length = np.zeros(count), np.zeros(count)
        self.success = np.zeros(count, bool)
        self.reports_success = False

    def add(self, i, reward, info):
        """A step of episode i."""
        self.returns[i] += reward
        self.length[i] += 1
        success = envs.success(info)
        if success is not None:
            self.reports_success = True
            self.success[i] |= success


class Rollouts:
    """Evaluates `act` in `dataset.make_env()`. Without an env every evaluation is None.

    Args:
        dataset: it has the env and the score.
        act: (params, observation [E, O], key) -> action [E, A] in [-1, 1] (or integers [E]);
            with a memory (..., memory, reward [E] of the step before) -> (action, memory).
        policy_keys: [S]; the key of a step depends on (seed, update, env step) alone.
        cfg: read are `eval_episodes`, `eval_every`, `num_updates` and `online_updates`.
        memory: arrays with which the policy of one seed begins its E episodes, None if it has none.
        first_start: the seed of the first episode's reset; the next one has the next number.
    """

    def __init__(self, dataset, act, policy_keys, cfg, memory=None, first_start=EVAL_SEED):
        self.dataset, self.cfg, self.first_start = dataset, cfg, first_start
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.keys = jax.device_put(policy_keys, self.cpu)
        # On an accelerator a thread rolls out while the device trains. Where the CPU is the
        # device, a policy call would wait for the whole chunk, so the rollouts come first.
        self.beside = jax.default_backend() != "cpu"
        self.pool = ThreadPoolExecutor(1)
        self.envs, self.asked = [], False  # asked: whether they were to be made
        self.preparing = 0.0  # seconds it took to make them
        self.said_not_finite = False
        self.memory = jax.tree.map(lambda x: np.stack([x] * len(policy_keys)), memory)

        def step(params, observation, keys, update, env_step, past):
            def one_seed(arguments):
                params, observation, key, past = arguments
                return act(params, observation, jax.random.fold_in(key, env_step), *past)

            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, update)
            # One seed after the other, so that their number changes no result.
            return jax.lax.map(one_seed, (params, observation, keys, past))

        self.act = jax.jit(step)

    def __enter__(self):
        return self

    def _make_envs(self):
        """Make the environments at the first evaluation: a finished run needs none."""
        self.asked = True
        if jax.process_index() > 0:  # the first process evaluates
            return
        if self.dataset.make_env is None:
            print("no env to evaluate in: training only, scores stay empty (set --env)")
            return
        began = time.perf_counter()
        count = len(self.keys) * self.cfg.eval_episodes
        make_env = self.dataset.make_env
        self.envs = [make_env()]  # the first one imports packages, so the second one is measured
        held, free = bytes_held_and_free()
        self.envs += [make_env() for _ in range(1, min(count, 2))]
        size = max(bytes_held_and_free()[0] - held, 1)
        self.envs += [make_env() for _ in range(2, min(count, free // 2 // size))]
        print(self._estimate())
        self.preparing = time.perf_counter() - began

    def __exit__(self, *error):
        self.pool.shutdown(wait=True, cancel_futures=True)
        for env in self.envs:
            envs.close(env)

    def start(self, params, update):
        """A future of `run`'s result; an accelerator trains the next chunk meanwhile."""
        if not self.asked:
            self._make_envs()
        if not self.envs:
            return None
        params = jax.device_put(params, self.cpu)  # a copy: the next chunk reuses its memory
        if self.beside:
            return self.pool.submit(self.run, params, update)
        future = Future()
        future.set_result(self.run(params, update))
        return future

    def run(self, params, update):
        """Play all episodes. Returns score, return, success and length, [S] each, and seconds.

        `score` is normalised (0 to 100), `return` is undiscounted, `success` is the share of
        episodes with a successful step (None where the env does not report success), `length` is in
        steps, `seconds` is the time taken, and `preparing` that of making the environments, at the
        first evaluation. A seed whose env gave rewards that are no finite numbers has NaN as return
        and score. `episode_scores` has the score of every episode, [S, E].
        """
        if not self.asked:
            self._make_envs()
        began = time.perf_counter()
        preparing, self.preparing = self.preparing, 0.0
        shape = (len(self.keys), self.cfg.eval_episodes)
        count, together = len(self.keys) * self.cfg.eval_episodes, len(self.envs)
        played = _Played(count)
        for first in range(0, count, together):
            episodes = np.arange(first, min(first + together, count))
            self._play(episodes, params, update, played)
        by_episode, successes = played.returns.reshape(shape), played.success.reshape(shape)
        returns = by_episode.mean(axis=1)
        returns[~np.isfinite(returns)] = np.nan
        success = successes.mean(axis=1) if played.reports_success else None
        each = self.dataset.score(by_episode, successes if played.reports_success else None)
        return {
            "score": self.dataset.score(returns, success),
            "episode_scores": each,
            "return": returns,
            "success": success,
            "length": played.length.reshape(shape).mean(axis=1),
            "seconds": time.perf_counter() - began,
            "preparing": preparing,
        }

    def _play(self, episodes, params, update, played):
        """Play these of the S E episodes to their end, one in each environment.

        The policy is called for all S E episodes, so that it is compiled once. The others' rows are
        not used.
        """
        shape = (len(self.keys), self.cfg.eval_episodes)
        first = [self._reset(i) for i in episodes.tolist()]
        for i, given in zip(episodes, first, strict=True):
            env = self.envs[i % len(self.envs)]
            envs.check_shape(env, given, first[0])
            if not self._check(env, given, "observation"):
                played.returns[i] = np.nan
        first = np.stack(first)
        observation = np.zeros((len(played.returns), *first.shape[1:]), first.dtype)
        observation[episodes] = first
        rewards, past, env_step = np.zeros(shape, np.float32), self.memory, 0
        live = episodes
        while len(live):
            by_seed = observation.reshape(*shape, *observation.shape[1:])
            known = () if past is None else (past, rewards)
            step = np.uint32(update), np.uint32(env_step)
            action = self.act(params, by_seed, self.keys, *step, known)
            if past is not None:
                action, past = action
            action = np.asarray(action)
            action = action.reshape(len(observation), *action.shape[2:])
            if action.dtype.kind == "f":  # a diverged policy must not stop the others
                action = np.nan_to_num(action.clip(-1, 1))
            over = np.zeros(len(observation), bool)
            for i in live:
                env = self.envs[i % len(self.envs)]
                given, reward, termination, truncation, info = envs.step(env, action[i])
                over[i] = termination or truncation
                envs.check_shape(env, given, first[0])
                if not (self._check(env, reward) and self._check(env, given, "observation")):
                    played.returns[i] = np.nan
                observation[i] = given
                rewards.flat[i] = reward
                played.add(i, reward, info)
            live = live[~over[live]]
            env_step += 1

    def _reset(self, i):
        seed = self.first_start + i % self.cfg.eval_episodes
        return envs.reset(self.envs[i % len(self.envs)], seed)

    def _check(self, env, numbers, what="reward"):
        """Whether a step's numbers are finite. Say once that a seed has no score otherwise."""
        if envs.is_finite(numbers):
            return True
        if not self.said_not_finite:
            self.said_not_finite = True
            bad = np.ravel(numbers)[~np.isfinite(np.ravel(numbers))][0]
            has = f"is {bad}" if what == "reward" else f"has {bad} in it"
            name = envs.name(env)
            print(f"env {name}: a step's {what} {has}; seeds that meet it get no score")
        return False

    def _estimate(self):
        """An upper bound on the time of all evaluations, from the speed of a few steps."""
        env, cfg = self.envs[0], self.cfg
        self._reset(0)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < 0.2:
            _, reward, termination, truncation, _ = envs.step(env, env.action_space.sample())
            self._check(env, reward)
            steps += 1
            if termination or truncation:
                self._reset(0)
        speed = steps / (time.perf_counter() - began)
        horizon = self.dataset.horizon or 1000
        updates = cfg.num_updates + getattr(cfg, "online_updates", 0)
        # None in a first phase, which trains no actor.
        updates -= sum(getattr(cfg, name, 0) for name in FIRST_PHASES)
        evaluations = 1 + -(-updates // cfg.eval_every)
        count = len(self.keys) * cfg.eval_episodes
        seconds = count * horizon * evaluations / speed
        fit = f", {len(self.envs)} at a time for memory" if len(self.envs) < count else ""
        return (
            f"evaluation: {evaluations} times {cfg.eval_episodes} episodes per seed of at most "
            f"{horizon} steps, {speed:,.0f} steps/s: at most {seconds / 60:.1f} min in all{fit}"
        )


def bytes_held_and_free():
    """Memory that this process has and that is free on the machine (a container may allow less)."""
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available
