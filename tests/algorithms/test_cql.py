# SPDX-License-Identifier: Apache-2.0
"""CQL's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import cql

critic_loss = nets.compiled(cql.critic_loss)
actor_loss = nets.compiled(cql.actor_loss)
setup = functools.partial(nets.setup, cql, critic_hidden=(16, 16), num_samples=4)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_actor(params, observation):
    """Mean and log std before tanh."""
    mean, log_std = np.split(nets.mlp(params, observation), 2, axis=-1)
    scale, shift = (params["params"][f"log_std_{name}"] for name in ("scale", "shift"))
    return mean, np.clip(scale * log_std + shift, -20, 2)


def numpy_sample(mean, log_std, noise):
    """Actions [B, M, A] and log pi [B, M] for noise [B, M, A]."""
    mean, log_std = mean[:, None], log_std[:, None]
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_critics(params, observation, action):
    """[K, B, M] for actions [B, M, A]."""
    shape = (*action.shape[:2], observation.shape[-1])
    return nets.critics(params, np.broadcast_to(observation[:, None], shape), action)


def draws(key, cfg, size=32, dim=2):
    """What the critic loss draws: uniform actions [B, N, A], noise at s and s' [2B, ..., A]."""
    key_uniform, key_noise = jax.random.split(jax.random.clone(key))
    count = cfg.num_samples * 2 if cfg.max_target_backup else cfg.num_samples + 1
    uniform = jax.random.uniform(key_uniform, (size, cfg.num_samples, dim), minval=-1, maxval=1)
    return double((uniform, jax.random.normal(key_noise, (2 * size, count, dim))))


def numpy_critic_loss(params, state, batch, drawn, cfg):
    """-> loss, TD error, q, gap"""
    uniform, noise = drawn
    size, dim = batch.action.shape
    n = cfg.num_samples
    actor = double(state.actor.params)
    here, log_here = numpy_sample(*numpy_actor(actor, batch.observation), noise[:size])
    there, log_there = numpy_sample(*numpy_actor(actor, batch.next_observation), noise[size:])
    target_params = double(state.critic.target_params)
    next_q = numpy_critics(target_params, batch.next_observation, there[:, n:])
    every = [batch.action[:, None], uniform, here[:, :n], there[:, :n]]
    q, *others = (numpy_critics(params, batch.observation, action) for action in every)
    densities = [np.full((size, n), 0.5**dim), np.exp(log_here), np.exp(log_there)]
    td_error, gap = 0.0, 0.0
    for k in range(len(q)):
        for i in range(size):
            target = batch.reward[i]
            if not batch.termination[i]:
                target += cfg.discount * max(min(column) for column in next_q[:, i].T)
            td_error += (q[k, i, 0] - target) ** 2 / size
            terms = [] if cfg.importance_sampling else [np.exp(q[k, i, 0])]
            for value, density in zip(others, densities, strict=True):
                for j in range(n):
                    weight = 1 / density[i, j] if cfg.importance_sampling else 1
                    terms.append(np.exp(value[k, i, j]) * weight)
            row_gap = np.log(sum(terms)) - q[k, i, 0]
            if cfg.clip_diff_min is not None and row_gap < cfg.clip_diff_min:
                row_gap = cfg.clip_diff_min
            gap += row_gap / size
    multiplier = 1.0
    if cfg.target_action_gap is not None:
        multiplier = min(np.exp(double(state.log_multiplier.params["log"])), 1e6)
    return td_error + multiplier * cfg.alpha * gap, td_error, q.mean(), gap / len(q)


def numpy_actor_loss(params, state, batch, noise):
    """-> loss, entropy"""
    action, log_prob = numpy_sample(*numpy_actor(params, batch.observation), noise)
    q = numpy_critics(double(state.critic.params), batch.observation, action).min(axis=0)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    return (temperature * log_prob - q).mean(), -log_prob.mean()


VARIANTS = [
    {},
    {"importance_sampling": False, "discount": 0.7, "num_critics": 1, "num_samples": 1},
    {
        "target_action_gap": 0.8,
        "alpha": 5.0,
        "max_target_backup": True,
        "num_critics": 3,
        "hidden": (12,),
    },
    {"clip_diff_min": 2.5, "importance_sampling": False, "max_target_backup": True},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_losses_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.critic.params)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    expected, td_error, q, gap = numpy_critic_loss(params, state, batch, draws(key, cfg), cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-4)
    if cfg.clip_diff_min is not None:
        changed = dataclasses.replace(cfg, clip_diff_min=None)
        free = numpy_critic_loss(params, state, batch, draws(key, cfg), changed)[3]
        assert gap > free > cfg.clip_diff_min + 0.1  # some rows are clipped, not all


