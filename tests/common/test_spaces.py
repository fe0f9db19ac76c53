# SPDX-License-Identifier: Apache-2.0
"""Every space of Gymnasium: recorded data and live environments give the same columns and actions.

For each space a toy env is recorded, loaded and acted in. A space that no method can use is one
line that names it.
"""

import re
from types import SimpleNamespace

import gymnasium
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gymnasium import spaces
from test_datasets import error_of

from common import datasets, envs, evaluation

BOX = spaces.Box(-1, 1, (3,), np.float32)
STEPS = 6


def box(*shape, kind=np.float32, low=-1, high=1):
    return spaces.Box(low, high, shape, kind)


GOALS = {"achieved_goal": box(2), "desired_goal": box(2)}
OBSERVATIONS = {
    "box": (box(3), 3),
    "box of one number": (box(), 1),
    "box of two axes": (box(2, 3), 6),
    "box of three axes": (box(2, 1, 2), 4),
    "box of float64": (box(3, kind=np.float64), 3),
    "box of float16": (box(3, kind=np.float16), 3),
    "box of integers": (box(2, kind=np.int64, low=-5, high=9), 2),
    "box of bools": (box(4, kind=np.bool_, low=0), 4),
    "image": (box(8, 8, 3, kind=np.uint8, low=0, high=255), 192),
    "box without bounds": (box(3, low=-np.inf, high=np.inf), 3),
    "discrete": (spaces.Discrete(5), 5),
    "discrete from 1": (spaces.Discrete(3, start=1), 3),
    "discrete from -2": (spaces.Discrete(4, start=-2), 4),
    "multi-discrete": (spaces.MultiDiscrete([3, 4]), 7),
    "multi-discrete from elsewhere": (spaces.MultiDiscrete([3, 2], start=[5, -1]), 5),
    "multi-discrete of two axes": (spaces.MultiDiscrete([[2, 3], [4, 2]]), 11),
    "multi-binary": (spaces.MultiBinary(4), 4),
    "multi-binary of two axes": (spaces.MultiBinary((2, 2)), 4),
    "dict": (spaces.Dict({"b": box(2), "a": box(1)}), 3),
    "dict of kinds": (
        spaces.Dict({"state": box(3), "gear": spaces.Discrete(4, start=1), "image": box(2, 2)}),
        11,
    ),
    "dict with lamps": (
        spaces.Dict({"lamps": spaces.MultiBinary(5), "mode": spaces.MultiDiscrete([2, 2])}),
        9,
    ),
    "nested dict": (
        spaces.Dict({"robot": spaces.Dict({"vel": box(2), "pos": box(1)}), "goal": box(2)}),
        5,
    ),
    "tuple": (spaces.Tuple((box(2), spaces.Discrete(3))), 5),
    "tuple of discretes": (spaces.Tuple((spaces.Discrete(3), spaces.Discrete(2))), 5),
    "image and a choice far below": (
        spaces.Dict(
            {
                "cam": spaces.Dict({"b w": box(4, 4, 3, kind=np.uint8, low=0, high=255)}),
                "gear.2": spaces.Tuple((spaces.Discrete(4, start=-1), spaces.MultiBinary((2, 2)))),
            }
        ),
        56,
    ),
    "dict of a tuple of a dict": (
        spaces.Dict({"x": spaces.Tuple((spaces.Dict({"y": spaces.Discrete(2)}), box(2)))}),
        4,
    ),
    "goal": (spaces.Dict({"observation": box(3), **GOALS}), 7),
}
UNUSABLE = {
    "text": spaces.Text(8),
    "sequence": spaces.Sequence(spaces.Discrete(2)),
    "graph": spaces.Graph(box(2), None),
    "one of": spaces.OneOf([spaces.Discrete(2), box(2)]),
    "text in a dict": spaces.Dict({"state": box(2), "mission": spaces.Text(8)}),
    "text far below": spaces.Tuple((spaces.Dict({"a": spaces.Tuple((spaces.Text(3),))}), box(1))),
    "empty": spaces.Dict({}),
}
ACTIONS = {
    "box": box(2),
    "box of one number": box(),
    "box of two axes": box(2, 2),
    "box of three axes": box(1, 2, 1, low=-3, high=7),
    "box of float64": box(2, kind=np.float64, low=-0.3, high=0.7),
    "box of float16": box(2, kind=np.float16, low=-2, high=2),
    "box of several bounds": spaces.Box(np.float32([0, -3.3]), np.float32([10, 7.7])),
    "box with a fixed number": spaces.Box(np.float32([0.5, -1]), np.float32([0.5, 3])),
    "discrete": spaces.Discrete(3),
    "discrete from 1": spaces.Discrete(3, start=1),
    "discrete from -2": spaces.Discrete(4, start=-2),
    "discrete of one": spaces.Discrete(1, start=7),
}
USELESS_ACTIONS = {
    "multi-discrete": spaces.MultiDiscrete([3, 4]),
    "multi-binary": spaces.MultiBinary(3),
    "box of integers": box(1, kind=np.int32),
    "image": box(2, 2, kind=np.uint8, low=0, high=255),
    "text": spaces.Text(8),
    "dict": spaces.Dict({"arm": box(2), "hand": spaces.Discrete(2)}),
    "tuple": spaces.Tuple((box(2), box(1))),
    "dict of one box": spaces.Dict({"arm": box(2)}),
}


