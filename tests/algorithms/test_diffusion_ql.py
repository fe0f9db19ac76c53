# SPDX-License-Identifier: Apache-2.0
"""Diffusion-QL's and FBRAC's losses, sampling, networks and update against NumPy in float64 and
hand-worked numbers."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import diffusion_ql

critic_loss = nets.compiled(diffusion_ql.critic_loss)
actor_loss = nets.compiled(diffusion_ql.actor_loss)
setup = functools.partial(nets.setup, diffusion_ql, generator_steps=2, max_gradient_norm=None)
FLOW = {"generator": "flow", "flow_steps": 2, "actor_q": "mean", "q_agg": "mean"}


# --- The method in NumPy ------------------------------------------------------------------------
def mish(x):
    return x * np.tanh(np.log(1 + np.exp(x)))


def numpy_actor(params, observation, action, time, cfg):
    """Noise or velocity. `time` [..., 1]"""
    if cfg.generator == "flow":
        return nets.gelu_net(params, observation, action, time)
    layers = params["params"]
    angle = time * np.array([10_000 ** (-i / 7) for i in range(8)])
    embedding = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    embedding = mish(nets.dense(layers["Dense_0"], embedding))
    embedding = nets.dense(layers["Dense_1"], embedding)
    x = np.concatenate([action, embedding, observation], axis=-1)
    for i in range(len(cfg.hidden)):
        x = mish(nets.dense(layers[f"Dense_{2 + i}"], x))
    return nets.dense(layers["head"], x)


def numpy_q(params, observation, action, cfg):
    """[K, ...]"""
    if cfg.generator == "flow":
        return nets.gelu_critics(params, observation, action)
    found = []
    for k in range(cfg.num_critics):
        layers = jax.tree.map(lambda x, k=k: x[k], params["params"])
        x = np.concatenate([observation, action], axis=-1)
        for i in range(len(cfg.hidden)):
            x = mish(nets.dense(layers[f"Dense_{i}"], x))
        found.append(nets.dense(layers[f"Dense_{len(cfg.hidden)}"], x)[..., 0])
    return np.stack(found)


def numpy_schedule(steps):
    """alpha_t and alpha_bar_t, their running products, from the authors' formula."""
    alpha = [
        math.exp(-0.1 / steps - 0.5 * 9.9 * (2 * t - 1) / steps**2) for t in range(1, steps + 1)
    ]
    return np.array(alpha), np.cumprod(alpha)


def draws_of(key, shape, cfg):
    """The noise of `generate_action`: one array for every step of ddpm, one for the flow."""
    keys = jax.random.split(jax.random.clone(key), cfg.generator_steps)
    used = [keys[0]] if cfg.generator == "flow" else [keys[0], *reversed(keys[1:])]
    return [np.asarray(jax.random.normal(one, shape), np.float64) for one in used]


def numpy_generate(params, observation, noises, cfg):
    """A density of x_{t-1} is the product of two Gaussians: its mean weighs by inverse variance."""
    x = noises[0]
    if cfg.generator == "flow":
        return nets.flow(params, observation, x, cfg.flow_steps)
    alpha, alpha_bar = numpy_schedule(cfg.generator_steps)
    for turn, t in enumerate(reversed(range(cfg.generator_steps))):
        epsilon = numpy_actor(params, observation, x, np.full((*x.shape[:-1], 1), float(t)), cfg)
        x0 = np.clip((x - np.sqrt(1 - alpha_bar[t]) * epsilon) / np.sqrt(alpha_bar[t]), -1, 1)
        if t == 0:
            return x0
        # x_{t-1} is sqrt(alpha_bar_{t-1}) x_0 + noise; x_t is sqrt(alpha_t) x_{t-1} + noise.
        forward = 1 / (1 - alpha_bar[t - 1])
        backward = alpha[t] / (1 - alpha[t])
        mean = forward * np.sqrt(alpha_bar[t - 1]) * x0 + backward * x / np.sqrt(alpha[t])
        mean = mean / (forward + backward)
        x = mean + noises[turn + 1] / np.sqrt(forward + backward)


