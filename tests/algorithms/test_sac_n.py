# SPDX-License-Identifier: Apache-2.0
"""SAC-N's losses, networks and update against NumPy in float64 and hand-worked numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import sac_n

setup = functools.partial(nets.setup, sac_n)
critic_loss = nets.compiled(sac_n.critic_loss)
actor_loss = nets.compiled(sac_n.actor_loss)
temperature_loss = nets.compiled(sac_n.temperature_loss)


# --- The method in NumPy ------------------------------------------------------------------------
def numpy_actor(params, observation):
    """Mean and log std before tanh: the last two layers, in this order."""
    layers, x = params["params"], observation
    hidden = len(layers) - 2
    for i in range(hidden):
        x = np.maximum(nets.dense(layers[f"Dense_{i}"], x), 0)
    log_std = nets.dense(layers[f"Dense_{hidden + 1}"], x)
    return nets.dense(layers[f"Dense_{hidden}"], x), np.clip(log_std, -5, 2)


def numpy_sample(params, observation, noise):
    """Actions and log pi."""
    mean, log_std = numpy_actor(params, observation)
    x = mean + np.exp(log_std) * noise
    return np.tanh(x), nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)


def numpy_target(state, batch, noise, cfg):
    """[B]"""
    action, log_prob = numpy_sample(double(state.actor.params), batch.next_observation, noise)
    q = nets.critics(double(state.critic.target_params), batch.next_observation, action)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    target = np.zeros(len(batch.reward))
    for i in range(len(target)):
        target[i] = batch.reward[i]
        if not batch.termination[i]:
            target[i] += cfg.discount * (min(q[:, i]) - temperature * log_prob[i])
    return target


def numpy_critic_loss(params, state, batch, noise, cfg):
    """-> loss, q, mean over the rows of the std over the critics"""
    target = numpy_target(state, batch, noise, cfg)
    q = nets.critics(params, batch.observation, batch.action)
    loss = sum(((member - target) ** 2).mean() for member in q)
    return loss, q.mean(), q.std(axis=0).mean()


def numpy_actor_loss(params, state, batch, noise):
    """-> loss, entropy"""
    action, log_prob = numpy_sample(params, batch.observation, noise)
    q = nets.critics(double(state.critic.params), batch.observation, action).min(axis=0)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    return (temperature * log_prob - q).mean(), -log_prob.mean()


def draw(key, shape=(32, 2)):
    """The noise that a loss draws from its key."""
    return double(jax.random.normal(jax.random.clone(key), shape))


@pytest.mark.parametrize(
    "overrides", [{"num_critics": 5}, {"discount": 0.7, "num_critics": 1, "hidden": (12,)}], ids=str
)
def test_losses_and_gradients_equal_numpy(overrides):
    """Targets, densities and the other networks are numbers to the critics' gradient. The actor's
    goes through its action and its density."""
    cfg, state, key, data = setup(**overrides)
    batch, noise, params = double(data), draw(key), double(state.critic.params)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q, q_std = numpy_critic_loss(params, state, batch, noise, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    np.testing.assert_allclose(metrics["q_std"], q_std, rtol=1e-4, atol=1e-6)
    for direction in directions(params, 3):
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noise, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)

    params = double(state.actor.params)
    loss, metrics, grads = actor_loss(state.actor.params, state, data, key, cfg)
    expected, entropy = numpy_actor_loss(params, state, batch, noise)
    np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-4)
    temperature = np.exp(double(state.log_temperature.params["log"]))
    np.testing.assert_allclose(metrics["temperature"], temperature, rtol=1e-5)
    for direction in directions(params, 3):
        expected = slope(lambda p: numpy_actor_loss(p, state, batch, noise)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(module, actor, critic, critic_target, temperature, log_std=-3.0):
    """pi(s) = tanh N(actor * s, exp(log_std)) for s of one number, Q_k(s, a) = critic_k sum a."""
    linear = functools.partial(nets.linear_net, module.train_state.TrainState.create)

    def act(p, s):
        return p[None] * s, jnp.full((len(s), len(p)), log_std)

    def value(p, s, a):
        return p[:, None] * a.sum(axis=-1)[None]

    return module.State(
        linear(act, actor),
        nets.linear_net(module.TrainState.create, value, critic, critic_target),
        linear(module.temperature_of, {"log": np.log(temperature)}),
    )


def squash(mean, noise, log_std=-3.0):
    """Actions of `linear_state` [B] and log pi [B], one action dimension."""
    x = mean + np.exp(log_std) * noise
    log_prob = -(noise**2) / 2 - log_std - np.log(np.sqrt(2 * np.pi))
    return np.tanh(x), log_prob - np.log(1 - np.tanh(x) ** 2)


def bootstrap_by_hand(module, key):
    """(state, batch, targets [2], Q of the data's actions [3, 2]); the second row is the end."""
    state = linear_state(module, [1], [1, -2, 0], [2, 4, 3], temperature=0.1)
    batch = probes.random_transitions(
        2,
        1,
        1,
        observation=[[5], [6]],  # Q does not depend on it
        next_observation=[[-0.5], [0.5]],
        action=[[0.75], [0.5]],
        reward=[1, 2],
        termination=[0, 1],
    )
    action, log_prob = squash(np.array([-0.5, 0.5]), draw(key, (2, 1))[:, 0])
    assert action[0] < 0  # so the least target is that of the second critic
    target = np.array([1 + 0.5 * (4 * action[0] - 0.1 * log_prob[0]), 2])
    return state, batch, target, np.array([[0.75, 0.5], [-1.5, -1], [0, 0]])


def test_critic_loss_by_hand():
    key = jax.random.key(0)
    state, batch, target, q = bootstrap_by_hand(sac_n, key)
    expected = ((q - target) ** 2).mean(axis=1).sum()
    cfg = sac_n.Config(discount=0.5)
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, key, cfg)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["q"], q.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["q_std"], q.std(axis=0).mean(), rtol=1e-5)


