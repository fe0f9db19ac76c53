# SPDX-License-Identifier: Apache-2.0
"""A small version of benchmarks/model_error.py: dynamics of a hopper, fitted in seconds."""

import json

import gymnasium
import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from algorithms import mopo
from benchmarks import model_error
from common import datasets, experiment

UPDATES = 800


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """4,000 rows of Hopper-v4 whose actions are small."""
    env, rng = gymnasium.make("Hopper-v4"), np.random.default_rng(0)
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    columns = {name: [] for name in names}
    observation, _ = env.reset(seed=0)
    for number in range(4000):
        action = rng.uniform(-0.3, 0.3, 3).astype(np.float32)
        after, reward, termination, _, _ = env.step(action)
        row = (observation, action, reward, termination, number == 3999, after)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        observation = env.reset()[0] if termination else after
    path = tmp_path_factory.mktemp("hopper") / "hopper-small.hdf5"
    with h5py.File(path, "w") as file:
        file.attrs["env_id"] = "Hopper-v4"
        for name, column in columns.items():
            file[name] = np.array(column, np.float32)
    return datasets.load(str(path))


@pytest.fixture(scope="module")
def fitted(dataset):
    """(config, state) of a run that has fitted its dynamics."""
    cfg = mopo.Config(
        dataset=dataset.id,
        log_every=UPDATES,
        batch_size=64,
        hidden=(8,),
        model_updates=UPDATES,
        model_hidden=(64, 64),
        model_decays=(1e-5, 1e-5, 1e-5),
        num_models=3,
        num_elites=2,
        holdout_every=100,
        rollout_batch=4,
    )
    data = jax.device_put(dataset.transitions)
    keys = [keys[0] for keys in experiment.streams(cfg.seeds, 3)]
    state = mopo.create_state(keys[0], jax.tree.map(lambda x: x[:1], data), cfg)
    fit = jax.jit(lambda state: mopo.model_chunk(state, keys[1], 0, data, cfg)[0])
    return cfg, fit(state)


def test_the_simulator_repeats_the_recording(atoll_data):
    """Also behind clipped speeds, where it begins in an earlier row and follows the recording."""
    dataset = datasets.load(str(atoll_data / "hopper-medium-v4.hdf5"))
    data, simulator = dataset.transitions, model_error.Simulator(dataset)
    begin = model_error.last_exact(data)
    clipped = (np.abs(data.observation) == 10).any(axis=1)
    assert clipped.sum() > 1000 and (begin >= 0).all()
    rows = np.random.default_rng(0).choice(np.flatnonzero(clipped), 30)
    rows = [*rows, *np.flatnonzero(~clipped)[:1000:100]]
    for row in rows:
        actions = data.action[begin[row] : row + 1]
        found = simulator.follow(data.observation[begin[row]], actions)[-1]
        np.testing.assert_allclose(found[:-1], data.next_observation[row], atol=1e-4)
        np.testing.assert_allclose(found[-1], data.reward[row], atol=1e-4)


def test_the_row_that_the_simulator_begins_at(transitions):
    observation = np.ones((8, 3))
    observation[[1, 2, 4, 6], 0] = [10, -10, 10, 10]
    ends = {"termination": np.arange(8) == 3, "truncation": np.arange(8) == 7}
    data = transitions(8, observation=observation, **ends)
    # The first row of the second episode is clipped: nothing of the first one is taken for it.
    assert model_error.last_exact(data).tolist() == [0, 0, 0, 3, -1, 5, 5, 7]


def test_the_penalty_rises_with_the_error(dataset, fitted):
    """What MOPO rests on. Errors grow from step to step, and with actions unlike the data's.

    There the penalty knows little after so short a fit, but the members disagree.
    """
    cfg, state = fitted
    arguments = model_error.Arguments(runs=())
    table, correlations, found, raw = model_error.measure(cfg, dataset, state, arguments)
    errors = {(row["actions"], row["predictor"]): row for row in table}
    ours = errors["data", "ensemble"]
    assert ours["step 1"] < 0.9 and ours["step 5"] > 1.2 * ours["step 1"], ours
    assert errors["uniform", "ensemble"]["step 1"] > ours["step 1"]
    assert errors["data", "recording"]["step 1"] < 1e-2
    assert correlations[0]["penalty and error"] > 0.4
    for row in correlations:
        assert row["penalty and error"] > 0 and row["disagreement and error"] > 0.2, row
    np.testing.assert_allclose(
        correlations[0]["penalty and error"],
        stats.spearmanr(found["data"].penalty, raw["data"]).statistic,
        atol=0.006,
    )


def test_first_error_is_that_of_the_fit(dataset, fitted):
    """One step from the held-out rows is what the fit measures there."""
    cfg, state = fitted
    data = dataset.transitions
    key = experiment.streams(cfg.seeds, 3)[1][0]
    rows = np.asarray(mopo.holdout_rows(key, len(data.reward)))
    observation, action = data.observation[rows], data.action[rows][:, None]
    member = np.asarray(model_error.members_steps(state, observation, action))[:, 0]
    truth = np.concatenate([data.next_observation[rows], data.reward[rows][:, None]], axis=-1)
    square = np.square(member - truth).mean(axis=(1, 2))
    np.testing.assert_allclose(square, state.fit.best_error, rtol=1e-3)


def test_the_page_has_the_record(dataset, fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(model_error, "fit_of", lambda folder: folder)
    cfg, state = fitted
    seeds = jax.tree.map(lambda x: jnp.asarray(x)[None], state)
    monkeypatch.setattr(experiment, "load", lambda module, folder: (cfg, dataset, seeds))
    output = tmp_path / "small"
    model_error.main(model_error.Arguments(runs=("a",), rows=20, steps=2, output=str(output)))
    record = json.loads(output.with_suffix(".json").read_text())
    assert output.with_suffix(".md").read_text() == model_error.page(record)
    assert output.with_suffix(".png").stat().st_size > 5000
    predictors = [f"member {i}" for i in range(3)] + ["ensemble"]
    expected = [(policy, x) for policy in model_error.POLICIES for x in predictors]
    expected.insert(4, ("data", "recording"))
    assert [(row["actions"], row["predictor"]) for row in record["rows"]] == expected
    assert [row["rows"] for row in record["correlations"]] == [20, 20, 20]


def test_ranks():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50), rng.normal(size=50)
    np.testing.assert_allclose(model_error.spearman(x, y), stats.spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"runs": ()}, "give a run folder"),
        ({"rows": 0}, "--rows 0: must be at least 1"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"output": "a.png"}, "--output a.png: must have no suffix"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(wrong, words, capsys):
    with pytest.raises(SystemExit) as leave:
        model_error.main(model_error.Arguments(**({"runs": ("a",)} | wrong)))
    assert leave.value.code == 2
    assert words in capsys.readouterr().err


def test_an_env_without_the_states_is_refused(capsys):
    with pytest.raises(SystemExit):
        model_error.Simulator(datasets.load("local/pointmaze/umaze-v0"))
    assert "no MuJoCo env" in capsys.readouterr().err
