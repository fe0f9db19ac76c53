# SPDX-License-Identifier: Apache-2.0
"""Run folders that grow, begin with others, keep their best policy, and act without their data."""

import dataclasses
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import helpers_runs as runs
import jax
import numpy as np
import pytest
import yaml
from own_files import NAMES

from common import envs, evaluation, experiment
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
    """Those that have a cosine decay, unless it is switched off; no other."""
    module = importlib.import_module(f"algorithms.{name}")
    where = growth.length_dependence(module.__file__, module.Config())
    assert (where is not None) == ("cosine" in vars(module.Config))
    if where:
        flat = module.Config(cosine=False)
        assert growth.length_dependence(module.__file__, flat) is None


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


def test_fewer_updates_than_there_are(made, tiny, capsys):
    line = refused(capsys, [*tiny, *SEEDS, "--resume", "--num-updates", "4"])
    assert "has trained for 8 updates already, more than --num-updates 4" in line
    line = refused(capsys, [*tiny, *SEEDS, "--num-updates", "16"])
    assert "exists; continue it with --resume" in line
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


def test_every_seed_begins_with_a_run_of_one_seed(made):
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


def test_what_cannot_be_a_beginning_is_one_line(made, tiny, capsys):
    def line(*words, name="rebrac"):
        return refused(capsys, [*tiny, "--name", "x", "--seeds", "0", *words], name)

    start = ("--start-from", COPY)
    assert "no run folder" in line("--start-from", "nowhere")
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
    facts = json.loads(json.dumps(envs.remembered(env, 2, 3, bounds)))
    translator = envs.Translator(facts, keys, bounds)
    flat = envs.flat_and_scaled(lambda _: env, keys, bounds)()
    env.observation_space.seed(0)
    seen, _ = flat.reset()
    env.observation_space.seed(0)
    assert np.array_equal(translator.flat(env.observation_space.sample()), seen)
    for action in (1, 2) if bounds is None else np.float32([[-1, 0.3], [0.1, 1]]):
        flat.step(action)
        assert np.array_equal(translator.action(action), told[-1])


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


def test_export_acts_in_numpy(made, capsys):
    """The lines of docs: two hidden layers of ReLU and a tanh, in NumPy alone."""
    program.main([COPY, "--export", "policy.npz", "--seed", "1"])
    p = np.load("policy.npz")
    observation = np.float32([0.1, -0.2, 0.3])
    x = observation
    layers = sorted(name[: -len(".kernel")] for name in p if name.endswith(".kernel"))
    for i, layer in enumerate(layers):
        x = x @ p[f"{layer}.kernel"] + p[f"{layer}.bias"]
        x = np.tanh(x) if i + 1 == len(layers) else np.maximum(x, 0)
    action = p["action_low"] + (p["action_high"] - p["action_low"]) * (x + 1) / 2
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
    ],
)
def test_wrong_words_are_one_line(made, words, said, capsys):
    with pytest.raises(SystemExit) as leave:
        program.main(words)
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
