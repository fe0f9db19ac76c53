# SPDX-License-Identifier: Apache-2.0
"""Which data set a name means, where several readings are possible.

What is on this machine is looked for before a name is refused, and a path comes first only where it
can be what is asked for.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_datasets import error_of
from test_spaces import STEPS, record, write

from common import datasets
from common.datasets import reference_scores

NAMES = [
    "hopper-medium-v2",  # D4RL's
    "local/cartpole/mixed-v0",
    "pointmaze-medium-navigate-singletask-v0",  # OGBench's
    "lab/toy-v0",  # in Minari's local root
    "toy-v0",
]


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder, and roots of data in which D4RL, OGBench and Minari have a data set each."""
    pytest.importorskip("minari")
    pytest.importorskip("ogbench")
    monkeypatch.chdir(tmp_path)
    roots = {"MINARI_DATASETS_PATH": "m", "D4RL_DATASET_DIR": "d", "OGBENCH_DATASET_DIR": "o"}
    for variable, folder in roots.items():
        monkeypatch.setenv(variable, str(tmp_path / "roots" / folder))
        (tmp_path / "roots" / folder).mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def d4rl_file():
    file = Path(reference_scores.table()["hopper-medium-v2"]["file"]).name
    columns = {"observations": np.zeros((12, 11)), "actions": np.zeros((12, 3))}
    write(f"roots/d/{file}", **columns)


def ogbench_file():
    spot = np.stack([17 + np.arange(6), np.full(6, 20)], axis=1).astype(np.float32)
    columns = dict.fromkeys(("observations", "actions", "qpos", "qvel"), spot)
    columns["actions"] = columns["actions"] / 100
    file = "roots/o/pointmaze-medium-navigate-v0.npz"
    np.savez(file, **columns, terminals=np.arange(6) % 3 == 2)


def there(name):
    """Put the data set of a name where its family keeps it."""
    if name == "hopper-medium-v2":
        d4rl_file()
    elif "singletask" in name:
        ogbench_file()
    else:
        record(name)


def folder(name):
    Path(name, "runs").mkdir(parents=True)


def log(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text("update 0: score 1.0\\n")


def link_to_nothing(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink("nowhere", name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("in_the_way", [folder, log, link_to_nothing])
@pytest.mark.parametrize("name", NAMES)
def test_what_only_has_the_name_of_a_data_set_is_not_in_its_way(name, in_the_way):
    there(name)
    in_the_way(name)
    dataset = datasets.load(name, actions="any")
    assert dataset.id == name and len(dataset.transitions.reward)
    assert datasets.slug(name) == name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*NAMES, "anything", "./anything", "runs/x.data"])
def test_an_hdf5_file_of_any_name_is_read(name):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    columns = {"observations": np.full((12, 11), 5.0), "actions": np.zeros((12, 3))}
    write(name, **columns)
    dataset = datasets.load(name)
    assert dataset.transitions.observation.shape[1] == 11 and dataset.transitions.observation[0, 0]
    assert datasets.slug(name) == Path(name).stem


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["toy-v0", "my.toy_2-v13", "lab/toy-v0", "lab/deep/er/toy-v0"])
def test_a_minari_id_with_and_without_a_namespace(name):
    if "." in name:  # Minari itself makes no such name, but can be given one
        record("toy-v13")
        shutil.move("roots/m/toy-v13", f"roots/m/{name}")
    else:
        record(name)
    assert len(datasets.load(name).transitions.reward) == 3 * STEPS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["hopper-medium-v2", "pointmaze-medium-navigate-singletask-v0"])
def test_a_recording_under_a_known_name_is_read_until_the_known_one_is_there(name, capsys):
    record(name)
    assert datasets.load(name).transitions.observation.shape[1] == 3
    assert f"{name}: the Minari data set of that name on this machine" in capsys.readouterr().out
    there(name)
    assert datasets.load(name).transitions.observation.shape[1] == (11 if "hopper" in name else 2)


@pytest.mark.filterwarnings("ignore")
def test_a_name_without_its_version_is_answered_with_its_versions(capsys):
    text = error_of(capsys, datasets.load, "antmaze-large-play")
    assert "lacks the version" in text and "there is antmaze-large-play-v2" in text
    record("toy-v0")
    record("toy-v3")
    assert "did you mean toy-v0 or toy-v3?" in error_of(capsys, datasets.load, "toy")


@pytest.mark.parametrize("name", ["anything", "lab/anything", "anything.txt", "toy-v0"])
@pytest.mark.parametrize(("in_the_way", "words"), [(folder, "directory"), (log, "read as HDF5")])
def test_a_path_that_is_no_data_is_told_as_such(name, in_the_way, words, capsys):
    in_the_way(name)
    assert words in error_of(capsys, datasets.load, name)


@pytest.mark.parametrize("scheme", ["https", "http", "s3", "hf", "gs", "file", "S3", "git+ssh"])
@pytest.mark.parametrize("file", ["example.org/data/copy.hdf5", "lab/toy-v0", "hopper-medium-v2"])
def test_an_address_is_told_as_such(scheme, file, capsys):
    text = error_of(capsys, datasets.load, f"{scheme}://{file}")
    assert f"{scheme}://{file}: an address, not a file; download it and pass the path" in text


def test_the_copy_of_an_address_is_read(capsys):
    assert "pass the path of the copy" in error_of(capsys, datasets.load, "https://a.org/copy.hdf5")
    write("copy.hdf5", observations=np.zeros((12, 2)), actions=np.zeros((12, 1)))
    assert len(datasets.load("copy.hdf5").transitions.reward)