def numpy_critic_loss(params, state, batch, noises, cfg):
    following = np.stack([batch.next_observation] * cfg.target_samples)
    action = numpy_generate(double(state.actor.target_params), following, noises, cfg)
    next_q = numpy_q(double(state.critic.target_params), following, action, cfg)  # [K, N, B]
    predicted, loss = numpy_q(params, batch.observation, batch.action, cfg), 0.0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            best = [max(member[:, i]) for member in next_q]
            worth = min(best) if cfg.q_agg == "min" else sum(best) / len(best)
            target += cfg.discount * worth
        loss += sum((q[i] - target) ** 2 for q in predicted) / len(batch.reward)
    return loss, predicted.mean()


def numpy_behaviour_loss(params, batch, noise, time, cfg):
    if cfg.generator == "flow":
        x, target = noise + time * (batch.action - noise), batch.action - noise
    else:
        alpha_bar = numpy_schedule(cfg.generator_steps)[1][time]
        x, target = np.sqrt(alpha_bar) * batch.action + np.sqrt(1 - alpha_bar) * noise, noise
    found = numpy_actor(params, batch.observation, x, time.astype(np.float64), cfg)
    return np.mean([(one - wanted) ** 2 for one, wanted in zip(found, target, strict=True)])


def actor_draws(key, shape, cfg):
    """(noise and time of the behaviour loss, noise of the chain, chosen critic)"""
    key_behaviour, key_action, key_choice = jax.random.split(jax.random.clone(key), 3)
    key_time, key_noise = jax.random.split(key_behaviour)
    noise = np.asarray(jax.random.normal(key_noise, shape), np.float64)
    if cfg.generator == "flow":
        time = jax.random.uniform(key_time, (shape[0], 1))
    else:
        time = jax.random.randint(key_time, (shape[0], 1), 0, cfg.generator_steps)
    chosen = int(jax.random.randint(key_choice, (), 0, cfg.num_critics))
    return noise, np.asarray(time), draws_of(key_action, shape, cfg), chosen


def numpy_actor_loss(params, state, batch, draws, cfg, scale=None):
    """`scale`: mean |Q_j|, a constant for the gradient; None computes it here."""
    noise, time, noises, chosen = draws
    behaviour = numpy_behaviour_loss(params, batch, noise, time, cfg)
    action = numpy_generate(params, batch.observation, noises, cfg)
    q = numpy_q(double(state.critic.params), batch.observation, action, cfg)
    if cfg.actor_q == "mean":
        q_loss, scale = -q.mean(), 1.0
    else:
        other = {0: 1, 1: 0}[chosen]
        scale = np.abs(q[other]).mean() if scale is None else scale
        q_loss = -q[chosen].mean() / scale
    return cfg.alpha * behaviour + cfg.eta * q_loss, behaviour, q_loss, scale


@pytest.mark.parametrize(
    "overrides",
    [{"discount": 0.7}, {"target_samples": 4}, FLOW | {"hidden": (8, 12), "num_critics": 3}],
    ids=str,
)
def test_critic_loss_and_gradient_equal_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch, params = double(data), double(state.critic.params)
    noises = draws_of(key, (cfg.target_samples, *data.action.shape), cfg)
    loss, metrics, grads = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q = numpy_critic_loss(params, state, batch, noises, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-3, atol=1e-4)
    for direction in directions(params, 2):  # the gradient takes the targets as numbers
        expected = slope(
            lambda p: numpy_critic_loss(p, state, batch, noises, cfg)[0], params, direction
        )
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(
    "overrides", [{"eta": 0.7}, FLOW | {"alpha": 3.0, "hidden": (8, 12)}], ids=str
)
def test_actor_loss_and_gradient_equal_numpy(overrides):
    """The gradient of Q goes through every step of the chain, and takes Q's scale as a number."""
    cfg, state, key, data = setup(**overrides)
    state = state._replace(actor=smaller(state.actor))  # few actions are clipped
    batch, params = double(data), double(state.actor.params)
    keys = {actor_draws(one, batch.action.shape, cfg)[-1]: one for one in jax.random.split(key, 8)}
    assert set(keys) == {0, 1}  # the chosen critic
    for one in keys.values():
        draws = actor_draws(one, batch.action.shape, cfg)
        loss, metrics, grads = actor_loss(state.actor.params, state, data, one, cfg)
        expected, behaviour, q_loss, scale = numpy_actor_loss(params, state, batch, draws, cfg)
        np.testing.assert_allclose([loss, metrics["actor_loss"]], expected, rtol=1e-4)
        np.testing.assert_allclose(metrics["behaviour_loss"], behaviour, rtol=1e-4)
        np.testing.assert_allclose(metrics["q_loss"], q_loss, rtol=1e-3, atol=1e-5)
        for direction in directions(params, 2):
            expected = slope(
                lambda p, d=draws, s=scale: numpy_actor_loss(p, state, batch, d, cfg, s)[0],
                params,
                direction,
            )
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=3e-3, atol=1e-3)


