# SPDX-License-Identifier: Apache-2.0
"""Rollouts in an env whose episodes end early when they go badly, so that every shortcut shows."""

from types import SimpleNamespace

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from common import envs, evaluation
from common.experiment import progress

UPDATE = 40


class Fickle(gymnasium.Env):
    """Episodes of 1 to 9 steps by the reset's seed; short ones have low rewards.

    The observation tells (length of the episode, steps so far); a step pays length + action.
    Stepping an episode that is over raises.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    reports = True  # success, at the last step of long episodes
    made = 0

    def __init__(self):
        Fickle.made += 1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.steps = int(self.np_random.integers(1, 10)), 0
        self.actions = []
        self.seeds = (*getattr(self, "seeds", ()), seed)
        self.noise = np.random.random()  # noqa: NPY002 - as ogbench envs do
        return np.array([self.length, 0], np.float32), {}

    def step(self, action):
        assert self.steps < self.length, "stepped after its end"
        self.steps += 1
        self.actions.append(np.array(action))
        over = self.steps == self.length
        info = {"success": self.length > 5} if over and self.reports else {}
        cut = self.length % 2 == 0
        observation = np.array([self.length, self.steps], np.float32)
        return observation, self.length + float(action[0]), over and not cut, over and cut, info


def dataset(make_env=Fickle, pair=(10.0, 20.0), by_success=False):
    def score(returns, success=None):
        if by_success:
            return 100 * success
        return returns if pair is None else 100 * (returns - pair[0]) / (pair[1] - pair[0])

    return SimpleNamespace(make_env=make_env, horizon=9, score=score)


def act(params, observation, key):
    """Sampled: a function of the parameters, the observation and the key."""
    noise = jax.random.uniform(key, (len(observation), 1))
    return jnp.tanh(params["shift"] + 0.01 * observation.sum(axis=-1, keepdims=True)) * noise


def parameters(seeds):
    return {"shift": jnp.asarray(seeds, jnp.float32)[:, None, None] / 10}


def policy_keys(seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def evaluate(seeds=(0,), episodes=6, update=UPDATE, beside=None, params=None, act=act, **options):
    cfg = SimpleNamespace(eval_episodes=episodes, eval_every=10, num_updates=100)
    rollouts = evaluation.Rollouts(dataset(**options), act, policy_keys(seeds), cfg)
    if beside is not None:
        rollouts.beside = beside
    with rollouts:
        future = rollouts.start(parameters(seeds) if params is None else params, update)
        return (None, None) if future is None else (future.result(), rollouts.envs)


def lengths(episodes):
    envs = [Fickle() for _ in range(episodes)]
    for i, env in enumerate(envs):
        env.reset(seed=evaluation.EVAL_SEED + i)
    return np.array([env.length for env in envs])


def same(one, two):
    for name in evaluation_names(one):
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def evaluation_names(result):
    return [name for name in result if name not in ("seconds", "preparing")]


def test_one_complete_episode_per_environment():
    result, envs = evaluate((0, 1), episodes=6)
    expected = lengths(6)
    assert len(set(expected)) > 2  # so that the first six to finish would be others
    assert [env.length for env in envs] == [*expected, *expected]
    assert all(env.steps == env.length == len(env.actions) for env in envs)
    np.testing.assert_array_equal(result["length"], [expected.mean()] * 2)


def test_fewer_environments_take_turns_where_memory_is_short(monkeypatch, capsys):
    """The numbers of all at once; an environment takes 100 bytes, half of 899 may be used."""
    whole, envs = evaluate((0, 1, 3), episodes=5)
    assert len(envs) == 15
    told = iter([(1000, 899), (1100, 0)])
    monkeypatch.setattr(evaluation, "bytes_held_and_free", lambda: next(told))
    result, envs = evaluate((0, 1, 3), episodes=5)
    assert len(envs) == 4 and "4 at a time for memory" in capsys.readouterr().out
    same(result, whole)


@pytest.mark.parametrize(("free", "count"), [(0, 2), (10, 5), (10**9, 6)])
def test_at_least_two_environments_and_no_more_than_episodes(monkeypatch, free, count):
    # The second one takes nothing.
    monkeypatch.setattr(evaluation, "bytes_held_and_free", lambda: (1000, free))
    assert len(evaluate(episodes=6)[1]) == count


def test_mean_return_success_and_score():
    still = lambda params, observation, key: jnp.zeros((len(observation), 1))  # noqa: E731
    result, _ = evaluate((0, 1), episodes=6, act=still)
    expected = lengths(6)
    mean = np.square(expected).mean()  # `length` steps that pay `length` each
    np.testing.assert_array_equal(result["return"], [mean] * 2)
    np.testing.assert_allclose(result["score"], [100 * (mean - 10) / 10] * 2)
    np.testing.assert_array_equal(result["success"], [(expected > 5).mean()] * 2)


def test_score_is_the_plain_return_without_a_pair():
    result, _ = evaluate(pair=None)
    np.testing.assert_array_equal(result["score"], result["return"])


def test_score_may_be_the_success():
    result, _ = evaluate(by_success=True)
    np.testing.assert_array_equal(result["score"], 100 * result["success"])


def test_success_is_none_where_no_env_reports_it(monkeypatch):
    monkeypatch.setattr(Fickle, "reports", False)
    assert evaluate()[0]["success"] is None


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"success": True}, 1.0),
        ({"success": np.bool_(False)}, 0.0),
        ({"success": 1.0}, 1.0),
        ({"success": np.array([True])}, 1.0),
        ({"success": np.array([True, False])}, 0.0),
        ({"success": [1, 1]}, 1.0),
        ({"is_success": True}, 1.0),
        ({"is_success": 0.0}, 0.0),
        ({"is_success": np.array([1.0])}, 1.0),
        ({"success": False, "is_success": True}, 0.0),
        ({"success": None, "is_success": True}, 1.0),
        ({"success": None}, None),
        ({"success": np.nan}, 0.0),
        ({"success": np.array([]), "is_success": True}, 1.0),
        ({"success": "no"}, None),
        ({"succeeded": True}, None),
    ],
)
def test_success_by_both_of_its_names(info, expected):
    class Telling(Fickle):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, info

    success = evaluate(make_env=Telling)[0]["success"]
    assert success is None if expected is None else success.tolist() == [expected]


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_an_observation_that_is_not_finite_is_said_and_costs_the_score(capsys, number):
    class Blind(Fickle):
        def step(self, action):
            observation, *rest = super().step(action)
            return observation * np.float32(number), *rest

    result, _ = evaluate(make_env=Blind)
    assert np.isnan(result["return"]).all() and np.isnan(result["score"]).all()
    said = capsys.readouterr().out
    assert said.count("seeds that meet it get no score") == 1 and "a step's observation has" in said


class Paying(Fickle):
    """Pays `reward`, or what it is for the second seed's actions, which are larger."""

    reward, large = 1.0, None

    def step(self, action):
        observation, _, *rest = super().step(action)
        paid = self.large if self.large is not None and action[0] > 0.5 else self.reward
        return observation, paid, *rest


