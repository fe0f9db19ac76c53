# SPDX-License-Identifier: Apache-2.0
"""The rows of the online phase: those of the data set first, those of the envs behind them.

The arrays keep one shape, so that the program of the updates is compiled once. All seeds share the
rows of the data set. Behind them every seed has a part of its own, which fills up:

    data set, N rows | seed 0, C rows | seed 1, C rows | ...

An update draws from both together. A method that chooses how many of its rows come from where asks
for them apart and gets `Apart`. A method that learns from whole episodes says which rows they are.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from common.experiment.host_data import Column

# Random row numbers are drawn below this number and then reduced to the rows that are there: how
# many they are changes from step to step, and the length of an array cannot. It is so much larger
# than the number of rows that all rows are equally likely, to a share of rows / MANY.
MANY = 2**31 - 1


class Apart(NamedTuple):
    """Two trees of columns: the rows of the data set, and those that a seed has of its own."""

    recorded: Any
    own: Any


@struct.dataclass
class Buffer:
    """`rows`: tree of [N + S C, ...]. `filled`: rows that every seed has of its own, at most C."""

    rows: Any
    filled: Any
    recorded: int = struct.field(pytree_node=False)  # N
    capacity: int = struct.field(pytree_node=False)  # C
    apart: bool = struct.field(pytree_node=False, default=False)  # see `of_seed`
    spans: Any = None  # [S, 2]: the first row that is drawn and the row after the last; None: all

    def of_seed(self, index):
        """The tree of columns that `update` takes for the data set: the rows that a seed has.

        `len(column)` is MANY and `column[i]` is a row for every i below it. If `apart`, there are
        two such trees, see `Apart`.
        """
        own_start = self.recorded + index * self.capacity

        def either(array, number):
            first, end = 0, self.recorded + self.filled
            if self.spans is not None:
                first, end = self.spans[index]
            row = first + number % (end - first)
            is_recorded = row < self.recorded
            return array[jnp.where(is_recorded, row, row - self.recorded + own_start)]

        def recorded(array, number):
            return array[number % self.recorded]

        def own(array, number):
            return array[own_start + number % self.filled]

        def columns(read):
            return jax.tree.map(lambda x: Column(MANY, partial(read, x)), self.rows)

        if self.apart:
            return Apart(recorded=columns(recorded), own=columns(own))
        return columns(either)


def empty(data, seeds, capacity, apart=False):
    """A Buffer with the rows of a data set, which are on the device, and none of the envs yet."""

    def extended(column):
        room = jnp.zeros((seeds * capacity, *column.shape[1:]), column.dtype)
        return jnp.concatenate([jnp.asarray(column), room])

    rows = jax.jit(partial(jax.tree.map, extended))(data)
    recorded = len(jax.tree.leaves(data)[0])
    return Buffer(rows, np.int32(0), recorded, capacity, apart)


def write(buffer, new, first, skip=0):
    """The Buffer with `new`, [T, S, ...] in host memory, from row `first` of each seed's part on.

    They are then the last rows there. The memory of the Buffer that is passed in is reused. The
    first `skip` of the new rows, a number or one per seed, [S], leave the Buffer as it is.
    """
    steps, seeds = np.shape(jax.tree.leaves(new)[0])[:2]
    starts = buffer.recorded + buffer.capacity * np.arange(seeds)
    step = np.arange(steps)[:, None]
    nowhere = buffer.recorded + buffer.capacity * seeds  # behind all rows: nothing is written
    places = np.where(step < skip, nowhere, starts + first + step)  # [T, S]
    rows = _write(buffer.rows, new, places.astype(np.int32))
    return buffer.replace(rows=rows, filled=np.int32(first + steps))


@partial(jax.jit, donate_argnums=0)
def _write(columns, new, places):
    return jax.tree.map(lambda x, y: x.at[places].set(y.astype(x.dtype), mode="drop"), columns, new)
