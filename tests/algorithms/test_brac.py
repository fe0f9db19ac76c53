# SPDX-License-Identifier: Apache-2.0
"""BRAC's and BEAR's losses, phases and policy against NumPy in float64 and hand-worked numbers."""

import dataclasses
import functools
import shutil

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import brac
from common import experiment
from common.experiment import config

critic_loss = nets.compiled(brac.critic_loss)
clone_loss = nets.compiled(brac.clone_loss)
_actor_loss = nets.compiled(brac.actor_loss)


def setup(**overrides):
    settings = {"critic_hidden": (16, 16), "alpha_training": "none", "divergence": "kl"}
    settings |= {"kernel_width": brac.Config.kernel_width}
    return nets.setup(brac, **(settings | overrides))


def actor_loss(params, state, batch, key, warm, cfg):
    return _actor_loss(params, state, batch, key, np.bool_(warm), cfg)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_gaussian(params, observation):
    """Mean and std before tanh of actor and behaviour policy."""
    mean, position = np.split(nets.mlp(params, observation), 2, axis=-1)
    return mean, np.exp(-5 + 5 * (1 + np.tanh(position)) / 2)


def numpy_log_prob(x, mean, std):
    """log density of tanh(x)."""
    normal = -0.5 * ((x - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))
    return (normal + 2 * np.log(np.cosh(x))).sum(axis=-1)


def numpy_divergence(x, actor, behaviour, noise, cfg):
    """Row by row and pair by pair; x [N, B, A] are draws of the actor, (mean, std), before tanh."""
    count, size, _ = x.shape
    found = np.zeros(size)
    for row in range(size):
        pi = [x[i, row] for i in range(count)]
        (mean, std), (b_mean, b_std) = [(m[row], s[row]) for m, s in (actor, behaviour)]
        if cfg.divergence == "kl":
            for u in pi:
                clipped = np.arctanh(
                    np.clip(np.tanh(u), cfg.action_margin - 1, 1 - cfg.action_margin)
                )
                ratio = numpy_log_prob(u, mean, std) - numpy_log_prob(clipped, b_mean, b_std)
                found[row] += ratio / count
            continue
        mu = [b_mean + b_std * noise[i, row] for i in range(count)]
        if not cfg.mmd_before_tanh:
            pi, mu = np.tanh(pi), np.tanh(mu)
        for one, other, weight in ((pi, pi, 1), (mu, mu, 1), (pi, mu, -2)):
            for u in one:
                for v in other:
                    power = 1 if cfg.kernel == "laplacian" else 2
                    distance = (np.abs(u - v) ** power).sum()
                    found[row] += weight * np.exp(-distance / cfg.kernel_width) / count**2
    return np.sqrt(found + 1e-6) if cfg.mmd_root else found


def draws(key, cfg, count, size=32, dim=2):
    """Noise of the actor [count + N, B, A] and of the behaviour policy [N, B, A]."""
    key_actor, key_behaviour = jax.random.split(jax.random.clone(key))
    shapes = (count + cfg.num_samples, size, dim), (cfg.num_samples, size, dim)
    keys = key_actor, key_behaviour
    return [double(jax.random.normal(k, s)) for k, s in zip(keys, shapes, strict=True)]


def numpy_alpha(state, cfg):
    number = double(state.alpha.params["value"])
    return np.exp(number) if cfg.alpha_training == "log" else number


def numpy_critic_loss(params, state, batch, key, cfg):
    """-> loss, q"""
    count = cfg.num_target_samples
    noise, behaviour_noise = draws(key, cfg, count)
    mean, std = numpy_gaussian(double(state.actor.params), batch.next_observation)
    x = mean + std * noise
    target_params, values = double(state.critic.target_params), []
    for u in x[:count]:
        q = nets.critics(target_params, batch.next_observation, np.tanh(u))
        values.append(cfg.lam * q.min(axis=0) + (1 - cfg.lam) * q.max(axis=0))
    value = np.max(values, axis=0)
    if cfg.variant == "v":
        behaviour = numpy_gaussian(double(state.behaviour.params), batch.next_observation)
        penalty = numpy_divergence(x[count:], (mean, std), behaviour, behaviour_noise, cfg)
        value = value - numpy_alpha(state, cfg) * penalty
    target = batch.reward + cfg.discount * np.where(batch.termination, 0, value)
    q = nets.critics(params, batch.observation, batch.action)
    return sum(np.mean((member - target) ** 2) for member in q), q.mean()


