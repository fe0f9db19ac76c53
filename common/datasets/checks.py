# SPDX-License-Identifier: Apache-2.0
"""What is refused: recorded arrays, actions, observations and reference scores that cannot be used.

Each check returns the checked value, or exits with code 2 after one line on what is wrong.
"""

import numbers

import numpy as np

from common import envs, fail

# An action at most this far outside its bounds (-1 and 1 after scaling) is clipped.
TOLERANCE = 1e-3


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
    """The array as float32 (actions may stay integers)."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.ndim == 0:
        fail(f"{dataset_id}: {name} is not an array of numbers")
    if len(array) == 0:
        fail(f"{dataset_id}: {name} is empty")
    if array.ndim == 2 and array.shape[1] == 1 and name in ("rewards", "terminals", "timeouts"):
        array = array[:, 0]
    axes = 2 if name.endswith("observations") else 1
    if array.ndim != axes and not (name == "actions" and array.ndim == 2):
        fail(f"{dataset_id}: {name} has shape {list(array.shape)}, it must have {axes} axes")
    if name == "actions" and array.dtype.kind in "iu":
        return array.astype(np.int32)
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    bad = ~np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if bad.any():
        fail(
            f"{dataset_id}: {name} has NaN or inf in {bad.sum()} rows, first in row {bad.argmax()}"
        )
    return array


def actions(dataset_id, action, env, bounds):
    """-> (integer actions as they are, or others scaled from their bounds to [-1, 1]; the number of
    integer actions or None; the bounds or None)
    """
    space = None if env is None else env.action_space
    discrete = space is not None and hasattr(space, "n")
    if action.dtype.kind == "i" and (space is None or discrete):
        if action.size != len(action):
            fail(
                f"{dataset_id}: integer actions of shape {list(action.shape)}: there must "
                "be one number per row, [N]; store continuous actions as floats"
            )
        first = int(space.start) if discrete else 0
        action = action.reshape(len(action)) - first
        number = int(space.n) if discrete else int(action.max()) + 1
        if action.min() < 0 or action.max() >= number:
            fail(f"{dataset_id}: actions {action.min()} to {action.max()}, but only {number} exist")
        return action, number, None
    if discrete:
        takes = f"{env.spec.id} takes {space.n} discrete ones; store them as integers"
        fail(f"{dataset_id}: continuous actions, but {takes}")
    action = action.astype(np.float32).reshape(len(action), -1)
    if space is not None and space.shape != action.shape[1:]:
        fail(f"{dataset_id}: {action.shape[1]} action dimensions, {env.spec.id} has {space.shape}")
    if space is None:
        low, high = _recorded_bounds(dataset_id, bounds, action.shape[1])
    else:
        low, high = space.low, space.high
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        fail(f"{dataset_id}: the action space (Box) has no bounds; wrap the env in ClipAction")
    scaled = action
    if (low != -1).any() or (high != 1).any():
        scaled = 2 * (action - low) / (high - low) - 1
    excess = np.abs(scaled).max(axis=1) - 1
    if excess.max() > TOLERANCE:
        row = excess.argmax()
        where = f"[{low.min():g}, {high.max():g}], " + (
            "the bounds of the env's action space"
            if space
            else "and nothing tells other bounds (--env, or attributes action_low and action_high)"
        )
        fail(f"{dataset_id}: actions leave {where}; row {row}: {action[row].tolist()}")
    if excess.max() > 0:
        print(f"{dataset_id}: actions leave their bounds by up to {excess.max():.1e}: clipped")
    return scaled.clip(-1, 1), None, (low, high)


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


def observation(dataset_id, env, keys, size):
    """The env's observation has as many numbers as the data's."""
    first, _ = env.reset(seed=0)
    fits = isinstance(first, dict) == bool(keys)
    shape = envs.flatten(first, keys).shape if fits else "a dict or its parts"
    if shape != (size,):
        fail(
            f"{dataset_id}: {size} numbers per observation, {env.spec.id} gives {shape}; see --env"
        )


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