def test_actor_loss_takes_the_least_critic_of_each_row_by_hand():
    state = linear_state(sac_n, [1], [1, -2, 3], [9, 9, 9], temperature=0.1)
    batch, key = probes.random_transitions(2, 1, 1, observation=[[0.5], [-0.25]]), jax.random.key(0)
    action, log_prob = squash(np.array([0.5, -0.25]), draw(key, (2, 1))[:, 0])
    assert action[0] > 0 > action[1]  # the second critic is the least, then the third
    least = np.array([-2 * action[0], 3 * action[1]])
    loss, metrics, _ = actor_loss(state.actor.params, state, batch, key, sac_n.Config())
    np.testing.assert_allclose(loss, (0.1 * log_prob - least).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["entropy"], -log_prob.mean(), rtol=1e-5)


def test_temperature_falls_while_the_entropy_is_above_minus_the_number_of_actions():
    for log_std, sign in ((0.0, 1), (-4.5, -1)):
        state = linear_state(sac_n, [0.1, -0.1], [1], [1], temperature=1.0, log_std=log_std)
        batch, key = probes.random_transitions(64, 1, 2), jax.random.key(0)
        noise, mean = draw(key, (64, 2)), double(batch.observation) * [0.1, -0.1]
        x = mean + np.exp(log_std) * noise
        log_prob = nets.log_normal(x, mean, log_std) + 2 * np.log(np.cosh(x)).sum(axis=-1)
        params = {"log": jnp.float32(0.5)}
        loss, metrics, grads = temperature_loss(params, state, batch, key, sac_n.Config())
        excess = -log_prob.mean() + 2
        np.testing.assert_allclose(grads["log"], excess, rtol=1e-4)
        np.testing.assert_allclose([loss, metrics["temperature_loss"]], 0.5 * excess, rtol=1e-4)
        assert np.sign(grads["log"]) == sign


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(
        lambda batch: critic_loss(state.critic.params, state, batch, key, cfg)[0], data
    )


def test_losses_read_only_the_networks_they_should():
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    targets = state.critic.replace(target_params=other.critic.target_params)
    networks = state.critic.replace(params=other.critic.params)

    def critic(params=state.critic.params, **changed):
        return critic_loss(params, state._replace(**changed), data, key, cfg)[0]

    def actor(params=state.actor.params, **changed):
        return actor_loss(params, state._replace(**changed), data, key, cfg)[0]

    here = critic()
    assert critic(params=other.critic.params) != here
    assert critic(critic=networks) == here != critic(critic=targets)
    assert critic(actor=other.actor) != here != critic(log_temperature=other.log_temperature)
    here = actor()
    assert actor(params=other.actor.params) != here
    assert actor(critic=targets) == actor(actor=other.actor) == here
    assert actor(critic=networks) != here != actor(log_temperature=other.log_temperature)


def test_every_critic_can_be_the_least():
    """Lower any one of them by 100: the target and the actor's objective fall with it."""
    cfg, state, key, data = setup(num_critics=4)
    data = data._replace(termination=np.zeros_like(data.termination))
    for k in range(4):
        lower = jax.tree.map(np.array, state.critic.params)
        lower["params"]["Dense_2"]["bias"][k] -= 100
        changed = state._replace(critic=state.critic.replace(params=lower))
        found = actor_loss(state.actor.params, changed, data, key, cfg)[0]
        assert 90 < found - actor_loss(state.actor.params, state, data, key, cfg)[0] < 110
        lower = jax.tree.map(np.array, state.critic.target_params)
        lower["params"]["Dense_2"]["bias"][k] -= 100
        changed = state._replace(critic=state.critic.replace(target_params=lower))
        found = critic_loss(state.critic.params, changed, data, key, cfg)[0]
        assert found > 4 * 90**2


