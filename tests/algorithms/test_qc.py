# SPDX-License-Identifier: Apache-2.0
"""QC's and QC-FQL's chunks, losses, update and policy against NumPy and hand-worked numbers."""

import functools
from types import SimpleNamespace

import helpers_runs as runs
import jax
import jax.numpy as jnp
import numpy as np
import numpy_nets as nets
import probes
import pytest
from flax.training import train_state
from numpy_nets import directions, dot, double, slope

from algorithms import fql, qc
from common import datasets, evaluation

critic_loss = nets.compiled(qc.critic_loss)
actor_loss = nets.compiled(qc.actor_loss)
flow_loss = nets.compiled(qc.flow_loss)
setup = functools.partial(nets.setup, qc, flow_steps=2, horizon=3)
DISTILL = {"actor": "distill"}


# --- Chunks -------------------------------------------------------------------------------------
ENDS = (4, 5, 10)  # cut by time, cut by time, ended
TERMINATION = (1, 9)  # a success after which the episode goes on, a true end


def recorded():
    """Ten rows of three episodes."""
    rows = np.isin(np.arange(10), TERMINATION), np.isin(np.arange(10), (3, 4))
    transitions = probes.random_transitions(10, 3, 2, termination=rows[0], truncation=rows[1])
    return datasets.Dataset("toy", transitions, np.array(ENDS), np.zeros(3))


@pytest.mark.parametrize("horizon", [1, 2, 3, 7])
def test_chunks_by_a_plain_loop(horizon):
    dataset = recorded()
    rows, cfg = double(dataset.transitions), qc.Config(horizon=horizon, discount=0.9)
    chunks = qc.chunked(dataset, cfg)
    for i in range(10):
        end = min(end for end in ENDS if end > i)
        reward, over, step = 0.0, False, 0
        for step in range(min(horizon, end - i)):
            if not over:
                reward += 0.9**step * rows.reward[i + step]
            over = over or i + step in TERMINATION
        np.testing.assert_allclose(chunks.reward[i], reward, rtol=1e-5, atol=1e-6)
        assert chunks.termination[i] == over
        assert chunks.valid[i].tolist() == [1.0] * (step + 1) + [0.0] * (horizon - step - 1)
        assert np.array_equal(chunks.observation[i], dataset.transitions.observation[i])
        behind = dataset.transitions.action[i : i + horizon].ravel()
        assert np.array_equal(chunks.action[i, : len(behind)], behind)
        if step == horizon - 1:
            after = dataset.transitions.next_observation[i + step]
            assert np.array_equal(chunks.next_observation[i], after)
    assert all(x.dtype == np.float32 for x in chunks)
    assert chunks.action.shape == (10, 2 * horizon)


def test_chunks_of_one_action_are_rows():
    dataset = recorded()
    chunks = qc.chunked(dataset, qc.Config(horizon=1))
    for name in set(chunks._fields) - {"valid"}:
        assert np.array_equal(getattr(chunks, name), getattr(dataset.transitions, name)), name


# --- The method in NumPy ------------------------------------------------------------------------
def normal(key, shape):
    return np.asarray(jax.random.normal(jax.random.clone(key), shape), np.float64)


def numpy_chunk(state, observation, key, cfg):
    """Actions of the policy [B, h A], the index of the best sample [B]."""
    shape = (len(observation), 2 * cfg.horizon)
    if cfg.actor == "distill":
        noise = normal(key, shape)
        net = double(state.actor.params)
        return np.clip(nets.gelu_net(net, observation, noise), -1, 1), None
    noise = normal(key, (cfg.num_samples, *shape))
    flow, critics = double(state.flow.params), double(state.critic.params)
    actions, best = np.zeros(shape), []
    for i in range(len(observation)):
        candidates, worth = [], []
        for n in range(cfg.num_samples):
            here = observation[i : i + 1]
            candidates.append(nets.flow(flow, here, noise[n, i : i + 1], cfg.flow_steps))
            members = nets.gelu_critics(critics, here, candidates[-1])[:, 0]
            worth.append(min(members) if cfg.q_agg == "min" else np.mean(members))
        best.append(int(np.argmax(worth)))
        actions[i] = candidates[best[-1]][0]
    return actions, best


def numpy_critic_loss(params, state, batch, key, cfg):
    action, _ = numpy_chunk(state, batch.next_observation, key, cfg)
    critics = double(state.critic.target_params)
    next_q = nets.gelu_critics(critics, batch.next_observation, action)
    next_q = next_q.min(axis=0) if cfg.q_agg == "min" else next_q.mean(axis=0)
    predicted = nets.gelu_critics(params, batch.observation, batch.action)
    loss, dropped = 0.0, 0
    for i in range(len(batch.reward)):
        target = batch.reward[i]
        if not batch.termination[i]:
            if batch.valid[i, -1] == 0:
                dropped += 1
                continue
            target += cfg.discount**cfg.horizon * next_q[i]
        loss += np.sum((predicted[:, i] - target) ** 2)
    return loss / predicted.size, predicted.mean(), dropped