@pytest.mark.parametrize("overrides", [{}, VARIANTS[2]], ids=str)
def test_actor_loss_equals_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    noise = double(jax.random.normal(jax.random.clone(key), (32, 1, 2)))
    loss, metrics, _ = actor_loss(state.actor.params, state, data, key, cfg)
    expected, entropy = numpy_actor_loss(double(state.actor.params), state, double(data), noise)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(
    actor, critic, critic_target, log_temperature=0.0, log_multiplier=0.0, log_std=-20.0
):
    """pi(s) = tanh N(actor * s, exp(log_std)) for s of one number, Q_k(s, a) = critic_k sum a."""
    linear = functools.partial(nets.linear_net, cql.train_state.TrainState.create)

    def act(p, s):
        return p[None] * s, jnp.full((len(s), len(p)), log_std)

    def value(p, s, a):
        return p[:, None, None] * a.sum(axis=-1)[None]

    return cql.State(
        linear(act, actor),
        nets.linear_net(cql.TrainState.create, value, critic, critic_target),
        linear(cql.bounded_exp, {"log": log_temperature}),
        linear(cql.bounded_exp, {"log": log_multiplier}),
        (),
    )


@pytest.mark.parametrize("target_gap", [None, 0.5])
def test_critic_loss_by_hand(monkeypatch, target_gap):
    sampled = np.log([[[1], [2], [5]], [[2], [1], [1]]])
    density = np.log([[0.5, 0.5, 0.5], [1, 0.25, 0.25]])
    next_action = np.array([[[2], [-1]], [[1], [3]]])
    drawn = [np.float32(x) for x in (sampled, density, next_action)]
    monkeypatch.setattr(cql, "sample_actions", lambda *_: drawn)
    state = linear_state([9], [1, -1], [2, -3], log_temperature=9.0, log_multiplier=np.log(3.0))
    action = np.log([[2], [4]])  # of the data
    batch = probes.random_transitions(2, 1, 1, action=action, reward=[1, 2], termination=[0, 1])
    cfg = cql.Config(discount=0.5, alpha=2.0, target_action_gap=target_gap)
    # row                    1                                 2
    # target Q_1, Q_2        4, -6        and -2, 3            not used: the end
    # their minimum         -6            and -2
    # the greater of both              -2
    # target               1 + 0.5 * -2 = 0                    2
    # Q_1, Q_2              log 2, -log 2                      log 4, -log 4
    # exp Q_1 / density     2 + 4 + 10 = 16                    2 + 4 + 4 = 10
    # exp Q_2 / density     2 + 1 + 0.4 = 3.4                  0.5 + 4 + 4 = 8.5
    # log of that - Q_1     log 8                              log 2.5
    # log of that - Q_2     log 6.8                            log 34
    # alpha 2, with a target gap times the multiplier 3
    td_error = (2 * np.log(2) ** 2 + (np.log(4) - 2) ** 2 + (np.log(4) + 2) ** 2) / 2
    gap = (np.log(8) + np.log(2.5) + np.log(6.8) + np.log(34)) / 2
    expected = td_error + (2 if target_gap is None else 6) * gap
    loss, metrics, _ = nets.compiled(cql.critic_loss)(
        state.critic.params, state, batch, jax.random.key(0), cfg
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-5)
    np.testing.assert_allclose(metrics["conservative_gap"], gap / 2, rtol=1e-5)


