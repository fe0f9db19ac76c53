# SPDX-License-Identifier: Apache-2.0
"""The tool that keeps the copies equal, on made-up files and on copies of the real ones."""

import shutil
import subprocess
import sys

import own_files
import pytest
import sync

FIRST = '''"""First."""

import math

LIMIT = 3  # upper bound


# --- Networks ---
# Why it is so.
@decorated
def helper(x):
    # inside
    return x + LIMIT
    # at the end


class Net:
    width: int = 4


def critic_loss(x):
    return x


if __name__ == "__main__":
    helper(math.pi)
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(FIRST.replace("First", "Second"))
    (tmp_path / "third.py").write_text('"""Third."""\n\nOTHER = 1\n')
    return tmp_path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_definitions_are_source_text(folder):
    found = sync.definitions(folder / "first.py")
    assert list(found) == ["LIMIT", "helper", "Net", "critic_loss"]
    assert found["LIMIT"] == "LIMIT = 3  # upper bound"
    assert found["helper"].splitlines() == [
        "# Why it is so.",
        "@decorated",
        "def helper(x):",
        "    # inside",
        "    return x + LIMIT",
        "    # at the end",
    ]


def test_every_kind_of_assignment_counts(tmp_path):
    (tmp_path / "a.py").write_text("A, B = 1, 2\nC: int = 3\nD = E = 4\nC += 1\n")
    found = sync.definitions(tmp_path / "a.py")
    assert list(found) == ["A", "B", "C", "D", "E"]
    assert found["A"] == found["B"] == "A, B = 1, 2"
    assert found["C"] == "C: int = 3\nC += 1"


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("LIMIT", "LIMIT = 3", "LIMIT = 4"),
        ("LIMIT", "upper bound", "bound"),
        ("helper", "# Why it is so", "# Because"),
        ("helper", "@decorated\n", ""),
        ("helper", "# inside", "# within"),
        ("helper", "# at the end", "# last"),
        ("Net", "width: int = 4", "width: int = 5"),
    ],
)
def test_drift_is_found_and_mended(folder, name, old, new):
    assert sync.drift(folder) == {}
    edit(folder / "second.py", old, new)
    assert sync.drift(folder) == {name: [["first.py"], ["second.py"]]}
    third = (folder / "third.py").read_text()
    assert sync.propagate(name, "first.py", folder) == ["second.py"]
    assert (folder / "second.py").read_text() == FIRST.replace("First", "Second")
    assert (folder / "first.py").read_text() == FIRST
    assert (folder / "third.py").read_text() == third
    assert sync.drift(folder) == {}


@pytest.mark.parametrize("name", ["Config", "State", "update", "train", "q_loss", "policy_params"])
def test_own_names_may_differ(folder, name):
    for path in ("first.py", "second.py"):
        with (folder / path).open("a") as file:
            file.write(f"\n\ndef {name}():\n    return {path!r}\n")
    assert sync.drift(folder) == {}


def test_own_names_are_the_documented_ones():
    names = "Config State create_state update train_chunk policy policy_params train"
    names += " policy_fn explore initial_memory online_update online_chunk online_rows"
    names += " clone_update"
    assert set(names.split()) == sync.OWN
    assert not any(map(sync.is_own, ("update_target", "TrainState", "loss", "critic_loss_scale")))


def test_command_line(folder, capsys):
    arguments = ["--folder", str(folder)]
    assert sync.main(arguments) == 0
    assert capsys.readouterr().out == ""
    edit(folder / "second.py", "x + LIMIT", "x - LIMIT")
    assert sync.main(arguments) == 1
    assert capsys.readouterr().out == "helper: first.py != second.py\n"
    assert sync.main(["helper", "--from", "first.py", *arguments]) == 0
    assert capsys.readouterr().out == "second.py\n"
    assert sync.main(["helper", "--from", "first.py", *arguments]) == 0
    assert capsys.readouterr().out == "helper: equal everywhere already\n"
    assert sync.main(arguments) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["helper"], "--from"),
        (["--from", "first.py"], "--from"),
        (["helper", "--from", "absent.py"], "absent.py"),
        (["absent", "--from", "first.py"], "no top-level definition"),
        (["critic_loss", "--from", "first.py"], "never propagated"),
        (["--folder", "/absent"], "/absent"),
        (["--unknown"], "--unknown"),
    ],
)
def test_errors_are_one_line_and_exit_2(folder, capsys, arguments, message):
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as leave:
        sync.main(["--folder", str(folder), *arguments])
    assert leave.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


@pytest.mark.parametrize("damage", ["def broken(:\n", "\n\ndef helper():\n    pass\n"])
def test_a_damaged_file_stops_everything(folder, capsys, damage):
    edit(folder / "second.py", "x + LIMIT", "x - LIMIT")
    (folder / "third.py").write_text(FIRST + damage)
    before = {path.name: path.read_text() for path in folder.iterdir()}
    with pytest.raises(SystemExit) as leave:
        sync.main(["helper", "--from", "first.py", "--folder", str(folder)])
    assert leave.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert {path.name: path.read_text() for path in folder.iterdir()} == before


def test_as_a_script_on_copies_of_the_real_files(tmp_path):
    real = own_files.FILES
    for path in real:
        shutil.copyfile(path, tmp_path / path.name)  # not its mode: it may be read-only
    shutil.copyfile(real[0], tmp_path / "copy_of_it.py")
    name = next(name for name in sync.definitions(real[0]) if not sync.is_own(name))
    body = sync.definitions(real[0])[name]
    edit(tmp_path / "copy_of_it.py", body, body + "  # drifted")

    def run(*arguments):
        command = [sys.executable, sync.__file__, *arguments, "--folder", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run().returncode == 1
    assert run(name, "--from", real[0].name).stdout == "copy_of_it.py\n"
    assert (tmp_path / "copy_of_it.py").read_text() == real[0].read_text()
    assert run().returncode == 0
