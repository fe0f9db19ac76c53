# SPDX-License-Identifier: Apache-2.0
"""benchmarks/throughput.py counts what it should and runs. How fast anything is, is not tested."""

import importlib
import json
import re
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import helpers_runs
import jax
import jax.numpy as jnp
import pytest
from own_files import NAMES

from algorithms import rebrac
from benchmarks import peers, throughput
from common import experiment
from common.experiment.config import Options

FILES = Path(__file__).resolve().parents[2] / "algorithms"


def products(function, *arguments):
    return throughput.Loop(throughput.matmuls(jax.make_jaxpr(function)(*arguments).jaxpr))


def rebrac_flops(hidden, num_critics, batch_size, policy_delay):
    """The matrix products of one critic update of rebrac.py, counted by hand."""

    def layers(inputs, outputs):
        return [2 * batch_size * m * n for m, n in pairwise((inputs, *hidden, outputs))]

    observation, action = throughput.OBSERVATION, throughput.ACTION
    actor, critic = layers(observation, action), layers(observation + action, 1)
    # Target: actor, critics. Critics: forward, then weights, then activations but the first.
    critic_step = sum(actor) + num_critics * (3 * sum(critic) + sum(critic[1:]))
    # Actor and critics forward, critics back to the action, then the actor's gradients.
    actor_step = 2 * sum(actor) + num_critics * 2 * sum(critic) + sum(actor[1:])
    return critic_step + actor_step / policy_delay


@pytest.mark.parametrize("sizes", [((256, 256, 256), 2, 256, 2), ((24, 16), 3, 8, 1)])
def test_count_of_rebrac_is_the_hand_count(sizes):
    names = ("hidden", "num_critics", "batch_size", "policy_delay")
    cfg = rebrac.Config(log_every=4, **dict(zip(names, sizes, strict=True)))
    data = jax.eval_shape(lambda: throughput.synthetic("").transitions)
    key = jax.eval_shape(partial(jax.random.key, 0))
    state = jax.eval_shape(partial(rebrac.create_state, cfg=cfg), key, data)
    found = products(partial(rebrac.train_chunk, cfg=cfg), state, key, 0, data)
    assert found.flops == pytest.approx(4 * rebrac_flops(*sizes), rel=0.01)
    assert throughput.unbatched(found).flops == found.flops


def test_loops_branches_and_dead_code():
    def function(x, w):
        dead = x @ w
        x, _ = jax.lax.scan(lambda x, _: (jax.jit(jnp.matmul)(x, w), dead @ w), x, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    found = products(function, jnp.ones((3, 4)), jnp.ones((4, 4)))
    assert found.flops == (5 + 2) * 2 * 3 * 4 * 4


def test_operands_keep_their_shapes_and_storage():
    product = jax.vmap(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))))
    (found,) = products(product, jnp.ones((2, 5, 3)), jnp.ones((2, 4, 3))).body
    assert (found.left.shape, found.right.shape) == ((2, 5, 3), (2, 4, 3))
    assert found.k_axes == (-1, -1) and found.flops == 2 * 2 * 5 * 3 * 4


def test_the_floor_is_a_chain_of_means():
    found = products(
        lambda x, w: jax.lax.map(lambda _: x @ w, jnp.arange(7)),
        *(jnp.ones((2, 5, 3)), jnp.ones((2, 3, 4))),
    )
    for node in (found, throughput.unbatched(found)):
        compiled, start = throughput.program(node)
        assert 0.25 < compiled(start) < 1


def test_it_runs_and_writes_both_records(tmp_path, capsys):
    file = tmp_path / "new" / "speed"
    sizes = {"seeds": (2,), "batch_size": 4, "updates": 2, "repeats": 1}
    (row,) = throughput.main(throughput.Arguments(**sizes, output=str(file)))
    by_hand = rebrac_flops((256, 256, 256), 2, 4, 2) / 1e9
    assert row["GFLOP/update"] == pytest.approx(by_hand, rel=0.01)
    record = json.loads(file.with_suffix(".json").read_text())
    assert record["rows"] == [row] and record["batch size"] == 4
    assert "| rebrac | 2 |" in file.with_suffix(".md").read_text()
    assert "| rebrac | 2 |" in capsys.readouterr().out


def test_a_call_that_is_broken_off_keeps_what_it_measured(tmp_path, monkeypatch):
    def measure(name, seeds, _):
        if seeds == 2:
            raise KeyboardInterrupt
        return {"updates/s": 5.0}

    monkeypatch.setattr(throughput, "measure", measure)
    file = tmp_path / "o.json"
    with pytest.raises(KeyboardInterrupt):
        throughput.main(throughput.Arguments(seeds=(1, 2), output=str(file)))
    assert json.loads(file.read_text())["rows"] == [{"updates/s": 5.0}]


