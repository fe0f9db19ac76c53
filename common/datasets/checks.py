# SPDX-License-Identifier: Apache-2.0
"""What is refused: recorded arrays, actions, observations and reference scores that cannot be used.

Each check returns the checked value, or exits with code 2 after one line on what is wrong.
"""

import numbers

import numpy as np

from common import envs, fail, one_line, told
from common.datasets import unreadable

# An action at most this far outside its bounds (-1 and 1 after scaling) is clipped.
TOLERANCE = 1e-3
# The square of a larger number, as in a standard deviation or a loss, is no float32.
LARGEST = 1e18
SMALLEST_CHOICE, LARGEST_CHOICE = -(2**31), 2**31 - 2  # of integer actions: int32, with its count


def rows(dataset_id, recorded):
    """Every array checked on its own, then their lengths and widths against each other."""
    checked = {name: _array(dataset_id, name, array) for name, array in recorded.items()}
    count = len(checked["rewards"])
    for name, array in checked.items():
        if len(array) != count:
            fail(f"{dataset_id}: {len(array)} rows of {name} but {count} of rewards")
    width = checked["observations"].shape[1]
    if "next_observations" in checked and checked["next_observations"].shape[1] != width:
        fail(f"{dataset_id}: next_observations and observations differ in width")
    return checked


