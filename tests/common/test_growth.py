# SPDX-License-Identifier: Apache-2.0
"""Run folders that grow, begin with others, keep their best policy, and act without their data."""

import ast
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import helpers_runs as runs
import jax
import numpy as np
import pytest
import yaml
from own_files import NAMES

from common import datasets, envs, evaluation, experiment
from common.datasets import reference_scores
from common.envs import d4rl, graphics
from common.experiment import __main__ as program
from common.experiment import beginning, checkpoints, config, growth, look, stored

ROOT = Path(__file__).resolve().parents[2]
ONE_EPISODE = ["--eval-episodes", "1"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A data file and one finished run of 8 updates and two seeds, with its best policies kept."""
    folder = tmp_path_factory.mktemp("growth")
    runs.write_hdf5(folder / "data.hdf5")
    argv = ["--dataset", str(folder / "data.hdf5"), *runs.TINY, *ONE_EPISODE]
    argv += ["--eval-every", "4"]
    made = [*argv, "--num-updates", "8", "--seeds", "0", "1", "--runs-dir", str(folder / "runs")]
    runs.start("rebrac", [*made, "--name", "made", "--keep", "best"])
    return folder, argv


@pytest.fixture
def tiny(base, tmp_path, monkeypatch):
    """Arguments of a tiny run; the working directory is empty."""
    monkeypatch.chdir(tmp_path)
    return base[1]


@pytest.fixture
def made(base, tiny):
    """A copy of the finished run, where the same command finds it."""
    return Path(shutil.copytree(base[0] / "runs" / "rebrac" / "data" / "made", COPY))


OGBENCH = "pointmaze-medium-navigate-singletask-v0"
OGBENCH_ENV = "cube-single-singletask-v0"
COPY = "runs/rebrac/data/made"
SEEDS = ["--name", "made", "--seeds", "0", "1"]


def refused(capsys, argv, name="rebrac"):
    """The one line with which a start ends, code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as leave:
        runs.start(name, argv)
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def leaves(folder, which="last"):
    state = experiment.load(runs.module("rebrac"), folder, which)[2]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


# --- The length of a run ------------------------------------------------------------------------
LENGTHS = """
def create_state(key, cfg):
    rate = 0.1
    {use}


def train(cfg):
    while step < cfg.num_updates:
        step += 1
"""


@dataclasses.dataclass(frozen=True)
class Config:
    num_updates: int = 8
    cosine: bool = True
    plain: bool = False


@pytest.mark.parametrize(
    ("use", "counts"),
    [
        ("pass", False),
        ("cfg.num_updates", True),
        ("rate = 3 if cfg.num_updates > 5 else 2", True),
        ("getattr(cfg, 'num_updates')", True),
        ("rate = schedule(rate, steps=cfg.num_updates)", True),
        ("(lambda: cfg.num_updates)()", True),
        ("if cfg.cosine: rate = cfg.num_updates", True),
        ("if cfg.plain: rate = cfg.num_updates", False),
        ("rate = cfg.num_updates if cfg.plain else 0", False),
        ("rate = 0 if cfg.plain else cfg.num_updates", True),
        ("if not cfg.cosine: rate = cfg.num_updates", True),  # not understood, so it counts
        ("if cfg.unknown: rate = cfg.num_updates", True),
    ],
)
def test_what_depends_on_the_length(tmp_path, use, counts):
    file = tmp_path / "toy.py"
    file.write_text(LENGTHS.format(use=use))
    where = growth.length_dependence(file, Config())
    assert where == ("create_state (line 4 of toy.py)" if counts else None)


def test_train_may_compare_with_the_length_and_nothing_else(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(LENGTHS.format(use="pass").replace("step += 1", "rate = 1 / cfg.num_updates"))
    assert growth.length_dependence(file, Config()) == "train (line 9 of toy.py)"


@pytest.mark.parametrize("name", NAMES)
def test_files_whose_schedule_ends_with_the_run(name):
    """Those that have a cosine decay, while it is switched on; no other."""
    module = importlib.import_module(f"algorithms.{name}")
    if "cosine" not in vars(module.Config):
        assert growth.length_dependence(module.__file__, module.Config()) is None
        return
    for cosine in (True, False):
        where = growth.length_dependence(module.__file__, module.Config(cosine=cosine))
        assert (where is not None) == cosine


# --- Longer, and evaluated otherwise ------------------------------------------------------------
def test_more_updates_and_other_evaluations(made, tiny, capsys):
    before = (made / "metrics.csv").read_text().splitlines()
    argv = [*tiny, *SEEDS, "--resume"]
    runs.start("rebrac", [*argv, "--num-updates", "8", "--eval-episodes", "2"])  # the last, again
    said = capsys.readouterr().out
    assert "config.yaml: eval_episodes 2 (was 1)" in said and "resuming at update 8" in said
    rows = (made / "metrics.csv").read_text().splitlines()
    assert rows[:-2] == before[:-2] and rows[-2:] != before[-2:]
    assert [row.split(",")[:-4] for row in rows] == [row.split(",")[:-4] for row in before]
    result = json.loads((made / "result.json").read_text())
    assert result["eval_episodes"] == 2 and result["num_updates"] == 8

    scores = runs.start("rebrac", [*argv, "--num-updates", "16", "--eval-every", "8"])
    result = json.loads((made / "result.json").read_text())
    assert result["num_updates"] == 16 and [*result["score"].values()] == scores.tolist()
    evaluated = [row["update"] for row in runs.read_csv(made / "metrics.csv") if row["score"]]
    assert evaluated[::2] == ["0", "4", "8", "16"]
    values = yaml.safe_load((made / "config.yaml").read_text())
    names = ("num_updates", "eval_every", "eval_episodes")
    assert [values[key] for key in names] == [16, 8, 1]
    assert values["record"]["history"] == [
        {"until_update": 8, "eval_episodes": 1},
        {"until_update": 8, "num_updates": 8, "eval_every": 4, "eval_episodes": 2},
    ]
    again = runs.start("rebrac", [*argv, "--num-updates", "16", "--eval-every", "8"])
    assert np.array_equal(scores, again)  # a finished run returns its scores


def test_a_schedule_that_is_switched_off_lets_a_run_grow(tiny):
    """IQL's actor has a cosine schedule over the whole run, unless --cosine is False."""
    runs.write_hdf5("bare.hdf5", attributes={}, actions=np.zeros((60, 1)))  # trained only: cheap
    argv = [*tiny, "--dataset", "bare.hdf5", "--cosine", "False", "--name"]
    runs.start("iql", [*argv, "grown", "--num-updates", "4"])
    runs.start("iql", [*argv, "grown", "--num-updates", "8", "--resume"])
    runs.start("iql", [*argv, "whole", "--num-updates", "8"])
    grown, whole = (Path("runs/iql/bare", name) for name in ("grown", "whole"))
    assert (grown / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    states = [checkpoints.read(checkpoints.manager(folder), 8)[0] for folder in (grown, whole)]
    assert all(np.array_equal(x, states[1][name]) for name, x in states[0].items())


def test_fewer_updates_than_there_are(made, tiny, capsys):
    line = refused(capsys, [*tiny, *SEEDS, "--resume", "--num-updates", "4"])
    assert "has trained for 8 updates already, more than --num-updates 4" in line
    line = refused(capsys, [*tiny, *SEEDS, "--num-updates", "16"])
    assert "exists; continue it with --resume" in line
    runs.write_hdf5("data.hdf5")  # another file of the same name: --resume alone is refused as well
    other = [*tiny, *SEEDS, "--num-updates", "8", "--dataset", "data.hdf5"]
    for words in (other, [*other, "--resume"]):
        line = refused(capsys, words)
        assert "has dataset" in line and "choose another --name" in line
        assert "continue that run with its own dataset and --resume" in line
    config.parse(runs.module("rebrac").Config, [*other, "--name", "another"])  # one remedy
    config.parse(runs.module("rebrac").Config, [*tiny, *SEEDS, "--num-updates", "8", "--resume"])
    longer = [*tiny, *SEEDS, "--resume", "--num-updates", "16"]
    assert "discount" in refused(capsys, [*longer, "--discount", "0.5"])


def test_without_a_name_the_shorter_run_is_found(tiny, capsys):
    """The default name is a hash of the config, so the longer run's is another one."""

    def folder(updates, *words):
        argv = [*tiny, "--num-updates", str(updates), *words]
        return config.run_folder(*config.parse(runs.module("rebrac").Config, argv))

    cfg, options = config.parse(runs.module("rebrac").Config, [*tiny, "--num-updates", "4"])
    short = config.run_folder(cfg, options)
    (short / "checkpoints" / "4").mkdir(parents=True)
    values = config.resolved(cfg, options) | {"record": {}}
    (short / "config.yaml").write_text(yaml.safe_dump(values))
    assert folder(8, "--resume") == folder(8, "--resume", "--eval-episodes", "3") == short
    for words in ((), ("--resume", "--discount", "0.5"), ("--resume", "--seeds", "3")):
        assert not folder(8, *words).exists()
    (short / "checkpoints" / "8").mkdir()  # it has become longer since
    assert folder(12, "--resume") == short
    shutil.copytree(short, short.with_name("0123abcd"))
    line = refused(capsys, [*tiny, "--num-updates", "12", "--resume"])
    assert "could continue 0123abcd, " in line and "--name" in line


def test_without_a_name_a_schedule_of_another_length_does_not_start_anew(tiny, capsys):
    """IQL's schedule ends with the run. A longer run would begin at update 0, unnoticed."""

    def folder(updates, *words):
        argv = [*tiny, "--num-updates", str(updates), *words]
        return config.run_folder(*config.parse(runs.module("iql").Config, argv))

    def refuse(updates, *words):
        with pytest.raises(SystemExit) as leave:
            folder(updates, "--resume", *words)
        (line,) = capsys.readouterr().err.splitlines()
        assert leave.value.code == 2
        return line

    cfg, options = config.parse(runs.module("iql").Config, [*tiny, "--num-updates", "8"])
    short = config.run_folder(cfg, options)
    short.mkdir(parents=True)
    values = config.resolved(cfg, options) | {"record": {}}
    (short / "config.yaml").write_text(yaml.safe_dump(values))
    assert not folder(12, "--resume").exists()  # no checkpoint: nothing is lost
    (short / "checkpoints" / "8").mkdir(parents=True)
    for words in ((), ("--eval-episodes", "3")):
        line = refuse(12, *words)
        assert f"{short} was begun with num_updates 8, and create_state (line" in line
        assert "cannot continue it with 12" in line
    # The remedies, each of which is a run of its own.
    assert "give it a --name" in line and "leave out --resume" in line
    named = folder(12, "--resume", "--name", "longer")
    assert named.name == "longer" and not named.exists()
    own = folder(12)
    assert own != short and not own.exists()
    # Its own length still continues, other settings are another run, and so is a shorter one.
    assert folder(8, "--resume") == short
    for words in ((12, "--discount", "0.5"), (12, "--seeds", "3"), (12, "--cosine", "False"), (4,)):
        assert not folder(words[0], "--resume", *words[1:]).exists()
    # A run of that length, once it has begun, is continued by the same command.
    (own / "checkpoints" / "4").mkdir(parents=True)
    longer = values | {"num_updates": 12}
    (own / "config.yaml").write_text(yaml.safe_dump(longer))
    assert folder(12, "--resume") == own


# --- Beginning with another run -----------------------------------------------------------------
def first_state(folder):
    """Parameters of the checkpoint of update 0."""
    return checkpoints.read(checkpoints.manager(Path(folder)), 0)[0]


def is_parameter(name):
    return name.split(".")[1] in ("params", "target_params")


@pytest.mark.parametrize("optimiser", [False, True])
def test_start_from(made, tiny, optimiser, capsys):
    runs.write_hdf5("other.hdf5", rows=40)
    argv = [*tiny, "--dataset", "other.hdf5", "--seeds", "1", "0", "--num-updates", "4"]
    argv += ["--start-from", COPY, "--discount", "0.9", "--name", "new"]
    runs.start("rebrac", [*argv, *["--start-optimizer"] * optimiser])
    assert f"begins with the parameters of {COPY} at update 8" in capsys.readouterr().out
    there = checkpoints.read(checkpoints.manager(made), 8)[0]
    here = first_state("runs/rebrac/other/new")
    equal = {name: np.array_equal(here[name], there[name][::-1]) for name in here}
    assert all(equal[name] for name in here if is_parameter(name))
    assert all(equal.values()) == optimiser
    record = yaml.safe_load(Path("runs/rebrac/other/new/config.yaml").read_text())["record"]
    origin = record["started_from"]
    assert origin["folder"] == COPY and origin["update"] == 8 and len(origin["digest"]) == 64
    if not optimiser:
        shutil.rmtree(made)  # a run that has begun needs its origin no more
        before = (Path("runs/rebrac/other/new") / "metrics.csv").read_text()
        runs.start("rebrac", [*argv, "--num-updates", "8", "--resume"])
        assert (Path("runs/rebrac/other/new") / "metrics.csv").read_text().startswith(before)


def test_every_seed_begins_with_a_run_of_one_seed(made, capsys):
    state = experiment.load(runs.module("rebrac"), made, 4)[2]
    facts = beginning.facts(COPY, "rebrac")
    there = checkpoints.read(checkpoints.manager(made), 8)[0]
    for seeds, rows in (([5], [0, 0]), ([8, 7], [1, 0])):
        begun = beginning.begin(state, (7, 8), facts | {"seeds": seeds}, optimiser=False)
        for name, array in checkpoints.names(begun).items():
            if is_parameter(name):
                assert np.array_equal(array, there[name][np.array(rows)])
    with pytest.raises(SystemExit):
        beginning.begin(state, (7, 8), facts | {"digest": "another"}, optimiser=False)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        beginning.begin({"params": {"new": np.zeros((2, 3))}}, (0, 1), facts, optimiser=False)
    said = capsys.readouterr().err
    assert "has no params.new, which this config makes; give the settings of that run" in said


def test_what_cannot_be_a_beginning_is_one_line(made, tiny, capsys):
    def line(*words, name="rebrac"):
        return refused(capsys, [*tiny, "--name", "x", "--seeds", "0", *words], name)

    start = ("--start-from", COPY)
    assert "no run folder" in line("--start-from", "nowhere")
    above = line("--start-from", "runs/rebrac")
    assert "--start-from runs/rebrac: no config.yaml" in above and f"below it is {COPY}" in above
    wide = line(*start, "--hidden", "9")
    assert "has 8 numbers there and 9 here" in wide
    shutil.rmtree("runs/rebrac/data/x")
    assert "seeds 0 1 and no seed 2" in line(*start, "--seeds", "2")
    shutil.rmtree("runs/rebrac/data/x")
    assert "a run of rebrac; td3_bc begins with" in line(*start, name="td3_bc")
    assert "say which with --start-from" in line("--start-optimizer")
    schedule = line(*start, "--start-optimizer", name="iql")
    assert "depends on num_updates" in schedule
    shutil.rmtree(made / "checkpoints")
    assert "no checkpoint in it" in line(*start)


# --- The best policy ----------------------------------------------------------------------------
def test_the_best_policy_is_kept(made, capsys):
    """That of each seed's best evaluation in metrics.csv; update 0 is not a result of training."""
    rows = [row for row in runs.read_csv(made / "metrics.csv") if row["update"] != "0"]
    module, wanted = runs.module("rebrac"), []
    for seed in ("0", "1"):
        wanted.append(
            max((float(x["score"]), -int(x["update"])) for x in rows if x["seed"] == seed)
        )
    cfg, dataset, state, updates = stored.load_all(module, made, "best")
    assert updates == [-update for _, update in wanted]
    result = json.loads((made / "result.json").read_text())
    assert [*result["best_kept_at"].values()] == updates
    act, keys = stored.acting(module, cfg, dataset, state), experiment.streams(cfg.seeds, 3)[2]
    with evaluation.Rollouts(dataset, act, keys, cfg) as rollouts:
        found = rollouts.run(module.policy_params(state), 0)["score"]
    assert found == pytest.approx([score for score, _ in wanted], rel=1e-8)


def test_which_checkpoint(made, capsys):
    assert all(map(np.array_equal, leaves(made, 8), leaves(made)))
    assert not all(map(np.array_equal, leaves(made, 4), leaves(made)))
    shutil.rmtree(made / "best")
    for which, said in ((5, "no checkpoint 5; there are 4, 8"), ("best", "--keep best")):
        with pytest.raises(SystemExit) as leave:
            experiment.load(runs.module("rebrac"), made, which)
        assert leave.value.code == 2 and said in capsys.readouterr().err


def test_a_resumed_run_keeps_the_same_best(made, tiny):
    runs.start("rebrac", [*tiny, *SEEDS, "--num-updates", "16", "--resume", "--keep", "best"])
    whole = [*tiny, "--seeds", "0", "1", "--num-updates", "16", "--name", "whole"]
    runs.start("rebrac", [*whole, "--keep", "best"])
    assert all(map(np.array_equal, leaves(made, "best"), leaves(made.with_name("whole"), "best")))


# --- Acting without the data --------------------------------------------------------------------
def test_act_in_a_fresh_process_elsewhere(tiny, tmp_path):
    """One observation after the other in the env itself, with a memory and with integer actions.

    For the evaluations of every algorithm see test_algorithms.py.
    """
    wanted = []
    for name, write in (("dt", runs.write_hdf5), ("bc", runs.write_cartpole)):
        argv = ["--dataset", write(f"{name}.hdf5"), *runs.tiny(name), *ONE_EPISODE]
        runs.start(name, [*argv, "--num-updates", "4", "--name", "a"])
        wanted += [runs.read_csv(f"runs/{name}/{name}/a/metrics.csv")[-1]["return"]] * 2
        Path(f"{name}.hdf5").unlink()
    shutil.move("runs", tmp_path / "elsewhere")
    code = """if True:
        import gymnasium
        from algorithms import bc, dt
        from common import experiment
        for module, name, env in ((dt, "dt", "Pendulum-v1"), (bc, "bc", "CartPole-v1")):
            policy = experiment.load_policy(module, f"{name}/{name}/a")
            env = gymnasium.make(env, max_episode_steps=10)
            for episode in range(2):
                policy.reset()
                observation, _ = env.reset(seed=10_000)
                total, reward, over = 0.0, 0.0, False
                while not over:
                    action = policy.act(observation, reward)
                    observation, reward, termination, truncation, _ = env.step(action)
                    total, over = total + float(reward), termination or truncation
                print(f"{total:.9g}")
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "elsewhere",
        env=runs.environment(tmp_path / "xla", XLA_FLAGS="--xla_backend_optimization_level=0"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.split() == wanted, done.stderr


def test_the_data_are_read_only_when_they_are_asked_for(made):
    dataset = experiment.load(runs.module("rebrac"), made)[1]
    assert dataset.score(np.array([-100.0])) == 0 and dataset.num_actions is None
    assert dataset.transitions.observation.shape == (54, 3)
    assert len(dataset.episode_returns) == len(dataset.episode_ends) == 6


def test_a_run_from_before_these_records_needs_its_data(made):
    """What newer runs record is then read from the data set."""
    values = yaml.safe_load((made / "config.yaml").read_text())
    for key in ("env_facts", "shapes", "num_actions", "horizon", "score_is_success", "acting"):
        del values["record"][key]
    module, observation = runs.module("rebrac"), np.float32([0.1, -0.2, 0.3])
    action = experiment.load_policy(module, made).act(observation)
    (made / "config.yaml").write_text(yaml.safe_dump(values))
    assert np.array_equal(experiment.load_policy(module, made).act(observation), action)
    dataset = experiment.load(module, made)[1]
    assert dataset.horizon == 10 and dataset.make_env().action_space.shape == (1,)


@pytest.mark.parametrize(
    ("space", "bounds"),
    [
        (gymnasium.spaces.Box(-2, 3, (2,), np.float32), ([-2.0, -2.0], [3.0, 3.0])),
        (gymnasium.spaces.Discrete(3), None),
    ],
)
@pytest.mark.parametrize("keys", [(), ("b", "a")])
def test_the_translator_agrees_with_the_env(space, bounds, keys):
    number = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    told = []

    class Env(gymnasium.Env):
        observation_space = gymnasium.spaces.Dict({"a": number, "b": number}) if keys else number
        action_space = space

        def reset(self, *, seed=None, options=None):
            return self.observation_space.sample(), {}

        def step(self, action):
            told.append(action)
            return self.observation_space.sample(), 0.0, False, False, {}

    env, bounds = Env(), bounds and tuple(map(np.float32, bounds))
    facts = json.loads(json.dumps(envs.remembered(env, 2, 3, bounds, {})))
    translator = envs.Translator(facts, keys, bounds)
    flat = envs.flat_and_scaled(lambda _: env, keys, bounds)()
    env.observation_space.seed(0)
    seen, _ = flat.reset()
    env.observation_space.seed(0)
    assert np.array_equal(translator.flat(env.observation_space.sample()), seen)
    for action in (1, 2) if bounds is None else np.float32([[-1, 0.3], [0.1, 1]]):
        flat.step(action)
        assert np.array_equal(translator.action(action), told[-1])


D4RL = {  # data set -> numbers per observation
    "hopper-medium-v2": 11,
    "ant-medium-v2": 111,
    "antmaze-umaze-v2": 29,
    "maze2d-umaze-dense-v1": 4,
    "kitchen-partial-v0": 60,
    "pen-human-v1": 45,
    "relocate-human-v1": 39,
}


@pytest.mark.parametrize("name", D4RL)
def test_an_env_with_d4rls_behaviour_is_made_again_without_the_data(name):
    pytest.importorskip("gymnasium_robotics")
    row = reference_scores.table()[name]
    adapted = {"row": {key: row[key] for key in ("suite", "dataset")}, "width": D4RL[name]}
    adapted["flipped"] = row["suite"] == "adroit"
    options = d4rl.options(row) | {"max_episode_steps": 4}
    env = d4rl.adapt(envs.make(row["env_id"], **options), **adapted)
    assert env.observation_space.shape == (D4RL[name],)
    spec = remembered_spec(env, adapted)
    assert ("adapted" in spec) == (name != "hopper-medium-v2")
    assert_same_episode(env, envs.make_remembered(spec))


def remembered_spec(env, adapted=None):
    """What config.yaml would hold of an env."""
    bounds = env.action_space.low, env.action_space.high
    facts = envs.remembered(env, 1, None, bounds, adapted or {})
    return yaml.safe_load(yaml.safe_dump(facts))["spec"]


def assert_same_episode(one, other):
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space
    one.action_space.seed(0)
    np.testing.assert_array_equal(one.reset(seed=3)[0], other.reset(seed=3)[0])
    over = False
    while not over:
        action = one.action_space.sample()
        (seen, *rest, _), (again, *others, _) = one.step(action), other.step(action)
        np.testing.assert_array_equal(seen, again)
        assert rest == others
        over = rest[1] or rest[2]


def inside(render_mode=None):
    return gymnasium.wrappers.RecordEpisodeStatistics(runs.Endless(render_mode))


class Own(gymnasium.Wrapper):
    """A wrapper of a user's own: no run folder names its code."""


@pytest.mark.parametrize(
    ("wrapper", "names"),
    [
        (lambda env: env, None),
        (gymnasium.wrappers.ClipAction, ["ClipAction"]),
        (lambda env: gymnasium.wrappers.ClipAction(gymnasium.wrappers.FlattenObservation(env)),
         ["FlattenObservation", "ClipAction"]),
        (lambda env: gymnasium.wrappers.RescaleAction(env, -2.0, 2.0), ["RescaleAction"]),
        (lambda env: gymnasium.wrappers.TransformReward(env, lambda reward: -reward), "data"),
        (Own, "data"),
        (lambda env: gymnasium.wrappers.ClipAction(Own(env)), "data"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("entry", [runs.Endless, inside])
def test_an_env_in_wrappers_is_made_again(wrapper, names, entry):
    gymnasium.register("Inner-v0", entry, max_episode_steps=4)
    try:
        spec = remembered_spec(env := wrapper(gymnasium.make("Inner-v0")))
        if names == "data":  # then the data tell it, if they can
            assert spec is None
            return
        places = [wrapper["entry_point"].rpartition(":")[2] for wrapper in spec.get("wrappers", [])]
        assert places == (names or [])
        assert_same_episode(env, envs.make_remembered(spec))
    finally:
        del gymnasium.registry["Inner-v0"]


@pytest.mark.parametrize("name", ["maze2d-umaze-v1", OGBENCH])
def test_a_run_of_a_benchmark_is_evaluated_without_its_data(tmp_path, monkeypatch, capsys, name):
    """Its env is not the plain one of an id: D4RL's wrappers, a task that OGBench registers."""
    pytest.importorskip("gymnasium_robotics")
    pytest.importorskip("ogbench")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("OGBENCH_DATASET_DIR", str(tmp_path))
    place = np.random.default_rng(0).normal(1, 0.1, (12, 4))
    columns = dict.fromkeys(("observations", "actions", "qpos", "qvel"), place[:, :2])
    columns["actions"] = columns["actions"] / 10
    np.savez("pointmaze-medium-navigate-v0.npz", **columns, terminals=np.arange(12) % 6 == 5)
    columns = {"observations": place, "actions": place[:, :2] / 10}
    runs.write_hdf5("maze2d-umaze-sparse-v1.hdf5", 12, {}, **columns)
    argv = ["--dataset", name, *runs.tiny("bc"), *ONE_EPISODE, "--env-steps", "4", "--name", "a"]
    runs.start("bc", [*argv, "--num-updates", "4", "--eval-every", "4"])
    for file in (*tmp_path.glob("*.npz"), *tmp_path.glob("*.hdf5")):
        file.unlink()
    row = runs.read_csv(f"runs/bc/{name}/a/metrics.csv")[-1]
    Path("elsewhere").mkdir()
    shutil.move(f"runs/bc/{name}/a", "elsewhere/b")
    program.main(["elsewhere/b", "--evaluate", "1"])
    number = f"{float(row['return']):.2f}"
    assert f"seed 0 at update 4: score {float(row['score']):.2f}, return {number}," in (
        capsys.readouterr().out
    )


# --- Looking at a run ---------------------------------------------------------------------------
def test_look(made, capsys):
    program.main([COPY, "--evaluate", "1", "--plot", "curve.png"])
    said = capsys.readouterr().out
    assert "rebrac" in said and "8 of 8, finished" in said and "drawn: curve.png" in said
    assert Path("curve.png").read_bytes()[:4] == b"\x89PNG"
    for row in runs.read_csv(made / "metrics.csv")[-2:]:
        assert f"seed {row['seed']} at update 8: score {float(row['score']):.2f}," in said


def test_new_start_states(made, capsys):
    args = ["--evaluate", "2"]
    for starts in ("same", "new"):
        program.main([COPY, *args, "--starts", starts])
    said = capsys.readouterr().out
    assert "the start states of training" in said and "new start states" in said
    lines = [line for line in said.splitlines() if line.startswith(("  seed 0", "  seed 1"))]
    assert len(lines) == 4 and lines[0] != lines[2]


def test_the_score_of_every_episode(made, capsys):
    program.main([COPY, "--evaluate", "3", "--keep-episodes"])
    said = capsys.readouterr().out
    rows = runs.read_csv(Path(COPY, "episodes.csv"))
    assert [(row["seed"], row["episode"]) for row in rows] == [
        (str(seed), str(episode)) for seed in (0, 1) for episode in range(3)
    ]
    for seed in (0, 1):
        mean = np.mean([float(row["score"]) for row in rows if row["seed"] == str(seed)])
        assert f"seed {seed} at update 8: score {mean:.2f}," in said


@pytest.mark.parametrize("starts", ["same", "new"])
@pytest.mark.parametrize("which", ["last", "best", "8"])
def test_the_scores_say_whose_they_are(made, which, starts):
    args = ["--evaluate", "2", "--keep-episodes", "--which", which, "--starts", starts]
    program.main([COPY, *args])
    rows = runs.read_csv(made / "episodes.csv")
    assert {(row["which"], row["starts"]) for row in rows} == {(which, starts)}
    updates = {"0": 8, "1": 8}
    if which == "best":
        updates = json.loads((made / "result.json").read_text())["best_kept_at"]
    assert {row["seed"]: int(row["update"]) for row in rows} == updates


class Drawn(runs.Endless):
    """With pictures, whose first pixel counts the steps."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012

    def render(self):
        return np.full((8, 8, 3), np.uint8(100 + 10 * self.position[0]))


def test_video(made, monkeypatch, capsys):
    make = Drawn

    def make_env(self, render_mode=None):
        env = gymnasium.wrappers.TimeLimit(make(render_mode), 10)
        return envs.flat_and_scaled(lambda _: env, (), (np.float32([-1]), np.float32([1])))()

    monkeypatch.setattr(stored.StoredDataset, "make_env", make_env)
    program.main([COPY, "--video", "film.gif"])
    assert "filmed: film.gif, 10 steps with return" in capsys.readouterr().out
    assert Path("film.gif").read_bytes()[:3] == b"GIF"
    make = runs.Endless
    with pytest.raises(SystemExit):
        program.main([COPY, "--video", "film.gif"])
    assert "--video: the env" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", OGBENCH_ENV])
def test_video_of_mujoco(env_id, tmp_path, capsys, monkeypatch):
    """Also where MuJoCo was imported before anything was to be drawn. Without a library: a line."""
    pytest.importorskip("ogbench")
    for variable in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(variable, raising=False)
    env = envs.make(env_id)
    assert graphics.is_mujoco(env)
    env.close()
    graphics._check_context.cache_clear()

    def make_env(self, render_mode=None):
        env = envs.make(env_id, render_mode=render_mode, max_episode_steps=3)
        bounds = env.action_space.low, env.action_space.high
        return envs.flat_and_scaled(lambda _: env, (), bounds)()

    dataset = type("Dataset", (), {"make_env": make_env})()
    size = make_env(None).action_space.shape
    policy = SimpleNamespace(dataset=dataset, act_flat=lambda *_: np.zeros(size, np.float32))
    args = SimpleNamespace(folder="x", video=str(tmp_path / "film.gif"), starts="same")
    try:
        program.film(policy, args)
    except SystemExit as leave:
        line = capsys.readouterr().err
        assert leave.code == 2 and "MUJOCO_GL" in line and "MuJoCo cannot draw" in line
        pytest.skip(line)
    assert "3 steps" in capsys.readouterr().out
    assert Path(args.video).read_bytes()[:3] == b"GIF"


@pytest.mark.parametrize(
    ("env_id", "drawn"),
    [("PointMaze_UMaze-v3", True), ("AdroitHandDoor-v1", True), ("Hopper-v4", True),
     ("atoll/PointMaze_UMaze-v0", True), ("CartPole-v1", False), ("Pendulum-v1", False)],
)  # fmt: skip
def test_which_envs_mujoco_draws(env_id, drawn):
    pytest.importorskip("gymnasium_robotics")
    assert graphics.is_mujoco(envs.make(env_id)) == drawn


def test_export_acts_in_numpy(made, capsys):
    """The function of docs/forking.md, taken from there, acts as the policy does."""
    program.main([COPY, "--export", "policy", "--seed", "1"])  # under exactly that name
    text = (ROOT / "docs" / "forking.md").read_text()
    (lines,) = re.findall(r"^(def act\(p, .*?)\n\n\n", text, re.M | re.S)
    of_docs = {"np": np}
    exec(lines, of_docs)
    observation = np.float32([0.1, -0.2, 0.3])
    action = of_docs["act"](np.load("policy"), observation)
    policy = experiment.load_policy(runs.module("rebrac"), made, seed=1)
    assert action == pytest.approx(policy.act(observation), abs=1e-5)


def test_the_file_of_a_run_is_found(made, tiny, capsys):
    assert look.find_module(made) is runs.module("rebrac")
    fork = Path(shutil.copy(ROOT / "algorithms" / "rebrac.py", "fork.py")).resolve()
    text = (made / "config.yaml").read_text().replace(str(ROOT / "algorithms/rebrac.py"), str(fork))
    (made / "config.yaml").write_text(text)
    assert Path(look.find_module(made).__file__) == fork
    fork.unlink()
    assert look.find_module(made) is runs.module("rebrac")  # as on another machine
    (made / "config.yaml").write_text(text.replace("algorithm: rebrac", "algorithm: mine"))
    for file, said in ((None, "no mine.py was found; give --file"), ("no.py", "no such file")):
        with pytest.raises(SystemExit):
            look.find_module(made, file)
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no run folder"),
        ([COPY, "--which", "x"], "--which x: must be last, best or"),
        ([COPY, "--evaluate", "0"], "--evaluate 0: must be at least 1"),
        ([COPY, "--evaluate", "1", "--which", "5"], "no checkpoint 5"),
        ([COPY, "--export", "no/where.npz"], "--export no/where.npz: cannot be written"),
        ([COPY, "--plot", "no/where.png"], "--plot no/where.png: cannot be written"),
        ([COPY, "--export", "x.npz", "--seed", "9"], "no seed 9; there are 0, 1"),
        ([], "the following arguments are required: folder"),
        ([COPY, "--plot"], "--plot: expected one argument"),
        ([COPY, "--starts", "old"], "--starts: invalid choice"),
        ([COPY, "--evaluate", "1", "--file", f"{COPY}/config.yaml"], "no Python file"),
    ],
)
def test_wrong_words_are_one_line(made, words, said, capsys):
    assert_refused(words, said, capsys)


def test_a_path_near_a_run_folder_names_it(made, capsys):
    """Above it, inside it, and where there is none."""
    for given in ("runs", "runs/rebrac", "runs/rebrac/data", "."):
        assert_refused([given], f"the newest below it is {Path(COPY)}", capsys)
    for given in ("checkpoints", "checkpoints/8", "metrics.csv"):
        assert_refused([f"{COPY}/{given}"], f"did you mean {COPY}?", capsys)
    assert_refused(["nowhere"], "give runs/ALGORITHM/DATA SET/NAME", capsys)
    program.main([COPY])  # the remedy
    older = Path(shutil.copytree(made, "runs/rebrac/data/older"))
    os.utime(older / "config.yaml", (1, 1))
    assert_refused(["runs"], f"the newest below it is {COPY}", capsys)


def assert_refused(words, said, capsys):
    with pytest.raises(SystemExit) as leave:
        program.main(words)
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def cut_checkpoints(folder):
    for file in (folder / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (write("config.yaml", b""), [], "is empty, so nothing tells what this run was"),
        (write("config.yaml", b"[1]"), [], "must be a mapping"),
        (write("config.yaml", b"a: b: c"), [], "not valid YAML"),
        (write("config.yaml", b"\xff\xfe"), [], "cannot be read"),
        (write("config.yaml", b"record: 3"), [], "record: must be a mapping"),
        (write("result.json", b"{"), [], "delete it, --resume writes it again"),
        (write("result.json", b"3"), [], "delete it, --resume writes it again"),
        (write("metrics.csv", b""), ["--plot", "x.png"], "no row in its metrics.csv yet"),
        (write("metrics.csv", b"update,seed\n"), ["--plot", "x.png"], "no row in its"),
        (lambda x: shutil.rmtree(x / "checkpoints"), ["--evaluate", "1"], "no readable checkpoint"),
        (cut_checkpoints, ["--evaluate", "1"], "no checkpoint can be read"),
    ],
)
def test_a_damaged_run_folder_is_one_line(made, change, words, said, capsys):
    """What is looked at is not advised to be deleted, but for a file that --resume writes again."""
    change(made)
    with pytest.raises(SystemExit) as leave:
        program.main([COPY, *words])
    lines = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and said in lines[-1] and lines[-1].startswith("error: ")
    assert all(line.startswith("WARNING: checkpoint") for line in lines[:-1])
    assert "delete" not in lines[-1] or "result.json" in lines[-1]


def test_a_damaged_result_is_written_again(made, tiny, capsys):
    """The remedy of its message."""
    before = json.loads((made / "result.json").read_text())
    (made / "result.json").write_bytes(b"{")
    argv = [*tiny, *SEEDS, "--resume", "--num-updates", "8"]
    assert "no JSON" in refused(capsys, argv)
    (made / "result.json").unlink()
    runs.start("rebrac", argv)
    after = json.loads((made / "result.json").read_text())
    assert before["score"] == after["score"] and before["best_score"] == after["best_score"]


def test_a_run_of_another_file_is_told_as_such(made, capsys):
    with pytest.raises(SystemExit) as leave:
        experiment.load(runs.module("td3_bc"), made)
    line = capsys.readouterr().err
    assert leave.value.code == 2 and "a run of rebrac, whose settings td3_bc.py does not have" in (
        line
    )


# --- Remedies -----------------------------------------------------------------------------------
MADE = [*SEEDS, "--num-updates", "8"]
ALONE = ["--seeds", "0", "--num-updates", "8", "--name", "new"]
TOY = {"mapping.yaml": "datasets: 3\n", "key.yaml": "discuont: 0.5\n"}
# The words that are refused, words of the message, and the words after its remedy. Later flags
# replace earlier ones; what begins with a variable's name sets it.
REMEDIES = [
    (MADE, "continue it with --resume", [*MADE, "--resume"]),
    (MADE, "or start another run with --name", [*MADE, "--name", "other"]),
    (
        [*MADE, "--resume", "--discount", "0.5"],
        "with its own discount and --resume",
        [*MADE, "--resume"],
    ),
    (
        [*MADE, "--resume", "--discount", "0.5"],
        "choose another --name",
        [*MADE, "--resume", "--discount", "0.5", "--name", "other"],
    ),
    (
        [*MADE, "--resume", "--seeds", "0", "1", "3", "2"],
        "to add seeds, train --seeds 3 2 under another --name",
        [*MADE, "--resume", "--seeds", "3", "2", "--name", "other"],
    ),
    (
        [*SEEDS, "--num-updates", "4", "--resume"],
        "or choose another --name",
        [*SEEDS, "--num-updates", "4", "--resume", "--name", "other"],
    ),
    (
        [*SEEDS, "--num-updates", "4", "--resume"],
        "give at least 8",
        [*SEEDS, "--num-updates", "8", "--resume"],
    ),
    (
        [*ALONE, "--start-optimizer"],
        "say which with --start-from",
        [*ALONE, "--start-optimizer", "--start-from", COPY],
    ),
    ([*ALONE, "--num-updates", "10"], "8 would be one", ALONE),
    (
        [*ALONE, "--num-updates", "6", "--eval-every", "6"],
        "8 would be one",
        [*ALONE, "--num-updates", "8", "--eval-every", "8"],
    ),
    (
        [*ALONE, "--eval-every", "2"],
        "or --log-every 2",
        [*ALONE, "--eval-every", "2", "--log-every", "2"],
    ),
    ([*ALONE, "--seeds", "1", "1"], "give at least one seed, and none twice", ALONE),
    ([*ALONE, "--discount", "2"], "must be a number from 0 to 1", [*ALONE, "--discount", "1"]),
    ([*ALONE, "--name", "../x"], "letters, digits, '_', '-'", [*ALONE, "--name", "a_b-c.1"]),
    ([*ALONE, "--runs-dir", "~nobody-here/x"], "a path without '~'", [*ALONE, "--runs-dir", "x"]),
    ([*ALONE, "--devices", "0"], "must be at least 1", [*ALONE, "--devices", "1"]),
    ([*ALONE, "--config", "key.yaml"], "did you mean 'discount'?", ALONE),
    ([*ALONE, "--config", "mapping.yaml"], "must be a mapping of data set ids", ALONE),
    (
        ["WANDB_MODE=sometimes", *ALONE, "--wandb", "None"],
        "must be online, offline or disabled",
        ["WANDB_MODE=offline", *ALONE, "--wandb", "None"],
    ),
    (
        ["WANDB_MODE=sometimes", *ALONE, "--wandb", "None"],
        "--wandb says it as well",
        ["WANDB_MODE=sometimes", *ALONE, "--wandb", "disabled"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said", "remedy"), REMEDIES, ids=[row[1] for row in REMEDIES])
def test_the_remedy_of_a_runs_message_works(made, tiny, monkeypatch, capsys, words, said, remedy):
    for name, text in TOY.items():
        Path(name).write_text(text)

    def parse(words):
        variables = [word for word in words if word.startswith("WANDB_")]
        for name, value in (word.split("=") for word in variables):
            monkeypatch.setenv(name, value)
        argv = [*tiny, *(word for word in words if word not in variables)]
        return config.parse(runs.module("rebrac").Config, argv)

    with pytest.raises(SystemExit) as leave:
        parse(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2 and said in line, line
    parse(remedy)


def test_a_folder_of_runs_that_is_a_file(tiny, capsys):
    Path("file").touch()
    argv = [*tiny, *ALONE, "--runs-dir", "file"]
    assert "file/rebrac/data/new" in (line := refused(capsys, argv))
    assert "choose another --runs-dir" in line
    cfg, options = config.parse(runs.module("rebrac").Config, [*argv, "--runs-dir", "folder"])
    dataset = datasets.load(cfg.dataset)
    with experiment.Run(cfg, options, dataset) as run:  # the remedy
        assert run.folder == Path("folder/rebrac/data/new")
        run.done = True


WITH_A_REMEDY = r"\b(set|give|delete|use|choose|resume|continue|wait|make|install|name|train) |"
WITH_A_REMEDY += r"did you mean|near it|would be one|or neither|--(name|file|resume|env|wandb)\b"
# Words of a message -> the test that sees it, and applies its remedy where one is not obvious.
SEEN_IN = {
    "start without --start-optimizer": "test_what_cannot_be_a_beginning_is_one_line",
    "is no longer what this run was begun with": "test_every_seed_begins_with_a_run_of_one_seed",
    "give --seeds of that run": "test_what_cannot_be_a_beginning_is_one_line",
    "which this config makes": "test_every_seed_begins_with_a_run_of_one_seed",
    "has another State than this": "test_a_checkpoint_of_another_state_is_not_called_damaged",
    "when it can be written again": "test_a_disk_that_takes_no_more",
    "set --num-updates 0": "test_bad_input_is_one_line",
    "to evaluate in that env": "test_bad_input_is_one_line",
    "and the fit of its dynamics ends at": (
        "test_a_fit_that_has_not_ended_or_is_not_there_is_refused"
    ),
    "no env is known for": "test_an_online_phase_without_an_env_is_one_line",
    "so --resume cannot": "test_without_a_name_a_schedule_of_another_length_does_not_start_anew",
    "all of its updates differ": "test_a_resumed_run_equals_an_undisturbed_one",
    "say which one with --name": "test_without_a_name_the_shorter_run_is_found",
    "give HOST:PORT/COUNT/INDEX": "test_distributed_wants_an_address",
    "--resume writes it again": "test_a_damaged_result_is_written_again",
    "has other columns": "test_rows_with_other_columns_are_not_appended",
    "another process trains in it": "test_bad_input_as_a_command",
    "cannot be divided equally among": "test_seeds_that_devices_cannot_share",
    "train with --keep best": "test_which_checkpoint",
    "is of a run": "test_a_run_goes_on_with_as_many_bits_as_it_began_with",
    "start again with --resume": "test_deleting_is_advised_for_damage_alone",
    "make the seed a parameter": "test_a_sweep_agent_takes_one_seed",
    "so nothing tells what this run was": "test_a_damaged_run_folder_is_one_line",
    "no such file": "test_the_file_of_a_run_is_found",
    "no Python file": "test_wrong_words_are_one_line",
    "aliases make more than": "test_bad_configs",
    "; choose another --runs-dir": "test_a_folder_of_runs_that_is_a_file",
    "has a new name": "test_a_former_name_of_a_field_is_one_line_that_names_the_present_one",
    "no checkpoint can be read": "test_every_checkpoint_damaged",
    "give at least one hidden layer": "test_a_config_made_in_python_is_checked",
    "chooses rows by its State or by": "test_rows_that_are_not_known_ahead_are_refused",
    "is in its online phase": (
        "test_the_offline_phase_is_that_of_an_offline_run_which_may_go_on_online"
    ),
}


def test_every_message_of_a_run_with_a_remedy_is_seen():
    tests = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    rows, missing = [said for _, said, _ in REMEDIES], []
    for file in sorted((ROOT / "common" / "experiment").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "fail":
                parts = [x.value for x in ast.walk(node) if isinstance(x, ast.Constant)]
                text = "".join(x for x in parts if isinstance(x, str))
                known = [name for words, name in SEEN_IN.items() if words in text]
                plain = re.sub(r"\W|\d", "", text)
                known += [said for said in rows if re.sub(r"\W|\d", "", said) in plain]
                if re.search(WITH_A_REMEDY, text) and not known:
                    missing.append(f"{file.name}:{node.lineno} {text}")
    assert not missing, missing
    assert all(f"def {name}(" in tests for name in SEEN_IN.values())