# --- Networks -----------------------------------------------------------------------------------
def check_small_outputs(state):
    """Kernels U(±1 / sqrt(inputs)), biases 0.1, outputs U(±1e-3) of the actor, U(±3e-3) of Q."""
    for net, sizes, outputs, bound in (
        (state.actor, (16, 64, 96), ((96, 2), (96, 2)), 1e-3),
        (state.critic, (16 + 2, 64, 96), ((96, 1),), 3e-3),
    ):
        layers = net.params["params"]
        assert len(layers) == 2 + len(outputs)
        for i in range(2):
            kernel, bias = np.asarray(layers[f"Dense_{i}"]["kernel"]), layers[f"Dense_{i}"]["bias"]
            limit = sizes[i] ** -0.5
            assert kernel.shape[-2:] == sizes[i : i + 2] and (np.asarray(bias) == 0.1).all()
            assert 0.9 * limit < np.abs(kernel).max() <= limit
            np.testing.assert_allclose(kernel.std(), limit / 3**0.5, rtol=0.05)
        for i, shape in enumerate(outputs):
            head = layers[f"Dense_{2 + i}"]
            assert head["kernel"].shape[-2:] == shape
            for x in head.values():
                assert 0.1 * bound < np.abs(x).max() <= bound


def test_initial_state():
    state = nets.fresh(sac_n)
    check_small_outputs(state)
    nets.check_members_differ(state.critic)
    nets.check_targets_are_copies(state.critic)
    assert state.log_temperature.params == {"log": 0.0}


def test_log_std_is_clipped_and_the_policy_is_tanh_of_the_mean():
    _, state, key, data = setup()
    params = {"params": dict(state.actor.params["params"])}
    apply_fn = jax.jit(state.actor.apply_fn)
    for bias, expected in ((-30.0, -5.0), (30.0, 2.0)):
        head = params["params"]["Dense_3"]
        params["params"]["Dense_3"] = head | {"bias": np.full(2, bias, np.float32)}
        assert (apply_fn(params, data.observation)[1] == expected).all()
    params = sac_n.policy_params(state)
    action = jax.jit(functools.partial(sac_n.policy, state.actor.apply_fn))(
        params, data.observation, key
    )
    mean, _ = numpy_actor(double(params), double(data).observation)
    np.testing.assert_allclose(action, np.tanh(mean), rtol=1e-4, atol=1e-5)


def test_five_hundred_critics_are_one_batched_product():
    """The traced gradient of 500 critics has as many operations as that of 3."""

    def operations(count):
        cfg = probes.config(sac_n, hidden=(4,), num_critics=count)
        data = probes.random_transitions()
        state = nets.shapes(sac_n, cfg, None)
        grad = jax.grad(sac_n.critic_loss, has_aux=True)
        program = jax.make_jaxpr(functools.partial(grad, cfg=cfg))
        return len(program(state.critic.params, state, data, jax.random.key(0)).eqns)

    assert operations(500) == operations(3)


# --- Update -------------------------------------------------------------------------------------
RATES = {
    "actor_learning_rate": 0.01,
    "critic_learning_rate": 0.05,
    "temperature_learning_rate": 0.1,
    "target_rate": 0.3,
}


def check_update(module):
    """Temperature; the actor with the new temperature; the critics with the new actor and the new
    temperature; the targets. Each loss has noise of its own."""
    cfg, state, key, data = nets.setup(module, log_every=2, num_critics=3, **RATES)
    after, metrics = nets.train_chunk(module, state, key, 0, data, cfg)
    temperature_adam, actor_adam, critic_adam = (nets.Adam(x) for x in (0.1, 0.01, 0.05))
    actor_loss = nets.compiled(module.actor_loss)
    critic_loss = nets.compiled(module.critic_loss)
    temperature_loss = nets.compiled(module.temperature_loss)
    found = []

    def place(state, **changed):
        return state._replace(
            **{name: getattr(state, name).replace(**parts) for name, parts in changed.items()}
        )

    for step in range(2):
        batch, *keys = nets.sample(key, step, data, cfg, 4)
        params = state.log_temperature.params
        _, temperature_metrics, grads = temperature_loss(params, state, batch, keys[0], cfg)
        params = temperature_adam.step(params, grads)
        state = place(state, log_temperature={"params": params})
        _, actor_metrics, grads = actor_loss(state.actor.params, state, batch, keys[1], cfg)
        params = actor_adam.step(state.actor.params, grads)
        state = place(state, actor={"params": params})
        _, critic_metrics, grads = critic_loss(state.critic.params, state, batch, keys[2], cfg)
        params = critic_adam.step(state.critic.params, grads)
        target_params = nets.polyak(params, state.critic.target_params, 0.3)
        state = place(state, critic={"params": params, "target_params": target_params})
        found.append(critic_metrics | actor_metrics | temperature_metrics)
    for name in state._fields:
        nets.check_close(getattr(after, name).params, getattr(state, name).params, 1e-3, 1e-4)
    nets.check_close(after.critic.target_params, state.critic.target_params, 1e-3, 1e-4)
    assert {*metrics} == {*found[0]}
    for name in metrics:
        mean = np.mean([row[name] for row in found])
        np.testing.assert_allclose(metrics[name], mean, rtol=1e-3, atol=1e-4)


def test_order_of_an_update_and_means_of_the_metrics():
    check_update(sac_n)