@pytest.mark.parametrize(
    "overrides",
    [
        {"discount": 0.7},
        {"q_agg": "min", "num_critics": 3},
        DISTILL | {"discount": 0.7},
        {"horizon": 1, "num_samples": 1},
    ],
    ids=str,
)
def test_critic_loss_equals_numpy(overrides):
    cfg, state, key, data = setup(**overrides)
    batch = double(data)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, key, cfg)
    expected, q, dropped = numpy_critic_loss(double(state.critic.params), state, batch, key, cfg)
    assert (dropped > 2) == (cfg.horizon > 1)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=5e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4)
    _, best = numpy_chunk(state, batch.next_observation, key, cfg)
    if best and cfg.num_samples > 1:
        assert len(set(best)) > 1


def test_flow_loss_and_gradient_equal_numpy():
    """Actions of other episodes have no part in it."""
    cfg, state, key, data = setup()
    key_noise, key_time = jax.random.split(jax.random.clone(key))
    noise = normal(key_noise, data.action.shape)
    time = np.asarray(jax.random.uniform(key_time, (len(noise), 1)), np.float64)
    batch, params = double(data), double(state.flow.params)

    def loss(params):
        x = (1 - time) * noise + time * batch.action
        velocity = nets.gelu_net(params, batch.observation, x, time)
        squares, total = (velocity - batch.action + noise) ** 2, 0.0
        for i, k in zip(*np.nonzero(batch.valid), strict=True):
            total += squares[i, 2 * k] + squares[i, 2 * k + 1]
        return total / squares.size

    assert 0.2 < batch.valid.mean() < 0.9
    found, metrics, grads = flow_loss(state.flow.params, state, data, key, cfg)
    np.testing.assert_allclose([found, metrics["flow_loss"]], loss(params), rtol=1e-4)
    for direction in directions(params):
        expected = slope(loss, params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3, atol=1e-4)


def test_policy_loss_is_that_of_fql_on_the_flat_chunk():
    cfg, state, key, data = setup(**DISTILL)
    loss, _, grads = actor_loss(state.actor.params, state, data, key, cfg)
    theirs = fql.Config(alpha=cfg.alpha, flow_steps=cfg.flow_steps)
    parent = nets.compiled(fql.actor_loss)
    expected, _, slopes = parent(state.actor.params, state, data, key, theirs)
    assert loss == pytest.approx(expected, rel=1e-5) and cfg.alpha == 100
    nets.check_close(grads, slopes, rtol=1e-4)


# --- By hand ------------------------------------------------------------------------------------
def linear_state(critic, critic_target):
    """v = z / 2 and 2 steps: F = 1.5625 z, clipped. Q_k(s, A) = critic_k * sum of A."""
    size = {"params": {"head": {"bias": np.zeros(2)}}}
    flow = nets.linear_net(train_state.TrainState.create, lambda p, s, x, t: x / 2, size)
    net = nets.linear_net(
        qc.TrainState.create,
        lambda p, s, a: p.reshape(-1, *([1] * (a.ndim - 1))) * a.sum(axis=-1)[None],
        critic,
        critic_target,
    )
    return qc.State(None, net, flow)


@pytest.mark.parametrize("sign", [1, -1])
def test_online_critics_choose_and_target_critics_judge(sign):
    """Many samples of two actions: the best by +Q is (1, 1), by -Q it is (-1, -1)."""
    state = linear_state(critic=(sign, sign), critic_target=(10, 20))
    batch = qc.Chunks(
        observation=np.zeros((4, 1), np.float32),
        action=np.zeros((4, 2), np.float32),
        reward=np.float32([0, 1, 2, 3]),
        next_observation=np.zeros((4, 1), np.float32),
        termination=np.float32([0, 0, 1, 1]),
        valid=np.float32([[1, 1], [1, 0], [1, 1], [1, 0]]),
    )
    for q_agg, worth in (("mean", sign * 30.0), ("min", 20.0 if sign > 0 else -40.0)):
        cfg = qc.Config(horizon=2, num_samples=200, flow_steps=2, discount=0.5, q_agg=q_agg)
        loss, _, _ = critic_loss(state.critic.params, state, batch, jax.random.key(0), cfg)
        # Not known is what follows the second row alone. Q = 0.
        expected = ((0.5**2 * worth) ** 2 + 0 + 2**2 + 3**2) / 4
        np.testing.assert_allclose(loss, expected, rtol=1e-2)


