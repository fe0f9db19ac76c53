# SPDX-License-Identifier: Apache-2.0
"""What holds for every algorithm file: invariance, golden values, a run of the file alone."""

import functools
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import helpers_runs as runs
import jax
import numpy as np
import probes
import pytest
import yaml
from own_files import NAMES

from common import evaluation, experiment
from common.experiment import stored

ROOT = Path(__file__).resolve().parents[2]


def test_every_algorithm_is_known_to_the_tests():
    assert {*NAMES} <= {*probes.SMALL}, (
        "add its small settings to SMALL in tests/algorithms/probes.py"
    )


# Files whose loop in `train` no other file of this list has: plain, with a cosine that ends with
# the run, in iterations, over windows, with a behaviour policy, with dynamics. The runs of others
# are resumed with ATOLL_SLOW=1.
LOOPS = ["awr", "bc", "bc, discrete", "brac", "iql", "mopo", "qc", "qdt", "rebrac"]
# One file for each way in which seeds could depend on each other: plain and ensembled networks,
# windows of episodes, a second phase, dynamics. Others with ATOLL_SLOW=1.
SEEDS_COMPARED = ("bc", "dt", "iql", "mopo", "rebrac", "spot")


# --- Golden values and invariance ---------------------------------------------------------------
@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def beside_others(name):
    """Whether its seeds are trained beside others, and compared bit for bit."""
    return name in SEEDS_COMPARED or "ATOLL_SLOW" in os.environ


@pytest.fixture(scope="module")
def alone(request, name):
    """Seed 0 alone, ten chunks of 10: golden values, state, means of the metrics over all ten."""
    test = test_a_seed_among_4_in_one_chunk_equals_that_seed_alone_in_ten.__name__
    selected = f"{test}[{name}]" in {item.name for item in request.session.items}
    chunks = []
    as_users = selected and beside_others(name)
    found, arrays = golden.measure(name, note=chunks.append, as_users=as_users)
    means = {metric: np.mean([x[metric] for x in chunks]) for metric in chunks[0]}
    return found, arrays, means


def test_golden_values(name, alone):
    found, _, _ = alone
    recorded = json.loads(golden.FILE.read_text())
    assert name in recorded, "python tests/algorithms/golden.py records a new algorithm"
    entry, now = recorded[name], golden.versions()
    same_jax = entry["versions"]["jax"] == now["jax"]
    for updates in golden.AFTER if same_jax else golden.AFTER[:1]:
        old, new = entry["after"][str(updates)], found[str(updates)]
        tolerance, relative = golden.tolerance(name, updates, entry), golden.RELATIVE[updates]
        spread = golden.tolerances()[name][str(updates)]
        problems = golden.differences(old, new, tolerance, relative if same_jax else None, spread)
        assert not problems, (
            f"after {updates} updates {'; '.join(problems)} (recorded with {entry['versions']}, "
            f"this is {now}). If meant: python tests/algorithms/golden.py {name}, and a line in "
            "CHANGELOG.md"
        )


@pytest.mark.parametrize(
    ("name", "coefficient"), [("odice", "discount"), ("cql", "alpha"), ("td3_bc", "discount")]
)
def test_golden_values_notice_a_small_change(name, coefficient):
    """One coefficient is a thousandth smaller; odice and cql amplify rounding most."""
    entry = json.loads(golden.FILE.read_text())[name]
    value = getattr(importlib.import_module(f"algorithms.{name}").Config(), coefficient)
    found, _ = golden.measure(name, updates=10, **{coefficient: 0.999 * value})
    tolerance = golden.tolerance(name, 10, entry)
    assert golden.differences(entry["after"]["10"], found["10"], tolerance)


def test_golden_values_are_compared_tightly_on_the_machine_of_the_recording(monkeypatch):
    entry = {"versions": golden.versions(), "machine": golden.machine()}
    assert golden.tolerance("odice", 100, entry) == golden.SAME_MACHINE[100]
    spread = golden.tolerances()["odice"]["100"]
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ['XLA_FLAGS']} --xla_cpu_max_isa=AVX")
    assert golden.tolerance("odice", 100, entry) == golden.MARGIN * spread
    nowhere = {"versions": golden.versions()}  # recorded before machines were noted
    assert golden.tolerance("odice", 100, nowhere) == golden.MARGIN * spread
    entry["versions"] = entry["versions"] | {"jax": "0.1"}
    assert golden.tolerance("odice", 10, entry) == golden.OTHER_JAX