REWARDS = [1, True, np.float32(1), np.float64(1), np.array(1), np.array([1.0]), np.ones((1, 1))]
REWARDS += [[1.0], (1,), np.int8(1), jnp.ones(1)]


@pytest.mark.parametrize("reward", REWARDS, ids=[repr(reward) for reward in REWARDS])
def test_a_reward_of_any_form_is_one_number(monkeypatch, reward):
    monkeypatch.setattr(Paying, "reward", reward)
    result, _ = evaluate(make_env=Paying)
    np.testing.assert_array_equal(result["return"], [lengths(6).mean()])


@pytest.mark.parametrize("reward", [None, "1x", np.ones(2), [], {"a": 1.0}], ids=repr)
def test_a_reward_that_is_no_number_is_one_line(monkeypatch, capsys, reward):
    monkeypatch.setattr(Paying, "reward", reward)
    with pytest.raises(SystemExit) as leave:
        evaluate(make_env=Paying)
    assert leave.value.code == 2
    text = capsys.readouterr().err
    assert "env Paying: the reward of a step must be one number, not" in text
    assert text.count("\n") == 1


@pytest.mark.parametrize("reward", [np.nan, np.inf, -np.inf])
def test_a_reward_that_is_not_finite_is_said_and_costs_its_seed_the_score(
    monkeypatch, capsys, reward
):
    constant = lambda params, observation, key: jnp.broadcast_to(  # noqa: E731
        params["shift"], (len(observation), 1)
    )
    alone, _ = evaluate((1,), make_env=Paying, act=constant)
    monkeypatch.setattr(Paying, "large", reward)
    capsys.readouterr()
    result, _ = evaluate((1, 9), make_env=Paying, act=constant)
    assert capsys.readouterr().out.count("seeds that meet it get no score") == 1
    assert (
        np.isnan(result["return"]).tolist() == np.isnan(result["score"]).tolist() == [False, True]
    )
    np.testing.assert_array_equal(result["return"][:1], alone["return"])