def test_a_peer_is_asked_for_the_same_sizes(tmp_path, monkeypatch):
    peer = tmp_path / "python"
    answer = {"updates/s": 2.0, "versions": {"d3rlpy": "1.2"}}
    peer.write_text(f"#!/bin/sh\necho \"$2\" > '{tmp_path}/asked'\necho '{json.dumps(answer)}'\n")
    peer.chmod(0o755)
    monkeypatch.setattr(throughput, "measure", lambda name, seeds, _: {"updates/s": 5.0})
    sizes = {"algorithms": ("td3_bc", "bc"), "seeds": (1, 2), "batch_size": 4, "repeats": 1}
    rows = throughput.main(throughput.Arguments(**sizes, updates=2, peer=str(peer)))
    assert [row["times d3rlpy"] for row in rows] == [2.5, None, None, None]
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["algorithm"] == "td3_bc" and asked["hidden"] == [256, 256]
    assert asked["batch_size"] == 4 and asked["updates"] == 2 and asked["rows"] == throughput.ROWS
    assert asked["device"] == "cpu"


DATASETS = """
class Dataset(dict):
    create = classmethod(lambda cls, **fields: cls(fields))

    def sample(self, count):
        return {key: x[:count] for key, x in self.items()}
"""
AGENT = """
import json
from pathlib import Path
from types import SimpleNamespace

get_config = SimpleNamespace


class FQLAgent:
    network = SimpleNamespace(params=0.0)

    @classmethod
    def create(cls, seed, observation, action, config):
        shapes = {"observation": observation.shape, "action": action.shape}
        Path("asked").write_text(json.dumps(vars(config) | shapes))
        return cls()

    def update(self, batch):
        assert batch["rewards"].shape == (4,) and batch["masks"].all()
        return self, {}
"""


def test_a_code_base_trains_as_its_main_program_does(tmp_path, monkeypatch):
    """A folder like that of seohongpark/fql, whose agent only says what it was asked for."""
    for file, text in (("agents/fql.py", AGENT), ("utils/datasets.py", DATASETS)):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    ours = {"updates/s": 5.0, "updates/CPU s": 2.0}
    monkeypatch.setattr(throughput, "measure", lambda name, seeds, _: ours)
    sizes = {"algorithms": ("fql", "bc"), "seeds": (1, 2), "batch_size": 4, "repeats": 1}
    options = {"updates": 3, "peers": (f"fql={tmp_path}",), "output": str(tmp_path / "o.json")}
    throughput.main(throughput.Arguments(**sizes, **options))
    (row,) = json.loads((tmp_path / "o.json").read_text())["peers"]
    assert (row["algorithm"], row["peer"], row["why not"]) == ("fql", "fql", "")
    assert row["updates/s"] > 0 and "jax" in row["versions"]
    assert row["times the peer"] == pytest.approx(5 / row["updates/s"])
    assert row["by CPU time"] == pytest.approx(2 / row["updates/CPU s"])
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked["batch_size"] == 4 and asked["value_hidden_dims"] == [512] * 4
    assert (asked["observation"], asked["action"]) == ([1, 17], [1, 6])


def test_a_code_base_that_cannot_be_measured_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "measure", lambda name, seeds, _: {"updates/s": 5.0})
    options = {"algorithms": ("rebrac",), "seeds": (1,), "peers": (f"corl={tmp_path}",)}
    throughput.main(throughput.Arguments(**options, output=str(tmp_path / "o.json")))
    (row,) = json.loads((tmp_path / "o.json").read_text())["peers"]
    assert row["updates/s"] is None and row["times the peer"] is None
    assert "ModuleNotFoundError" in row["why not"]


def test_other_widths_than_those_in_the_code_of_a_peer_are_refused():
    ask = {"hidden": [256, 256], "critic_hidden": [256, 256]}
    peers.demand(ask, "a peer", (256, 256))
    with pytest.raises(peers.Refused, match="has the widths"):
        peers.demand(ask, "a peer", (256, 256, 256))


# Files with a Config field whose comment begins with "first updates", and that field.
FIRST_UPDATES = re.compile(r"^    (\w+): int = .*# first updates[:,]", re.MULTILINE)
FIRST = {name: FIRST_UPDATES.findall((FILES / f"{name}.py").read_text()) for name in NAMES}
WITH_A_FIRST_PHASE = [name for name, fields in FIRST.items() if fields]


def test_all_first_phases_are_known():
    assert len(WITH_A_FIRST_PHASE) >= 11
    assert {x for fields in FIRST.values() for x in fields} <= {*throughput.FIRST_PHASES}


@pytest.mark.parametrize("name", NAMES)
def test_every_file_takes_the_sizes(name):
    module = importlib.import_module(f"algorithms.{name}")
    arguments = throughput.Arguments(updates=12, batch_size=4)
    cfg = throughput.config(module, 1, arguments)
    experiment.check(cfg, Options(wandb="disabled"))
    assert cfg.batch_size == 4 and cfg.num_updates % cfg.log_every == 0


