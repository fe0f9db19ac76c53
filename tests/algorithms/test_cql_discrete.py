# SPDX-License-Identifier: Apache-2.0
"""Discrete CQL's loss and update against NumPy in float64 and hand-worked numbers, and the one
action that no row shows."""

import functools

import helpers_runs as runs
import jax
import numpy as np
import numpy_nets as nets
import probes
import pytest
from numpy_nets import directions, dot, double, slope

from algorithms import cql_discrete

critic_loss = nets.compiled(cql_discrete.critic_loss)


def setup(**overrides):
    """Parameters for which the best action differs from row to row."""
    cfg, state, key, data = nets.setup(cql_discrete, probes.NUMBER, **overrides)
    return cfg, nets.shaken(state, seed=10), key, data


# --- The method in NumPy ------------------------------------------------------------------------
def errors(params, state, batch, cfg):
    """q - target of every row, and Q of every action."""
    q, online = (nets.mlp(params, x) for x in (batch.observation, batch.next_observation))
    target_q = nets.mlp(double(state.critic.target_params), batch.next_observation)
    found = []
    for i, action in enumerate(np.int32(batch.action)):
        target = batch.reward[i]
        if not batch.termination[i]:
            best = max(range(len(online[i])), key=lambda a, i=i: online[i, a])
            target += cfg.discount * target_q[i, best]
        found.append(q[i, action] - target)
    return np.array(found), q


def numpy_critic_loss(params, state, batch, cfg):
    """-> loss, TD error, mean Q of the data, gap"""
    error, q = errors(params, state, batch, cfg)
    size = np.abs(error)
    td_error = np.where(size <= 1, size**2 / 2, size - 0.5).mean()
    chosen = np.array([row[int(a)] for row, a in zip(q, batch.action, strict=True)])
    gap = np.mean(np.log(np.exp(q).sum(axis=-1)) - chosen)
    return td_error + cfg.alpha * gap, td_error, chosen.mean(), gap


VARIANTS = [
    {},
    {"alpha": 4.0, "discount": 0.7},
    {"alpha": 0.0},
    {"hidden": (8, 12, 16)},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_loss_equals_numpy(overrides):
    cfg, state, _, data = setup(**overrides)
    batch, params = double(data), double(state.critic.params)
    loss, metrics, _ = critic_loss(state.critic.params, state, data, cfg)
    expected, td_error, q, gap = numpy_critic_loss(params, state, batch, cfg)
    np.testing.assert_allclose([loss, metrics["critic_loss"]], expected, rtol=2e-5)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=2e-5)
    np.testing.assert_allclose(metrics["q"], q, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=2e-5)
    if not overrides:  # both parts of Huber's error, every action, and two minds on the best one
        size = np.abs(errors(params, state, batch, cfg)[0])
        assert 3 < (size < 1).sum() < 29 and {*np.int32(batch.action)} == {0, 1, 2}
        minds = params, double(state.critic.target_params)
        best = [nets.mlp(p, batch.next_observation).argmax(axis=-1) for p in minds]
        assert (best[0] != best[1]).sum() > 3


# --- By hand ------------------------------------------------------------------------------------
def linear_state(critic, target):
    """Q(s, a) = critic_a * s for s of one number."""
    create = cql_discrete.TrainState.create
    return cql_discrete.State(nets.linear_net(create, lambda p, s: p[None] * s, critic, target))


def test_critic_loss_by_hand():
    state = linear_state(np.log([1, 2, 5]), [8, 2, -4])
    batch = probes.integer_actions(
        probes.random_transitions(
            3,
            1,
            1,
            observation=[[1], [1], [-1]],
            action=[[-1], [0], [1]],  # actions 0, 1, 2
            reward=[10, 20, 30],
            next_observation=[[1], [-1], [1]],
            termination=[0, 0, 1],
        )
    )
    assert batch.action.tolist() == [0, 1, 2]
    # row                            1               2              3
    # best of log 1, 2, 5 times s'   action 2        action 0       not used: the end
    # its target Q                   -4              -8
    # target               10 - 2 = 8      20 - 4 = 16    30
    # Q                              0               log 2          -log 5
    # Huber of Q - target            7.5             15.5 - log 2   29.5 + log 5
    # log sum exp Q           log 8           log 8          log 1.7
    td_error = (7.5 + 15.5 - np.log(2) + 29.5 + np.log(5)) / 3
    gap = (np.log(8) + np.log(8) - np.log(2) + np.log(1.7) + np.log(5)) / 3
    cfg = cql_discrete.Config(discount=0.5, alpha=2.0)
    loss, metrics, _ = critic_loss(state.critic.params, state, batch, cfg)
    np.testing.assert_allclose(loss, td_error + 2 * gap, rtol=1e-5)
    np.testing.assert_allclose(metrics["td_error"], td_error, rtol=1e-5)
    np.testing.assert_allclose(metrics["conservative_gap"], gap, rtol=1e-5)
    # Small errors are squared: 0.5 * 0.6^2.
    state = linear_state([0.4, 0.4, 0.4], [0, 0, 0])
    batch = batch._replace(observation=np.ones((3, 1), np.float32), reward=np.ones(3, np.float32))
    _, metrics, _ = critic_loss(state.critic.params, state, batch, cql_discrete.Config())
    np.testing.assert_allclose(metrics["td_error"], 0.18, rtol=1e-5)


# --- What the loss may depend on ----------------------------------------------------------------
def test_termination_stops_the_bootstrap_and_truncation_does_not():
    cfg, state, _, data = setup()
    nets.check_bootstrap(lambda b: critic_loss(state.critic.params, state, b, cfg)[0], data)