def _array(dataset_id, name, array):
    """The array as float32, observations flat (actions may stay integers)."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim == 0:
        fail(f"{dataset_id}: {name} is not an array of numbers")
    if array.size == 0:
        fail(f"{dataset_id}: {name} is empty")
    if array.ndim == 2 and array.shape[1] == 1 and name in ("rewards", "terminals", "timeouts"):
        array = array[:, 0]
    if name in ("rewards", "terminals", "timeouts") and array.ndim != 1:
        fail(f"{dataset_id}: {name} has shape {list(array.shape)}, it must have 1 axis")
    if name == "actions" and array.dtype.kind in "iu":
        if array.min() < SMALLEST_CHOICE or array.max() > LARGEST_CHOICE:
            fail(
                f"{dataset_id}: integer actions {array.min()} to {array.max()} are no numbers of "
                "choices; number the actions from 0 on, or store continuous ones as floats"
            )
        return array.astype(np.int32)
    if not are_usable(array):
        _fail_in_row(dataset_id, name, array)
    array = np.ascontiguousarray(array, np.float32)
    return array.reshape(len(array), -1) if name.endswith("observations") else array


def are_usable(numbers) -> bool:
    """Whether numbers of data or of an env are finite, with squares that float32 can hold."""
    low, high = float(np.min(numbers)), float(np.max(numbers))  # NaN where one is
    return low >= -LARGEST and high <= LARGEST


def _fail_in_row(dataset_id, name, array):
    """Say which rows have numbers that cannot be used."""
    array = array.reshape(len(array), -1)
    bad = ~np.isfinite(array).all(axis=1)
    if bad.any():
        fail(
            f"{dataset_id}: {name} has NaN or inf in {bad.sum()} rows, first in row {bad.argmax()}"
        )
    huge = (np.abs(array) > LARGEST).any(axis=1)
    fail(
        f"{dataset_id}: {name} has numbers beyond {LARGEST:g} in {huge.sum()} rows, first in "
        f"row {huge.argmax()}: float32 cannot hold their squares; store them scaled down"
    )


def actions(dataset_id, action, env, bounds, recorded=None):
    """Actions in [-1, 1], or integers from 0 on.

    Args:
        action: as recorded.
        env: that the policy acts in, None if there is none.
        bounds: that the data give, where no space tells them.
        recorded: the action space of the recording, None where it is not known.

    Returns:
        The actions; the number of integer actions or None; the bounds of others or None.
    """
    space = recorded if env is None else envs.action_space(env)
    name = dataset_id if env is None else env.spec.id
    if why := None if space is None else envs.unusable_action(space):
        fail(f"{dataset_id}: {name} takes actions that no method here can give: {why}")
    if env is not None and recorded is not None:
        _same_actions(dataset_id, recorded, env)
    discrete = space is not None and not space.shape and space.dtype.kind == "i"
    if action.dtype.kind == "i" and (space is None or discrete):
        return *_discrete(dataset_id, action, space), None
    if discrete:
        takes = f"{name} takes {space.n} discrete ones; store them as integers"
        fail(f"{dataset_id}: continuous actions, but {takes}")
    action = action.astype(np.float32).reshape(len(action), -1)
    if space is not None and np.prod(space.shape, dtype=int) != action.shape[1]:
        fail(
            f"{dataset_id}: {action.shape[1]} action dimensions, {name} has {space.shape}; see "
            "--env"
        )
    unbounded = space is not None and not space.is_bounded()
    if space is None or (env is None and unbounded):
        low, high = _recorded_bounds(dataset_id, bounds, action.shape[1])
    else:
        low, high = space.low.reshape(-1), space.high.reshape(-1)
    _check_bounds(dataset_id, low, high, name if unbounded and env is not None else None)
    if env is not None and space is not env.action_space:  # there is a ClipAction in it
        beyond = ((action < low) | (action > high)).any(axis=1)
        if beyond.any():
            print(
                f"{dataset_id}: {beyond.mean():.1%} of the actions clipped, as its ClipAction did"
            )
        action = action.clip(low, high)
    return _scaled(dataset_id, action, low, high, env), None, (low, high)


def _discrete(dataset_id, action, space):
    """(integer actions from 0 on, how many there are)."""
    if action.size != len(action):
        fail(
            f"{dataset_id}: integer actions of shape {list(action.shape)}: there must "
            "be one number per row, [N]; store continuous actions as floats"
        )
    first = 0 if space is None else int(space.start)
    action = action.reshape(len(action))
    number = int(action.max()) + 1 if space is None else int(space.n)
    if space is None and action.min() < 0:
        fail(
            f"{dataset_id}: integer actions from {action.min()} on; number the actions from 0 on, "
            "or name the env by --env, whose action space tells the first one"
        )
    if action.min() < first or action.max() >= first + number:
        exist = f"only {number} exist" + (f", from {first} on" if first else "")
        fail(f"{dataset_id}: actions {action.min()} to {action.max()}, but {exist}")
    return action - first, number


def _check_bounds(dataset_id, low, high, env_id):
    """Exit with code 2 after one line where an action has no bound."""
    with np.errstate(over="ignore"):
        if np.isfinite(high - low).all():  # Bounds of 1e38 are none for float32.
            return
    if env_id is None:
        fail(
            f"{dataset_id}: the action space (Box) has no bounds; give finite attributes "
            "action_low and action_high, or neither"
        )
    fail(
        f"{dataset_id}: the action space (Box) of {env_id} has no bounds; wrap the env in "
        "gymnasium.wrappers.TransformAction with a bounded Box, register that and name it with "
        "--env"
    )


def _scaled(dataset_id, action, low, high, env):
    """Actions from their bounds to [-1, 1]."""
    scaled = action
    if (low != -1).any() or (high != 1).any():
        fixed = high == low
        scaled = 2 * (action - low) / np.where(fixed, 1, high - low) - 1
        scaled[:, fixed] += 1  # an action that has one value only is 0 then
    excess = np.abs(scaled).max(axis=1) - 1
    if excess.max() > TOLERANCE:
        row = excess.argmax()
        where = f"[{low.min():g}, {high.max():g}], "
        if env is not None:
            where += "the bounds of the env's action space"
            remedy = "; where the recording clipped them, name an env with "
            remedy += "gymnasium.wrappers.ClipAction by --env"
        else:
            where += "and nothing tells other bounds"
            where += " (--env, or attributes action_low and action_high)"
            remedy = ""
        fail(f"{dataset_id}: actions leave {where}; row {row}: {action[row].tolist()}{remedy}")
    if excess.max() > 0:
        print(f"{dataset_id}: actions leave their bounds by up to {excess.max():.1e}: clipped")
    return scaled.clip(-1, 1)


def _same_actions(dataset_id, recorded, env):
    """The actions of the recording must mean the same in the env."""
    space = envs.action_space(env)
    if type(recorded) is not type(space) or (
        hasattr(recorded, "n") and (recorded.n, recorded.start) != (space.n, space.start)
    ):
        fail(
            f"{dataset_id}: recorded with actions of {recorded}, but {env.spec.id} takes {space}; "
            "name an env with the same actions by --env"
        )
    if hasattr(recorded, "low") and recorded.is_bounded() and recorded.shape == space.shape:
        close = np.allclose(recorded.low, space.low), np.allclose(recorded.high, space.high)
        if not all(close) and space.is_bounded():
            print(
                f"{dataset_id}: recorded with actions of {recorded}, {env.spec.id} takes {space}; "
                "they are scaled by the env's bounds"
            )


def _recorded_bounds(dataset_id, bounds, size):
    """Bounds of the actions as the file's attributes give them; -1 and 1 without attributes."""
    low, high = (-1.0, 1.0) if bounds[0] is None and bounds[1] is None else bounds
    try:
        low = np.broadcast_to(np.asarray(low, np.float32), size)
        high = np.broadcast_to(np.asarray(high, np.float32), size)
        good = (low < high).all()
    except (TypeError, ValueError):
        good = False
    if not good:
        fail(
            f"{dataset_id}: attributes action_low {bounds[0]} and action_high {bounds[1]}: give "
            f"two numbers or arrays of {size}, each low below its high, or neither attribute"
        )
    return low, high