@pytest.mark.parametrize(
    "name", helpers_runs.slow_but([*WITH_A_FIRST_PHASE, "rlpd", "wsrl"], ["brac", "qdt"])
)
def test_the_phase_after_the_first_ones_is_measured(name, monkeypatch):
    monkeypatch.setattr(experiment, "over_seeds", lambda chunk, update=None: chunk)
    module = importlib.import_module(f"algorithms.{name}")
    words = [*helpers_runs.tiny(name), "--dataset", "-"]
    small, _ = experiment.parse(module.Config, words)
    given = ("batch_size", "num_updates", "log_every", "eval_every", "seeds", "online_updates")
    given += throughput.FIRST_PHASES
    small = {key: value for key, value in vars(small).items() if key not in given}
    cfg = throughput.config(module, 2, throughput.Arguments(updates=4, batch_size=4), **small)
    chunk, (_, _, start, _) = throughput.last_chunk(module, cfg)
    assert chunk.func is module.train_chunk
    assert start == cfg.num_updates - cfg.log_every


def test_a_chunk_is_whole_iterations():
    """AWR's is one iteration: V on all rows three times, 200 steps of V, 1000 of the actor."""
    sizes = {"algorithms": ("awr",), "seeds": (1,), "batch_size": 4, "updates": 5, "repeats": 1}
    (row,) = throughput.main(throughput.Arguments(**sizes))
    v = [(throughput.OBSERVATION, 128), (128, 64), (64, 1)]
    actor = [*v[:2], (64, throughput.ACTION)]
    forward, steps = sum(2 * m * n for m, n in v), 0
    for layers, count in ((v, 200), (actor, 1000)):  # forward, weights, activations but the first
        steps += count * 4 * sum(2 * m * n * (3 if i else 2) for i, (m, n) in enumerate(layers))
    by_hand = (3 * throughput.ROWS * forward + steps) / 1000 / 1e9
    assert row["GFLOP/update"] == pytest.approx(by_hand, rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"algorithms": ("no_such_file",)},
        {"seeds": ()},
        {"updates": 3},
        {"repeats": 0},
        {"output": "table.csv"},
        {"peer": "/absent/python"},
        {"peers": ("fql=/absent/folder",)},
        {"peers": ("no_such_peer=/tmp",)},
        {"peers": ("fql",)},
        {"online": ("NoSuchEnv-v0",), "algorithms": ("iql",), "updates": 50},
        {"online": ("Pendulum-v1",), "algorithms": ("bc",), "updates": 50},
        {"online": ("Pendulum-v1",), "updates": 51},
        {"steps_per_refresh": (0,)},
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        throughput.main(throughput.Arguments(**wrong))
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_rollouts_are_counted_in_env_steps(capsys):
    row = throughput.roll_out("Pendulum-v1", seeds=2)
    assert row["steps"] == 2 * 10 * 200 and row["steps/s"] > 0
    with pytest.raises(SystemExit):
        throughput.roll_out("NoSuchEnv-v0", seeds=1)
    assert capsys.readouterr().err.startswith("error: --rollouts NoSuchEnv-v0: ")


def test_env_steps_of_the_online_phase_are_counted(tmp_path, capsys):
    """An env that sleeps has at least the time in which it slept."""
    import gymnasium
    from gymnasium.envs.classic_control import PendulumEnv

    class Slow(PendulumEnv):
        def step(self, action):
            time.sleep(0.01)
            return super().step(action)

    gymnasium.register("Slow-v0", Slow, max_episode_steps=20, disable_env_checker=True)
    sizes = {"algorithms": ("rlpd",), "seeds": (2,), "batch_size": 4, "updates": 40, "repeats": 1}
    try:
        arguments = throughput.Arguments(**sizes, online=("Slow-v0",), steps_per_refresh=(1,))
        rows = throughput.main(arguments)
    finally:
        del gymnasium.registry["Slow-v0"]
    assert [row["steps per refresh"] for row in rows] == [1]
    for row in rows:
        assert row["updates per env step"] == 20
        assert row["updates/s"] == pytest.approx(20 * row["env steps/s"])
        # A step of both seeds sleeps 0.02 s, in which they make two env steps.
        slept = 0.01 * row["env steps/s"]
        assert slept <= row["share of env"] <= row["share of env and acting"] < 1
    assert "| rlpd | Slow-v0 | 2 | 1 | 20 |" in capsys.readouterr().out


def test_an_actor_that_is_updated_every_second_time_is_newer_after_two_steps():
    sizes = {"batch_size": 4, "updates": 4, "repeats": 1}
    arguments = throughput.Arguments(**sizes)
    row = throughput.measure_online("rebrac", "Pendulum-v1", 1, 1, arguments)
    assert row["steps per refresh"] == 2


def test_a_record_shows_every_table():
    tables = {"rows": [{"a": 1.0}], "loading": [{"layout": "D4RL", "load, s": 0.5}]}
    text = throughput.markdown({"command": "x"}, tables)
    assert "| a |\n| --- |\n| 1.000 |\n\n## Loading\n\n| layout | load, s |" in text