def test_what_differs_is_named():
    old = {"q": 0.5, "positive": 0.25, "norm of actor.params": 20.0}
    rows = 10 * golden.SETTINGS["batch_size"]
    near = {"q": 0.5 + 9e-6, "positive": 0.25 + 4 / rows, "norm of actor.params": 20.0 + 1e-4}
    assert golden.differences(old, near, 1e-5) == []
    assert golden.differences({"kl": 0.01}, {"kl": 0.01 + 9e-6}, 1e-5) == []
    assert golden.differences({"kl": 0.01}, {"kl": 0.01 + 9e-6}, 1e-5, 1e-4, 1e-7)
    assert golden.differences({"kl": 0.01}, {"kl": 0.01 + 9e-6}, 1e-5, 1e-4, 1e-6) == []
    far = {"q": 0.5 + 2e-5, "positive": 0.25 + 6 / rows, "norm of actor.params": 20.0 + 3e-4}
    assert len(golden.differences(old, far, 1e-5)) == 3
    assert golden.differences(old, near | {"q": float("nan")}, 1.0)
    assert golden.differences({"q": 0.5}, {"value": 0.5}, 1.0) == [
        "q is in one of them only",
        "value is in one of them only",
    ]


def test_shares_of_rows_are_known():
    """A mean of comparisons is a whole number of rows, K of them per row of data, K up to 3."""
    for name, entry in json.loads(golden.FILE.read_text()).items():
        for key in entry["after"]["10"]:
            if key.startswith("norm of "):  # of parameters that may stay at 1
                continue
            if key == "bound_rate":  # counts sampled actions, many per row: a share all the same
                continue
            values = np.array([entry["after"][str(updates)][key] for updates in golden.AFTER])
            rows = values * 6 * 10 * golden.SETTINGS["batch_size"]
            whole = (values != 0).any() and np.abs(rows - rows.round()).max() < 2e-3
            assert whole == (key in golden.shares()), (
                f"{name}: {key} counts rows, so it belongs to the shares in golden_tolerances.json"
            )


def test_a_seed_among_4_in_one_chunk_equals_that_seed_alone_in_ten(name, alone):
    """Neither the other seeds nor the length of a chunk change a bit.

    Both at once, since every program takes seconds to compile. Metrics are means over a chunk:
    those of the one chunk are the means of the ten, but for rounding.
    """
    if not beside_others(name):
        pytest.skip("minutes: ATOLL_SLOW=1 runs it")
    found, arrays = golden.measure(name, (3, 0, 7, 1), chunk=100, lane=1)
    values_alone, arrays_alone, means_alone = alone
    for key, value in found["100"].items():
        if key in means_alone:
            assert value == pytest.approx(means_alone[key], rel=1e-5, abs=1e-5), key
        else:
            assert value == values_alone["100"][key], key
    for one, four in zip(arrays_alone, arrays, strict=True):
        assert np.array_equal(one[0], four[1])
    floats = [x for x in arrays if x.dtype.kind == "f" and x[0].size > 1 and x.max() > x.min()]
    assert floats and all((x[0] != x[1]).any() for x in floats)  # the seeds do differ


@runs.SLOW  # a third program for the metrics alone, which the test above compares but for rounding
def test_metrics_of_a_seed_among_4_are_those_of_that_seed_alone(name, alone):
    found, _ = golden.measure(name, (3, 0, 7, 1), lane=1)
    assert found == alone[0]


@runs.SLOW
def test_seeds_as_lanes_of_a_vmap_equal_one_after_the_other(name, monkeypatch):
    """What an accelerator does. Few updates: later a ReLU that rounding flips grows into more."""
    _, alone = golden.measure(name, updates=20)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    _, arrays = golden.measure(name, (3, 0), updates=20)
    for one, two in zip(alone, arrays, strict=True):
        np.testing.assert_allclose(one[0], two[1], rtol=1e-3, atol=1e-5)