def test_what_is_said_of_seeds_without_a_score(capsys):
    nan = np.nan
    progress.say_result("runs/x", [nan, nan], [nan, nan], [nan, nan], 0)
    progress.say_result("runs/x", [1.0, nan, 3.0], [1.0, nan, 3.0], [1.0, nan, 3.0], 0)
    progress.say_result("runs/x", [nan], [nan], None, 0)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "no score, since the env gave rewards that are no finite numbers, in runs/x"
    assert second.startswith("final score 2.0 ± 1.0 ") and ", 1 without a score, " in second
    assert third == "trained without an evaluation, in runs/x"


@pytest.mark.parametrize("form", [list, tuple, np.float64, lambda x: x[None]])
def test_observations_of_any_form(form):
    class Formed(Fickle):
        def reset(self, **options):
            observation, info = super().reset(**options)
            return form(observation), info

        def step(self, action):
            observation, *rest = super().step(action)
            return form(observation), *rest

    def make_env():
        return envs.flat_and_scaled(lambda render_mode: Formed(), (), (-np.ones(1), np.ones(1)))()

    same(evaluate((0, 1), make_env=make_env)[0], evaluate((0, 1))[0])


@pytest.mark.parametrize("call", ["reset", "step"])
def test_an_observation_of_another_shape_is_one_line(capsys, call):
    class Growing(Fickle):
        def reset(self, **options):
            observation, info = super().reset(**options)
            grows = call == "reset" and options["seed"] == evaluation.EVAL_SEED + 2
            return observation[: 1 + (not grows)], info

        def step(self, action):
            observation, *rest = super().step(action)
            return np.resize(observation, 2 + (call == "step" and self.steps == 3)), *rest

    with pytest.raises(SystemExit) as leave:
        evaluate(make_env=Growing)
    assert leave.value.code == 2
    text = capsys.readouterr().err
    assert "env Growing: gave an observation of shape (" in text and text.count("\n") == 1


def test_an_env_without_info_that_does_not_close(capsys):
    class Rough(Fickle):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, None

        def close(self):
            raise OSError("no window")

    result, _ = evaluate((0,), make_env=Rough)
    assert result["success"] is None and np.isfinite(result["return"]).all()
    assert "env Rough: its close raised OSError: no window" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["reset", "step"])
def test_what_an_env_raises_is_one_line_with_its_place(monkeypatch, capsys, call):
    def unstable(*args, **options):
        raise RuntimeError("simulator\nunstable")

    monkeypatch.setattr(Fickle, call, unstable)
    with pytest.raises(SystemExit) as leave:
        evaluate()
    assert leave.value.code == 2
    text = capsys.readouterr().err
    assert f"env Fickle: its {call} raised RuntimeError: simulator unstable" in text
    assert "(test_evaluation.py:" in text and text.count("\n") == 1


