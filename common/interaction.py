# SPDX-License-Identifier: Apache-2.0
"""The online phase of a run: envs are stepped, the policy is trained on what they give, in turns.

Every seed has an env of its own. It takes `steps_per_refresh` steps with the policy as it is, then
come `updates_per_step` updates for each of them, or `updates_per_refresh` in all, and so on. The
new rows go behind those of the data set, see experiment/buffers.py. Time limits are truncations. No
number depends on the other seeds: the episodes of a seed begin with `reset(seed=...)`, a number
made of seed and episode.

The rows are kept in the run folder, in `online.rows`: float32, a row per env step and seed. A
checkpoint tells how many of them count. When a run is resumed, an episode that was under way is
played again, by its recorded actions, up to where it was. The env is then as it was, whatever it
consists of, and each row tells whether that is so. Where it is not, the env cannot repeat an
episode. A line says so and the seed's next episode begins.

The regret of the phase is 1 - the mean normalised score of its episodes / 100. Their actions are
those that exploration took. Where the score is a success rate, as on AntMaze, that is CORL's.
"""

import dataclasses
import os
import time
import zlib
from functools import partial
from pathlib import Path

import jax
import numpy as np

from common import envs, experiment, fail, files
from common.datasets import Transitions, checks
from common.experiment import buffers, phases

FILE = "online.rows"
COLUMNS = ("observation", "action", "reward", "next_observation", "termination", "truncation")


def columns(example):
    """({name: place in a row of the file}, numbers per row), by the shapes of Transitions."""
    places, end = {}, 0
    for name in COLUMNS:
        size = int(np.prod(getattr(example, name).shape[1:]))
        places[name] = slice(end, end + size)
        end += size
    return places, end


def recorded(folder, example, seeds, steps):
    """{name: [steps, seeds, ...]}: the first rows of the online phase of a run."""
    places, width = columns(example)
    rows = np.fromfile(Path(folder) / FILE, np.float32, steps * seeds * width)
    rows = rows.reshape(steps, seeds, width)
    return {name: rows[..., place] for name, place in places.items()}