# --- Runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", runs.slow_but([*NAMES, "bc, discrete"], LOOPS))
def test_a_resumed_run_equals_an_undisturbed_one(name, tmp_path, monkeypatch, capsys):
    """8 updates and then 16 are 16 at once, and the policy acts the same without its data set.

    Where a schedule ends with the run, a copy of the run folder, taken between two chunks, is
    resumed: it is what a killed process leaves. The rest of what runs do is tested on one file, see
    test_experiment.py and test_growth.py.
    """
    monkeypatch.chdir(tmp_path)
    write = runs.write_cartpole if name in (*runs.DISCRETE, "bc, discrete") else runs.write_hdf5
    name = name.split(",")[0]
    module = importlib.import_module(f"algorithms.{name}")
    argv = ["--dataset", write("data.hdf5"), *runs.tiny(name), "--seeds", "0", "1"]
    longer = [*argv, "--num-updates", "16"]
    log, final = experiment.Run.log, {}
    whole, broken = (tmp_path / "runs" / name / "data" / x for x in ("whole", "broken"))

    def copied(run, step, *args):
        log(run, step, *args)
        final[run.folder.name] = probes.leaves(run.divergence.last_state)  # of the last border
        if step == 12 and run.folder.name == "whole" and decays:
            shutil.copytree(run.folder, broken)

    monkeypatch.setattr(experiment.Run, "log", copied)
    decays = getattr(module.Config(), "cosine", False)
    if not decays:
        runs.start(name, [*argv, "--num-updates", "8", "--name", "broken"])
    runs.start(name, [*longer, "--name", "whole"])
    assert "resuming" not in capsys.readouterr().out
    if decays:
        with pytest.raises(SystemExit) as leave:
            runs.start(name, [*argv, "--num-updates", "20", "--name", "broken", "--resume"])
        line = capsys.readouterr().err
        assert leave.value.code == 2 and line.count("\n") == 1
        assert "num_updates 16, and create_state (line" in line and "choose another --name" in line
    runs.start(name, [*longer, "--name", "broken", "--resume"])
    said = capsys.readouterr().out
    assert "resuming at update 8" in said or "resuming at update 12" in said
    rows = (whole / "metrics.csv").read_text()
    assert rows == (broken / "metrics.csv").read_text()
    assert [row.split(",")[0] for row in rows.splitlines()[1::2]] == [*map(str, range(0, 17, 4))]
    assert all(map(np.array_equal, final["whole"], final["broken"]))
    history = yaml.safe_load((broken / "config.yaml").read_text())["record"].get("history")
    assert history == (None if decays else [{"until_update": 8, "num_updates": 8}])

    Path("data.hdf5").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(broken, "copied")
    cfg, dataset, state = experiment.load(module, "copied")
    assert cfg.seeds == (0, 1) and dataset.horizon == 10
    assert all(map(np.array_equal, probes.leaves(state), final["whole"]))
    memory = stored.initial_memory(module, cfg, dataset, cfg.eval_episodes)
    act, keys = stored.acting(module, cfg, dataset, state), experiment.streams(cfg.seeds, 3)[2]
    with evaluation.Rollouts(dataset, act, keys, cfg, memory) as rollouts:
        found = rollouts.run(module.policy_params(state), 16)["return"]
    last = runs.read_csv(whole / "metrics.csv")[-2:]
    assert [f"{x:.9g}" for x in found] == [row["return"] for row in last]