# --- What the losses may depend on --------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{}, DISTILL], ids=str)
def test_termination_stops_the_bootstrap(overrides):
    cfg, state, key, data = setup(**overrides)

    def loss(**columns):
        rows = {name: np.full_like(getattr(data, name), x) for name, x in columns.items()}
        return critic_loss(state.critic.params, state, data._replace(**rows), key, cfg)[0]

    on, over = {"termination": 0, "valid": 1}, {"termination": 1}
    assert loss(**on) != loss(**on, next_observation=0.5)
    assert loss(**over) == loss(**over, next_observation=0.5) != loss(**on)
    assert loss(**over, valid=0) == loss(**over, valid=1) != loss(**over, reward=0.5)
    assert loss(termination=0, valid=0) == 0


READS = {
    ("critic", "best_of_n"): {"flow.params", "critic.params", "critic.target_params"},
    ("critic", "distill"): {"actor.params", "critic.target_params"},
    ("actor", "distill"): {"critic.params", "flow.params"},
    ("flow", "best_of_n"): set(),
}


@pytest.mark.parametrize(("name", "actor"), READS)
def test_losses_read_only_the_networks_they_should(name, actor):
    cfg, state, key, data = setup(actor=actor)
    other = nets.shaken(state, seed=4)
    function = {"critic": critic_loss, "actor": actor_loss, "flow": flow_loss}[name]
    params, found = getattr(state, name).params, set()
    here, _, grads = function(params, state, data, key, cfg)
    for net in state._fields:
        for kind in ("params", "target_params"):
            if hasattr(getattr(state, net), kind):
                changed = getattr(state, net).replace(**{kind: getattr(getattr(other, net), kind)})
                if function(params, state._replace(**{net: changed}), data, key, cfg)[0] != here:
                    found.add(f"{net}.{kind}")
    assert found == READS[name, actor]
    if name == "critic":  # the choice of the next chunk gives the critics no gradient
        batch = double(data)
        for direction in directions(double(params), 2):
            expected = slope(
                lambda p: numpy_critic_loss(p, state, batch, key, cfg)[0], double(params), direction
            )
            np.testing.assert_allclose(dot(grads, direction), expected, rtol=2e-3, atol=1e-3)


# --- Update -------------------------------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{}, DISTILL], ids=str)
def test_order_of_two_updates(overrides):
    """All gradients from the state before; the targets follow the critics before their step."""
    rates = {"actor_learning_rate": 0.02, "critic_learning_rate": 0.05, "target_rate": 0.3}
    cfg, state, key, data = setup(log_every=2, **rates, **overrides)
    cfg_here, here, _, _ = setup(**overrides)  # the same numbers, with the losses compiled already
    losses = {"critic": critic_loss, "actor": actor_loss, "flow": flow_loss}
    adam = {name: nets.Adam(0.05 if name == "critic" else 0.02) for name in losses}
    for step in (6, 7):
        batch, *keys = nets.sample(key, step, data, cfg, 4)
        after = {}
        for (name, loss), key_loss in zip(losses.items(), keys, strict=True):
            net = getattr(here, name)
            if net is not None:
                _, _, grads = loss(net.params, here, batch, key_loss, cfg_here)
                after[name] = net.replace(params=adam[name].step(net.params, grads))
        target = nets.polyak(here.critic.params, here.critic.target_params, 0.3)
        after["critic"] = after["critic"].replace(target_params=target)
        here = here._replace(**after)
    after, metrics = nets.train_chunk(qc, state, key, 6, data, cfg)
    assert (after.actor is None) == ("actor_loss" not in metrics) == (not overrides)
    for name in after._fields:
        if getattr(after, name) is not None:
            nets.check_close(getattr(after, name).params, getattr(here, name).params)
    nets.check_close(after.critic.target_params, here.critic.target_params)


# --- Policy -------------------------------------------------------------------------------------
class Recorder(runs.Endless):
    """Four steps of four numbers of action."""

    def __init__(self):
        super().__init__()
        self.actions = []

    def step(self, action):
        self.actions.append(np.array(action))
        self.position += np.float32(0.1)
        return self.position.copy(), 0.0, False, len(self.actions) % 7 == 0, {}