def smaller(net, factor=0.4):
    return net.replace(params=jax.tree.map(lambda x: factor * x, net.params))


# --- By hand ------------------------------------------------------------------------------------
ACTIONS = np.float32([[0.5, -0.25], [-0.75, 1.0], [0.0, 0.125]])


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("generator", ["ddpm", "flow"])
def test_a_perfect_model_of_one_action_generates_it(generator, steps):
    cfg = diffusion_ql.Config(generator=generator, generator_steps=steps, flow_steps=steps)

    def noise(params, observation, x, time):
        alpha_bar = np.float32(numpy_schedule(steps)[1])[int(time[0, 0])]
        return (x - np.sqrt(alpha_bar) * ACTIONS) / np.sqrt(1 - alpha_bar)

    def velocity(params, observation, x, time):
        return (ACTIONS - x) / (1 - time)

    model, shape = {"ddpm": noise, "flow": velocity}[generator], {"head": {"bias": np.zeros(2)}}
    found = diffusion_ql.generate_action(
        model, {"params": shape}, np.zeros((3, 7)), jax.random.key(0), cfg
    )
    np.testing.assert_allclose(found, ACTIONS, atol=1e-5)


def test_the_chain_has_the_marginals_of_the_forward_process():
    """With one true action, x before the last step is N(sqrt(alpha_bar_0) a, 1 - alpha_bar_0)."""
    cfg, seen = diffusion_ql.Config(), []
    alpha_bar = np.float32(numpy_schedule(5)[1])

    def noise(params, observation, x, time):
        seen.append(np.asarray(x, np.float64))
        bar = alpha_bar[int(time[0, 0])]
        return (x - np.sqrt(bar) * 0.5) / np.sqrt(1 - bar)

    shape = {"params": {"head": {"bias": np.zeros(1)}}}
    diffusion_ql.generate_action(noise, shape, np.zeros((20_000, 1)), jax.random.key(0), cfg)
    for x, bar in zip(reversed(seen), alpha_bar[:4], strict=False):  # the first x_T is N(0, 1)
        np.testing.assert_allclose(x.mean(), 0.5 * np.sqrt(bar), atol=0.02)
        np.testing.assert_allclose(x.std(), np.sqrt(1 - bar), rtol=0.02)


def test_the_average_of_the_actor_moves_when_it_is_due():
    """In every fifth step, not before the update of that number, by a tenth."""
    net = nets.linear_net(diffusion_ql.TrainState.create, None, [1.0], [0.0])
    for start, steps in ((1, (0, 5, 10)), (6, (5, 10)), (7, (10,))):
        cfg = diffusion_ql.Config(
            actor_target_start=start, actor_target_every=5, actor_target_rate=0.1
        )
        moved = [
            float(diffusion_ql.update_average(net, step, cfg).target_params[0])
            for step in range(12)
        ]
        expected = [0.1 if step in steps else 0.0 for step in range(12)]
        np.testing.assert_allclose(moved, expected, rtol=1e-6)


# --- Acting -------------------------------------------------------------------------------------
@functools.cache
def acting(generator):
    """cfg, small parameters and the compiled policy with 6 samples."""
    cfg, state, _, _ = setup(num_samples=6, **(FLOW if generator == "flow" else {}))
    act = functools.partial(
        diffusion_ql.policy, state.actor.apply_fn, apply_critics=state.critic.apply_fn, cfg=cfg
    )
    small = jax.tree.map(
        lambda x: 0.3 * x, diffusion_ql.policy_params(state)
    )  # few actions are clipped
    return cfg, small, jax.jit(act)