class Toy(gymnasium.Env):
    """Observations are drawn from the space by the reset's seed. Actions must lie in theirs."""

    def __init__(self, observation="box", action="box", render_mode=None):
        known = {name: space for name, (space, _) in OBSERVATIONS.items()} | UNUSABLE
        self.observation_space = known[observation]
        self.action_space = (ACTIONS | USELESS_ACTIONS)[action]
        self.taken = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.taken = []
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.taken.append(action)
        return self.observation_space.sample(), 1.0, False, False, {}


class Goal(gymnasium.Env):
    """A point that is moved by its action, with a goal that may change between the episodes."""

    action_space = box(2)

    def __init__(self, moves=True, shown=True, mission=None, render_mode=None):
        self.moves, self.shown, self.mission = moves, shown, mission
        parts = {"observation": box(4, low=-99, high=99), "noise": box(1)}
        parts |= {"achieved_goal": box(2, low=-99, high=99), "desired_goal": box(2)}
        if mission:
            parts["mission"] = spaces.Text(9)
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.goal = self.place / 2 if self.moves else np.float32([0.5, 0.25])
        return self.observe(), {}

    def step(self, action):
        self.place = self.place + action
        return self.observe(), 0.0, False, False, {}

    def observe(self):
        place = self.place if self.shown else np.zeros(2, np.float32)
        parts = {"observation": np.concatenate([self.place * 0 + 7, place])}
        parts |= {"noise": self.np_random.uniform(-1, 1, 1).astype(np.float32)}
        parts |= {"achieved_goal": self.place, "desired_goal": self.goal}
        if self.mission:
            word = self.mission if self.mission == "go" else f"go{self.np_random.integers(1000)}"
            parts["mission"] = word
        return parts


for name, entry in (("Toy-v0", "test_spaces:Toy"), ("Goal-v0", "test_spaces:Goal")):
    if name not in gymnasium.registry:
        gymnasium.register(
            name, entry, max_episode_steps=STEPS, disable_env_checker=True, order_enforce=False
        )


@pytest.fixture
def root(tmp_path, monkeypatch):
    pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "minari"


def record(
    dataset_id="lab/toy-v0",
    env_id="Toy-v0",
    wrapper=None,
    episodes=3,
    jpeg_encoding=True,
    **options,
):
    """Record random episodes with Minari's collector, reset with seeds 0, 1, ... -> the actions."""
    import minari

    env = gymnasium.make(env_id, **options)
    env = minari.DataCollector(wrapper(env) if wrapper else env, jpeg_encoding=jpeg_encoding)
    env.action_space.seed(0)
    taken = []
    for seed in range(episodes):
        env.reset(seed=seed)
        for _ in range(STEPS):
            taken.append(env.action_space.sample())
            env.step(taken[-1])
    env.create_dataset(dataset_id, algorithm_name="random")
    return taken