@pytest.mark.parametrize("overrides", [{}, DISTILL], ids=str)
def test_chunks_are_executed_open_loop_and_nothing_is_computed_meanwhile(overrides):
    """Episodes of 7 steps, chunks of 3: new ones at steps 0, 3 and 6, of that step's observation
    and key."""
    cfg, state, key, _ = setup(**overrides)
    params, calls = qc.policy_params(state), []
    net = state.flow.apply_fn

    def counted(*args):
        jax.debug.callback(lambda: calls.append(1), ordered=False)
        return net(*args)

    act = functools.partial(qc.policy, counted, apply_critics=state.critic.apply_fn, cfg=cfg)
    envs = []

    def make_env():
        envs.append(Recorder())
        return envs[-1]

    dataset = SimpleNamespace(make_env=make_env, horizon=7, score=lambda returns, rate: returns)
    memory = jnp.zeros((2, cfg.horizon, 2)), jnp.int32(0)
    sizes = SimpleNamespace(eval_episodes=2, eval_every=1, num_updates=1)
    policy_keys = jax.random.split(key, 2)
    two = jax.tree.map(lambda x: np.stack([x, -x]), params)
    with evaluation.Rollouts(
        dataset, act, jax.random.clone(policy_keys), sizes, memory
    ) as rollouts:
        rollouts.run(two, 4)  # makes the environments and tries them out
        jax.effects_barrier()
        calls.clear()
        for env in envs:
            env.actions.clear()
        rollouts.run(two, 5)
    jax.effects_barrier()
    steps = 1 if overrides else cfg.flow_steps
    assert len(calls) == 3 * 2 * steps  # replans, seeds, calls of a net
    for seed in (0, 1):
        here = jax.tree.map(lambda x, seed=seed: (x, -x)[seed], params)
        changed = {
            name: getattr(state, name).replace(params=x)
            for name, x in here._asdict().items()
            if x is not None
        }
        folded = jax.random.fold_in(jax.random.clone(policy_keys)[seed], 5)
        pair = envs[2 * seed : 2 * seed + 2]
        start = np.stack([runs.Endless().reset(seed=evaluation.EVAL_SEED + i)[0] for i in (0, 1)])
        for step in (0, 3, 6):
            observation = (start + np.float32(0.1) * step).astype(np.float64)
            step_key = jax.random.fold_in(jax.random.clone(folded), step)
            chunk, _ = numpy_chunk(state._replace(**changed), observation, step_key, cfg)
            made = np.stack([env.actions[step : step + 3] for env in pair])  # [2, 3 or 1, A]
            expected = chunk.reshape(2, 3, 2)[:, : made.shape[1]]
            np.testing.assert_allclose(made, expected, rtol=1e-3, atol=1e-4)


def test_what_acting_needs():
    _, state, _, _ = setup()
    assert state.actor is None
    expected = {"actor": None, "critic": state.critic.params, "flow": state.flow.params}
    assert qc.policy_params(state)._asdict() == expected
    _, state, _, _ = setup(**DISTILL)
    expected = {"actor": state.actor.params, "critic": None, "flow": None}
    assert qc.policy_params(state)._asdict() == expected


# --- Data ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("overrides", [{"reward_shift": -1.0}, {"sparse_reward": True}], ids=str)
def test_training_sees_chunks_of_changed_rewards(overrides, monkeypatch, tmp_path):
    raw = probes.random_transitions(20, termination=0, truncation=0)
    raw.reward[::2] = 0
    raw.action[0] = 1
    settings = {"horizon": 2, "discount": 0.5} | overrides
    state, data = nets.handed_over(qc, monkeypatch, tmp_path, raw, (2, 2), **settings)
    reward = raw.reward - 1 if "reward_shift" in overrides else -np.float32(raw.reward != 0)
    expected = reward + 0.5 * np.append(reward[1:], 0)
    expected[[9, 19]] = reward[[9, 19]]
    np.testing.assert_allclose(data.reward, expected, rtol=1e-6, atol=1e-6)
    assert data.action.shape == (20, 4) and np.abs(data.action).max() < 1
    assert data.valid[:, 1].sum() == 18
    assert state.flow.params["params"]["head"]["bias"].shape[-1] == 4


# --- Known answers ------------------------------------------------------------------------------
def test_values_of_chunks():
    """Q = (0.9, 1) of chunks that the end cuts, Q = 10 where 0.9^3 carries the rest."""
    settings = {"discount": 0.9, "target_rate": 0.05, "num_samples": 2}
    state = probes.train(qc, probes.two_steps(), 2000, **settings)
    for observation, value in ((1, 0.9), (-1, 1.0)):
        found = [probes.q(state, observation, [a, b, -a]) for a, b in ((0.5, -0.5), (-0.9, 0.3))]
        np.testing.assert_allclose(found, value, atol=0.03)
    state = probes.train(qc, probes.endless_reward(), 2000, **settings)
    np.testing.assert_allclose(probes.q(state, 1, [0.5, -0.5, 0.0]), 10, rtol=0.03)
