"""Copies parameters between the matrices of a checkpoint and the devices that hold them.

Each strip of rows is read once, converted, checked, transposed, and written to every device buffer of this
process that needs it.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lct import sharding
from lct.models import llama
from lct.models.llama import LlamaConfig, Params
from lct.weights.mapping import checkpoint_letters, is_transposed, parameter_table, rectangle
from lct.weights.tensors import ALL, FLOATS, Matrix, check_dtype

STRIP = 64  # rows transposed at a time: what is read stays in the cache until it is written
BLOCK = 2**24  # bytes of a file that a thread has mapped at a time
STAGED = 2**31  # bytes of one parameter that wait in host memory for their devices

Matrices = dict[tuple[str, int | None], Matrix]  # {(parameter name, layer or None): its matrix}


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def check_mesh(config: LlamaConfig) -> None:
    """Refuse a current mesh over which the parameters do not divide."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        llama.check_mesh(config, [mesh.shape[name] for name in sharding.AXES])


def resolve_dtype(dtype: Any, matrices: Matrices, folder: str | os.PathLike) -> np.dtype:
    """The numpy dtype to load: dtype, or for None the common dtype of all matrices of the folder."""
    stored = sorted({shard.dtype for matrix in matrices.values() for shard in matrix.shards})
    if dtype is None:
        if len(stored) > 1:
            raise ValueError(f'{folder} mixes the dtypes {", ".join(stored)}; pass the dtype to load')
        return FLOATS[stored[0]]
    try:
        name = jnp.dtype(dtype).name
    except TypeError:  # not the name of any dtype
        name = dtype
    check_dtype(name)
    return np.dtype(jnp.dtype(name))


def load(config: LlamaConfig, dtype: np.dtype, matrices: Matrices,
         convert: Callable[[str, jax.Array], Any] | None = None) -> Params:
    """Params on the current mesh, read from their matrices.

    convert: (name, such as 'wq', parameter) -> what takes its place before the next one is read.

    A process reads only what its own devices keep and holds no more than that and a strip: the buffers become
    the arrays of CPU devices, and other devices are sent at most STAGED bytes at a time.
    """
    leaves, tree = jax.tree.flatten(llama.abstract(config, dtype))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = []
        for (name, entry), target in zip(parameter_table(config).items(), leaves, strict=True):
            stacked = entry.letters.startswith('L')
            layers = [matrices[name, i] for i in (range(config.num_layers) if stacked else [None])]
            array = _load_parameter(pool, config, entry.letters, target, layers)
            arrays.append(convert(name.rpartition('.')[2], array) if convert else array)
    return jax.tree.unflatten(tree, arrays)


def _load_parameter(pool, config, letters, target, layers):
    """One parameter from the matrices of its layers, as many at a time as fit into STAGED bytes."""
    if not letters.startswith('L'):
        return _stage(pool, config, letters, target, layers)
    shard = target.shape if target.sharding is None else target.sharding.shard_shape(target.shape)
    nbytes_of_layer = len(_local_shards(target)) * math.prod(shard[1:]) * target.dtype.itemsize
    count = max(1, STAGED // nbytes_of_layer)
    if count >= len(layers):
        return _stage(pool, config, letters, target, layers)
    stack = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)()
    for i in range(0, len(layers), count):
        some = layers[i:i + count]
        few = jax.ShapeDtypeStruct((len(some), *target.shape[1:]), target.dtype, sharding=target.sharding)
        stack = _put_layers(stack, _stage(pool, config, letters, few, some), i).block_until_ready()
    return stack


@functools.partial(jax.jit, donate_argnums=0)
def _put_layers(stack, layers, start):
    return lax.dynamic_update_slice_in_dim(stack, layers, start, 0)


def _local_shards(target):
    """{((start, stop) of each dim): (index, devices)} of the distinct shards of this process.

    A device of None is the default one.
    """
    if target.sharding is None:
        indices = {None: (ALL,) * len(target.shape)}
    else:
        indices = target.sharding.addressable_devices_indices_map(target.shape)
    shards = {}
    for device, index in indices.items():
        key = tuple(one.indices(n)[:2] for one, n in zip(index, target.shape))
        shards.setdefault(key, (index, []))[1].append(device)
    return shards