class Interaction:
    """Used as in every `train` that has an online phase; without one it does nothing.

    Args:
        run: the Run. It saves where the envs are, and restores it.
        data: the rows of the data set as the updates take them, on the device.
        act: (params, observation [1, O], key) -> action [1, A] in [-1, 1], exploration included;
            with a memory (..., memory, reward [1] of the step before) -> (action, memory).
        keys: [S] random keys; that of a step depends on the seed and the step alone.
        policy_params: State -> the `params` of `act`.
        train_chunk: that of the algorithm's file, or what takes its place in this phase.
        transform: of the env's rows, Transitions [T, S, ...], to rows like those of `data`.
        apart: `train_chunk` gets the rows of the data set and the new ones as two trees, `Apart`.
        window: how many rows `transform` needs for one of its own, the row itself and those that
            follow. It gets them all, and a row is drawn once those that follow are there.
        look_ahead: how many rows that follow may change what `transform` makes of a row. It is
            drawn before they are there, and written anew when they come. One changes at least the
            next action.
        memory: arrays with which the policy begins an episode, None if it has none.
        episodes: `transform` gets the rows of an episode once more, all of them, when it has ended,
            and the buffer has what it makes of them then.
        replay: (number, [row of `data` after each of its episodes]): only whole episodes are drawn
            from, the newest so many of them. Those of `data` are the oldest, in their order.
            `transform` gets the rows of an episode once it has ended, and rows of others with it.
            It may be wrong about an episode of which it does not get the first row.
    """

    METRICS = ("online_return",)  # columns of metrics.csv

    def __init__(
        self,
        run,
        data,
        act,
        keys,
        policy_params,
        train_chunk,
        transform=None,
        apart=False,
        window=1,
        memory=None,
        episodes=False,
        look_ahead=1,
        replay=None,
    ):
        self.cfg, self.dataset, self.data = run.cfg, run.dataset, data
        self.file = run.folder / FILE
        self.policy_params, self.transform = policy_params, transform or (lambda rows: rows)
        self.apart, self.window, self.episodes_again = apart, window, episodes
        self.look_ahead = look_ahead
        self.newest_episodes = replay
        self.first_memory = jax.tree.map(np.array, memory)
        self.memory = jax.tree.map(lambda x: np.stack([x] * len(keys)), self.first_memory)
        self.steps = phases.env_steps(self.cfg)  # of every seed, over the whole run
        self.count = 0  # env steps so far
        self.written, self.digest = 0, 0  # rows in the file, and their CRC
        self.seconds = 0.0  # spent on acting and on env steps
        self.envs, self.buffer = [], None
        if not self.steps:
            return
        if apart and not len(self.dataset.transitions.reward):
            given = f"--dataset {self.cfg.dataset}: an env without rows"
            env = self.cfg.dataset.removeprefix("env/")
            what = "a part of every batch comes from a data set"
            fail(f"{given}, and {what}; name one, with --env {env} to act in that env")
        run.attach(self)
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.keys = jax.device_put(keys, self.cpu)
        refresh = phases.updates_per_refresh(self.cfg)
        chunk = partial(train_chunk, cfg=dataclasses.replace(self.cfg, log_every=refresh))
        self.train = experiment.over_seeds(chunk)

        def act_all(params, observation, keys, env_step, memory, reward):
            def one_seed(arguments):
                params, observation, key, past, reward = arguments
                key = jax.random.fold_in(key, env_step)
                if past is None:
                    return act(params, observation[None], key)[0], None
                action, past = act(params, observation[None], key, past, reward)
                return action[0], past

            # One seed after the other, so that their number changes no result.
            return jax.lax.map(one_seed, (params, observation, keys, memory, reward))

        self.act = jax.jit(act_all)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for env in self.envs:
            envs.close(env)

    # --- Env steps and updates ------------------------------------------------------------------
    def chunk(self, state, keys, start):
        """The `log_every` updates from update `start` on. Returns the State and mean metrics."""
        cfg, means = self.cfg, []
        if not self.envs:
            self._begin()
        self.finished = [[] for _ in cfg.seeds]
        if self.count == 0 and hasattr(cfg, "random_steps"):
            self._collect(None, cfg.random_steps)
        if self.count == 0 and hasattr(cfg, "warm_up_steps"):
            self._collect(jax.block_until_ready(self.policy_params(state)), cfg.warm_up_steps)
        refresh = phases.updates_per_refresh(cfg)
        for update in range(start, start + cfg.log_every, refresh):
            params = jax.block_until_ready(self.policy_params(state))  # so that times are true
            self._collect(params, cfg.steps_per_refresh)
            state, metrics = self.train(state, keys, np.int32(update), self.buffer)
            means.append(metrics)
        means = jax.device_get(means)
        return state, {name: np.mean([x[name] for x in means], axis=0) for name in means[0]}

    def _collect(self, params, steps):
        """Step every env `steps` times, at random without `params`, and add the rows."""
        if not steps:
            return
        began, first, over = time.perf_counter(), self.count, list(self.over)
        if params is not None and jax.default_backend() != "cpu":
            params = jax.device_put(params, self.cpu)
        for _ in range(steps):
            action = self._random() if params is None else self._policy(params)
            for i in range(len(self.envs)):
                self._step(i, action[i])
            self.count += 1
        # Once more the rows before that the new ones change, at least the next action of the last.
        back = max(self.window - 1, self.look_ahead)
        if (self.episodes_again or self.newest_episodes) and self.over != over:
            back = max(back, self.dataset.horizon or first)  # always so many: one program serves
        if not self.newest_episodes:
            self._write(max(first - back, 0))
        elif self.over != over:
            self._write_episodes(max(first - back, 0))
        self.seconds += time.perf_counter() - began

    def _write(self, first):
        """Put the rows from `first` on into the buffer. The last ones may not be drawn yet."""
        rows = self.transform(self._transitions(first))
        self.buffer = buffers.write(self.buffer, rows, first)
        ready = max(self.count - (self.window - 1), 0)
        self.buffer = self.buffer.replace(filled=np.int32(ready))

    def _write_episodes(self, first):
        """Put the episodes that are whole among the rows from `first` on into the buffer."""
        rows = self.transform(self._transitions(first))
        over = self._ends()  # [count, S]
        # The first rows may be the end of an episode that is in the buffer already.
        skip = np.zeros(len(self.envs), int)
        if first:
            first_ends = over[first:].argmax(axis=0) + 1
            skip = np.where(over[first - 1], 0, first_ends)
        self.buffer = buffers.write(self.buffer, rows, first, skip)
        self.buffer = self.buffer.replace(spans=self._spans(over))

    def _ends(self):
        """Whether an episode ended with a row, [count, S]."""
        rows = self.rows[: self.count]
        termination = rows[..., self.columns["termination"]]
        truncation = rows[..., self.columns["truncation"]]
        return (termination + truncation)[..., 0] > 0

    def _spans(self, over):
        """The first row of the newest episodes and the row after them, [S, 2]."""
        number, recorded = self.newest_episodes
        spans = []
        for i in range(len(self.envs)):
            own = self.buffer.recorded + np.flatnonzero(over[:, i]) + 1
            ends = np.concatenate([[0], recorded, own])  # row 0: where the first episode begins
            spans.append([ends[max(len(ends) - 1 - number, 0)], ends[-1]])
        return np.array(spans, np.int32)

    def _policy(self, params):
        step = np.uint32(self.count)
        reward = np.zeros((len(self.envs), 1), np.float32)  # none before an episode's first step
        for i, length in enumerate(self.lengths):
            if length:
                reward[i] = self.rows[self.count - 1, i, self.columns["reward"]]
        action, memory = self.act(params, self.observation, self.keys, step, self.memory, reward)
        self.memory = jax.tree.map(np.array, memory)  # copied, so that `_reset` can write
        return np.nan_to_num(np.asarray(action).clip(-1, 1))  # of a seed that diverged

    def _random(self):
        """Actions [S, A], uniform in [-1, 1]."""
        size = self.columns["action"].stop - self.columns["action"].start
        draws = [np.random.default_rng((seed, self.count)) for seed in self.cfg.seeds]
        return np.stack([draw.uniform(-1, 1, size).astype(np.float32) for draw in draws])

    def _step(self, i, action):
        """One step of the env of seed i, and the first observation of the next episode."""
        next_observation, reward, termination, truncation = self._env_step(i, action)
        late = self.dataset.horizon is not None and self.lengths[i] >= self.dataset.horizon
        truncation = (truncation or late) and not termination
        row = self.rows[self.count, i]
        values = self.observation[i], action, reward, next_observation, termination, truncation
        for name, value in zip(COLUMNS, values, strict=True):
            row[self.columns[name]] = value
        self.observation[i] = next_observation
        if termination or truncation:
            self.finished[i].append(self.returns[i])
            self.over[i] += 1
            self.sum_of_returns[i] += self.returns[i]
            self.successes[i] += self.success[i]
            self._reset(i, self.episodes[i] + 1)

    def _env_step(self, i, action):
        """(next observation, reward, termination, truncation) of a step in the env of seed i."""
        env = self.envs[i]
        observation, reward, termination, truncation, info = envs.step(env, action)
        envs.check_shape(env, observation, self.observation[i])
        self._check(i, reward, "a step's reward is")
        self._check(i, observation, "a step's observation contains")
        self.lengths[i] += 1
        self.returns[i] += reward
        success = envs.success(info)
        if success is not None:
            self.reports_success = True
            self.success[i] |= success
        return observation, reward, termination, truncation

    def _check(self, i, numbers, what):
        """One line and exit code 2 where the env of seed i gave a number that cannot be used."""
        if checks.are_usable(numbers):
            return
        numbers = np.ravel(numbers)
        bad = numbers[~(np.abs(numbers) <= checks.LARGEST)][0]
        where = f"at env step {self.count + 1} of seed {self.cfg.seeds[i]}"
        why = f"beyond {checks.LARGEST:g}, and float32 cannot hold its square; scale it down"
        why = why if np.isfinite(bad) else "from which nothing is learnt"
        fail(f"env {envs.name(self.envs[i])}: {what} {bad} {where}, {why}")

    def _reset(self, i, episode):
        """Begin that episode of seed i."""
        numbers = np.random.SeedSequence((self.cfg.seeds[i], episode))
        observation = envs.reset(self.envs[i], int(numbers.generate_state(1)[0]))
        envs.check_shape(self.envs[i], observation, self.observation[i])
        self._check(i, observation, "the observation of a reset contains")
        self.observation[i] = observation
        self.episodes[i], self.lengths[i], self.returns[i] = episode, 0, 0.0
        self.success[i] = False
        self._remember(i, self.first_memory)

    def _remember(self, i, memory):
        """Give the policy of seed i that memory."""
        for x, of_seed in zip(jax.tree.leaves(self.memory), jax.tree.leaves(memory), strict=True):
            x[i] = of_seed

    def _transitions(self, first):
        """The rows from `first` on, Transitions [T, S, ...]. A next action may yet be unknown."""
        rows = self.rows[first : self.count]
        column = {name: rows[..., place] for name, place in self.columns.items()}
        for name in ("reward", "termination", "truncation"):
            column[name] = column[name][..., 0]
        action = column["action"]
        next_action = np.concatenate([action[1:], action[-1:]])
        ended = column["termination"] + column["truncation"] > 0
        next_action = np.where(ended[..., None], action, next_action)
        return Transitions(**column, next_action=next_action)

    # --- Beginning and resuming -----------------------------------------------------------------
    def _begin(self):
        """Make the envs and the buffer, and begin the first episodes."""
        seeds = self.cfg.seeds
        self.envs = [self.dataset.make_env() for _ in seeds]
        self.columns, width = columns(self.dataset.transitions)
        self.rows = np.zeros((self.steps, len(seeds), width), np.float32)
        self.observation = self.rows[0, :, self.columns["observation"]].copy()
        self.buffer = buffers.empty(self.data, len(seeds), self.steps, self.apart)
        self.episodes, self.lengths = [0] * len(seeds), [0] * len(seeds)
        self.success, self.reports_success = [False] * len(seeds), False
        # Of the episodes that ended: how many, their returns' sum, how many were successful.
        self.over, self.sum_of_returns = [0] * len(seeds), [0.0] * len(seeds)
        self.successes = [0] * len(seeds)
        self.returns, self.finished = [0.0] * len(seeds), [[] for _ in seeds]
        if self.newest_episodes:
            self.buffer = self.buffer.replace(spans=self._spans(self._ends()))
        self.broken = []  # [row, seed's index]: episodes that a resumed run could not go on with
        for i in range(len(seeds)):
            self._reset(i, 0)

    def report(self):
        """Of the chunk before: mean return of the episodes that ended in it, [S], or None."""
        if not self.envs:
            return {"online_return": [None] * len(self.cfg.seeds)}
        return {"online_return": [float(np.mean(x)) if x else None for x in self.finished]}

    def result(self):
        """What result.json says."""
        return {
            "online_updates": self.cfg.online_updates,
            "env_steps": self.count,
            "env_seconds": round(self.seconds, 1),
        }

    def regret(self):
        """1 - mean score / 100 of the episodes that ended, [S], NaN without a normalised score."""
        dataset, success = self.dataset, self.online_success()
        normalised = dataset.ref_min_score is not None
        if dataset.score_is_success:
            normalised = success is not None
        if not self.envs or not normalised:
            return np.full(len(self.cfg.seeds), np.nan)
        count = np.where(self.over, self.over, np.nan)
        return 1 - dataset.score(self.sum_of_returns / count, success) / 100

    def online_success(self):
        """Share of the episodes that ended which were successful, [S]; None if it is unknown."""
        if not self.envs or not self.reports_success:
            return None
        return self.successes / np.where(self.over, self.over, np.nan)

    def saved(self):
        """Add the new rows to the file. Returns what a checkpoint keeps beside them."""
        if not self.envs:
            return None
        new = self.rows[self.written : self.count].tobytes()
        with self.file.open("ab") as out:
            out.write(new)
            files.sync(out)
        self.digest, self.written = zlib.crc32(new, self.digest), self.count
        return {
            "rows": self.count,
            "digest": self.digest,
            "episodes": self.episodes,
            "lengths": self.lengths,
            "finished": self.finished,
            "over": self.over,
            "sum_of_returns": self.sum_of_returns,
            "successes": self.successes,
            "reports_success": self.reports_success,
            "broken": self.broken,
            "memory": [x.tolist() for x in jax.tree.leaves(self.memory)],
            "seconds": self.seconds,
        }

    def restore(self, saved):
        """Go on from what `saved` returned, None where the phase had not begun.

        Rows that no checkpoint counts are dropped from the file: they are made again.
        """
        if saved is None:
            self.file.unlink(missing_ok=True)
            return
        self._begin()
        count, kept = saved["rows"], self.rows[: saved["rows"]]
        if not self.file.exists() or self.file.stat().st_size < kept.nbytes:
            fail(f"{self.file}: rows are missing, so the run cannot go on; choose a --name")
        os.truncate(self.file, kept.nbytes)
        kept[:] = np.fromfile(self.file, np.float32).reshape(kept.shape)
        self.digest, self.written, self.count = zlib.crc32(kept.tobytes()), count, count
        if self.digest != saved["digest"]:
            fail(f"{self.file}: is not as it was written, so the run cannot go on; choose a --name")
        self.broken, self.finished = saved["broken"], saved["finished"]
        self.seconds = saved["seconds"]
        self.over, self.sum_of_returns = saved["over"], saved["sum_of_returns"]
        self.successes, self.reports_success = saved["successes"], saved["reports_success"]
        for i in range(len(self.envs)):
            self._play_again(i, saved["episodes"][i], saved["lengths"][i])
            if self.lengths[i] == saved["lengths"][i]:  # the env has repeated the episode
                self._remember(i, [np.array(x[i]) for x in saved["memory"]])
        for t, i in self.broken:
            self.rows[t, i, self.columns["truncation"]] = 1
        if count and self.newest_episodes:
            self._write_episodes(0)
        elif count:
            self._write(0)

    def _play_again(self, i, episode, length):
        """Play the last `length` rows of seed i again, which are the beginning of that episode."""
        self._reset(i, episode)
        for row in self.rows[self.count - length : self.count, i]:
            known = {name: row[place] for name, place in self.columns.items()}
            observation, reward, _, _ = self._env_step(i, known["action"])
            self.observation[i] = observation
            same = np.array_equal(self.observation[i], known["next_observation"])
            if not same or np.float32(reward) != known["reward"][0]:
                name, seed = envs.name(self.envs[i]), self.cfg.seeds[i]
                print(f"env {name}: does not repeat an episode, so that of seed {seed} ends here")
                self.broken.append([self.count - 1, i])
                self._reset(i, episode + 1)
                return