def test_actor_loss_by_hand():
    state = linear_state([0.5, -1.0], [2, 4], [9, 9], log_temperature=np.log(2.0))
    batch = probes.random_transitions(2, 1, 2, observation=[[1], [-2]])
    key = jax.random.key(0)
    noise = double(jax.random.normal(jax.random.clone(key), (2, 1, 2)))[:, 0]
    # row                   1                              2
    # a = tanh(mean)    tanh 0.5, -tanh 1              -tanh 1, tanh 2
    # Q_1, Q_2, sum a     -0.29947..: Q_2 is smaller    0.20243..: Q_1 is smaller
    low, mid, high = np.tanh([0.5, 1, 2])
    q = (4 * (low - mid) + 2 * (high - mid)) / 2
    # log pi = 20 - noise^2 / 2 - log sqrt(2 pi) - log(1 - a^2) per dimension
    log_prob = (20 - noise**2 / 2 - np.log(np.sqrt(2 * np.pi))).sum(axis=-1)
    log_prob -= np.log([(1 - low**2) * (1 - mid**2), (1 - mid**2) * (1 - high**2)])
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, key, cql.Config())
    np.testing.assert_allclose(loss, 2 * log_prob.mean() - q, rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-6)


def test_temperature_and_multiplier_loss_by_hand():
    params = {"log": jnp.float32(np.log(2.0))}
    grads = jax.grad(cql.temperature_loss)(params, 5.0, 3)  # entropy 5, target -3
    np.testing.assert_allclose(cql.temperature_loss(params, 5.0, 3), 8 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(grads["log"], 8, rtol=1e-6)
    cfg = cql.Config(alpha=3.0, target_action_gap=0.5)
    grads = jax.grad(cql.multiplier_loss)(params, 2.0, cfg)
    np.testing.assert_allclose(cql.multiplier_loss(params, 2.0, cfg), -2 * 3 * 1.5, rtol=1e-6)
    np.testing.assert_allclose(grads["log"], -2 * 3 * 1.5, rtol=1e-6)
    for log, expected in ((0.0, 1.0), (50.0, 1e6), (-200.0, 0.0)):
        np.testing.assert_allclose(cql.bounded_exp({"log": jnp.float32(log)}), expected, rtol=1e-6)


# --- Sampled actions ----------------------------------------------------------------------------
sample_actions = jax.jit(cql.sample_actions, static_argnums=3)


@pytest.mark.parametrize("best_of", [False, True])
def test_where_the_sampled_actions_come_from(best_of):
    state = linear_state([0.5, -1.0], [1], [1])
    batch = probes.random_transitions(32, 1, 2)
    cfg, key = cql.Config(num_samples=3, max_target_backup=best_of), jax.random.key(0)
    sampled, log_density, target_action = sample_actions(state.actor, batch, key, cfg)
    actor = np.float32([0.5, -1.0])
    current = np.tanh(batch.observation * actor)  # pi(s)
    following = np.tanh(batch.next_observation * actor)  # pi(s')
    assert sampled.shape == (32, 9, 2) and log_density.shape == (32, 9)
    assert target_action.shape == (32, 3 if best_of else 1, 2)
    for j in range(3):
        np.testing.assert_allclose(sampled[:, 3 + j], current, atol=1e-6)
        np.testing.assert_allclose(sampled[:, 6 + j], following, atol=1e-6)
    for j in range(target_action.shape[1]):
        np.testing.assert_allclose(target_action[:, j], following, atol=1e-6)
    uniform = np.asarray(sampled[:, :3])
    assert -1 <= uniform.min() < -0.95 and 0.95 < uniform.max() <= 1
    np.testing.assert_allclose(uniform.std(), 3**-0.5, rtol=0.1)
    np.testing.assert_allclose(log_density[:, :3], 2 * np.log(0.5), rtol=1e-6)
    assert (np.abs(log_density[:, 3:]) > 10).all()  # std is exp(-20)


def test_no_two_samples_are_alike():
    state = linear_state([0.0, 0.0], [1], [1], log_std=0.0)
    batch = probes.random_transitions(8, 1, 2)
    cfg = cql.Config(num_samples=3, max_target_backup=True)
    sampled, log_density, target_action = sample_actions(state.actor, batch, jax.random.key(0), cfg)
    every = np.concatenate([sampled, target_action], axis=1).reshape(-1)
    assert len(np.unique(every)) == every.size and len(np.unique(log_density[:, 3:])) == 8 * 6


def test_tanh_log_prob_is_exact_far_out():
    # log(1 - tanh(x)^2) = -2 log cosh x; where |a| = 1 in float32 it is lost if taken from a.
    x = np.array([0.0, 0.1, -0.1, 3.0, -3.0, 8.0, -8.0, 12.0, -12.0, 50.0, -50.0])[:, None]
    log_std, key = np.full_like(x, -2.0), jax.random.key(0)
    noise = double(jax.random.normal(jax.random.clone(key), (len(x), 4, 1)))
    sample_tanh = jax.jit(cql.sample_tanh, static_argnums=3)
    action, log_prob = sample_tanh(np.float32(x), np.float32(log_std), key, 4)
    _, expected = numpy_sample(np.float64(np.float32(x)), log_std, noise)
    np.testing.assert_allclose(log_prob, expected, rtol=2e-6, atol=2e-6)
    assert (np.abs(action[-4:]) > 1 - 1e-6).all() and np.ptp(log_prob[-4:]) > 50
    # What it is compared with is a density: its integral over the actions is 1.
    noise = np.linspace(-6, 6, 1001)[None, :, None]
    action, log_prob = numpy_sample(np.full((1, 1), 0.3), np.full((1, 1), -0.5), noise)
    np.testing.assert_allclose(np.trapezoid(np.exp(log_prob[0]), action[0, :, 0]), 1, rtol=1e-4)


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()

    def td_error(batch):
        return critic_loss(state.critic.params, state, batch, key, cfg)[1]["td_error"]

    nets.check_bootstrap(td_error, data)


def values_of_states(actor=1.0):
    """Q_k(s, a) = critic_k * s: what a state is worth, whatever is done in it."""
    state = linear_state([actor, -actor], [1, 3], [2, 5])
    return state._replace(
        critic=state.critic.replace(
            apply_fn=lambda p, s, a: p[:, None, None] * s[None].repeat(a.shape[1], axis=2)
        )
    )


def test_all_conservative_terms_are_valued_at_s_and_the_target_at_the_next():
    """The terms of pi(s') too, whose actions are drawn at s'."""
    state, key = values_of_states(), jax.random.key(0)
    batch = probes.random_transitions(8, 1, 2, termination=0)
    cfg = cql.Config(num_samples=3, importance_sampling=False, discount=0.5)
    _, metrics, _ = critic_loss(state.critic.params, state, batch, key, cfg)
    # With Q(s, a) = Q(s) the 1 + 3N terms are the same. At s' any of them would be another number.
    np.testing.assert_allclose(metrics["conservative_gap"], np.log(10), rtol=1e-5)
    s, next_s = batch.observation[:, 0], batch.next_observation[:, 0]
    target = batch.reward + 0.5 * np.minimum(2 * next_s, 5 * next_s)
    expected = np.mean((s - target) ** 2 + (3 * s - target) ** 2)
    np.testing.assert_allclose(metrics["td_error"], expected, rtol=1e-5)


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup(target_action_gap=0.8)
    other = nets.shaken(state, seed=4)
    names = ("actor", "critic", "log_temperature", "log_multiplier")

    def critic(cfg=cfg, params=state.critic.params, **changed):
        return critic_loss(params, state._replace(**changed), data, key, cfg)[0]

    def target_of(net, other):
        return net.replace(target_params=other.target_params)

    here = critic()
    assert critic(params=other.critic.params) != here
    assert critic(critic=target_of(state.critic, other.critic)) != here
    assert critic(critic=target_of(other.critic, state.critic)) == here  # not state's params
    for name in names:
        if name != "critic":
            assert (critic(**{name: getattr(other, name)}) == here) == (name == "log_temperature")
    free, _, _, _ = setup()  # no target gap: no multiplier
    assert critic(free) == critic(free, log_multiplier=other.log_multiplier)

    def actor(params=state.actor.params, **changed):
        return actor_loss(params, state._replace(**changed), data, key, cfg)[0]

    here = actor()
    assert actor(params=other.actor.params) != here
    assert actor(critic=target_of(state.critic, other.critic)) == here
    for name in names:
        changed = actor(**{name: getattr(other, name)})
        assert (changed == here) == (name in ("actor", "log_multiplier"))


@pytest.mark.parametrize("overrides", [VARIANTS[0], *VARIANTS[2:]], ids=str)
def test_critic_gradient_takes_target_densities_and_multiplier_as_numbers(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params, drawn = double(data), double(state.critic.params), draws(key, cfg)
    _, _, grads = critic_loss(state.critic.params, state, data, key, cfg)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, drawn, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


def test_actor_gradient_goes_through_the_action_and_its_density():
    cfg, state, key, data = setup()
    batch, params = double(data), double(state.actor.params)
    noise = double(jax.random.normal(jax.random.clone(key), (32, 1, 2)))
    _, _, grads = actor_loss(state.actor.params, state, data, key, cfg)
    for direction in directions(params):
        expected = slope(lambda p: numpy_actor_loss(p, state, batch, noise)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(cql, statistics=(np.arange(16.0), np.arange(1.0, 17.0)))


@pytest.mark.parametrize(
    ("net", "sizes"), [("actor", (16, 64, 96, 4)), ("critic", (16 + 2, 64, 64, 1))]
)
def test_initial_parameters(net, sizes):
    layers = dict(getattr(fresh(), net).params["params"])
    if net == "actor":
        assert layers.pop("log_std_scale") == 1 and layers.pop("log_std_shift") == -1
    *hidden, head = (layers.pop(f"Dense_{i}") for i in range(3))
    assert not layers
    nets.check_orthogonal_init(
        {"params": {f"Dense_{i}": layer for i, layer in enumerate(hidden)}}, sizes[:-1]
    )
    assert head["kernel"].shape[-2:] == sizes[-2:]
    for matrix in np.asarray(head["kernel"]).reshape(-1, *sizes[-2:]):
        np.testing.assert_allclose(matrix.T @ matrix, 1e-4 * np.eye(sizes[-1]), atol=1e-9)
    assert (np.asarray(head["bias"]) == 0).all()


def test_initial_log_std_temperature_and_multiplier():
    state, data = fresh(), probes.random_transitions(observation_dim=16)
    mean, log_std = jax.jit(state.actor.apply_fn)(state.actor.params, data.observation)
    assert mean.shape == log_std.shape == (32, 2)
    assert np.abs(mean).max() < 0.1 and np.abs(log_std + 1).max() < 0.1
    assert state.log_temperature.params == {"log": 0.0}
    assert state.log_multiplier.params == {"log": 1.0}


def test_log_std_is_clipped():
    _, state, _, data = setup()
    act = jax.jit(state.actor.apply_fn)
    for shift, expected in ((-30.0, -20.0), (30.0, 2.0)):
        params = {"params": state.actor.params["params"] | {"log_std_shift": np.float32(shift)}}
        assert (act(params, data.observation)[1] == expected).all()


def test_members_of_the_ensemble_differ():
    critic, data = fresh().critic, probes.random_transitions(observation_dim=16)
    for layer in critic.params["params"].values():
        kernel = np.asarray(layer["kernel"])
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not np.isclose(kernel[i], kernel[j], atol=1e-6).any(axis=0).all()
    q = np.asarray(jax.jit(critic.apply_fn)(critic.params, data.observation, data.action[:, None]))
    assert q.shape == (3, 32, 1) and (np.ptp(q, axis=0) > 0).all()


def test_targets_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)


# --- Observations and rewards -------------------------------------------------------------------
def test_normalise():
    nets.check_normalise(cql)


def test_the_policy_is_tanh_of_the_mean_and_normalises():
    mean, std = fresh().statistics
    assert mean.tolist() == [*range(16)] and std.tolist() == [*range(1, 17)]
    nets.check_policy_normalises(
        cql, lambda params, observation: np.tanh(numpy_actor(params, observation)[0])
    )


@pytest.mark.parametrize("normalised", [True, False])
def test_training_sees_scaled_rewards_and_normalised_observations(
    monkeypatch, tmp_path, normalised
):
    raw = probes.random_transitions(20, observation=5 + np.arange(60).reshape(20, 3))
    overrides = {"reward_scale": 10.0, "reward_shift": -5.0, "seeds": (0, 1)}
    overrides |= {"normalise_observations": normalised, "critic_hidden": (4,), "num_critics": 1}
    state, data = nets.handed_over(cql, monkeypatch, tmp_path, raw, (1, 2), **overrides)
    scaled = raw._replace(reward=10 * raw.reward - 5)
    expected, (mean, std) = cql.normalise(scaled) if normalised else (scaled, ([0] * 3, [1] * 3))
    statistics = np.stack([mean, mean]), np.stack([std, std])  # one per seed
    nets.check_close(data, expected, atol=1e-6)
    nets.check_close(state.statistics, statistics, atol=1e-6)


# --- Update -------------------------------------------------------------------------------------
NETS = ("actor", "critic", "log_temperature", "log_multiplier")
RATES = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}


@functools.partial(jax.jit, static_argnums=0)
def program(cfg, target_gap, *args):
    return cql.update(*args, dataclasses.replace(cfg, target_action_gap=target_gap))


def update(state, step, key, data, cfg):
    """One program for every target gap."""
    without = dataclasses.replace(cfg, target_action_gap=None)
    return program(without, cfg.target_action_gap, state, step, key, data)


def test_order_of_three_updates():
    """Every network steps from the state before, then the targets follow the new critics."""
    # Large steps, so that another order would show.
    cfg, state, key, data = setup(target_action_gap=0.8, **RATES)
    _, here, _, _ = setup()  # the same numbers, with the losses compiled already
    adam = {
        name: nets.Adam(0.02 if name in ("actor", "log_temperature") else 0.05) for name in NETS
    }
    for step in (6, 7, 8):
        batch, key_critic, key_actor = nets.sample(key, step, data, cfg, 3)
        _, expected, critic_grads = critic_loss(here.critic.params, here, batch, key_critic, cfg)
        _, more, actor_grads = actor_loss(here.actor.params, here, batch, key_actor, cfg)
        multiplier = np.exp(here.log_multiplier.params["log"])
        expected |= more | {"multiplier": multiplier}
        expected["temperature"] = np.exp(here.log_temperature.params["log"])
        excess = expected["conservative_gap"] - 0.8
        grads = {
            "actor": actor_grads,
            "critic": critic_grads,
            "log_temperature": {"log": expected["entropy"] + 2},
            "log_multiplier": {"log": -multiplier * cfg.alpha * excess},
        }
        for name in NETS:
            net = getattr(here, name)
            net = net.replace(params=adam[name].step(net.params, grads[name]))
            here = here._replace(**{name: net})
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        here = here._replace(critic=here.critic.replace(target_params=target))

        state, metrics = update(state, step, jax.random.clone(key), data, cfg)
        nets.check_close(metrics, expected)
        for name in NETS:
            nets.check_close(getattr(state, name).params, getattr(here, name).params)
        nets.check_close(state.critic.target_params, here.critic.target_params)
    assert [getattr(state, name).step for name in NETS] == [3] * 4
    nets.check_close(state.statistics, here.statistics, 0, 0)


def test_the_multiplier_grows_while_the_gap_is_above_its_target():
    cfg, state, key, data = setup(target_action_gap=0.8, **RATES)
    gap = float(update(state, 0, key, data, cfg)[1]["conservative_gap"])
    for target_gap in (gap - 0.1, gap + 0.1):
        cfg = dataclasses.replace(cfg, target_action_gap=target_gap)
        after, metrics = update(state, 0, jax.random.clone(key), data, cfg)
        np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-6)
        moved = after.log_multiplier.params["log"] - state.log_multiplier.params["log"]
        np.testing.assert_allclose(moved, 0.05 * np.sign(gap - target_gap), rtol=1e-3)