def by_gymnasium(space, value):
    """The columns of one value by Gymnasium's own functions, dicts in alphabetical order."""
    if isinstance(space, spaces.Dict):
        return np.concatenate([by_gymnasium(space[key], value[key]) for key in sorted(space)])
    if isinstance(space, spaces.Tuple):
        return np.concatenate([by_gymnasium(*pair) for pair in zip(space, value, strict=True)])
    return np.asarray(spaces.flatten(space, value), np.float32)


# --- The map ------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_columns_are_those_of_gymnasium(name):
    space, width = OBSERVATIONS[name]
    space.seed(0)
    columns = envs.columns(space)
    assert envs.unusable(space) is None and envs.width(space) == width
    assert sum(count for _, count in envs.kinds(space)) == width == spaces.flatdim(space)
    for _ in range(5):
        value = space.sample()
        written = columns(value, 1)
        assert written.shape == (1, width) and written.dtype == np.float32
        np.testing.assert_array_equal(written[0], by_gymnasium(space, value))


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_space_without_columns_is_named(name):
    assert re.search(r"Text\(|Sequence\(|Graph\(|OneOf\(|Dict\(\)", envs.unusable(UNUSABLE[name]))


def test_values_outside_of_a_space_are_no_columns():
    for space, value in [
        (spaces.Discrete(3, start=1), 0),
        (spaces.Discrete(3), 3),
        (spaces.Discrete(3), 0.5),
        (spaces.MultiDiscrete([2, 3]), [1, 3]),
    ]:
        with pytest.raises(ValueError, match="not all among"):
            envs.columns(space)(value, 1)


def test_columns_of_one_meaning_are_told_from_others():
    assert envs.kinds(box(2, 3)) == envs.kinds(box(6, kind=np.float64)) == [("number", 6)]
    assert envs.kinds(spaces.Discrete(6)) == [("one of", 6)] != envs.kinds(box(6))
    assert envs.kinds(spaces.MultiDiscrete([2, 4])) != envs.kinds(spaces.Discrete(6))
    assert envs.kinds(spaces.Dict({"a": box(2), "b": box(3)})) == [("number", 5)]


# --- Record, load, act --------------------------------------------------------------------------
def replay(dataset, taken):
    """Play the recorded actions again in the env of the data, as the algorithms see it."""
    env, t = dataset.make_env(), dataset.transitions
    ends = dataset.episode_ends
    for seed, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        observation, _ = env.reset(seed=seed)
        for row in range(start, end):
            assert observation.dtype == np.float32
            np.testing.assert_array_equal(observation, t.observation[row])
            observation, *_ = env.step(t.action[row])
            np.testing.assert_array_equal(observation, t.next_observation[row])
        given = [np.asarray(x, float) for x in env.unwrapped.taken]
        np.testing.assert_allclose(given, taken[start:end], atol=2e-3, rtol=2e-3)
        same = env.unwrapped.action_space
        assert same.dtype.kind == "f" or [int(x) for x in given] == [
            int(x) for x in taken[start:end]
        ]
    env.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OBSERVATIONS)
def test_recorded_observations_are_those_of_the_env(root, capsys, name):
    taken = record(observation=name)
    dataset = datasets.load("lab/toy-v0")
    assert dataset.transitions.observation.shape == (3 * STEPS, OBSERVATIONS[name][1])
    replay(dataset, taken)
    keys = dataset.record["observation_keys"]
    said = capsys.readouterr().out
    if isinstance(OBSERVATIONS[name][0], spaces.Dict):
        assert sorted(keys) == sorted(OBSERVATIONS[name][0])
        assert f"({', '.join(keys)})" in said
    else:
        assert keys == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "space",
    [
        box(32, 40, 3, kind=np.uint8, low=0, high=255),
        box(32, 32, kind=np.uint8, low=0, high=255),
        spaces.Tuple((box(2), spaces.Dict({"eye": box(32, 32, kind=np.uint8, low=0, high=255)}))),
    ],
    ids=["colours", "grey", "far below"],
)
def test_images_stored_as_jpeg_are_said(root, monkeypatch, capsys, space):
    """Minari changes images of 32 pixels and more unless told otherwise."""
    monkeypatch.setitem(OBSERVATIONS, "camera", (space, spaces.flatdim(space)))
    for number, said in ((0, True), (1, False)):
        taken = record(f"lab/camera-v{number}", observation="camera", jpeg_encoding=said)
        dataset = datasets.load(f"lab/camera-v{number}")
        assert dataset.transitions.observation.shape[1] == spaces.flatdim(space)
        assert ("with jpeg_encoding=False" in capsys.readouterr().out) == said
    replay(dataset, taken)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ACTIONS)
