# SPDX-License-Identifier: Apache-2.0
"""`--data host`: the data set stays in host memory, and the device gets the rows of one chunk.

Which rows an update reads depends on (key, step) alone, so the rows of a chunk are known before it
runs: `update` is traced with columns that only record the indices they are asked for, and the
compiler drops everything else. While the device trains on one chunk, a thread gathers the rows of
the next one. Each row is gathered once, in the order of the data set, and the compiled chunk finds
it by binary search. The same draws read the same rows, so the numbers equal those of
`--data device`. An update of your own that chooses rows by its State asks for others than those
that were gathered: they are NaN, which stops the run.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Column:
    """Stands for an array [N, ...] of the data set. `len(column)` and `column[index]` work."""

    def __init__(self, count, read):
        self.count, self.read = count, read

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.read(index)


@struct.dataclass
class Rows:
    """Rows of a data set on the device. The numbers are sorted and padded with the last one."""

    ids: Any  # [M]
    arrays: Any  # tree of [M, ...]
    count: int = struct.field(pytree_node=False)  # rows in the whole data set

    def columns(self):
        """The tree of columns that `update` takes for the data set."""
        found = {}  # id of an index -> (index, places, found there): all columns get one index

        def read(array, index):
            if id(index) not in found:  # the index is kept, so that no other gets its id
                place = jnp.searchsorted(self.ids, index, method="scan_unrolled")
                found[id(index)] = index, place, self.ids[place] == index
            _, place, is_there = found[id(index)]
            rows = array[place]
            if not jnp.issubdtype(rows.dtype, jnp.floating):
                return rows
            is_there = is_there.reshape(*index.shape, *[1] * (rows.ndim - index.ndim))
            return jnp.where(is_there, rows, jnp.nan)

        return jax.tree.map(lambda x: Column(self.count, partial(read, x)), self.arrays)


class Feed:
    """The rows of every chunk, gathered ahead.

    Args:
        update: (state, step, key, data) -> (state, metrics) of one seed, a `partial` with its cfg.
        state, keys: those of the first chunk, [S]; only the shapes of the state matter.
        data: tree of arrays [N, ...] in host memory.
        steps, end: updates per chunk, and in all.
    """

    def __init__(self, update, state, keys, data, steps, end):
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.data, self.steps, self.end = data, steps, end
        self.keys = jax.device_put(keys, self.cpu)
        self.draw = _draws(update, jax.eval_shape(lambda: state), data, steps)
        self.pool, self.ahead = ThreadPoolExecutor(1), {}

    def __call__(self, start):
        """Rows of the chunk that begins with update `start`."""
        return self.ahead.pop(start)() if start in self.ahead else self._rows(start)

    def prepare(self, start):
        """Gather the rows of that chunk in a thread."""
        if start < self.end:
            self.ahead = {start: self.pool.submit(self._rows, start).result}

    def _rows(self, start):
        index = np.asarray(self.draw(self.keys, start)).ravel()
        ids = np.unique(index)
        # The same number for every chunk, or each would be compiled anew.
        size = min(len(index), len(jax.tree.leaves(self.data)[0]))
        ids = np.pad(ids, (0, size - len(ids)), mode="edge")
        arrays = jax.device_put(jax.tree.map(lambda x: x[ids], self.data))
        return Rows(jax.device_put(ids), arrays, len(jax.tree.leaves(self.data)[0]))


def fed(train, feed):
    """`train(state, keys, start, data)`, which gets the rows of the chunk in place of the data."""

    def one(state, keys, start, _):
        after = train(state, keys, start, feed(start))
        feed.prepare(start + feed.steps)  # while the device trains
        return after

    return one


def _draws(update, state, data, steps):
    """(keys [S], start) -> [S, calls of update, n] row numbers, compiled for the keys' device."""

    def of_one_step(key, step):
        asked = {}

        def read(array, index):
            asked[id(index)] = index
            return jnp.zeros((*index.shape, *array.shape[1:]), array.dtype)

        columns = jax.tree.map(lambda x: Column(len(x), partial(read, x)), data)
        update(jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), state), step, key, columns)
        return jnp.concatenate([index.ravel() for index in asked.values()])

    def of_one_seed(key, start):  # with a policy delay, one call of update is that many steps
        delay = getattr(update.keywords["cfg"], "policy_delay", 1)
        return jax.vmap(partial(of_one_step, key))(start + jnp.arange(0, steps, delay))

    return jax.jit(jax.vmap(of_one_seed, (0, None)))
