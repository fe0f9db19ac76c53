# SPDX-License-Identifier: Apache-2.0
"""`--data host`: the data set stays in host memory, and the device gets the rows of one chunk.

Which rows an update reads depends on (key, step) alone, so the rows of a chunk are known before it
runs: `update` is traced with columns that only record the indices they are asked for, and
everything else is dropped. An `update` is refused that chooses rows by its State, as in prioritised
sampling, or by the values of other rows. While the device trains on one chunk, a thread gathers the
rows of the next one. Each row is gathered once, in the order of the data set, and the compiled
chunk finds it by binary search. The same draws read the same rows, so the numbers equal those of
`--data device`. A row that was not gathered, for a chunk that does not scan over `update`, is NaN,
which stops the run.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from common import fail


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
        chunk: (state, key, start, data) -> (state, metrics), which scans over `update`.
        state, keys: those of the first chunk, [S]; only the shapes of the state matter.
        data: tree of arrays [N, ...] in host memory.
        steps, end: updates per chunk, and in all.
    """

    def __init__(self, update, chunk, state, keys, data, steps, end):
        self.cpu = jax.local_devices(backend="cpu")[0]
        self.data, self.steps, self.end = data, steps, end
        self.keys = jax.device_put(keys, self.cpu)
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state)
        self.draw = _draws(update, state, data, steps, _calls(chunk, state, data, steps))
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


def _calls(chunk, state, data, steps):
    """How often a chunk calls `update`, which may make several of its steps at once."""

    def nothing(array, index):
        return jnp.zeros((*index.shape, *array.shape[1:]), array.dtype)

    columns = _columns(data, nothing)
    program = jax.make_jaxpr(lambda *x: chunk(*x, columns))(state, jax.random.key(0), np.int32(0))
    lengths = [x.params["length"] for x in program.eqns if x.primitive.name == "scan"]
    return lengths[0] if lengths else steps


def _columns(data, read):
    return jax.tree.map(lambda x: Column(len(x), partial(read, x)), data)


def _draws(update, state, data, steps, calls):
    """(keys [S], start) -> [S, calls of update, n] row numbers, compiled for the keys' device."""
    unknown = state, jax.ShapeDtypeStruct((), np.float32)  # stands for all values of rows

    def read_rows(unknown, key, step):
        """The numbers of the rows that a call of `update` reads, [n]."""
        state, value = unknown
        asked = {}

        def read(array, index):
            asked[id(index)] = index
            return jnp.full((*index.shape, *array.shape[1:]), value, array.dtype)

        with jax.disable_jit():  # loops within `update` are written out, so all reads are here
            update(state, step, key, _columns(data, read))
        return jnp.concatenate([index.ravel() for index in asked.values()])

    program = jax.make_jaxpr(read_rows)(unknown, jax.random.key(0), np.int32(0))
    sizes = jax.tree.leaves(unknown)
    of_one_step = jaxpr_as_fun(_needed(program, len(sizes), update.func.__name__))

    def of_one_seed(key, start):
        zeros = [jnp.zeros(x.shape, x.dtype) for x in sizes]  # nothing depends on them
        first_steps = start + jnp.arange(0, steps, steps // calls)
        (rows,) = jax.vmap(lambda step: of_one_step(*zeros, key, step))(first_steps)
        return rows

    return jax.jit(jax.vmap(of_one_seed, (0, None)))


def _needed(program, unknown, name):
    """A program without the steps that its result does not depend on.

    Exit with code 2 after one line where it depends on one of its first `unknown` inputs.
    """
    needed, kept = {*_variables(program.jaxpr.outvars)}, []
    for step in reversed(program.jaxpr.eqns):
        if needed & {*step.outvars}:
            needed |= {*_variables(step.invars)}
            kept.append(step)
    if needed & {*program.jaxpr.invars[:unknown]}:
        fail(
            f"--data host: {name} chooses rows by its State or by the values of other rows, so "
            "they are not known before it runs; use --data device"
        )
    return ClosedJaxpr(program.jaxpr.replace(eqns=kept[::-1]), program.consts)


def _variables(operands):
    return (x for x in operands if isinstance(x, Var))  # the others are numbers
