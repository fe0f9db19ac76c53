# SPDX-License-Identifier: Apache-2.0
"""Measure the updates/s of another JAX code base; `throughput.py --peers` runs this file.

It runs in the peer's own environment and imports nothing of this project. Its argument is JSON with
peer, folder (a clone of the peer's repository), algorithm, hidden, critic_hidden, batch_size,
updates, repeats, rows, observation and action. The last line that it prints is JSON with updates/s
and updates/CPU s, the best of the repeats, and the versions, or with the reason why there are none.

Every peer trains as its own main program does: its functions, its loop, its number of updates per
compiled call, on random data of the same shape. Updates are critic updates, as in our files. What
the peer imports but training does not use (d4rl, gym, wandb, pyrallis, tqdm) is replaced by an
empty module where it is not installed. Evaluation and logging are left out.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

import numpy as np

UNUSED = ("d4rl", "gym", "wandb", "pyrallis", "tqdm", "tqdm.auto")  # by training itself
REPLACED = ("pyrallis", "tqdm.auto")  # even where they are: `corl` sets what it calls of them
PACKAGES = ("jax", "flax", "optax")


class Refused(Exception):
    """The peer cannot train with these sizes."""


def random_rows(ask):
    """Random transitions in D4RL's layout, in episodes of 1000 steps."""
    generator, rows = np.random.default_rng(0), ask["rows"]
    timeouts = np.zeros(rows, np.float32)
    timeouts[999::1000] = 1
    return {
        "observations": generator.normal(size=(rows, ask["observation"])).astype(np.float32),
        "next_observations": generator.normal(size=(rows, ask["observation"])).astype(np.float32),
        "actions": generator.uniform(-1, 1, (rows, ask["action"])).astype(np.float32),
        "next_actions": generator.uniform(-1, 1, (rows, ask["action"])).astype(np.float32),
        "rewards": generator.normal(size=rows).astype(np.float32),
        "terminals": np.zeros(rows, np.float32),
        "timeouts": timeouts,
    }


