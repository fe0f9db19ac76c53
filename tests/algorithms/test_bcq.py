# SPDX-License-Identifier: Apache-2.0
"""BCQ's losses, networks, sampling and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import bcq

critic_loss = nets.compiled(bcq.critic_loss)
actor_loss = nets.compiled(bcq.actor_loss)
vae_loss = nets.compiled(bcq.vae_loss)
setup = functools.partial(nets.setup, bcq, vae_hidden=(12, 8), num_samples=3)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_decode(params, observation, latent):
    decoder = {"params": params["params"]["decoder"]}
    return np.tanh(nets.mlp(decoder, np.concatenate([observation, latent], axis=-1)))


def numpy_sample(params, observation, key):
    """Actions of the VAE for latents near their mean; two latents per action dimension."""
    latent = np.asarray(jax.random.normal(key, (*observation.shape[:-1], 4)), np.float64)
    return numpy_decode(params, observation, latent.clip(-0.5, 0.5))


def numpy_perturb(params, observation, action, cfg):
    shift = nets.tanh_actor(params, np.concatenate([observation, action], axis=-1))
    return np.clip(action + cfg.perturbation * shift, -1, 1)


def numpy_critic_loss(params, state, batch, key, cfg):
    observation = np.stack([batch.next_observation] * cfg.num_samples)
    action = numpy_sample(double(state.vae.params), observation, key)
    action = numpy_perturb(double(state.actor.target_params), observation, action, cfg)
    q = nets.critics(double(state.critic.target_params), observation, action)  # [K, N, B]
    predicted, loss = nets.critics(params, batch.observation, batch.action), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i] + cfg.reward_shift
        if not batch.termination[i]:
            mixed = [cfg.lam * min(x) + (1 - cfg.lam) * max(x) for x in q[:, :, i].T]
            target += cfg.discount * max(mixed)
        loss += sum((predicted[k, i] - target) ** 2 for k in range(len(q))) / len(batch.reward)
    return loss


def numpy_actor_loss(params, state, batch, key, cfg):
    action = numpy_sample(double(state.vae.params), batch.observation, key)
    action = numpy_perturb(params, batch.observation, action, cfg)
    return -nets.critics(double(state.critic.params), batch.observation, action)[0].mean()


def numpy_vae_loss(params, state, batch, key, cfg):
    encoder = {"params": params["params"]["encoder"]}
    code = nets.mlp(encoder, np.concatenate([batch.observation, batch.action], axis=-1))
    mean, std = code[:, :4], np.exp(np.clip(code[:, 4:], -4, 15))
    noise = np.asarray(jax.random.normal(key, mean.shape), np.float64)
    decoded = numpy_decode(params, batch.observation, mean + std * noise)
    kl = -0.5 * (1 + np.log(std**2) - mean**2 - std**2)
    return np.mean((decoded - batch.action) ** 2) + cfg.kl_weight * np.mean(kl)


@pytest.mark.parametrize(
    "overrides",
    [
        {"lam": 1.0, "perturbation": 0.5, "discount": 0.7, "reward_shift": -1.0},
        {"lam": 0.6, "kl_weight": 0.1, "num_critics": 3, "hidden": (8, 12, 16)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["critic", "actor", "vae"])
def test_losses_and_gradients_equal_numpy(name, overrides):
    """The target is a constant to the critic's gradient, the sampled action one to the actor's."""
    cfg, state, key, data = setup(**overrides)
    loss = {"critic": critic_loss, "actor": actor_loss, "vae": vae_loss}[name]
    numpy_loss = globals()[f"numpy_{name}_loss"]

    def expected(params):
        return numpy_loss(params, state, batch, jax.random.clone(key), cfg)

    batch, params = double(data), double(getattr(state, name).params)
    found, metrics, grads = loss(getattr(state, name).params, state, data, key, cfg)
    np.testing.assert_allclose([found, metrics[f"{name}_loss"]], expected(params), rtol=1e-4)
    for direction in directions(params, 3):
        derivative = slope(expected, params, direction)
        np.testing.assert_allclose(dot(grads, direction), derivative, rtol=2e-3, atol=1e-3)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(actor=(0, 0), critic=(1, -1), critic_target=(9, 9)):
    """Networks whose outputs are worked out by hand; A = 1.

    The VAE samples 0.5, 0 and -1 for three rows of samples, 0.5 if there is one sample per state.
    Q_k(s, a) = critic_k a; the second target critic adds 1. xi = Phi actor.
    """
    net = functools.partial(nets.linear_net, bcq.TrainState.create)

    def vae(params, observation, key, method):
        assert method == "sample"
        sampled = np.float32([0.5, 0, -1])[: len(observation)].reshape(-1, *[1] * 2)
        shape = (*observation.shape[:-1], 1)
        return np.broadcast_to(sampled if len(shape) > 2 else np.float32(0.5), shape)

    def critics(params, observation, action):
        shape = (-1, *[1] * (action.ndim - 1))
        return params[0].reshape(shape) * action[..., 0][None] + params[1].reshape(shape)

    return bcq.State(
        net(lambda p, s, a: p + 0 * a, actor[0], actor[1]),
        net(critics, [critic, (0, 0)], [critic_target, (0, 1)]),
        nets.linear_net(train_state.TrainState.create, vae, 0.0),
    )


def test_critic_loss_by_hand():
    state = linear_state(critic=(1, -1), critic_target=(2, -2))
    batch = probes.random_transitions(
        3, 1, 1, action=[[1], [0.5], [0]], reward=[2, 0, 2], termination=[0, 0, 1]
    )
    cfg = bcq.Config(discount=0.5, reward_shift=-1.0, num_samples=3, lam=0.75)
    # sampled action             0.5     0      -1
    # target Q_1 = 2 a           1       0      -2
    # target Q_2 = 1 - 2 a       0       1       3
    # 0.75 min + 0.25 max        0.25    0.25   -0.75     best 0.25
    # (best of each Q first: Q_1 1, Q_2 3, and so 1.5)
    # row                        1       2       3 (the end)
    # target          2 - 1 + 0.125 = 1.125    -1 + 0.125 = -0.875    2 - 1 = 1
    # Q_1 = a                    1       0.5     0
    # Q_2 = -a                  -1      -0.5     0
    # (Q_1 - target)^2    0.015625    1.890625   1    sum 2.90625
    # (Q_2 - target)^2    4.515625    0.140625   1    sum 5.65625
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
    np.testing.assert_allclose(loss, (2.90625 + 5.65625) / 3, rtol=1e-6)
    assert metrics["q"] == 0.0


def test_actor_loss_by_hand():
    state = linear_state(actor=(0.5, 9), critic=(3, -9))
    batch = probes.random_transitions(3, 1, 1)
    # sampled 0.5, moved by 0.2 times 0.5; Q_1 = 3 a
    cfg, key = bcq.Config(perturbation=0.2), jax.random.key(0)
    loss, _, _ = actor_loss(state.actor.params, state, batch, key, cfg)
    np.testing.assert_allclose(loss, -3 * 0.6, rtol=1e-5)
    loss, _, grads = actor_loss(state.actor.params, state, batch, key, bcq.Config(perturbation=1.5))
    np.testing.assert_allclose(loss, -3, rtol=1e-6)  # 1.25 is not an action
    assert grads == 0


# --- Acting -------------------------------------------------------------------------------------
@functools.cache
def acting():
    cfg, state, _, _ = setup(num_eval_samples=6, perturbation=0.4)
    functions = {"apply_vae": state.vae.apply_fn, "apply_critics": state.critic.apply_fn}
    act = functools.partial(bcq.policy, state.actor.apply_fn, **functions, cfg=cfg)
    return cfg, state, jax.jit(act)


@pytest.mark.parametrize("rows", [4, None])
def test_the_policy_takes_the_best_sample(rows):
    cfg, state, act = acting()
    params = bcq.policy_params(state)
    assert params == (state.actor.params, state.vae.params, state.critic.params)
    observation = probes.random_transitions(4).observation[0 if rows is None else slice(rows)]
    action = act(params, observation, jax.random.key(3))
    assert action.shape == (*observation.shape[:-1], 2)
    repeated = np.stack([np.float64(observation)] * 6)
    samples = numpy_sample(double(state.vae.params), repeated, jax.random.key(3))
    samples = numpy_perturb(double(state.actor.params), repeated, samples, cfg)
    best = nets.critics(double(state.critic.params), repeated, samples)[0].argmax(axis=0)
    expected = np.take_along_axis(samples, best[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-4)
    assert rows is None or len({*best}) > 1
    assert (act(params, observation, jax.random.key(4)) != action).any()


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


READS = {  # loss -> what it reads of the state
    "critic": {"actor.target_params", "critic.target_params", "vae.params"},
    "actor": {"critic.params", "vae.params"},
    "vae": set(),
}
COLUMNS = {"actor": {"observation"}, "vae": {"observation", "action"}}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_the_networks_and_columns_they_should(name):
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    function = {"critic": critic_loss, "actor": actor_loss, "vae": vae_loss}[name]

    def loss(state, params=state, data=data):
        return function(getattr(params, name).params, state, data, key, cfg)[0]

    here = loss(state)
    assert loss(state, params=other) != here
    found = set()
    for net in state._fields:
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if loss(state._replace(**{net: changed})) != here:
                    found.add(f"{net}.{kind}")
    assert found == READS[name]
    for column in data._fields if name in COLUMNS else ():
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(state, data=rolled) != here) == (column in COLUMNS[name]), column


# --- Networks -----------------------------------------------------------------------------------
def test_initial_parameters_and_targets():
    state = nets.fresh(bcq)
    nets.check_uniform_init(state.actor.params, (16 + 2, 64, 96, 2))
    nets.check_uniform_init(state.critic.params, (16 + 2, 64, 96, 1))
    vae = {name: {"params": layers} for name, layers in state.vae.params["params"].items()}
    nets.check_uniform_init(vae.pop("encoder"), (16 + 2, 64, 64, 8))
    nets.check_uniform_init(vae.pop("decoder"), (16 + 4, 64, 64, 2))
    assert not vae
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.actor)
    nets.check_targets_are_copies(state.critic)
    assert not hasattr(state.vae, "target_params")


# --- Update -------------------------------------------------------------------------------------
def test_order_of_two_updates():
    """The VAE, the critics with the new VAE, the actor with both, targets; three keys."""
    rates = {"vae": 0.03, "critic": 0.05, "actor": 0.02}
    overrides = {f"{name}_learning_rate": rate for name, rate in rates.items()}
    cfg, state, key, data = setup(log_every=2, target_rate=0.3, **overrides)
    cfg_here, here, _, _ = setup()  # the same numbers, with the losses compiled already
    adam, found = {name: nets.Adam(rate) for name, rate in rates.items()}, {}
    losses = {"vae": vae_loss, "critic": critic_loss, "actor": actor_loss}
    for step in (6, 7):
        batch, *keys = nets.sample(key, step, data, cfg, 4)
        for (name, loss), key_loss in zip(losses.items(), keys, strict=True):
            net = getattr(here, name)
            _, metrics, grads = loss(net.params, here, batch, key_loss, cfg_here)
            params = adam[name].step(net.params, grads)
            here = here._replace(**{name: net.replace(params=params)})
            for metric, x in metrics.items():
                found.setdefault(metric, []).append(x)
        for name in ("actor", "critic"):
            net = getattr(here, name)
            target = nets.polyak(net.params, net.target_params, 0.3)
            here = here._replace(**{name: net.replace(target_params=target)})

    after, metrics = nets.train_chunk(bcq, state, key, 6, data, cfg)
    for name in losses:
        nets.check_close(getattr(after, name).params, getattr(here, name).params)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).target_params, getattr(here, name).target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics
    for name, rate in rates.items():
        nets.check_rate(getattr(state, name), lambda step, rate=rate: rate)


# --- Data ---------------------------------------------------------------------------------------
def test_training_sees_the_data_as_recorded(monkeypatch, tmp_path):
    raw = probes.random_transitions(20)
    _, data = nets.handed_over(bcq, monkeypatch, tmp_path, raw, (1, 2), reward_shift=-1.0)
    for name in data._fields:
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name