def observations(dataset_id, rows, env, source):
    """Exit with code 2 after one line where the env's observations are not those of the data.

    A file without spaces may hold the choices of a Discrete or MultiDiscrete env as they are. They
    are replaced by the columns that the env's observations become.
    """
    space, keys, env_id = env.observation_space, source.keys, env.spec.id
    width = rows["observations"].shape[1]
    _check_parts(dataset_id, space, keys, env_id)
    for key in keys or [None]:
        if what := envs.unusable(space if key is None else space[key]):
            fail(
                f"{dataset_id}: {env_id} gives an {what}, which has no fixed number of values; "
                "name an env without it by --env (gymnasium.wrappers.FilterObservation)"
            )
    recorded = source.observation_space
    if recorded is None and space.shape is not None and width == np.prod(space.shape, dtype=int):
        _mark_choices(dataset_id, rows, space, env_id)
        width = rows["observations"].shape[1]
    try:
        first, _ = env.reset(seed=0)
    except Exception as error:  # of the env
        fail(f"{dataset_id}: {env_id} cannot be reset ({told(error)}); see --env")
    try:
        given = envs.columns(space, keys)(first, 1).shape[1:]
    except (ValueError, TypeError, KeyError, IndexError) as error:
        fail(f"{dataset_id}: {env_id} gives observations that are not in {space} ({told(error)})")
    if given != (width,):
        shape = np.shape(source.rows["observations"])
        stored = f" (observations has shape {list(shape)})" if len(shape) != 2 else ""
        fail(
            f"{dataset_id}: {width} numbers per observation{stored}, {env_id} gives {given}; "
            "see --env"
        )
    if recorded is not None and envs.kinds(recorded, keys) != envs.kinds(space, keys):
        fail(
            f"{dataset_id}: recorded with observations of {recorded}, but {env_id} gives {space}; "
            "name an env with the same observations by --env"
        )


def _check_parts(dataset_id, space, keys, env_id):
    """The env gives a dict where the data have parts of one, and those parts."""
    parts = getattr(space, "spaces", None)
    parts = sorted(parts) if isinstance(parts, dict) else None
    if keys and not {*keys} <= {*(parts or ())}:
        what = f"only {', '.join(parts)}" if parts else f"{space}, which is no dict"
        fail(
            f"{dataset_id}: parts {', '.join(keys)} per observation, {env_id} gives {what}; name "
            "an env with those parts by --env"
        )
    if parts and not keys:
        fail(
            f"{dataset_id}: arrays as observations, {env_id} gives a dict or its parts "
            f"({', '.join(parts)}); name an env that flattens them as the recording did by --env "
            "(gymnasium.wrappers.FlattenObservation)"
        )


def _mark_choices(dataset_id, rows, space, env_id):
    """Replace the values of a Discrete or MultiDiscrete by one column per value."""
    if {kind for kind, _ in envs.kinds(space)} != {"one of"}:
        return
    columns = envs.columns(space)
    for name in {"observations", "next_observations"} & {*rows}:
        try:
            unreadable.check_memory(len(rows[name]), envs.width(space))
            rows[name] = columns(rows[name], len(rows[name]))
        except MemoryError as error:
            fail(f"{dataset_id}: {env_id} gives {space}, a column for each value ({error})")
        except ValueError as error:
            fail(f"{dataset_id}: {name}: {one_line(error)}: {env_id} gives {space}")


def reference(dataset_id, scores):
    """Both reference scores as numbers, the one for 0 below the one for 100, or neither."""
    if tuple(scores) == (None, None):
        return None, None
    good = all(isinstance(score, numbers.Real) and abs(score) < 1e300 for score in scores)
    if not good or scores[0] >= scores[1]:
        fail(
            f"{dataset_id}: reference scores {scores[0]!r} and {scores[1]!r}: give two finite "
            "numbers, ref_min_score below ref_max_score, or neither of them"
        )
    return float(scores[0]), float(scores[1])