def test_actions_reach_the_env_as_recorded(root, capsys, name):
    taken = record(action=name)
    dataset = datasets.load("lab/toy-v0", actions="any")
    if "discrete" in name:
        assert dataset.num_actions == ACTIONS[name].n
        assert dataset.record.get("first_action", 0) == ACTIONS[name].start
        assert 0 <= dataset.transitions.action.min() <= dataset.transitions.action.max()
    else:
        assert dataset.transitions.action.shape[1] == int(np.prod(ACTIONS[name].shape))
        assert np.abs(dataset.transitions.action).max() <= 1
        shape = list(ACTIONS[name].shape)
        assert dataset.record.get("action_shape") == (None if len(shape) == 1 else shape)
    replay(dataset, taken)
    play_everything(dataset)


def play_everything(dataset):
    """Evaluate a policy that takes every action, the bounds among them."""
    count = dataset.num_actions

    def act(params, observation, key):
        if count is not None:
            return jax.random.randint(key, len(observation), 0, count)
        size = dataset.transitions.action.shape[1]
        return jax.random.randint(key, (len(observation), size), -1, 2).astype(jnp.float32)

    cfg = SimpleNamespace(eval_episodes=3, eval_every=1, num_updates=1)
    keys = jax.vmap(jax.random.key)(jnp.arange(2, dtype=jnp.uint32))
    with evaluation.Rollouts(dataset, act, keys, cfg) as rollouts:
        result = rollouts.run({"x": jnp.zeros((2, 1))}, 0)
        taken = [x for env in rollouts.envs for x in env.unwrapped.taken]
    np.testing.assert_array_equal(result["return"], [STEPS, STEPS])
    if count is not None:
        space = rollouts.envs[0].unwrapped.action_space
        assert {int(x) for x in taken} == {*range(space.start, space.start + space.n)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_observation_without_columns_is_one_line(root, tmp_path, capsys, name):
    if name == "text in a dict":  # Minari itself records no more of these than this
        record(observation=name)
        text = error_of(capsys, datasets.load, "lab/toy-v0")
        assert "observation['mission']: Text(" in text and "FilterObservation" in text
        assert "delete" not in text and "damaged" not in text
    rows = {"observations": np.zeros((9, 3)), "actions": np.zeros((9, 2))}
    path = write(tmp_path / "own.hdf5", **rows)
    gymnasium.register("Spaced-v0", Toy, max_episode_steps=5, kwargs={"observation": name})
    try:
        text = error_of(capsys, datasets.load, path, env="Spaced-v0")
    finally:
        del gymnasium.registry["Spaced-v0"]
    words = "no fixed number of values|a dict or its parts|An empty Dict observation space"
    assert "Spaced-v0" in text and re.search(words, text)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", USELESS_ACTIONS)
def test_actions_that_no_method_takes_are_one_line(root, tmp_path, capsys, name):
    kind = type(USELESS_ACTIONS[name]).__name__
    record(action=name)
    text = error_of(capsys, datasets.load, "lab/toy-v0", actions="any")
    assert f"the action space {kind}(" in text and "TransformAction" in text
    assert "delete" not in text and "damaged" not in text
    rows = {"observations": np.zeros((9, 3)), "actions": np.zeros((9, 2), int)}
    path = write(tmp_path / "own.hdf5", **rows)
    gymnasium.register("Spaced-v0", Toy, max_episode_steps=5, kwargs={"action": name})
    try:
        text = error_of(capsys, datasets.load, path, env="Spaced-v0", actions="any")
    finally:
        del gymnasium.registry["Spaced-v0"]
    assert f"{kind}(" in text and "Spaced-v0" in text and "TransformAction" in text


# --- Files without spaces -----------------------------------------------------------------------
def write(path, attributes=None, **columns):
    count = len(columns["observations"])
    arrays = {"rewards": np.ones(count), "terminals": np.zeros(count)}
    arrays["timeouts"] = np.arange(count) % STEPS == STEPS - 1
    with h5py.File(path, "w") as file:
        for key, array in (arrays | columns).items():
            file[key] = array
        file.attrs.update(attributes or {})
    return str(path)


ARRAYS = [name for name, (space, _) in OBSERVATIONS.items() if space.shape is not None]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "action"),
    [(name, "discrete from 1") for name in ARRAYS]
    + [(name, "box of three axes") for name in ("box", "discrete", "image")],
)
def test_a_file_of_raw_values_agrees_with_the_env(tmp_path, name, action):
    """HDF5 in D4RL's layout knows no spaces: those of the env are used."""
    env_id = "Spaced-v0"
    options = {"observation": name, "action": action}
    gymnasium.register(env_id, Toy, max_episode_steps=STEPS, kwargs=options)
    try:
        env = gymnasium.make(env_id)
        env.action_space.seed(0)
        rows = {"observations": [], "next_observations": [], "actions": []}
        for seed in range(2):
            observation, _ = env.reset(seed=seed)
            for _ in range(STEPS):
                rows["observations"].append(observation)
                rows["actions"].append(env.action_space.sample())
                observation, *_ = env.step(rows["actions"][-1])
                rows["next_observations"].append(observation)
        stacked = {key: np.stack(values) for key, values in rows.items()}
        path = write(tmp_path / "own.hdf5", {"env_id": env_id}, **stacked)
        dataset = datasets.load(path, actions="any")
        replay(dataset, rows["actions"])
        if "discrete" in name:  # the columns themselves may be stored as well
            space = OBSERVATIONS[name][0]
            for key in ("observations", "next_observations"):
                stacked[key] = envs.columns(space)(stacked[key], 2 * STEPS)
            path = write(tmp_path / "marked.hdf5", {"env_id": env_id}, **stacked)
            again = datasets.load(path, actions="any")
            np.testing.assert_array_equal(
                again.transitions.observation, dataset.transitions.observation
            )
    finally:
        del gymnasium.registry[env_id]