# --- The file alone -----------------------------------------------------------------------------
# A file with two phases. Others with ATOLL_SLOW=1: test_fuzz.py trains them all, in their folder.
TRAINED_ALONE = ("spot",)
EACH = """
import runpy, sys
for line in sys.stdin:
    sys.argv = line.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def test_smoke_the_files_and_common_are_enough(tmp_path, compilation_cache):
    """Every file is imported and shows its settings; TRAINED_ALONE train.

    All in one process, since the imports of the libraries take longer than such a run.
    """
    shutil.copytree(ROOT / "common", tmp_path / "common", ignore=lambda *_: ["__pycache__"])
    with (tmp_path / "common" / "__init__.py").open("a") as file:
        file.write('\nprint("this is the copy")\n')
    commands = [f"{name}.py --show-config" for name in NAMES]
    for name in NAMES:
        shutil.copy(ROOT / "algorithms" / f"{name}.py", tmp_path)
    trained = [name for name in NAMES if name in TRAINED_ALONE or "ATOLL_SLOW" in os.environ]
    for name in trained:
        write = runs.write_cartpole if name in runs.DISCRETE else runs.write_hdf5
        write(tmp_path / f"{name}.hdf5")
        words = [f"{name}.py", "--dataset", f"{name}.hdf5", *runs.tiny(name), "--seeds", "0", "1"]
        words += ["--num-updates", "8", "--runs-dir", "made", "--name", "smoke"]
        commands.append(" ".join(words))
    paths = {"JAX_COMPILATION_CACHE_DIR": str(compilation_cache), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        cwd=tmp_path,
        env=os.environ | paths,
        input="\n".join(commands),
        capture_output=True,
        text=True,
        timeout=runs.HANGS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this is the copy" in done.stdout  # not the installed one
    assert done.stdout.count("\nnum_updates: ") == len(NAMES)  # of --show-config
    for name in trained:
        folder = tmp_path / "made" / name / name / "smoke"
        result = json.loads((folder / "result.json").read_text())
        assert result["algorithm"] == name and result["num_updates"] == 8
        assert np.isfinite(list(result["score"].values())).all()
        rows = (folder / "metrics.csv").read_text().splitlines()
        assert [row.split(",")[0] for row in rows] == ["update", *"004488"]
        assert all(np.isfinite(float(cell)) for cell in rows[-1].split(",") if cell)


# --- Shapes -------------------------------------------------------------------------------------
NUMBERS = ("reward", "termination", "truncation", "returns_to_go", "valid")  # columns of numbers
IN_ANOTHER_PHASE = {("qdt", "critic")}  # trained by value_chunk, whose losses are those of cql.py
NEVER_READ = {(name, "truncation") for name in NAMES if name != "awr"} | {("bc", "termination")}


def one_more_axis(net):
    def apply_fn(*args, **kwargs):
        return jax.tree.map(lambda x: x[..., None], net.apply_fn(*args, **kwargs))

    return net.replace(apply_fn=apply_fn)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_that_broadcasts_is_an_error(name):
    """[B, 1] beside [B] must not become [B, B]: without the debug modes of these tests, a column or
    a network's output with an axis too many is refused by the file itself."""
    module = importlib.import_module(f"algorithms.{name}")
    cfg, key, rows = (
        probes.config(module, log_every=4),
        jax.random.key(0),
        probes.rows_for(name, 64),
    )
    facts = {"num_actions": probes.NUMBER} if rows.action.ndim == 1 else {}
    create = functools.partial(module.create_state, cfg=cfg, **facts)
    state = jax.eval_shape(create, key, rows)
    data = jax.tree.map(np.asarray, probes.prepared(module, rows, cfg))

    def trace(state, data):
        chunk = functools.partial(module.train_chunk, start=0, cfg=cfg)
        jax.eval_shape(lambda *args: chunk(args[0], args[1], data=args[2]), state, key, data)

    columns = [x for x in NUMBERS if hasattr(data, x) and (name, x) not in NEVER_READ]
    nets = [x for x in ("critic", "value_net") if hasattr(state, x)]
    nets = [x for x in nets if (name, x) not in IN_ANOTHER_PHASE]
    assert columns + nets
    with jax.numpy_rank_promotion("allow"):
        trace(state, data)
        for x in columns:
            with pytest.raises((AssertionError, ValueError)):
                trace(state, data._replace(**{x: getattr(data, x)[..., None]}))
        for x in nets:
            with pytest.raises((AssertionError, ValueError)):
                trace(state._replace(**{x: one_more_axis(getattr(state, x))}), data)