def _stage(pool, config, letters, target, layers):
    """The array for target, read from its matrices: one matrix, or one for each layer."""
    shards = _local_shards(target)
    buffers = {key: _aligned([stop - start for start, stop in key], target.dtype) for key in shards}
    _read_all(pool, layers, _destinations(config, letters, shards, buffers))
    if target.sharding is None:
        return jax.device_put(next(iter(buffers.values())))
    arrays = [
        jax.device_put(buffers[key], device) for key, (_, devices) in shards.items() for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _destinations(config, letters, shards, buffers):
    """{(layer index, first row, end row): [(cols of the matrix, view [out, in] of a buffer)]}: buffers that
    need the same rows are filled by one read."""
    stacked = letters.startswith('L')
    is_vector, transposed = not checkpoint_letters(letters[stacked:])[1], is_transposed(letters[stacked:])
    result = {}
    for key, (index, _) in shards.items():
        rows, cols = rectangle(config, letters[stacked:], index[stacked:])
        width = cols.stop - cols.start
        for i, layer in enumerate(buffers[key] if stacked else [buffers[key]]):
            if is_vector:
                view = layer.reshape(-1)
            else:
                view = layer.reshape(width, -1).T if transposed else layer.reshape(-1, width)
            result.setdefault((i, rows.start, rows.stop), []).append((cols, view))
    return result


def _read_all(pool, layers, destinations):
    """Fill all destinations, in blocks of rows that the threads of the pool take in turn."""
    tasks = [
        pool.submit(_fill, layers[i], first, slice(start, min(start + step, stop)), views)
        for (i, first, stop), views in destinations.items()
        for step in [_block_rows(layers[i])] for start in range(first, stop, step)
    ]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _aligned(shape, dtype):
    """An empty array that a CPU device can adopt without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def _block_rows(matrix):
    """Rows of a matrix that take about BLOCK bytes, a multiple of STRIP."""
    return STRIP * max(1, BLOCK // (STRIP * 4 * math.prod(matrix.shape[1:])))


def _fill(matrix, first_row, rows, views):
    """Copy rows of a matrix into views [out, in] that begin at first_row: [(cols of the matrix, view)]."""
    first_col = min(cols.start for cols, _ in views)
    block = matrix.read(rows, slice(first_col, max(cols.stop for cols, _ in views)))
    dtype = views[0][1].dtype
    if block.ndim == 1:
        with np.errstate(over='ignore'):  # reported by the check
            values = block.astype(dtype)
        _check_finite(values, block, matrix)
        for _, view in views:
            view[rows.start - first_row:rows.stop - first_row] = values
        return
    # Fresh memory for every strip would cost more than the copies. A row length that is a power of two would
    # map a column of the strip onto a few lines of the cache.
    width = block.shape[1]
    strip = np.empty((STRIP, width + 32), dtype)
    scratch = np.empty((STRIP, width), EXPONENTS[dtype.name].dtype)
    for start in range(0, len(block), STRIP):
        stored = block[start:start + STRIP]
        values = strip[:len(stored), :width]
        with np.errstate(over='ignore'):  # reported by the check
            values[...] = stored
        _check_finite(values, stored, matrix, scratch[:len(stored)])
        out = slice(rows.start + start - first_row, rows.start + start - first_row + len(stored))
        for cols, view in views:
            view.T[:, out] = values.T[cols.start - first_col:cols.stop - first_col]


EXPONENTS = {  # the bits that are all set only in infinities and NaNs
    'float32': np.uint32(0x7F800000), 'float16': np.uint16(0x7C00), 'bfloat16': np.uint16(0x7F80),
}


def _check_finite(values, stored, matrix, scratch=None):
    """Refuse values, converted from the stored ones, unless all are finite.

    This is many times faster than np.isfinite.
    """
    mask = EXPONENTS[values.dtype.name]
    bits = values.view(mask.dtype)
    if np.bitwise_and(bits, mask, out=scratch).max() == mask:
        remedy = 'load it in a wider dtype' if np.isfinite(stored).all() else 'the weights are damaged'
        raise ValueError(
            f'{matrix.location} has values that are not finite in {values.dtype.name}; {remedy}')


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def check_params(config: LlamaConfig, params: Params) -> None:
    """Refuse params that do not belong to the config, or are not all in this process."""
    leaves = _named_leaves(params)
    size, entries = llama.dims(config), parameter_table(config)
    if set(leaves) != set(entries):
        differing = sorted(set(leaves) ^ set(entries))
        raise ValueError(
            f'params and config disagree about {", ".join(differing)}; pass the params\' own config')
    for name, entry in entries.items():
        shape = tuple(size[x] for x in entry.letters)
        if leaves[name].shape != shape:
            raise ValueError(
                f'params.{name} has shape {leaves[name].shape} but the config requires {shape}; pass the '
                "params' own config")
        if isinstance(leaves[name], jax.Array) and not leaves[name].is_fully_addressable:
            raise ValueError(
                f'params.{name} is sharded over several processes; gather it or restore the checkpoint in '
                'one process to save it')


def _named_leaves(params):
    return {
        '.'.join(key.name for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def save(config: LlamaConfig, params: Params, matrices: Matrices) -> None:
    """Write params, shard by shard, to matrices of writable arrays.

    Raises:
      ValueError: if a value is not finite in the dtype of the arrays.
    """
    table = parameter_table(config)
    for name, leaf in _named_leaves(params).items():
        letters = table[name].letters
        for index, data in _distinct_shards(leaf):
            data = np.asarray(data)
            if not letters.startswith('L'):
                _write(matrices[name, None], config, letters, index, data, name)
                continue
            for i, layer in enumerate(range(config.num_layers)[index[0]]):
                _write(matrices[name, layer], config, letters[1:], index[1:], data[i], f'{name}[{layer}]')


def _distinct_shards(leaf) -> Iterator[tuple[tuple[slice, ...], Any]]:
    """(index, data) of the shards of an array, each once."""
    if not isinstance(leaf, jax.Array):
        yield (ALL,) * leaf.ndim, leaf
        return
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield shard.index, shard.data


def _write(matrix, config, letters, index, data, name):
    """Write the data at an index of one layer; letters and index without L."""
    dtype = matrix.shards[0].dtype
    with np.errstate(over='ignore'):  # reported below
        values = data.astype(dtype)
    if not np.isfinite(values).all():
        remedy = 'save in a wider dtype' if np.isfinite(data).all() else 'the parameters are damaged'
        raise ValueError(
            f'params.{name} has values that are not finite in {dtype.name}; nothing was saved, {remedy}')
    rows, cols = rectangle(config, letters, index)
    if not is_transposed(letters):
        matrix.write(rows, cols, values if checkpoint_letters(letters)[1] else values.reshape(-1))
        return
    values = values.reshape(cols.stop - cols.start, -1)  # [in, out]: transposed in strips of complete heads
    step = -(-STRIP // (matrix.head_dim or 1)) * (matrix.head_dim or 1)
    strip = np.empty((len(values), step + 16), dtype)  # padded as in _fill
    for start in range(0, values.shape[1], step):
        some = strip[:, :min(step, values.shape[1] - start)]
        some[...] = values[:, start:start + step]
        matrix.write(slice(rows.start + start, rows.start + start + some.shape[1]), cols, some.T)
