# SPDX-License-Identifier: Apache-2.0
"""`--data host`: the device holds the rows of one chunk, the numbers are those of `device`."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import compiler_flags
import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_algorithms import NAMES

from benchmarks import host_data as benchmark
from common.experiment import config, devices, host_data

ROOT = Path(__file__).resolve().parents[2]
ROWS, BATCH, STEPS, END = 1000, 4, 5, 15
REFUSE = ("awr", "qdt", "mopo", "combo", "mobile", "morel")  # two read all rows, four roll out
NAMES = [name for name in NAMES if name not in REFUSE]


class Data(NamedTuple):
    x: np.ndarray  # [N]
    pair: np.ndarray  # [N, 2]


class Settings(NamedTuple):
    log_every: int = STEPS
    num_updates: int = END


def data():
    x = np.arange(ROWS, dtype=np.float32)
    return Data(x, np.stack([x, -x], axis=1))


def update(state, step, key, data, cfg):
    """The sum of all rows read; the second read is of windows."""
    index = jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, len(data.x))
    batch = jax.tree.map(lambda x: x[index], data)
    window = data.x[(index[:, None] + jnp.arange(2)[None]).clip(max=len(data.x) - 1)]
    total = state["total"] + batch.x.sum() + 2 * batch.pair[:, 1].sum() + 3 * window.sum()
    return {"total": total}, {"first": batch.x[0]}


def train_chunk(state, key, start, data, cfg):
    steps = start + jnp.arange(cfg.log_every)
    return jax.lax.scan(functools.partial(update, key=key, data=data, cfg=cfg), state, steps)


def trained(rows, starts=range(0, END, STEPS)):
    train = devices.over_seeds(functools.partial(train_chunk, cfg=Settings()), update)
    state, metrics = {"total": jnp.zeros(2)}, []
    for start in starts:
        state, now = train(state, jax.random.split(jax.random.key(0)), start, rows)
        metrics.append(np.asarray(now["first"]))
    return np.asarray(state["total"]), np.concatenate(metrics, axis=1)


def test_the_numbers_are_those_of_the_whole_data_on_the_device():
    for mine, whole in zip(trained(data()), trained(jax.device_put(data())), strict=True):
        assert np.array_equal(mine, whole)
    later = range(STEPS, END, STEPS)  # as a resumed run begins
    assert np.array_equal(trained(data(), later)[1], trained(data())[1][:, STEPS:])


def test_the_device_gets_each_row_of_a_chunk_once_and_in_order():
    keys, state = jax.random.split(jax.random.key(0)), {"total": jnp.zeros(2)}
    one = functools.partial(update, cfg=Settings())
    chunk = functools.partial(train_chunk, cfg=Settings())
    feed = host_data.Feed(one, chunk, state, keys, data(), STEPS, END)
    rows = feed(STEPS)
    ids = np.asarray(rows.ids)
    assert len(ids) == 2 * STEPS * BATCH * 3 < ROWS and (np.diff(ids) >= 0).all()
    wanted = [
        np.asarray(jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, ROWS))
        for key in keys
        for step in range(STEPS, 2 * STEPS)
    ]
    wanted = np.unique(np.stack([wanted, np.minimum(np.add(wanted, 1), ROWS - 1)]))
    assert np.array_equal(np.unique(ids), wanted)
    assert len(np.unique(ids)) == (ids != ids[-1]).sum() + 1  # only the last one is repeated
    assert np.array_equal(rows.arrays.pair, data().pair[ids]) and rows.count == ROWS


def test_a_row_that_was_not_gathered_is_no_number():
    """So a chunk that reads other rows than its `update` showed stops the run."""
    ids, index = jnp.array([2, 5, 5]), jnp.array([[0, 2], [5, 8]])
    arrays = {"x": jnp.arange(3.0), "wide": jnp.ones((3, 4, 2)), "n": jnp.array([7, 8, 9])}
    with jax.debug_nans(False):
        columns = host_data.Rows(ids, arrays, 9).columns()
        x, wide, n = (columns[name][index] for name in ("x", "wide", "n"))
    assert np.array_equal(x, [[np.nan, 0], [1, np.nan]], equal_nan=True)
    assert np.isnan(wide).all(axis=(2, 3)).tolist() == [[True, False], [False, True]]
    assert wide.shape == (2, 2, 4, 2) and n.shape == (2, 2) and n.dtype == arrays["n"].dtype


def in_turn(state, step, key, data, cfg):
    """An update that reads for two steps, as in td3_bc.py and rebrac.py."""
    for i in range(2):
        state, metrics = update(state, step + i, key, data, cfg)
    return state, metrics


def in_a_loop(state, step, key, data, cfg):
    """The same, as in rlpd.py."""
    one = functools.partial(update, key=key, data=data, cfg=cfg)
    state, metrics = jax.lax.scan(one, state, step + jnp.arange(2))
    return state, jax.tree.map(lambda x: x[-1], metrics)


@pytest.mark.parametrize("two", [in_turn, in_a_loop])
def test_no_step_is_drawn_twice_by_an_update_of_two_steps(two):
    """The chunk tells how often it calls `update`; the Config may have a delay of other updates."""

    class Delayed(NamedTuple):
        log_every: int = 2 * STEPS
        policy_delay: int = 2

    def chunk(state, key, start, data, update, stride):
        steps = start + jnp.arange(0, 2 * STEPS, stride)
        cfg = Delayed()
        return jax.lax.scan(functools.partial(update, key=key, data=data, cfg=cfg), state, steps)

    keys, state = jax.random.split(jax.random.key(0)), {"total": jnp.zeros(2)}
    made = []
    for one, stride in ((update, 1), (two, 2)):
        functions = (
            functools.partial(one, cfg=Delayed()),
            functools.partial(chunk, update=one, stride=stride),
        )
        feed = host_data.Feed(*functions, state, keys, data(), 2 * STEPS, END)
        made.append(feed(STEPS))
    assert np.array_equal(made[0].ids, made[1].ids) and len(made[0].ids) < ROWS


def by_priority(state, step, key, data, cfg):
    """Rows that the State likes are drawn more often, as in prioritised sampling."""
    liked = jnp.full(len(data.x), state["total"])
    key = jax.random.fold_in(key, step)
    index = jax.random.choice(key, len(data.x), (BATCH,), p=jax.nn.softmax(liked))
    return {"total": state["total"] + data.x[index].sum()}, {"first": data.x[index[0]]}


def in_stages(state, step, key, data, cfg):
    """The first rows alone until the State has learnt them."""
    known = jnp.where(state["total"] < 10, 100, len(data.x))
    index = jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, known)
    return {"total": state["total"] + data.x[index].sum()}, {"first": data.x[index[0]]}


def by_link(state, step, key, data, cfg):
    """A row tells which other row is read."""
    index = jax.random.randint(jax.random.fold_in(key, step), (BATCH,), 0, len(data.x))
    other = data.x[index].astype(int)
    return {"total": state["total"] + data.pair[other].sum()}, {"first": data.x[index[0]]}


@pytest.mark.parametrize("chooses", [by_priority, in_stages, by_link])
def test_rows_that_are_not_known_ahead_are_refused(chooses, capsys):
    """They were drawn by a State and by rows of zeros, and then rows beside them were read."""

    def chunk(state, key, start, data, cfg):
        steps = start + jnp.arange(cfg.log_every)
        return jax.lax.scan(functools.partial(chooses, key=key, data=data, cfg=cfg), state, steps)

    train = devices.over_seeds(functools.partial(chunk, cfg=Settings()), chooses)
    keys = jax.random.split(jax.random.key(0))
    with pytest.raises(SystemExit) as leave:
        train({"total": jnp.zeros(2)}, keys, 0, data())
    assert leave.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--data host: {chooses.__name__} chooses rows by its State or by" in line
    assert line.endswith("use --data device")
    train = devices.over_seeds(functools.partial(chunk, cfg=Settings()), chooses)
    state, _ = train({"total": jnp.zeros(2)}, keys, 0, jax.device_put(data()))  # the remedy
    assert np.isfinite(state["total"]).all()


def test_a_memory_map_is_read_in_rows_not_copied(tmp_path):
    mapped = []
    for name, array in data()._asdict().items():
        np.save(tmp_path / f"{name}.npy", array)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    placed = devices.place(Data(*mapped), config.Options(data="host"))
    assert all(np.shares_memory(mine, file) for mine, file in zip(placed, mapped, strict=True))
    for mine, whole in zip(trained(placed), trained(data()), strict=True):
        assert np.array_equal(mine, whole)


def test_chunks_are_gathered_ahead_but_not_past_the_end():
    asked = []
    feed = host_data.Feed(
        functools.partial(update, cfg=Settings()),
        functools.partial(train_chunk, cfg=Settings()),
        {"total": jnp.zeros(2)},
        jax.random.split(jax.random.key(0)),
        data(),
        STEPS,
        END,
    )
    rows = feed._rows
    feed._rows = lambda start: asked.append(start) or rows(start)
    for start in range(0, END, STEPS):
        feed(start)
        feed.prepare(start + STEPS)
    feed.pool.shutdown()
    assert asked == [0, STEPS, 2 * STEPS]


def test_one_program_serves_all_chunks(monkeypatch):
    traced, scan = [], jax.lax.scan

    def counted(*args):
        traced.append(args)
        return scan(*args)

    monkeypatch.setattr(jax.lax, "scan", counted)
    trained(data())
    assert len(traced) == 2  # to see how often it calls `update`, and to compile it


@pytest.mark.usefixtures("fused_as_users")
@pytest.mark.parametrize("name", runs.slow_but(NAMES, ["rebrac", "qc", "spot"]))
def test_a_run_with_data_in_host_memory_has_the_same_numbers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write = runs.write_cartpole if name in runs.DISCRETE else runs.write_hdf5
    argv = ["--dataset", write("data.hdf5"), *runs.tiny(name), "--seeds", "0", "1"]
    argv += ["--num-updates", "16"]
    found = []
    for where in ("device", "host"):
        runs.start(name, [*argv, "--name", where, "--data", where])
        folder = tmp_path / "runs" / name / "data" / where
        found.append((folder / "metrics.csv").read_text())
    assert found[0] == found[1]


def test_what_needs_all_rows_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny("awr"), "--data", "host"]
    with pytest.raises(SystemExit) as leave:
        runs.start("awr", argv)
    assert leave.value.code == 2 and "--data host" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_two_devices_have_the_same_numbers(tmp_path, fused_as_users):
    """Each trains one of the seeds; the numbers are those of one device, data on it."""
    argv = ["--dataset", runs.write_hdf5(tmp_path / "data.hdf5"), *runs.tiny("rebrac")]
    argv += ["--seeds", "0", "1", "--num-updates", "16", "--runs-dir"]
    runs.start("rebrac", [*argv, str(tmp_path / "one")])
    flags = compiler_flags.as_users("--xla_force_host_platform_device_count=2")
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    words = runs.command("rebrac", [*argv, "two", "--data", "host"])
    code, _, error = runs.call(words, tmp_path, runs.environment(cache, XLA_FLAGS=flags))
    assert code == 0, error
    one, two = (runs.only_run(tmp_path / name) for name in ("one", "two"))
    for count, folder in ((1, one), (2, two)):
        result = json.loads((folder / "result.json").read_text())
        assert result["hardware"].startswith(f"{count} x cpu")
    assert (one / "metrics.csv").read_text() == (two / "metrics.csv").read_text()


def test_the_rows_of_two_chunks_at_most_are_on_the_device(tmp_path, monkeypatch, capsys):
    """As the benchmark counts them: with those of the chunk that runs, which Python lets go."""
    monkeypatch.chdir(tmp_path)
    # Without the reset of what the kernel noted of pytest's process.
    monkeypatch.setattr(benchmark, "most_of_process", lambda forget=False: 0)
    argv = ["--dataset", runs.write_hdf5("data.hdf5", rows=2000), *runs.tiny("rebrac")]
    argv += ["--seeds", "0", "1", "--data", "host"]
    benchmark.watched("rebrac", *argv)
    found = json.loads(capsys.readouterr().out.rpartition("\0")[2])
    chunk = 4 * 4 * 2 * (4 * (3 + 1 + 1 + 3 + 1 + 1 + 1) + 4)  # updates, batch, seeds, row, number
    assert found["rows, GB"] in (chunk, 2 * chunk)
    assert found["device, GB"] > found["rows, GB"]


def test_the_kept_record_counts_the_rows_on_the_device():
    record = json.loads((ROOT / "benchmarks" / "results" / "host_data.json").read_text())
    device, host = record["rows"]
    assert host["rows, GB"] == pytest.approx(2 * 1000 * 256 * (benchmark.ROW + 4) / 1e9, rel=0.02)
    assert device["rows, GB"] == pytest.approx(10_000_000 * benchmark.ROW / 1e9, rel=0.01)
    for row in (device, host):
        assert row["rows, GB"] < row["device, GB"] < row["training, GB"] <= row["process, GB"]
    # Data once, and what Python, JAX, its compiler and two chunks take.
    assert host["training, GB"] < device["rows, GB"] + 1.5


@runs.SLOW
def test_the_benchmark_compares_both_ways(tmp_path):
    count, chunk = 3_000_000, (40, 256, 2)  # updates, batch, seeds
    sizes = ["--transitions", str(count), "--num-updates", "160", "--log-every", str(chunk[0])]
    sizes += ["--seeds", "0", "1", "--output", tmp_path / "record"]
    words = [sys.executable, "benchmarks/host_data.py", *sizes]
    subprocess.run(words, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    record = json.loads((tmp_path / "record.json").read_text())
    device, host = record["rows"]
    assert record["metrics.csv of both"] == "the same, byte for byte"
    assert host["updates/s"] > 0
    data, row = count * benchmark.ROW / 1e9, benchmark.ROW + 4
    assert device["rows, GB"] == pytest.approx(data, rel=0.01)
    assert host["rows, GB"] == pytest.approx(2 * np.prod(chunk) * row / 1e9, rel=0.1)
    for found in (device, host):  # the rest is the state of two seeds, some megabytes each
        assert found["rows, GB"] < found["device, GB"] < found["rows, GB"] + 0.03
    # On a CPU the device's data are a second copy in the process; here there must be none.
    assert host["training, GB"] < device["training, GB"] - data / 2
    assert host["training, GB"] <= host["process, GB"] and host["training, GB"] < data + 1.5
    assert (tmp_path / "record.md").read_text() == benchmark.page(record)
