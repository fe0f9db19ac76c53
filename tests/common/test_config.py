# SPDX-License-Identifier: Apache-2.0
"""Config default < YAML < its row of the data set < command line, and what a run folder keeps."""

import dataclasses
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import helpers_runs as runs
import own_files
import pytest
import yaml

from common import datasets
from common.experiment import config, ranges, wrong_words

TOY = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    dataset: str = "local/pointmaze/umaze-v0"
    seeds: tuple[int, ...] = (0,)
    num_updates: int = 100
    log_every: int = 10
    eval_every: int = 50
    learning_rate: float = 1e-3
    discount: float = 0.99
    shift: float = 0.0
    hidden: tuple[int, ...] = (32, 32)
    weights: tuple[float, ...] = ()
    note: str = "plain"
    flag: bool = False
    limit: int | None = None
"""
YAML = """
dataset: maze2d-umaze-v1
learning_rate: 1e-4
hidden: [64, 64]
discount: 0.9
datasets:
  maze2d-umaze-v1: {discount: 0.8, hidden: [16], shift: -1.5}
  maze2d-large-v1: {discount: 0.7}
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An algorithm file `toy.py` with a maze2d.yaml, in a folder of its own."""
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "configs" / "toy").mkdir(parents=True)
    file = tmp_path / "algorithms" / "toy.py"
    file.write_text(TOY)
    (tmp_path / "configs" / "toy" / "maze2d.yaml").write_text(YAML)
    spec = importlib.util.spec_from_file_location("toy", file)
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "toy", loaded)
    spec.loader.exec_module(loaded)
    monkeypatch.chdir(tmp_path)
    return loaded.Config


def parse(config_class, *words):
    return config.parse(config_class, [word for line in words for word in line.split()])[0]


def error(capsys, config_class, *words):
    """The one line that a start with these words ends with."""
    with pytest.raises(SystemExit) as leave:
        parse(config_class, *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2
    assert line.startswith("error: ")
    return line


# --- Precedence ---------------------------------------------------------------------------------
MAZE = ("--dataset", "maze2d-umaze-v1")


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        ([], "learning_rate", 1e-3),  # the default: the default data set has no file here
        (MAZE, "learning_rate", 1e-4),  # the file
        (MAZE, "discount", 0.8),  # the row before the file
        (MAZE, "hidden", (16,)),
        (MAZE, "shift", -1.5),
        (("--dataset", "maze2d-large-v1"), "discount", 0.7),  # another row
        (("--dataset", "maze2d-large-v1"), "hidden", (64, 64)),
        (("--dataset", "maze2d-medium-v1"), "discount", 0.9),  # no row: the file alone
        ((*MAZE, "--discount", "0.5"), "discount", 0.5),  # the command line before the row
        ((*MAZE, "--hidden", "8", "4"), "hidden", (8, 4)),
        ((*MAZE, "--shift", "-2"), "shift", -2.0),
        ((*MAZE, "--learning-rate", "3e-4"), "learning_rate", 3e-4),
        (("--config", "configs/toy/maze2d.yaml"), "dataset", "maze2d-umaze-v1"),
        (("--config", "configs/toy/maze2d.yaml"), "discount", 0.8),  # the row of the file's own
        (("--config", "configs/toy/maze2d.yaml", "--dataset", "maze2d-large-v1"), "discount", 0.7),
        (("--config", "configs/toy/maze2d.yaml", "--dataset", "x.hdf5"), "discount", 0.9),
        (("--dataset", "some/where/maze2d-large-v1.hdf5"), "discount", 0.7),  # a file by its stem
    ],
)
def test_the_last_source_wins(toy, argv, field, value):
    assert getattr(config.parse(toy, list(argv))[0], field) == value


def test_a_copy_without_configs_is_told_how_to_get_its_parents(toy, capsys):
    shutil.rmtree("configs/toy")
    config.parse(toy, [])
    line = capsys.readouterr().out.splitlines()[0]
    assert line.endswith("of toy.py apply; cp -r configs/PARENT configs/toy copies its parent's")


def test_one_line_says_what_was_read(toy, capsys):
    for argv, line in (
        (
            [],
            "config: no file configs/toy/pointmaze.yaml for local/pointmaze/umaze-v0, the defaults "
            "of toy.py apply",
        ),
        (
            MAZE,
            "config: configs/toy/maze2d.yaml, row maze2d-umaze-v1: "
            "discount 0.8, hidden [16], shift -1.5",
        ),
        (
            ["--dataset", "maze2d-medium-v1"],
            "config: configs/toy/maze2d.yaml, the suite's values apply to all its data sets but "
            "the 2 with a row of their own",
        ),
    ):
        config.parse(toy, list(argv))
        assert capsys.readouterr().out.splitlines() == [line]


@pytest.mark.parametrize("name", runs.ALGORITHMS)
def test_no_arguments_is_the_quickstart(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg, options = config.parse(runs.module(name).Config, [])
    values, _ = config.read_yaml(
        runs.ROOT / "configs" / name / "pointmaze.yaml", runs.module(name).Config
    )
    assert cfg.dataset == "local/pointmaze/umaze-v0" == values["dataset"]
    assert {key: getattr(cfg, key) for key in values} == {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    assert options.config is None and not options.resume and options.wandb is None
    assert f"configs/{name}/pointmaze.yaml" in capsys.readouterr().out


@pytest.mark.parametrize("name", runs.ALGORITHMS)
@pytest.mark.parametrize(
    ("dataset", "suite"),
    [
        ("hopper-medium-v2", "mujoco"),
        ("mujoco/walker2d/medium-v0", "mujoco"),
        ("path/to/hopper-medium-v4.hdf5", "v4"),
        ("antmaze-umaze-v2", "antmaze"),
        ("D4RL/antmaze/umaze-v1", "antmaze"),
        ("maze2d-large-v1", "maze2d"),
        ("D4RL/pointmaze/umaze-v2", "maze2d"),
        ("local/pointmaze/large-v0", "pointmaze"),
        ("pen-human-v1", "adroit"),
        ("D4RL/pen/human-v2", "adroit"),
    ],
)
def test_the_data_set_picks_the_file(name, dataset, suite, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    if (runs.ROOT / "configs" / name / f"{suite}.yaml").exists():
        config.parse(runs.module(name).Config, ["--dataset", dataset])
        assert f"configs/{name}/{suite}.yaml, " in capsys.readouterr().out


def test_options_of_the_environment_may_stand_in_a_file(toy, tmp_path):
    (tmp_path / "own.yaml").write_text("dataset: x.hdf5\nenv: Pendulum-v1\nenv_steps: 50\n")
    _, options = config.parse(toy, ["--config", "own.yaml"])
    assert (options.env, options.env_steps) == ("Pendulum-v1", 50)
    _, options = config.parse(toy, ["--config", "own.yaml", "--env-steps", "70"])
    assert (options.env, options.env_steps) == ("Pendulum-v1", 70)


# --- Values -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),  # a string to YAML 1.1
        ("learning_rate: 1.0e-4", "learning_rate", 1e-4),
        ("learning_rate: 1E-4", "learning_rate", 1e-4),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("shift: -1", "shift", -1.0),
        ("shift: -1e-3", "shift", -1e-3),
        ("hidden: 16", "hidden", (16,)),
        ("weights: []", "weights", ()),
        ("weights: [-1, 2e-3]", "weights", (-1.0, 2e-3)),
        ("seeds: [3, 1]", "seeds", (3, 1)),
        ("flag: true", "flag", True),
        ("flag: no", "flag", False),
        ("limit: 7", "limit", 7),
        ("limit: null", "limit", None),
        ("note: '--resume'", "note", "--resume"),
        ("note: 'two words'", "note", "two words"),
        ("note: ''", "note", ""),
        ("note: 'None'", "note", "None"),
    ],
)
def test_values_of_a_file(toy, tmp_path, text, field, value):
    (tmp_path / "own.yaml").write_text(f"dataset: x.hdf5\n{text}\n")
    cfg = parse(toy, "--config own.yaml")
    assert getattr(cfg, field) == value
    assert type(getattr(cfg, field)) is type(value)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--flag True", "flag", True),
        ("--flag False", "flag", False),
        ("--limit 3", "limit", 3),
        ("--limit None", "limit", None),
        ("--shift -1e-3", "shift", -1e-3),
        ("--shift=-3", "shift", -3.0),
        ("--weights -1 2", "weights", (-1.0, 2.0)),
        ("--weights", "weights", ()),
        ("--seeds 4 2 7", "seeds", (4, 2, 7)),
    ],
)
def test_values_of_the_command_line(toy, words, field, value):
    assert getattr(parse(toy, words), field) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("discount: high", ("own.yaml", "--discount", "high")),
        ("num_updates: 1.5", ("own.yaml", "--num-updates", "1.5")),
        ("flag: 3", ("own.yaml", "--flag", "3")),
        ("discount:", ("own.yaml", "discount", "None")),
        ("note:", ("own.yaml", "note", "None")),
        ("discount: [0.9, 0.8]", ("own.yaml",)),
        ("hidden: {a: 1}", ("own.yaml", "hidden")),
        ("datasets: [a, b]", ("own.yaml", "datasets", "mapping")),
        ("datasets: {a: 3}", ("own.yaml", "datasets", "mapping")),
        ("datasets: {a: {discont: 3}}", ("own.yaml", "datasets: a", "did you mean 'discount'")),
        ("datasets: {x: {discount: off}}", ("own.yaml", "datasets: x", "--discount", "False")),
        ("1: 2", ("own.yaml", "1", "not a word")),
        ("[a, b]: 2", ("own.yaml",)),
    ],
)
def test_errors_name_file_and_key(toy, tmp_path, capsys, text, words):
    (tmp_path / "own.yaml").write_text(f"dataset: x.hdf5\n{text}\n")
    line = error(capsys, toy, "--config own.yaml")
    assert all(word in line for word in words), line


def test_a_good_line_of_the_command_line_does_not_hide_a_bad_file(toy, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("dataset: x.hdf5\ndiscount: high\n")
    assert "own.yaml" in error(capsys, toy, "--config own.yaml --discount 0.5")


def cases():
    """Values of every config of the project, alone and with each row that brings a new value."""
    for file in own_files.YAMLS:
        config_class = runs.module(file.parent.name).Config
        values, rows = config.read_yaml(file, config_class)
        seen = set()
        for row in ({}, *rows.values()):
            wanted = values | row
            new = {(key, str(value)) for key, value in wanted.items()} - seen
            if new or not row:
                yield file, config_class, wanted
            seen |= new


def test_the_rows_of_every_file_have_names_that_a_data_set_can_have():
    """The row of `name.hdf5` is `name`: a row with the suffix would never be taken."""
    found = [
        (file, row)
        for file in own_files.YAMLS
        for row in yaml.safe_load(file.read_text()).get("datasets") or {}
    ]
    assert len(found) > 100
    assert [(file, row) for file, row in found if datasets.config_name(row) != row] == []
    assert datasets.config_name("hopper-medium-v4.hdf5") == "hopper-medium-v4"


def test_every_file_and_value_of_the_repository():
    count = 0
    for file, config_class, wanted in cases():
        cfg, _ = config._command_line(config_class, list(config._tokens(wanted)), str(file))
        ranges.check(cfg)
        kinds = {field.name: field.default for field in dataclasses.fields(config_class)}
        for key, value in wanted.items():
            if key in config.IN_YAML:
                continue
            value = tuple(value) if isinstance(value, list) else value
            if type(kinds[key]) is float and value is not None:
                value = float(value)
            assert getattr(cfg, key) == value, file
        count += 1
    assert count > 50


# --- Run folder ---------------------------------------------------------------------------------
ODD = (
    "--learning-rate 1e-05 --discount 0.1234567890123 --shift -0.25 --seeds 7 3 --flag True "
    "--weights -1 2e-3 --limit 5"
)


def write_run(cfg, options):
    """What a run keeps of its config, as Run writes it."""
    folder = config.run_folder(cfg, options)
    folder.mkdir(parents=True)
    text = yaml.safe_dump(config.resolved(cfg, options), default_flow_style=None)
    (folder / "config.yaml").write_text(text)
    return folder


@pytest.mark.parametrize("words", ["", ODD, f"{ODD} --env Pendulum-v1 --env-steps 50", "--weights"])
def test_round_trip(toy, words):
    cfg, options = config.parse(toy, [*MAZE, *words.split()])
    folder = write_run(cfg, options)
    again, options_again = config.parse(
        toy, ["--config", str(folder / "config.yaml"), "--name", "other"]
    )
    assert again == cfg
    assert type(again.seeds) is type(again.hidden) is tuple
    assert (options_again.env, options_again.env_steps) == (options.env, options.env_steps)
    read, _ = config.read_run(folder, toy)
    assert read == cfg


@pytest.mark.parametrize("name", runs.ALGORITHMS)
def test_round_trip_of_every_algorithm(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config_class = runs.module(name).Config
    for dataset in ("local/pointmaze/umaze-v0", "antmaze-large-play-v2", "mujoco/hopper/medium-v0"):
        cfg, options = config.parse(config_class, ["--dataset", dataset, "--seeds", "2", "5"])
        assert config.read_run(write_run(cfg, options), config_class)[0] == cfg


# --- Renamed fields -----------------------------------------------------------------------------
RENAMED_TOY = (
    TOY
    + """
    target_action_gap: float = 1.0
    num_eval_samples: int = 10