def test_choices_outside_of_the_env_are_one_line(tmp_path, capsys):
    gymnasium.register("Spaced-v0", Toy, max_episode_steps=5, kwargs={"observation": "discrete"})
    try:
        path = write(tmp_path / "x.hdf5", observations=np.arange(9), actions=np.zeros((9, 2)))
        text = error_of(capsys, datasets.load, path, env="Spaced-v0")
    finally:
        del gymnasium.registry["Spaced-v0"]
    assert "observations" in text and "0 to 8" in text and "Discrete(5)" in text


class Vast(Toy):
    """More values than there is memory for columns."""

    def __init__(self, render_mode=None):
        super().__init__()
        self.observation_space = spaces.Discrete(2**50)


def test_more_choices_than_memory_are_one_line(tmp_path, capsys):
    gymnasium.register("Spaced-v0", Vast, max_episode_steps=5)
    try:
        path = write(tmp_path / "x.hdf5", observations=np.arange(9), actions=np.zeros((9, 2)))
        text = error_of(capsys, datasets.load, path, env="Spaced-v0")
    finally:
        del gymnasium.registry["Spaced-v0"]
    assert "a column for each value" in text and f"Discrete({2**50})" in text


# --- The env of another space -------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recorded", "other", "words"),
    [
        (
            {"observation": "discrete"},
            {"observation": "box of two axes"},
            "numbers per observation",
        ),
        ({"observation": "multi-binary"}, {"observation": "discrete from -2"}, "Discrete(4"),
        ({"observation": "discrete from -2"}, {"observation": "multi-binary"}, "MultiBinary"),
        ({"observation": "dict"}, {"observation": "box"}, "which is no dict"),
        ({"observation": "dict"}, {"observation": "nested dict"}, "gives only goal, robot"),
        ({"observation": "box"}, {"observation": "dict"}, "FlattenObservation"),
        ({"action": "discrete from 1"}, {"action": "discrete"}, "Discrete(3)"),
        ({"action": "discrete"}, {"action": "discrete from -2"}, "the same actions"),
        ({"action": "discrete"}, {"action": "box"}, "the same actions"),
        ({"action": "box"}, {"action": "discrete"}, "the same actions"),
    ],
)
def test_data_are_not_evaluated_in_an_env_of_other_spaces(root, capsys, recorded, other, words):
    record(**recorded)
    gymnasium.register("Spaced-v0", Toy, max_episode_steps=5, kwargs=other)
    try:
        text = error_of(capsys, datasets.load, "lab/toy-v0", env="Spaced-v0", actions="any")
    finally:
        del gymnasium.registry["Spaced-v0"]
    assert words in text and "--env" in text