def numpy_actor_loss(params, state, batch, key, warm, cfg):
    """-> loss, divergence"""
    noise, behaviour_noise = draws(key, cfg, 1)
    mean, std = numpy_gaussian(params, batch.observation)
    x = mean + std * noise
    behaviour = numpy_gaussian(double(state.behaviour.params), batch.observation)
    penalty = numpy_divergence(x[1:], (mean, std), behaviour, behaviour_noise, cfg)
    q = nets.critics(double(state.critic.params), batch.observation, np.tanh(x[0])).min(axis=0)
    loss = numpy_alpha(state, cfg) * penalty - (0 if warm else q)
    return loss.mean(), penalty.mean()


def numpy_clone_loss(params, state, batch, key, cfg):
    """-> loss, log prob, entropy"""
    noise = double(jax.random.normal(jax.random.clone(key), (1, 32, 2)))[0]
    mean, std = numpy_gaussian(params, batch.observation)
    entropy = -numpy_log_prob(mean + std * noise, mean, std).mean()
    action = np.clip(batch.action, cfg.action_margin - 1, 1 - cfg.action_margin)
    log_prob = numpy_log_prob(np.arctanh(action), mean, std).mean()
    temperature = double(state.clone_temperature.params["value"])
    return -temperature * entropy - log_prob, log_prob, entropy