"""
)


@pytest.fixture
def renamed(toy):
    """A Config that has the present names of two renamed fields."""
    file = Path("algorithms", "toy.py").resolve()
    file.write_text(RENAMED_TOY)
    spec = importlib.util.spec_from_file_location("toy", file)
    sys.modules["toy"] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.Config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--gap 2.0", "toy.py: --gap has a new name: --target-action-gap"),
        ("--num-choices=4", "toy.py: --num-choices has a new name: --num-eval-samples"),
        ("--num_choices 4", "toy.py: --num-choices has a new name: --num-eval-samples"),
        ("--config key.yaml", "key.yaml: gap has a new name: target_action_gap"),
        ("--config row.yaml", "row.yaml: datasets: b: gap has a new name: target_action_gap"),
    ],
)
def test_a_former_name_of_a_field_is_one_line_that_names_the_present_one(
    renamed, capsys, words, said
):
    Path("key.yaml").write_text("dataset: maze2d-umaze-v1\ngap: 2.0\n")
    Path("row.yaml").write_text("dataset: maze2d-umaze-v1\ndatasets: {b: {gap: 2.0}}\n")
    assert error(capsys, renamed, f"{' '.join(MAZE)} {words}") == f"error: {said}"


def test_a_config_without_the_new_field_knows_no_former_name(toy, capsys):
    assert "new name" not in error(capsys, toy, "--gap 2.0")
    assert config.renamed(toy) == {}


def test_a_config_that_still_has_the_old_field_takes_it(toy):
    both = dataclasses.make_dataclass(
        "Config", [("gap", float, 1.0), ("target_action_gap", float, 1.0)]
    )
    assert config.renamed(both) == {}


def test_a_run_folder_with_former_names_is_read_and_resumed(renamed):
    cfg, options = config.parse(
        renamed, [*MAZE, "--target-action-gap", "2.0", "--num-eval-samples", "7"]
    )
    folder = write_run(cfg, options)
    file = folder / "config.yaml"
    values = yaml.safe_load(file.read_text())
    values["gap"] = values.pop("target_action_gap")
    values["num_choices"] = values.pop("num_eval_samples")
    file.write_text(yaml.safe_dump(values | {"record": {"digest": "x"}}))
    read, _ = config.read_run(folder, renamed)
    assert read == cfg and read.target_action_gap == 2.0 and read.num_eval_samples == 7
    again, _ = config.parse(renamed, ["--config", str(file), "--name", "other"])
    assert again == cfg
    # The default name is the one that a run with the former names has.
    resumed = ["--target-action-gap", "2.0", "--num-eval-samples", "7", "--resume"]
    assert config.run_folder(*config.parse(renamed, [*MAZE, *resumed])) == folder
    known = {"gap": 2.0, "num_choices": 7} | {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in vars(cfg).items()
        if key not in ("target_action_gap", "num_eval_samples")
    }
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:8]
    assert folder.name == digest


def test_a_damaged_run_folder_with_a_former_name_still_names_the_key(renamed, capsys):
    cfg, options = config.parse(renamed, [*MAZE])
    file = write_run(cfg, options) / "config.yaml"
    file.write_text(file.read_text().replace("discount", "discont") + "record: {}\n")
    with pytest.raises(SystemExit):
        config.read_run(file.parent, renamed)
    assert "unknown key 'discont'; did you mean 'discount'?" in capsys.readouterr().err


def test_default_name_is_a_stable_hash(toy):
    def name(*words):
        cfg, options = config.parse(toy, [*MAZE, *words])
        return config.run_folder(cfg, options)

    assert str(name()) == "runs/toy/maze2d-umaze-v1/70e4fe92"
    assert name() == name("--discount", "0.8") == name("--wandb", "disabled", "--resume")
    others = (("--discount", "0.81"), ("--seeds", "1"), ("--env", "Pendulum-v1"))
    others += (("--env-steps", "3"), ("--note", "x"))
    assert len({name(), *(name(*words) for words in others)}) == 1 + len(others)
    assert str(name("--name", "mine", "--runs-dir", "elsewhere")) == (
        "elsewhere/toy/maze2d-umaze-v1/mine"
    )


def test_folder_of_a_file_has_its_stem(toy):
    cfg, options = config.parse(toy, ["--dataset", "some/where/data.hdf5", "--name", "a"])
    assert str(config.run_folder(cfg, options)) == "runs/toy/data/a"


def test_a_file_is_the_same_run_however_its_path_is_spelled(toy, tmp_path, capsys):
    def folder(path, *words):
        return config.run_folder(*config.parse(toy, ["--dataset", str(path), *words]))

    cfg, options = config.parse(toy, ["--dataset", "data.hdf5"])
    made = write_run(cfg, options)
    for path in ("./data.hdf5", Path("data.hdf5").absolute()):
        assert folder(path, "--resume") == made
    Path("elsewhere").mkdir()
    line = error(capsys, toy, "--dataset elsewhere/data.hdf5 --resume")
    assert "dataset data.hdf5, not elsewhere/data.hdf5" in line


def test_resume_wants_the_same_config(toy, capsys):
    cfg, options = config.parse(toy, [*MAZE, "--name", "a"])
    folder = write_run(cfg, options)
    assert config.parse(toy, [*MAZE, "--name", "a", "--resume"])[0] == cfg
    capsys.readouterr()
    line = error(capsys, toy, *MAZE, "--name a")
    assert str(folder) in line and "--resume" in line and "--name" in line
    line = error(capsys, toy, *MAZE, "--name a --resume --discount 0.5")
    assert "discount 0.8, not 0.5" in line
    line = error(capsys, toy, *MAZE, "--name a --resume --env Pendulum-v1")
    assert "env None, not Pendulum-v1" in line


def test_resume_without_a_run_starts_anew(toy):
    assert config.parse(toy, [*MAZE, "--name", "new", "--resume"])[1].resume


def test_help_lists_every_field(toy, capsys):
    with pytest.raises(SystemExit) as leave:
        config.parse(toy, ["--help"])
    assert leave.value.code == 0
    text = capsys.readouterr().out
    for field in (*dataclasses.fields(toy), *dataclasses.fields(config.Options)):
        assert f"--{field.name.replace('_', '-')}" in text


# --- Wrong words --------------------------------------------------------------------------------
# Words that tyro refuses, words of the message, and the words that its remedy makes of them.
WRONG_WORDS = [
    ("--seeds 0,1", "write `--seeds 0 1`", "--seeds 0 1"),
    ("--seeds=0,1", "write `--seeds 0 1`", "--seeds 0 1"),
    ("--seeds [0, 1]", "write `--seeds 0 1`", "--seeds 0 1"),
    ("--hidden 8,4", "write `--hidden 8 4`", "--hidden 8 4"),
    ("--weights -1.5,2", "write `--weights -1.5 2`", "--weights -1.5 2"),
    ("--seeds range(3)", "each part must be a whole number, as in `--seeds 0 1`", "--seeds 0 1"),
    ("--num-updates 1e3", "write `--num-updates 1000`", "--num-updates 1000"),
    ("--env-steps 5.0", "write `--env-steps 5`", "--env-steps 5"),
    ("--eval-every many", "--eval-every many: must be a whole number", "--eval-every 10"),
    ("--discount 0,9", "--discount 0,9: must be a number", "--discount 0.9"),
    ("--limit x", "--limit x: must be a whole number or None", "--limit None"),
    ("--flag 3", "--flag 3: must be True or False", "--flag True"),
    ("--flag", "has no value behind it; it must be True or False", "--flag False"),
    ("--wandb on", "must be one of offline, online, disabled or None", "--wandb offline"),
    ("--data gpu", "--data gpu: must be one of device, host", "--data host"),
    ("--discount", "--discount: has no value behind it; it must be a number", "--discount 1"),
    ("--discont 0.9", "no flag --discont; did you mean --discount? --help", "--discount 0.9"),
    ("--updates 1000", "did you mean --num-updates? --help", "--num-updates 1000"),
    ("--alpha 2.5 --beta 3", "there is no flag --alpha; --help lists the flags", ""),
    ("-x", "there is no flag -x; --help lists the flags", ""),
    ("0.9", "0.9: belongs to no flag; --help lists the flags", ""),
    ("note=a", "belongs to no flag; write `--note=a`", "--note=a"),
    ("--discount 0.9 0.8", "takes one value, so not 0.8 as well", "--discount 0.9"),
    ("--show-config True", "write `--show-config` alone", ""),
    ("--resume=True", "--resume: takes no value, so not True; write `--resume` alone", "--resume"),
    ("--resume True", "or leave it out", ""),
]


@pytest.mark.parametrize(("words", "said", "remedy"), WRONG_WORDS)
def test_wrong_words_are_one_line_with_a_remedy_that_works(toy, capsys, words, said, remedy):
    line = error(capsys, toy, words)
    assert said in line, line
    assert (
        line.startswith("error: toy.py: ") and "helptext" not in line and "Value error" not in line
    )
    parse(toy, "--name new", remedy)


@pytest.mark.parametrize(
    ("name", "word", "meant"),
    [
        ("iql", "--lr", "--actor-learning-rate or --critic-learning-rate"),
        ("iql", "--critic_lr", "--critic-learning-rate"),
        ("iql", "--bs", "--batch-size"),
        ("iql", "--gamma", "--discount"),
        ("iql", "--tau", "--target-rate or --expectile"),
        ("iql", "--beta", "--inverse-temperature"),
        ("rebrac", "--beta1", "--actor-penalty"),
        ("rebrac", "--beta_2", "--critic-penalty"),
        ("rebrac", "--tau", "--target-rate"),
    ],
)
def test_names_of_papers_and_other_code_are_answered_with_the_flag(name, word, meant, capsys):
    with pytest.raises(SystemExit):
        config.parse(runs.module(name).Config, [word, "0.5"])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"there is no flag {word}; did you mean {meant}? --help" in line


def test_a_word_that_many_comments_have_suggests_nothing():
    comments = {f"--field-{i}": "weight of something" for i in range(4)}
    assert wrong_words._near("weight", comments, comments) == []
    comments["--last"] = "weight, the first word of all"
    assert wrong_words._near("weight", comments, comments) == ["--last"]


def test_a_list_of_a_file_is_written_as_a_list(toy, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("dataset: x.hdf5\nseeds: 0,1\n")
    assert "own.yaml: --seeds 0,1: write `seeds: [0, 1]`" in error(capsys, toy, "--config own.yaml")
    (tmp_path / "own.yaml").write_text("dataset: x.hdf5\nseeds: [0, 1]\n")
    assert parse(toy, "--config own.yaml").seeds == (0, 1)


def test_a_missing_version_is_all_that_is_said(toy, capsys):
    """Nothing about configs comes first, which would sound as if one were missing."""
    with pytest.raises(SystemExit):
        parse(toy, "--dataset antmaze-large-play")
    said = capsys.readouterr()
    assert said.out == "" and "there is antmaze-large-play-v" in said.err


# --- Ranges of the algorithm files' own fields ----------------------------------------------------
@pytest.mark.parametrize(
    ("name", "flag", "value", "wanted"),
    [
        ("atac", "--residual", "1.5", "from 0 to 1"),
        ("atac", "--weight-norm", "0", "above 0"),
        ("awr", "--max-weight", "-1", "above 0"),
        ("bcq", "--lam", "-0.1", "from 0 to 1"),
        ("bcq", "--kl-weight", "-0.5", "0 or more"),
        ("bcq", "--perturbation", "-0.05", "0 or more"),
        ("cql", "--alpha", "-5", "0 or more"),
        ("dt", "--num-heads", "3", "is no multiple of --num-heads 3"),
        ("dt", "--max-gradient-norm", "0", "above 0"),
        ("dt", "--context", "0", "at least 1"),
        ("idql", "--actor-target-rate", "2", "from 0 to 1"),
        ("idql", "--weight-decay", "-0.5", "0 or more"),
        ("iql", "--inverse-temperature", "-3", "0 or more"),
        ("ivr", "--sql-alpha", "0", "above 0"),
        ("odice", "--lam", "1.2", "from 0 to 1"),
        ("qc", "--horizon", "0", "at least 1"),
        ("rebrac", "--actor-penalty", "-0.1", "0 or more"),
        ("rebrac", "--target-noise", "-0.2", "0 or more"),
        ("xql", "--beta", "0", "above 0"),
        ("xql", "--huber-delta", "-20", "above 0"),
        ("trajectory_transformer", "--action-cdf", "1.5", "between 0 and 1"),
    ],
)
def test_ranges(name, flag, value, wanted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = error(capsys, runs.module(name).Config, f"{flag}={value}")
    assert wanted in line and flag in line and value.lstrip("-")[:3] in line
    assert not list(tmp_path.iterdir())


def test_a_rule_that_a_default_breaks_is_not_meant_for_that_field(toy, capsys):
    """A field of a file of your own may have a name that has a rule and mean something else."""
    own = [
        ("warmup", int, 0),  # whole numbers are at least 1
        ("lam", float, 10.0),  # a share elsewhere
        ("policy_delay", int, 0),  # must divide log_every elsewhere
        ("actor_updates", int, 7),
        ("noise", str, "pink"),
        ("alpha", float, 1.0),
    ]
    own = [(name, kind, dataclasses.field(default=value)) for name, kind, value in own]
    mine = dataclasses.make_dataclass("Config", own, bases=(toy,), frozen=True)
    ranges.check(mine())
    ranges.check(mine(warmup=5, lam=20.0, policy_delay=3, actor_updates=9))
    for wrong, wanted in (
        ({"alpha": -1.0}, "--alpha -1.0: must be 0 or more"),  # its default keeps the rule
        ({"lam": float("inf")}, "--lam inf: must be a finite number"),
        ({"warmup": 2**31}, "--warmup 2147483648: must be below"),
        ({"num_updates": 0}, "--num-updates 0: must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            ranges.check(mine(**wrong))
        assert wanted in capsys.readouterr().err