@pytest.mark.filterwarnings("ignore")
def test_other_bounds_of_the_env_are_said(root, capsys):
    record()
    gymnasium.register("Spaced-v0", Wide, max_episode_steps=5)
    try:
        datasets.load("lab/toy-v0", env="Spaced-v0")
    finally:
        del gymnasium.registry["Spaced-v0"]
    assert "they are scaled by the env's bounds" in capsys.readouterr().out


class Wide(Toy):
    def __init__(self, render_mode=None):
        super().__init__()
        self.action_space = box(2, low=-2, high=2)


@pytest.mark.filterwarnings("ignore")
def test_numbers_beyond_float32_in_a_recording_are_told_as_such(root, capsys):
    record("lab/huge-v0", observation="box of float64")
    with h5py.File(root / "lab/huge-v0/data/main_data.hdf5", "a") as file:
        file["episode_1/observations"][2] = 1e300
    text = error_of(capsys, datasets.load, "lab/huge-v0")
    assert "beyond float32" in text and "store them scaled down" in text
    assert "NaN" not in text and "delete" not in text
    with h5py.File(root / "lab/huge-v0/data/main_data.hdf5", "a") as file:
        file["episode_1/observations"][2] = 1e-300
    assert len(datasets.load("lab/huge-v0").transitions.reward) == 3 * STEPS


@pytest.mark.filterwarnings("ignore")
def test_a_recording_larger_than_the_memory_is_one_line(root, monkeypatch, capsys):
    import psutil

    record(observation="image")
    free = psutil.virtual_memory()._replace(available=1000)
    with monkeypatch.context() as patch:
        patch.setattr(psutil, "virtual_memory", lambda: free)
        text = error_of(capsys, datasets.load, "lab/toy-v0")
    assert "need more memory than is free" in text and "delete" not in text
    assert len(datasets.load("lab/toy-v0").transitions.reward) == 3 * STEPS


# --- Goals --------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("options", "keys", "unused"),
    [
        ({}, "observation desired_goal noise", "achieved_goal"),
        ({"moves": False}, "observation noise", "achieved_goal, desired_goal"),
        ({"shown": False}, "observation achieved_goal desired_goal noise", ""),
        ({"mission": "go"}, "observation desired_goal noise", "achieved_goal, mission"),
        ({"mission": "any"}, None, "mission"),
    ],
)
def test_a_goal_is_kept_unless_it_never_changes(root, capsys, options, keys, unused):
    record(env_id="Goal-v0", **options)
    if keys is None:
        text = error_of(capsys, datasets.load, "lab/toy-v0")
        assert "observation['mission']: Text(" in text
        return
    dataset = datasets.load("lab/toy-v0")
    said = capsys.readouterr().out
    assert dataset.record["observation_keys"] == keys.split()
    without = f", without {unused}" if unused else ""
    assert f"({keys.replace(' ', ', ')}{without})" in said
    assert ", ".join(dataset.record.get("observation_keys_left_out", [])) == unused
    env = dataset.make_env()
    observation, _ = env.reset(seed=2)
    np.testing.assert_array_equal(observation, dataset.transitions.observation[2 * STEPS])
    if "desired_goal" in keys:
        at = 6 if "achieved_goal" in keys else 4
        np.testing.assert_array_equal(observation[at : at + 2], env.unwrapped.goal)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["team/maze-run-v0", "team/pointmaze-run-v0"])