def test_a_success_counts_once_seen():
    class Passing(Fickle):
        def step(self, action):
            *rest, _ = super().step(action)
            return *rest, {"success": self.steps == 1}  # only at the first step

    np.testing.assert_array_equal(evaluate(make_env=Passing)[0]["success"], [1.0])


@pytest.mark.parametrize("seeds", [(3, 1, 0, 2), (1, 3), (2,)])
def test_a_seed_has_its_numbers_in_any_company(seeds):
    together, _ = evaluate((0, 1, 2, 3))
    assert len(set(together["return"])) == 4
    others, _ = evaluate(seeds)
    for name in evaluation_names(together):
        np.testing.assert_array_equal(others[name], together[name][list(seeds)], err_msg=name)


def test_keys_are_a_function_of_seed_update_and_step():
    def record(params, observation, key):
        data = jax.random.key_data(key).astype(jnp.uint32)
        return jnp.broadcast_to(data[0] >> 9, (len(observation), 1)) / 2.0**23

    def expected(seed, step, update=UPDATE):
        key = jax.random.fold_in(jax.random.key(seed), update)
        data = jax.random.key_data(jax.random.fold_in(key, step))
        return np.float32(int(data[0]) >> 9) / np.float32(2.0**23)

    _, envs = evaluate((5, 6), episodes=4, act=record)
    drawn = set()
    for i, env in enumerate(envs):
        seed = (5, 6)[i // 4]
        for step, action in enumerate(env.actions):
            assert action == expected(seed, step)
            drawn.add((seed, step, action.item()))
    assert len({value for _, _, value in drawn}) == len(drawn)  # all differ
    _, later = evaluate((5, 6), episodes=4, act=record, update=UPDATE + 10)
    assert later[0].actions[0] == expected(5, 0, UPDATE + 10)


def test_every_evaluation_meets_the_same_starts():
    cfg = SimpleNamespace(eval_episodes=3, eval_every=10, num_updates=100)
    with evaluation.Rollouts(dataset(), act, policy_keys((0, 1)), cfg) as rollouts:
        results, noises = [], []
        for _ in range(2):
            results.append(rollouts.start(parameters((0, 1)), UPDATE).result())
            noises.append([env.noise for env in rollouts.envs])
        seeds = [env.seeds[-2:] for env in rollouts.envs]
    same(*results)
    assert seeds == [(evaluation.EVAL_SEED + i,) * 2 for i in (0, 1, 2, 0, 1, 2)]
    assert noises[0] == noises[1] and noises[0][:3] == noises[0][3:]  # NumPy's generator as well


def test_actions_that_are_not_finite_do_not_stop_the_other_seed():
    with jax.debug_nans(False):
        params = {"shift": parameters((0, 1))["shift"].at[0].set(jnp.nan)}
        result, envs = evaluate((0, 1), params=params)
    assert np.isfinite([action for env in envs for action in env.actions]).all()
    alone, _ = evaluate((1,))
    np.testing.assert_array_equal(result["return"][1:], alone["return"])


def test_actions_leave_neither_box_nor_type():
    far = lambda params, observation, key: jnp.full((len(observation), 1), 3.0)  # noqa: E731
    _, envs = evaluate(act=far)
    assert {action.item() for env in envs for action in env.actions} == {1.0}

    class Discrete(Fickle):
        action_space = gymnasium.spaces.Discrete(4)

        def step(self, action):
            assert self.action_space.contains(action)
            return super().step(np.array([action]))

    third = lambda params, observation, key: jnp.full(len(observation), 3)  # noqa: E731
    _, envs = evaluate(act=third, make_env=Discrete)
    assert {action.item() for env in envs for action in env.actions} == {3}


def test_one_policy_call_per_step(monkeypatch):
    calls = []
    cfg = SimpleNamespace(eval_episodes=5, eval_every=10, num_updates=100)
    with evaluation.Rollouts(dataset(), act, policy_keys((0, 1)), cfg) as rollouts:
        inner = rollouts.act
        monkeypatch.setattr(rollouts, "act", lambda *args: calls.append(args) or inner(*args))
        rollouts.run(parameters((0, 1)), UPDATE)
    assert len(calls) == lengths(5).max()
    assert calls[0][1].shape == (2, 5, 2) and calls[0][1].dtype == np.float32


def test_beside_the_training_gives_the_same_numbers():
    same(evaluate((0, 1), beside=True)[0], evaluate((0, 1), beside=False)[0])


def test_beside_the_training_leaves_an_error_visible(capsys):
    class Broken(Fickle):
        def step(self, action):
            if len(self.seeds) > 1:  # past the measurement of its speed
                raise ZeroDivisionError
            return super().step(action)

        def reset(self, *, seed=None, options=None):
            self.__dict__.setdefault("seeds", (None,))
            return super().reset(seed=seed)

    with pytest.raises(SystemExit) as leave:
        evaluate(beside=True, make_env=Broken)
    assert leave.value.code == 2
    text = capsys.readouterr().err
    assert "env Broken: its step raised ZeroDivisionError" in text and text.count("\n") == 1


def test_no_env_no_evaluation(capsys):
    assert evaluate(make_env=None) == (None, None)
    assert "training only" in capsys.readouterr().out


def test_envs_are_made_once_and_closed(monkeypatch, capsys):
    closed = []
    monkeypatch.setattr(Fickle, "close", lambda env: closed.append(env))
    monkeypatch.setattr(Fickle, "made", 0)
    evaluate((0, 1, 2), episodes=4)
    assert Fickle.made == len(closed) == 12
    assert "evaluation: 11 times 4 episodes per seed of at most 9 steps" in capsys.readouterr().out


# --- A policy with memory -----------------------------------------------------------------------
def recall(params, observation, key, memory, reward):
    """Acts by what it was paid so far, and by its shift from the third step on."""
    total, seen = memory
    total, seen = total + reward, seen + 1
    return jnp.tanh(total[:, None] / 100 + params["shift"] * (seen >= 3)), (total, seen)


def remembered(length, shift):
    """The actions of one episode of Fickle, by hand."""
    actions, total = [], 0.0
    for step in range(length):
        actions.append(np.tanh(total / 100 + shift * (step >= 2)))
        total += length + actions[-1]
    return actions


def test_memory_holds_the_past_of_one_episode_only(monkeypatch):
    memory = np.zeros(6, np.float32), np.int32(0)
    cfg = SimpleNamespace(eval_episodes=6, eval_every=10, num_updates=100)
    rollouts = evaluation.Rollouts(dataset(), recall, policy_keys((0, 3)), cfg, memory)
    with rollouts:
        results = [rollouts.start(parameters((0, 3)), update).result() for update in (0, 10)]
    same(*results)  # the second evaluation starts as the first one did
    for i, env in enumerate(rollouts.envs):
        expected = remembered(env.length, 0.0 if i < 6 else 0.3)
        np.testing.assert_allclose(np.ravel(env.actions), expected, rtol=1e-5)
    monkeypatch.setattr(evaluation, "bytes_held_and_free", iter([(0, 10), (1, 10)]).__next__)
    with evaluation.Rollouts(dataset(), recall, policy_keys((0, 3)), cfg, memory) as turns:
        same(turns.start(parameters((0, 3)), 0).result(), results[0])
        assert len(turns.envs) == 5
    monkeypatch.undo()
    alone = evaluation.Rollouts(dataset(), recall, policy_keys((3,)), cfg, memory)
    with alone:
        np.testing.assert_array_equal(
            alone.start(parameters((3,)), 0).result()["return"], results[0]["return"][1:]
        )