@pytest.mark.parametrize("generator", ["ddpm", "flow"])
@pytest.mark.parametrize("rows", [4, None])
def test_the_policy_draws_a_sample_by_softmax(generator, rows):
    cfg, params, act = acting(generator)
    observation = probes.random_transitions(4).observation[0 if rows is None else slice(rows)]
    action = act(params, observation, jax.random.key(3))
    assert action.shape == (*observation.shape[:-1], 2)
    actor, critic = double(params)
    repeated = np.stack([np.float64(observation)] * cfg.num_samples)
    key_action, key_choice = jax.random.split(jax.random.key(3))
    noises = draws_of(key_action, (*repeated.shape[:-1], 2), cfg)
    samples = numpy_generate(actor, repeated, noises, cfg)
    q = numpy_q(critic, repeated, samples, cfg).min(axis=0)
    choice = (q + np.asarray(jax.random.gumbel(key_choice, q.shape, np.float32))).argmax(axis=0)
    expected = np.take_along_axis(samples, choice[None, ..., None], axis=0)[0]
    np.testing.assert_allclose(action, expected, rtol=1e-3, atol=1e-4)
    assert (act(params, observation, jax.random.key(4)) != action).any()


def test_candidates_are_drawn_in_proportion_to_exp_of_the_lower_q():
    """Two actions, -1 and 1, as likely as the noise's sign; Q = 0 and 1 by the lower critic."""
    cfg = diffusion_ql.Config(generator="flow", flow_steps=1, num_samples=2)
    observation = np.zeros((20_000, 1), np.float32)
    critics = lambda params, s, a: jnp.stack([(a[..., 0] + 1) / 2, a[..., 0] + 2])  # noqa: E731
    sign = lambda params, s, x, t: jnp.sign(x) - x  # noqa: E731
    params = {"params": {"head": {"bias": np.zeros(1)}}}, None
    action = diffusion_ql.policy(sign, params, observation, jax.random.key(0), critics, cfg)
    # Both are 1 in a quarter of the rows; in half of them one is, with odds of e to 1.
    expected = 0.25 + 0.5 * np.e / (1 + np.e)
    np.testing.assert_allclose((np.asarray(action) > 0).mean(), expected, atol=0.01)


def test_the_actor_acts_and_the_target_critics_choose():
    _, state, _, _ = setup()
    actor, critic = diffusion_ql.policy_params(state)
    assert actor is state.actor.params and critic is state.critic.target_params


# --- What the losses may depend on --------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, key, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, key, cfg)[0], data)


READS = {  # loss -> what it reads of the state, and of the data
    "critic": ({"actor.target_params", "critic.target_params"}, None),
    "actor": ({"critic.params"}, {"observation", "action"}),
}


@pytest.mark.parametrize("name", READS)
def test_losses_read_only_what_they_should(name):
    cfg, state, key, data = setup()
    other = nets.shaken(state, seed=4)
    function = {"critic": critic_loss, "actor": actor_loss}[name]

    def loss(state, params=state, data=data, key=key):
        return function(getattr(params, name).params, state, data, key, cfg)[0]

    here, (reads, columns) = loss(state), READS[name]
    assert loss(state, params=other) != here and loss(state, key=jax.random.key(9)) != here
    found = set()
    for net in state._fields:
        for kind in ("params", "target_params"):
            changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
            if loss(state._replace(**{net: changed})) != here:
                found.add(f"{net}.{kind}")
    assert found == reads
    for column in data._fields if columns else ():
        rolled = data._replace(**{column: np.roll(getattr(data, column), 1, axis=0)})
        assert (loss(state, data=rolled) != here) == (column in columns), column


# --- Networks -----------------------------------------------------------------------------------
@functools.cache
def fresh():
    return nets.fresh(diffusion_ql)


def test_initial_parameters():
    """PyTorch's default in every layer of both networks."""
    nets.check_uniform_init(fresh().critic.params, (18, 64, 96, 1))
    actor = dict(fresh().actor.params["params"])
    actor["Dense_4"] = actor.pop("head")
    embedding = {"params": {name: actor.pop(name) for name in ("Dense_0", "Dense_1")}}
    nets.check_uniform_init(embedding, (16, 32, 16))
    rest = {f"Dense_{i}": actor[f"Dense_{i + 2}"] for i in range(3)}
    nets.check_uniform_init({"params": rest}, (2 + 16 + 16, 64, 96, 2))
    nets.check_members_differ(fresh().critic)