def test_a_goal_does_not_depend_on_the_name_of_the_data(root, capsys, name):
    pytest.importorskip("gymnasium_robotics")
    envs.make("PointMaze_UMaze-v3").close()  # registers it
    record(name, "PointMaze_UMaze-v3")
    assert datasets.load(name).record["observation_keys"] == ["observation", "desired_goal"]


@pytest.mark.filterwarnings("ignore")
def test_fetch_keeps_its_goal_and_tells_success(root):
    """A user's recording of an env with goals and `is_success`, by no name of D4RL's."""
    pytest.importorskip("gymnasium_robotics")
    envs.make("FetchReach-v4").close()  # registers it
    record("team/reach-v0", "FetchReach-v4")
    dataset = datasets.load("team/reach-v0", env_steps=5)
    assert dataset.record["observation_keys"] == ["observation", "desired_goal"]
    assert dataset.record["observation_keys_left_out"] == ["achieved_goal"]
    cfg = SimpleNamespace(eval_episodes=3, eval_every=1, num_updates=1)
    act = lambda params, observation, key: jnp.zeros((len(observation), 4))  # noqa: E731
    key = jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32))
    with evaluation.Rollouts(dataset, act, key, cfg) as rollouts:
        result = rollouts.run({"x": jnp.zeros((1, 1))}, 0)
    near = [-5 < value <= 0 for value in result["return"]]  # a step within 5 cm pays 0, others -1
    assert all(near) == (result["success"][0] > 0)


# --- Clipped actions ----------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "wrapper",
    [
        gymnasium.wrappers.ClipAction,
        lambda env: gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.wrappers.ClipAction(env)),
        lambda env: gymnasium.wrappers.ClipAction(gymnasium.wrappers.RecordEpisodeStatistics(env)),
    ],
    ids=["clip", "clip inside", "clip outside"],
)
@pytest.mark.parametrize("action", ["box", "box of two axes"])
def test_a_recording_through_clip_action_has_the_bounds_inside(root, capsys, wrapper, action):
    space = ACTIONS[action]
    taken = record(wrapper=wrapper, action=action)
    dataset = datasets.load("lab/toy-v0")
    assert "of the actions clipped, as its ClipAction did" in capsys.readouterr().out
    assert np.abs(dataset.transitions.action).max() == 1
    replay(dataset, [np.clip(x, space.low, space.high) for x in taken])
    play_everything(dataset)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["box of several bounds", "discrete from 1"])
def test_data_without_an_env_know_their_actions(root, capsys, name):
    """Minari stores the action space where it stores no env."""
    import minari
    from minari.data_collector import EpisodeBuffer

    space = ACTIONS[name]
    space.seed(0)
    taken = [space.sample() for _ in range(9)]
    buffer = EpisodeBuffer(
        observations=np.zeros((10, 3), np.float32),
        actions=np.stack(taken),
        rewards=np.ones(9),
        terminations=np.zeros(9, bool),
        truncations=np.arange(9) == 8,
    )
    minari.create_dataset_from_buffers(
        "own-v0", [buffer], action_space=space, observation_space=BOX
    )
    dataset = datasets.load("own-v0", actions="any")
    assert dataset.make_env is None
    if name == "discrete from 1":
        assert dataset.num_actions == 3
        assert dataset.transitions.action.tolist() == [int(x) - 1 for x in taken]
    else:
        scaled = 2 * (np.stack(taken) - space.low) / (space.high - space.low) - 1
        np.testing.assert_allclose(dataset.transitions.action, scaled, atol=1e-5)