@pytest.mark.parametrize("shift", [-30.0, -1.0])
def test_the_temperature_grows_while_the_entropy_is_below_its_target(shift):
    cfg, state, key, data = setup(target_action_gap=0.8, **RATES)
    params = jax.tree.map(lambda x: 0.1 * x, state.actor.params)
    params = {"params": params["params"] | {"log_std_shift": jnp.float32(shift)}}
    state = state._replace(actor=state.actor.replace(params=params))
    after, metrics = update(state, 0, key, data, cfg)
    moved = after.log_temperature.params["log"] - state.log_temperature.params["log"]
    below = metrics["entropy"] < -2  # two action dimensions
    assert below == (shift == -30)
    np.testing.assert_allclose(moved, 0.02 if below else -0.02, rtol=1e-3)


def test_without_a_target_gap_the_multiplier_stays():
    cfg, state, key, data = setup(log_every=2)
    after, metrics = nets.train_chunk(cql, state, key, 0, data, cfg)
    assert after.log_multiplier.params == state.log_multiplier.params
    assert after.log_multiplier.step == 0 and after.log_temperature.step == 2
    assert "multiplier" not in metrics


def test_learning_rates():
    _, state, _, _ = setup(**RATES)
    for name in NETS:
        rate = 0.02 if name in ("actor", "log_temperature") else 0.05
        nets.check_rate(getattr(state, name), lambda step, rate=rate: rate)
