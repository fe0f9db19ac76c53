# SPDX-License-Identifier: Apache-2.0
"""Rollouts of all seeds' policies at once, scored by the data set's reference pair.

S seeds x E episodes run side by side, one complete episode per environment (never "the first E to
finish", which favours short ones). All of a seed's environments share one batched policy call per
step; finished ones are no longer stepped. Episode (s, i) is reset with `EVAL_SEED + i` for
every s, so all seeds and all evaluations meet the same starts. Where so many environments would
take more than half of the free memory (OGBench's scenes are large), fewer of them take the
episodes in turns, which changes no number unless a step draws from NumPy's global generator.
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
import psutil

EVAL_SEED = 10_000


class Rollouts:
    """Evaluation of `act` in `dataset.make_env()`; without an env every evaluation is None.

    Args:
        dataset: supplies the env and the score.
        act: (params, observation [E, O], key) -> action [E, A] in [-1, 1] (or integers [E]);
            with a memory (..., memory, reward [E] of the step before) -> (action, memory).
        policy_keys: [S] keys; a step's key is a function of (seed, update, env step) alone.
        cfg: `eval_episodes`, `eval_every` and `num_updates` are read.
        memory: arrays with which the policy of one seed begins its E episodes, None without any.
    """

    def __init__(self, dataset, act, policy_keys, cfg, memory=None):
        self.dataset, self.cfg = dataset, cfg
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.keys = jax.device_put(policy_keys, self.cpu)
        # On an accelerator a thread rolls out while the device trains. Where the CPU is the
        # device, a policy call would queue behind the chunk: roll out at once.
        self.beside = jax.default_backend() != "cpu"
        self.pool = ThreadPoolExecutor(1)
        self.envs = []

        self.memory = jax.tree.map(lambda x: np.stack([x] * len(policy_keys)), memory)

        def step(params, observation, keys, update, env_step, past):
            def one(lane):
                params, observation, key, past = lane
                return act(params, observation, jax.random.fold_in(key, env_step), *past)

            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, update)
            # One seed after the other: the same numbers for any number of seeds.
            return jax.lax.map(one, (params, observation, keys, past))

        self.act = jax.jit(step)

    def __enter__(self):
        if jax.process_index() > 0:  # the first process evaluates
            return self
        if self.dataset.make_env is None:
            print("no env to evaluate in: training only, scores stay empty (set --env)")
            return self
        count = len(self.keys) * self.cfg.eval_episodes
        make_env = self.dataset.make_env
        self.envs = [make_env()]  # imports what it needs, too
        held, free = memory()
        self.envs += [make_env() for _ in range(1, min(count, 2))]
        size = max(memory()[0] - held, 1)
        self.envs += [make_env() for _ in range(2, min(count, free // 2 // size))]
        print(self._estimate())
        return self

    def __exit__(self, *error):
        self.pool.shutdown(wait=True, cancel_futures=True)
        for env in self.envs:
            env.close()

    def start(self, params, update):
        """A future of `run`'s result, computed beside the next chunk where there is a device."""
        if not self.envs:
            return None
        params = jax.device_put(params, self.cpu)  # a copy: the state is donated to the next chunk
        if self.beside:
            return self.pool.submit(self.run, params, update)
        future = Future()
        future.set_result(self.run(params, update))
        return future

    def run(self, params, update):
        """Roll out one episode per environment. Returns [S] each: score, return, success, length.

        `score` is the normalised one (0 to 100), `return` undiscounted, `success` the share of
        episodes that ever report it (None where the env reports none), `length` in steps;
        `seconds` is the time taken.
        """
        began = time.perf_counter()
        shape = (len(self.keys), self.cfg.eval_episodes)
        count, together = len(self.keys) * self.cfg.eval_episodes, len(self.envs)
        returns, length, success = np.zeros(count), np.zeros(count), {}
        observation = None
        for first in range(0, count, together):
            live = np.arange(first, min(first + together, count))
            fresh = np.stack([self._reset(i) for i in live.tolist()])
            if observation is None:  # [S E, O]; lanes of other turns hold what nobody reads
                observation = np.zeros((count, *fresh.shape[1:]), fresh.dtype)
            observation[live] = fresh
            rewards, past, env_step = np.zeros(shape, np.float32), self.memory, 0
            while len(live):
                lanes = observation.reshape(*shape, *observation.shape[1:])
                numbers = np.uint32(update), np.uint32(env_step)
                known = () if past is None else (past, rewards)
                action = self.act(params, lanes, self.keys, *numbers, known)
                if past is not None:
                    action, past = action
                action = np.asarray(action)
                action = action.reshape(count, *action.shape[2:])
                if action.dtype.kind == "f":  # a diverged policy must not stop the others
                    action = np.nan_to_num(action.clip(-1, 1))
                over = np.zeros(count, bool)
                for i in live:
                    env = self.envs[i % together]
                    observation[i], reward, termination, truncation, info = env.step(action[i])
                    returns[i] += reward
                    rewards.flat[i] = reward
                    length[i] += 1
                    if "success" in info:
                        success[i] = success.get(i, False) or bool(info["success"])
                    over[i] = termination or truncation
                live = live[~over[live]]
                env_step += 1
        returns = returns.reshape(shape).mean(axis=1)
        rate = None
        if success:
            rate = np.array([success.get(i, False) for i in range(count)])
            rate = rate.reshape(shape).mean(axis=1)
        return {
            "score": self.dataset.score(returns, rate),
            "return": returns,
            "success": rate,
            "length": length.reshape(shape).mean(axis=1),
            "seconds": time.perf_counter() - began,
        }

    def _reset(self, i):
        seed = EVAL_SEED + i % self.cfg.eval_episodes
        np.random.seed(seed)  # noqa: NPY002 - ogbench envs draw from NumPy's global generator
        observation, _ = self.envs[i % len(self.envs)].reset(seed=seed)
        return observation

    def _estimate(self):
        """How long the evaluations will take at most, from the speed of a few steps."""
        env, cfg = self.envs[0], self.cfg
        self._reset(0)
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < 0.2:
            _, _, termination, truncation, _ = env.step(env.action_space.sample())
            steps += 1
            if termination or truncation:
                self._reset(0)
        speed = steps / (time.perf_counter() - began)
        horizon = self.dataset.horizon or 1000
        evaluations = 1 + -(-cfg.num_updates // cfg.eval_every)
        count = len(self.keys) * cfg.eval_episodes
        seconds = count * horizon * evaluations / speed
        fit = f", {len(self.envs)} at a time for memory" if len(self.envs) < count else ""
        return (
            f"evaluation: {evaluations} times {cfg.eval_episodes} episodes per seed of at most "
            f"{horizon} steps, {speed:,.0f} steps/s: at most {seconds / 60:.1f} min in all{fit}"
        )


def memory():
    """Bytes this process holds, and those free on the machine (a container may allow less)."""
    return psutil.Process().memory_info().rss, psutil.virtual_memory().available