def test_the_loss_reads_only_the_networks_it_should():
    cfg, state, _, data = setup()
    c, d = state.critic, nets.shaken(state, seed=4).critic

    def loss(params, critic, target):
        net = critic.replace(target_params=target.target_params)
        return critic_loss(params, state._replace(critic=net), data, cfg)[0]

    here = loss(c.params, c, c)
    assert loss(c.params, d, c) == here  # not state.critic.params
    assert loss(d.params, c, c) != here
    assert loss(c.params, c, d) != here


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_gradient_takes_the_target_as_a_number(alpha):
    cfg, state, _, data = setup(alpha=alpha)
    batch, params = double(data), double(state.critic.params)
    _, _, grads = critic_loss(state.critic.params, state, data, cfg)
    for direction in directions(params):
        expected = slope(lambda p: numpy_critic_loss(p, state, batch, cfg)[0], params, direction)
        np.testing.assert_allclose(dot(grads, direction), expected, rtol=1e-3, atol=1e-4)


# --- Networks -----------------------------------------------------------------------------------
def test_initial_parameters():
    critic = nets.fresh(cql_discrete, probes.NUMBER).critic
    nets.check_uniform_init(critic.params, (16, 64, 96, 3))
    nets.check_targets_are_copies(critic)


def test_the_policy_takes_the_best_action():
    _, state, key, data = setup()
    params = cql_discrete.policy_params(state)
    act = jax.jit(functools.partial(cql_discrete.policy, state.critic.apply_fn))
    action = act(params, data.observation, key)
    expected = nets.mlp(double(state.critic.params), double(data).observation).argmax(axis=-1)
    assert action.dtype == np.int32 and {*expected.tolist()} == {0, 1, 2}
    assert np.array_equal(action, expected)
    assert act(params, data.observation[0], jax.random.clone(key)) == expected[0]


# --- Update -------------------------------------------------------------------------------------
def test_order_of_updates_and_the_hard_copy():
    """A step of the critic, then, every third time, the new critic becomes the target."""
    cfg, state, key, data = setup(critic_learning_rate=0.05, target_every=3, log_every=1)
    _, here, _, _ = setup()  # the same numbers, with the loss compiled already
    adam, old = nets.Adam(0.05), state.critic.target_params
    for count in range(1, 8):
        batch = nets.sample(key, 5 + count, data, cfg, 1)[0]
        _, expected, grads = critic_loss(here.critic.params, here, batch, cfg)
        params = adam.step(here.critic.params, grads)
        here = here._replace(critic=here.critic.replace(params=params))
        if count in (3, 6):
            here = here._replace(critic=here.critic.replace(target_params=params))
        state, metrics = nets.train_chunk(cql_discrete, state, key, 5 + count, data, cfg)
        nets.check_close(state.critic.params, here.critic.params)
        if count < 3:
            nets.check_close(state.critic.target_params, old, 0, 0)
        nets.check_close(state.critic.target_params, here.critic.target_params)
        nets.check_close(metrics, expected)
    assert state.critic.step == 7


def test_learning_rate():
    _, state, _, _ = setup(critic_learning_rate=0.05)
    nets.check_rate(state.critic, lambda step: 0.05)


# --- The action that no row shows ---------------------------------------------------------------
def one_state_three_actions(seed, alpha, start=5.0):
    """Q [3] after learning from one endless state: action 0 costs 1, action 1 nothing, and action
    2, which is worst, never occurs. The network begins with a Q of `start` for it."""
    action = np.random.default_rng(seed).integers(0, 2, probes.COUNT).astype(np.int32)
    data = probes.one_state(reward=action - 1.0)._replace(action=action, next_action=action)
    numbers = {"alpha": alpha, "discount": 0.9}
    cfg = probes.config(cql_discrete, target_every=50, log_every=probes.CHUNK, alpha=None)
    state, key, data = probes.start(cql_discrete, data, cfg, seed)

    def raised(params):  # the bias of action 2
        layers = params["params"]
        bias = layers["Dense_2"]["bias"] + np.float32([0, 0, start])
        return {"params": layers | {"Dense_2": layers["Dense_2"] | {"bias": bias}}}

    nets_at = {name: raised(getattr(state.critic, name)) for name in ("params", "target_params")}
    state = state._replace(critic=state.critic.replace(**nets_at))
    for step in (0, probes.CHUNK):
        chunk = probes.compiled_chunk(cql_discrete.train_chunk)
        state, _ = chunk(state, key, step, data, numbers, cfg)
    return np.asarray(state.critic.apply_fn(state.critic.params, np.ones(1, np.float32)))


@pytest.mark.parametrize("seed", [0, 1])
def test_fitted_q_prefers_the_unseen_action_and_cql_does_not(seed):
    # In truth staying with action 1 is worth 0, with action 0 -10 and with action 2 less.
    q = one_state_three_actions(seed, alpha=0.0)
    assert q.argmax() == 2 and q[1] > 3, q  # what follows action 1 looks like action 2
    q = one_state_three_actions(seed, alpha=1.0)
    assert q.argmax() == 1 and q[1] < 0.5, q


def test_continuous_actions_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = runs.write_hdf5("data.hdf5")
    with pytest.raises(SystemExit) as leave:
        runs.start("cql_discrete", ["--dataset", data, *runs.TINY])
    (line,) = capsys.readouterr().err.splitlines()
    assert leave.value.code == 2
    told = "error: data.hdf5: continuous actions, but this method takes integer ones only; "
    assert line == told + "README's table of methods says which do not need integer actions"
    assert [path.name for path in tmp_path.iterdir()] == ["data.hdf5"]