BEAR = {
    "variant": "p",
    "divergence": "mmd",
    "alpha_training": "log",
    "mmd_root": True,
    "mmd_before_tanh": True,
    "kernel": "gaussian",
    "lam": 0.75,
    "num_target_samples": 3,
}
VARIANTS = [
    {},
    {"divergence": "mmd", "kernel_width": 2.0, "num_samples": 3, "num_critics": 3},
    BEAR,
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=["kl", "mmd", "bear"])
def test_losses_and_gradients_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q = numpy_critic_loss(params, state, batch, key, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    for direction in directions(params, 1):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, key, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)
    params = double(state.actor.params)
    for warm in (False, True):
        loss, metrics, grads = actor_loss(state.actor.params, state, data, key, warm, cfg)
        expected, penalty = numpy_actor_loss(params, state, batch, key, warm, cfg)
        np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["divergence"], penalty, rtol=1e-4)
        np.testing.assert_allclose(metrics["alpha"], numpy_alpha(state, cfg), rtol=1e-5)
        (direction,) = directions(params, 1)
        expected = slope(
            lambda p, warm=warm: numpy_actor_loss(p, state, batch, key, warm, cfg)[0],
            params,
            direction,
            step=1e-5,
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


def test_clone_loss_and_its_gradient_equal_numpy():
    cfg, state, key, data = setup()
    data = data._replace(action=data.action.at[0].set(jnp.array([1.0, -1.0])))  # at the bounds
    batch, params = double(data), double(state.behaviour.params)
    loss, metrics, grads = clone_loss(state.behaviour.params, state, data, key, cfg)
    expected, log_prob, entropy = numpy_clone_loss(params, state, batch, key, cfg)
    np.testing.assert_allclose([loss, metrics["clone_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["clone_log_prob"], log_prob, rtol=1e-4)
    np.testing.assert_allclose(metrics["clone_entropy"], entropy, rtol=1e-4)
    for direction in directions(params, 2):
        expected = slope(
            lambda p: numpy_clone_loss(p, state, batch, key, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kernel", "power"), [("laplacian", 1), ("gaussian", 2)])
@pytest.mark.parametrize("root", [False, True])
def test_mmd_by_hand(kernel, power, root):
    # One row of two dimensions. Distances |.|_1: 3 within x, 1 within y, and 1, 2, 2, 1 between.
    x = np.float32([[[0, 0]], [[2, 1]]])
    y = np.float32([[[1, 0]], [[1, 1]]])
    cfg = brac.Config(kernel=kernel, kernel_width=2.0, mmd_root=root)
    k = lambda *steps: np.exp(-sum(s**power for s in steps) / 2)  # noqa: E731
    within_x = (2 + 2 * k(2, 1)) / 4  # a pair of a sample with itself counts
    within_y = (2 + 2 * k(1)) / 4
    between = (k(1) + k(1, 1) + k(1, 1) + k(1)) / 4
    expected = within_x + within_y - 2 * between
    expected = np.sqrt(expected + 1e-6) if root else expected
    found = jax.jit(brac.mmd, static_argnums=2)(x, y, cfg)
    np.testing.assert_allclose(found, [expected], rtol=1e-5)
    np.testing.assert_allclose(brac.mmd(x, x, cfg), [1e-3 if root else 0], atol=1e-6)


def test_alpha_and_temperature_by_hand():
    params = {"value": jnp.float32(np.log(2.0))}
    for training, alpha in (("linear", np.log(2)), ("log", 2.0)):
        cfg = brac.Config(alpha_training=training, target_divergence=0.5)
        loss, grads = jax.value_and_grad(brac.alpha_loss)(params, 0.75, cfg)
        np.testing.assert_allclose(loss, -alpha * 0.25, rtol=1e-6)
        # Above its target the divergence raises alpha.
        np.testing.assert_allclose(
            grads["value"], -0.25 * (2 if training == "log" else 1), rtol=1e-6
        )
    loss, grads = jax.value_and_grad(brac.clone_temperature_loss)(params, 5.0, 3)  # target -3
    np.testing.assert_allclose([loss, grads["value"]], [8 * np.log(2), 8], rtol=1e-6)


@pytest.mark.parametrize("training", runs.slow_but(["linear", "log"], {"log"}))
def test_alpha_and_temperature_stay_in_their_ranges(training):
    cfg, _, _, data = setup(
        alpha_training=training, alpha_learning_rate=1e3, clone_learning_rate=1e3
    )
    state = jax.jit(functools.partial(brac.create_state, cfg=cfg))(jax.random.key(0), data)
    np.testing.assert_allclose(brac.alpha_of(state.alpha.params, cfg), cfg.alpha, rtol=1e-5)
    low, high = (0, 500) if training == "linear" else (-5, 10)
    for net, ends in ((state.alpha, (low, high)), (state.clone_temperature, (0, None))):
        for sign, end in zip((1.0, -1.0), ends, strict=True):
            after = net.apply_gradients(grads={"value": jnp.float32(sign)}).params["value"]
            assert after > 900 if end is None else np.isclose(after, end, atol=1e-4)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


def test_losses_read_only_the_networks_they_should():
    other = nets.shaken(setup()[1], seed=4)
    for overrides in ({}, {"variant": "p"}):
        cfg, state, key, data = setup(**overrides)
        value = not overrides

        def critic(state=state, cfg=cfg, key=key, data=data, **changed):
            params = state.critic.params
            return critic_loss(params, state._replace(**changed), data, key, cfg)[0]

        def actor(warm, state=state, cfg=cfg, key=key, data=data, **changed):
            params = state.actor.params
            return actor_loss(params, state._replace(**changed), data, key, warm, cfg)[0]

        here = critic()
        targets = state.critic.replace(target_params=other.critic.target_params)
        networks = state.critic.replace(params=other.critic.params)
        assert critic(critic=targets) != here and critic(actor=other.actor) != here
        assert critic(critic=networks) == here == critic(clone_temperature=other.clone_temperature)
        assert (critic(behaviour=other.behaviour) != here) == value
        assert (critic(alpha=other.alpha) != here) == value
        for warm in (False, True):
            here = actor(warm)
            assert actor(warm, behaviour=other.behaviour) != here != actor(warm, alpha=other.alpha)
            assert actor(warm, critic=targets) == here == actor(warm, actor=other.actor)
            assert (actor(warm, critic=networks) == here) == warm


# --- Networks and policy ------------------------------------------------------------------------
def test_initial_parameters():
    """Keras's default: kernels uniform in ±sqrt(6 / (fan in + fan out)), biases 0."""
    cfg = probes.config(brac, hidden=(64, 96), critic_hidden=(64, 96), num_critics=3)
    data = probes.random_transitions(observation_dim=16)
    state = jax.jit(functools.partial(brac.create_state, cfg=cfg))(jax.random.key(0), data)
    sizes = {"actor": (16, 64, 96, 4), "behaviour": (16, 64, 96, 4), "critic": (18, 64, 96, 1)}
    for name, widths in sizes.items():
        layers = getattr(state, name).params["params"]
        assert sorted(layers) == ["Dense_0", "Dense_1", "Dense_2"]
        for i, (layer, fan_in, fan_out) in enumerate(zip(layers, widths, widths[1:], strict=False)):
            kernel, bias = (np.asarray(layers[layer][x]) for x in ("kernel", "bias"))
            assert layer == f"Dense_{i}" and kernel.shape[-2:] == (fan_in, fan_out)
            bound = np.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < np.abs(kernel).max() <= bound and not bias.any()
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    first = [x.params["params"]["Dense_0"]["kernel"] for x in (state.actor, state.behaviour)]
    assert (first[0] != first[1]).all()
    assert state.clone_temperature.params == {"value": 1.0}


def test_std_lies_between_its_bounds():
    _, state, _, data = setup()
    params = jax.tree.map(np.array, state.actor.params)
    apply_fn = jax.jit(state.actor.apply_fn)
    for bias, expected in ((-30.0, np.exp(-5)), (30.0, 1.0)):
        params["params"]["Dense_2"]["bias"][2:] = bias
        np.testing.assert_allclose(
            np.exp(apply_fn(params, data.observation)[1]), expected, rtol=1e-5
        )


@pytest.mark.parametrize("number", [None, 7])
def test_the_mean_acts_or_the_best_sample_of_the_first_critic(number):
    cfg, state, key, data = setup(num_eval_samples=number)
    params, observation = brac.policy_params(state), data.observation
    act = jax.jit(brac.policy_fn(state, cfg))
    action = act(params, observation, jax.random.clone(key))
    mean, std = numpy_gaussian(double(state.actor.params), double(observation))
    expected = np.tanh(mean)
    if number:
        noise = double(jax.random.normal(jax.random.clone(key), (number, *mean.shape)))
        every = np.tanh(mean + std * noise)
        q = [nets.critics(double(state.critic.params), double(observation), a)[0] for a in every]
        expected = every[np.argmax(q, axis=0), np.arange(len(mean))]
        assert len(set(np.argmax(q, axis=0))) > 2
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
    alone = act(params, observation[0], jax.random.clone(key))
    assert alone.shape == (2,) and (number or np.allclose(alone, expected[0], atol=1e-5))


# --- Phases -------------------------------------------------------------------------------------
def test_each_phase_trains_its_own_networks():
    settings = {"log_every": 3, "clone_updates": 3, "warm_start": 2, "alpha_training": "linear"}
    cfg, state, key, data = setup(**settings)
    clone = jax.jit(brac.clone_chunk, static_argnums=4)
    cloned, metrics = clone(state, jax.random.clone(key), 0, data, cfg)
    trained, more = nets.train_chunk(brac, cloned, key, 3, data, cfg)
    for name in state._fields:
        before, between, after = (getattr(x, name).params for x in (state, cloned, trained))
        same = all(map(np.array_equal, probes.leaves(before), probes.leaves(between)))
        assert same == (name in ("actor", "critic", "alpha")), name
        same = all(map(np.array_equal, probes.leaves(between), probes.leaves(after)))
        assert same == (name in ("behaviour", "clone_temperature")), name
    assert {*metrics} == {"clone_loss", "clone_log_prob", "clone_entropy", "clone_temperature"}
    assert {*more} == {"critic_loss", "q", "actor_loss", "divergence", "alpha"}
    # The first two updates of the second phase are warm: a step later Q counts in the third.
    later = dataclasses.replace(cfg, warm_start=3)
    other, _ = nets.train_chunk(brac, cloned, key, 3, data, later)
    assert (probes.leaves(other.actor.params)[0] != probes.leaves(trained.actor.params)[0]).any()
    assert np.array_equal(probes.leaves(other.critic)[0], probes.leaves(trained.critic)[0])


@pytest.mark.parametrize("name", runs.slow_but(["brac", "fisher_brc"], {"brac"}))
def test_a_run_resumed_in_a_phase_or_between_them(name, tmp_path, monkeypatch, capsys):
    """Byte for byte, with the metrics of both phases in one file and no score while cloning."""
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", runs.write_hdf5("data.hdf5"), *runs.tiny(name), "--seeds", "0", "1"]
    argv += ["--num-updates", "16", "--clone-updates", "8", "--eval-every", "4"]
    log, folder = experiment.Run.log, tmp_path / "runs" / name / "data"

    def copied(run, step, *args):
        log(run, step, *args)
        if run.folder.name == "whole" and step in (4, 8):  # what a killed process leaves
            shutil.copytree(run.folder, folder / f"from{step}")

    monkeypatch.setattr(experiment.Run, "log", copied)
    runs.start(name, [*argv, "--name", "whole"])
    assert "evaluation: 3 times" in capsys.readouterr().out  # after 8, 12 and 16 updates
    whole = (folder / "whole" / "metrics.csv").read_text()
    for step in (4, 8):
        runs.start(name, [*argv, "--name", f"from{step}", "--resume"])
        assert (folder / f"from{step}" / "metrics.csv").read_text() == whole
    rows = runs.read_csv(folder / "whole" / "metrics.csv")
    assert [int(row["update"]) for row in rows[::2]] == [0, 4, 8, 12, 16]
    for row in rows:
        update = int(row["update"])
        assert bool(row["clone_loss"]) == (update in (4, 8))
        assert bool(row["critic_loss"]) == (update in (12, 16)) == bool(row["actor_loss"])
        assert bool(row["score"]) == (update >= 8)


def test_a_phase_that_leaves_no_update_is_refused(capsys):
    line = nets.refused(capsys, brac.Config, "--num-updates 4000 --clone-updates 4000")
    assert "--num-updates 4000" in line and "--clone-updates 4000" in line
    line = nets.refused(capsys, brac.Config, "--clone-updates 1500 --log-every 1000")
    assert "--clone-updates 1500 is no multiple of --log-every 1000" in line
    assert "--kernel-width" in nets.refused(capsys, brac.Config, "--kernel-width 0")
    assert "at least 1e-06" in nets.refused(capsys, brac.Config, "--action-margin 1e-9")
    assert config.parse(brac.Config, ["--warm-start", "0"])[0].warm_start == 0
    line = nets.refused(capsys, brac.Config, "--target-divergence -1")
    assert "--target-divergence -1.0: must be 0 or more" in line


@pytest.mark.parametrize(
    ("says", "settings"),
    [
        ("--alpha 0.0:", {"alpha": 0.0, "alpha_training": "log"}),
        ("--alpha 0.0069:", {"alpha": 0.0069, "alpha_training": "log"}),
        ("--alpha 22001.0:", {"alpha": 22_001.0, "alpha_training": "log"}),
        ("--alpha 500.5:", {"alpha": 500.5, "alpha_training": "linear"}),
        (
            "--warm-start 2000 as well, so it must be more; give at least 6000",
            {"num_updates": 5000, "clone_updates": 3000, "warm_start": 2000},
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_hold_are_refused(says, settings, capsys):
    """A learned alpha is kept in a range, and an actor that is warm to the end never sees Q."""
    with pytest.raises(SystemExit) as leave:
        brac.train(brac.Config(**settings), config.Options())
    line = capsys.readouterr().err
    assert leave.value.code == 2 and line.count("\n") == 1 and says in line