def best_rates(step, ask, per_call=1):
    """(updates/s, updates per second of CPU time) of `step`, which makes per_call updates.

    A repeat is as many calls as make at least ask["updates"]; the first repeat, with compilation,
    is not timed.
    """
    import jax

    calls = -(-ask["updates"] // per_call)
    wall, cpu = [], []
    for _ in range(ask["repeats"] + 1):
        began, began_cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            result = step()
        jax.block_until_ready(result)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    count = calls * per_call
    return count / min(wall[1:]), count / min(cpu[1:])


def demand(ask, name, hidden, critic_hidden=None):
    """Raises Refused unless the widths are those that the peer has in its code."""
    asked = list(ask["hidden"]), list(ask["critic_hidden"])
    fixed = list(hidden), list(critic_hidden or hidden)
    if asked != fixed:
        raise Refused(f"{name} has the widths {fixed[0]} in its code, asked for are {asked[0]}")


# --- Peers --------------------------------------------------------------------------------------
def fql(ask):
    """seohongpark/fql: main.py samples a batch on the host and makes one jitted update."""
    from utils.datasets import Dataset

    agents = {"fql": "FQLAgent", "iql": "IQLAgent", "rebrac": "ReBRACAgent"}
    module = importlib.import_module(f"agents.{ask['algorithm']}")
    config = module.get_config()
    config.batch_size = ask["batch_size"]
    config.actor_hidden_dims = tuple(ask["hidden"])
    config.value_hidden_dims = tuple(ask["critic_hidden"])
    rows = random_rows(ask)
    fields = ("observations", "next_observations", "actions", "rewards")
    dataset = {key: rows[key] for key in fields}
    dataset |= {"masks": 1 - rows["terminals"], "terminals": rows["timeouts"]}
    dataset = Dataset.create(**dataset)
    rebrac = ask["algorithm"] == "rebrac"
    dataset.return_next_actions = rebrac
    example = dataset.sample(1)
    agent = getattr(module, agents[ask["algorithm"]]).create(
        0, example["observations"], example["actions"], config
    )
    count = 0

    def step():
        nonlocal agent, count
        count += 1
        more = {"full_update": count % config.actor_freq == 0} if rebrac else {}
        agent, _ = agent.update(dataset.sample(config.batch_size), **more)
        return agent.network.params

    return best_rates(step, ask)


def jax_corl(ask):
    """nissymori/JAX-CORL: eight updates per jitted call, data on the device."""
    import jax
    import jax.numpy as jnp

    name = {"td3_bc": "td3bc", "iql": "iql"}[ask["algorithm"]]
    if ask["hidden"] != ask["critic_hidden"]:
        raise Refused("JAX-CORL has one width for all networks")
    with mock.patch.object(sys, "argv", [f"{name}.py"]):  # the module parses the command line
        module = importlib.import_module(f"algos.{name}")
    classes = {"td3bc": ("TD3BCConfig", "TD3BC"), "iql": ("IQLConfig", "IQL")}[name]
    config = getattr(module, classes[0])(
        batch_size=ask["batch_size"], hidden_dims=tuple(ask["hidden"])
    )
    rows = random_rows(ask)
    values = {"dones": rows["terminals"], "dones_float": rows["timeouts"]} | rows
    values["masks"] = 1 - rows["terminals"]
    fields = module.Transition._fields
    dataset = module.Transition(**{key: jnp.asarray(values[key]) for key in fields})
    create = getattr(module, f"create_{name}_train_state")
    state = create(jax.random.PRNGKey(0), dataset.observations[0], dataset.actions[0], config)
    algorithm = getattr(module, classes[1])()
    update = jax.jit(algorithm.update_n_times, static_argnums=(3,))
    key = jax.random.PRNGKey(1)

    def step():
        nonlocal state, key
        key, subkey = jax.random.split(key)
        state, info = update(state, dataset, subkey, config)
        return info

    return best_rates(step, ask, config.n_jitted_updates)


def unifloral(ask):
    """EmptyJackson/unifloral: a scan over eval_interval updates, each with two of the critics."""
    import jax
    import jax.numpy as jnp

    name = ask["algorithm"]
    demand(ask, "Unifloral", (256,) * {"rebrac": 3, "td3_bc": 2}[name])
    module = importlib.import_module(f"algorithms.{name}")
    args = module.Args(batch_size=ask["batch_size"])
    rows = random_rows(ask)
    values = {
        "obs": rows["observations"],
        "action": rows["actions"],
        "reward": rows["rewards"],
        "next_obs": rows["next_observations"],
        "next_action": np.roll(rows["actions"], -1, axis=0),
        "done": rows["terminals"],
    }
    fields = module.Transition._fields
    dataset = module.Transition(**{key: jnp.asarray(values[key]) for key in fields})
    moments = dataset.obs.mean(axis=0), jnp.nan_to_num(dataset.obs.std(axis=0), nan=1.0)
    actor_more, critic_more = (), ()
    if name == "rebrac":
        actor_more, critic_more = (args.actor_ln, args.norm_obs), (args.critic_ln, args.norm_obs)
    actor = module.DeterministicTanhActor(ask["action"], *moments, *actor_more)
    critic = module.DualQNetwork(*moments, *critic_more)
    key, actor_key, critic_key = jax.random.split(jax.random.PRNGKey(0), 3)
    observation, action = jnp.zeros(ask["observation"]), jnp.zeros(ask["action"])
    make = module.create_train_state
    state = module.AgentTrainState(
        actor=make(args, actor_key, actor, [observation]),
        actor_target=make(args, actor_key, actor, [observation]),
        dual_q=make(args, critic_key, critic, [observation, action]),
        dual_q_target=make(args, critic_key, critic, [observation, action]),
    )
    train = module.make_train_step(args, actor.apply, critic.apply, dataset)
    per_update = getattr(args, "num_critic_updates_per_step", 2)
    length = -(-ask["updates"] // per_update)

    def step():
        nonlocal key, state
        (key, state), loss = jax.lax.scan(train, (key, state), None, length)
        return loss

    return best_rates(step, ask, per_update * length)


def corl(ask):
    """corl-team/CORL, algorithms/offline/rebrac.py: its own `train`, timed from epoch to epoch."""
    import jax

    if len(set(ask["hidden"])) > 1 or len(set(ask["critic_hidden"])) > 1:
        raise Refused("CORL has one width for all layers")
    if not hasattr(jax, "tree_map"):  # it was removed from JAX; CORL pins 0.4.1
        jax.tree_map = jax.tree.map
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    sys.modules["tqdm.auto"].trange = lambda count, **_: range(count)
    module = importlib.import_module("algorithms.offline.rebrac")
    config = module.Config(
        batch_size=ask["batch_size"],
        hidden_dim=ask["hidden"][0],
        actor_n_hiddens=len(ask["hidden"]),
        critic_n_hiddens=len(ask["critic_hidden"]),
        num_epochs=ask["repeats"] + 1,
        num_updates_on_epoch=ask["updates"],
    )
    rows, clocks = random_rows(ask), []

    def log(metrics):  # after every epoch; it has the metrics, so the updates are done
        if "ReBRAC/critic_loss" in metrics:
            clocks.append((time.perf_counter(), time.process_time()))

    module.wandb = mock.MagicMock(log=log)
    with (
        mock.patch.object(module, "qlearning_dataset", lambda *_: rows),
        mock.patch.object(module, "make_env", mock.MagicMock()),
        mock.patch.object(module, "wrap_env", mock.MagicMock()),
        mock.patch.object(module, "evaluate", lambda *_, **__: np.zeros(1)),
        mock.patch.object(module, "gym", mock.MagicMock()),
    ):
        module.train(config)
    wall, cpu = np.diff(np.array(clocks), axis=0).min(axis=0).tolist()
    return ask["updates"] / wall, ask["updates"] / cpu


DRIVERS = {"fql": fql, "jax_corl": jax_corl, "unifloral": unifloral, "corl": corl}


def replace_unused():
    """Empty modules for what the peers import at the top and training does not use."""
    for name in UNUSED:
        here = importlib.util.find_spec(name.split(".")[0])
        if here is None or name in REPLACED:
            module = mock.MagicMock(name=name)
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module


def main(ask):
    """Print the updates/s of one algorithm of a peer."""
    replace_unused()
    folder = Path(ask["folder"]).resolve()
    sys.path.insert(0, str(folder))
    try:
        wall, cpu = DRIVERS[ask["peer"]](ask)
        answer = {"updates/s": wall, "updates/CPU s": cpu}
    except Refused as reason:
        answer = {"refused": str(reason)}
    answer["versions"] = {name: metadata.version(name) for name in PACKAGES}
    print(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