def test_targets_start_as_copies():
    nets.check_targets_are_copies(fresh().critic)
    nets.check_targets_are_copies(fresh().actor)


# --- Update -------------------------------------------------------------------------------------
def clipped(grads, limit):
    """The gradients, scaled such that their norm over all parameters is at most `limit`."""
    norm = math.sqrt(sum((x**2).sum() for x in jax.tree.leaves(double(grads))))
    assert norm > limit  # else nothing is tested
    return jax.tree.map(lambda x: x * (limit / norm), double(grads))


def test_order_of_two_updates():
    """The critics, the actor with the new critics, its average, the targets of the critics."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    rates |= {"actor_target_rate": 0.2, "actor_target_start": 1, "actor_target_every": 3}
    limit = {"max_gradient_norm": 0.1}
    cfg, state, key, data = setup(log_every=2, **rates | limit)
    loss_cfg, expected, _, _ = setup()  # the same numbers, with the losses compiled already
    state = state._replace(actor=smaller(state.actor))  # few actions are clipped
    expected = expected._replace(actor=smaller(expected.actor))
    adam = {"critic": nets.Adam(0.05), "actor": nets.Adam(0.02)}
    found = {}
    for step in (6, 7):
        batch, key_critic, key_actor = nets.sample(key, step, data, cfg, 3)
        for name, loss, key_loss in (
            ("critic", critic_loss, key_critic),
            ("actor", actor_loss, key_actor),
        ):
            net = getattr(expected, name)
            _, metrics, grads = loss(net.params, expected, batch, key_loss, loss_cfg)
            params = adam[name].step(net.params, clipped(grads, 0.1))
            expected = expected._replace(**{name: net.replace(params=params)})
            for metric, x in metrics.items():
                found.setdefault(metric, []).append(x)
        for name, rate in (("critic", 0.3), ("actor", 0.2 if step == 6 else 0.0)):
            net = getattr(expected, name)
            target = nets.polyak(net.params, net.target_params, rate)
            expected = expected._replace(**{name: net.replace(target_params=target)})

    after, metrics = nets.train_chunk(diffusion_ql, state, key, 6, data, cfg)
    for name in ("actor", "critic"):
        nets.check_close(getattr(after, name).params, getattr(expected, name).params)
        nets.check_close(getattr(after, name).target_params, getattr(expected, name).target_params)
    for name, numbers in found.items():
        np.testing.assert_allclose(metrics.pop(name), np.mean(numbers), rtol=1e-3)
    assert not metrics


@pytest.mark.parametrize("cosine", [True, False])
def test_learning_rates(cosine):
    """With `cosine` both fall to 0 along a cosine and stay there."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "num_updates": 4}
    _, state, _, _ = setup(**rates, cosine=cosine)
    for net, rate in ((state.actor, 0.02), (state.critic, 0.05)):
        share = [(1 + math.cos(math.pi * min(t, 4) / 4)) / 2 if cosine else 1.0 for t in range(6)]
        nets.check_rate(net, lambda t, rate=rate, share=share: rate * share[t], steps=6)


# --- Data ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("standardise", [False, True])
def test_training_sees_changed_rewards(monkeypatch, tmp_path, standardise):
    raw = probes.random_transitions(20)
    overrides = {"reward_scale": 4.0, "reward_shift": -2.0, "standardise_rewards": standardise}
    _, data = nets.handed_over(diffusion_ql, monkeypatch, tmp_path, raw, (2, 2), **overrides)
    reward = raw.reward.astype(np.float64)
    if standardise:
        centred = reward - reward.mean()
        reward = centred / np.sqrt((centred**2).sum() / 19)
    np.testing.assert_allclose(data.reward, 4 * reward - 2, rtol=1e-4, atol=1e-5)
    for name in ("observation", "action", "next_observation", "termination"):
        assert np.array_equal(getattr(data, name), getattr(raw, name)), name
