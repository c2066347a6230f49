"""Parameters between the matrices of a format and the devices that hold them, a strip of rows at a time.

Every format stores a Linear as [out, in]; ours are [in..., out...], stacked on L. Each strip of rows is read
once, converted, checked, turned, and laid into the parts of all devices of this process that want of it.
Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lct import sharding
from lct.models import llama
from lct.weights.tensors import ALL, FLOATS, check_dtype

STRIP = 64  # rows turned at a time: what is read stays in the cache until it is written
BLOCK = 2**24  # bytes of a file that a thread has mapped at a time
STAGED = 2**31  # bytes of one parameter that wait in host memory for their devices


def named_entries(config):
    """{our name: table entry} of the parameters that a config has, in the order of the table."""
    rows = jax.tree_util.tree_leaves_with_path(
        llama.table(config), is_leaf=lambda x: isinstance(x, llama.Entry))
    return {'.'.join(key.name for key in path): entry for path, entry in rows}


def their_letters(letters):
    """Our letters without L -> (letters of their output dims, of their input dims): 'DNH' -> ('NH', 'D').

    D is one side of every matrix. The embedding is a lookup, stored alike in both.
    """
    if letters in ('D', 'VD'):
        return letters, ''
    return (letters[1:], 'D') if letters[0] == 'D' else ('D', letters[:-1])


def their_shape(config, letters):
    """Shape of their tensor of one entry, without the layer."""
    size = llama.dims(config)
    out, inner = their_letters(letters.replace('L', ''))
    if not inner:
        return tuple(size[x] for x in out)
    return math.prod(size[x] for x in out), math.prod(size[x] for x in inner)


def as_ours(tensor, config, letters):
    """A view of their tensor [out, in] in our dims, e.g. [N * H, D] -> [D, N, H]; letters without L."""
    size = llama.dims(config)
    out, inner = their_letters(letters)
    theirs = out + inner
    return tensor.reshape([size[x] for x in theirs]).transpose([theirs.index(x) for x in letters])


def tensor_names(config, names):
    """{their name: (our name, layer or None)} of every tensor of a config, in the order of a file; names is
    a table ours -> theirs in which {} is the layer."""
    entries = named_entries(config)
    result = {
        names[name]: (name, None) for name, entry in entries.items() if not entry.letters.startswith('L')}
    for layer, (name, entry) in itertools.product(range(config.num_layers), entries.items()):
        if entry.letters.startswith('L'):
            result[names[name].format(layer)] = (name, layer)
    return result


def their_shapes(config, names):
    """{their name: shape} of every tensor of a config."""
    entries = named_entries(config)
    return {
        theirs: their_shape(config, entries[name].letters)
        for theirs, (name, _) in tensor_names(config, names).items()
    }


def _rectangle(config, letters, index):
    """The (rows, cols) of their tensor that an index, slices over our dims without L, speaks of."""
    size = llama.dims(config)
    out, inner = their_letters(letters)
    if not inner:
        out, inner = out[:1], out[1:]
    sides = []
    for side in (out, inner):
        part = index[letters.index(side[0])] if side else ALL
        width = math.prod(size[x] for x in side[1:])  # the dims of one head are never apart
        start, stop, _ = part.indices(size[side[0]] if side else 1)
        sides.append(slice(start * width, stop * width))
    return tuple(sides)


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def check_mesh(config):
    """Refuse a current mesh over which the parameters do not divide."""
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        llama.check_mesh(config, [mesh.shape[name] for name in sharding.AXES])


def wanted_dtype(dtype, matrices, folder):
    """The numpy dtype to load: the one asked for, or if that is None the one dtype of all matrices."""
    stored = sorted({piece.dtype for matrix in matrices.values() for piece in matrix.pieces})
    if dtype is None:
        if len(stored) > 1:
            raise ValueError(f'{folder} mixes the dtypes {", ".join(stored)}; pass the dtype that is wanted')
        return FLOATS[stored[0]]
    try:
        name = jnp.dtype(dtype).name
    except TypeError:  # no name of a dtype at all
        name = dtype
    check_dtype(name, 'of weights')
    return np.dtype(jnp.dtype(name))


def load(config, dtype, matrices):
    """Params on the current mesh, of {(our name, layer or None): Matrix}.

    A process reads what its own devices keep and holds no more than that and a strip: the buffers that are
    filled become the arrays of CPU devices, and other devices are sent at most STAGED bytes at a time.
    """
    leaves, tree = jax.tree.flatten(llama.abstract(config, dtype))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = []
        for (name, entry), target in zip(named_entries(config).items(), leaves, strict=True):
            stacked = entry.letters.startswith('L')
            layers = [matrices[name, i] for i in (range(config.num_layers) if stacked else [None])]
            arrays.append(_load_one(pool, config, entry.letters, target, layers))
    return jax.tree.unflatten(tree, arrays)


def _load_one(pool, config, letters, target, layers):
    """One parameter of the matrices of its layers, a few layers at a time if all would be too many bytes."""
    if not letters.startswith('L'):
        return _stage(pool, config, letters, target, layers)
    shard = target.shape if target.sharding is None else target.sharding.shard_shape(target.shape)
    parts = len(_parts(target))
    count = max(1, STAGED // (parts * math.prod(shard[1:]) * target.dtype.itemsize))
    if count >= len(layers):
        return _stage(pool, config, letters, target, layers)
    whole = jax.jit(lambda: jnp.zeros(target.shape, target.dtype), out_shardings=target.sharding)()
    for i in range(0, len(layers), count):
        some = layers[i:i + count]
        few = jax.ShapeDtypeStruct((len(some), *target.shape[1:]), target.dtype, sharding=target.sharding)
        whole = _put_layers(whole, _stage(pool, config, letters, few, some), i).block_until_ready()
    return whole


@functools.partial(jax.jit, donate_argnums=0)
def _put_layers(whole, layers, start):
    return lax.dynamic_update_slice_in_dim(whole, layers, start, 0)


def _parts(target):
    """{index as numbers: (index, devices)} of the different parts that this process holds; device None is the
    default one."""
    if target.sharding is None:
        places = {None: (ALL,) * len(target.shape)}
    else:
        places = target.sharding.addressable_devices_indices_map(target.shape)
    parts = {}
    for device, index in places.items():
        key = tuple(part.indices(n)[:2] for part, n in zip(index, target.shape))
        parts.setdefault(key, (index, []))[1].append(device)
    return parts


def _stage(pool, config, letters, target, layers):
    """The array of target, filled from its matrices: one, or one a layer."""
    stacked = letters.startswith('L')
    parts, filled = _parts(target), {}
    for key, (index, _) in parts.items():
        buffer = _aligned([stop - start for start, stop in key], target.dtype)
        filled[key] = (_rectangle(config, letters[stacked:], index[stacked:]), buffer)
    turned = bool(their_letters(letters[stacked:])[1])
    by_rows = {}
    for (rows, cols), buffer in filled.values():
        for i, part in enumerate(buffer if stacked else [buffer]):
            size = cols.stop - cols.start
            view = part if part.ndim == 1 else part.reshape(size, -1).T if turned else part.reshape(-1, size)
            by_rows.setdefault((i, rows.start, rows.stop), []).append((cols, view))
    tasks = [
        pool.submit(_fill, layers[i], start, slice(a, min(a + step, stop)), views)
        for (i, start, stop), views in by_rows.items()
        for step in [_block_rows(layers[i])] for a in range(start, stop, step)
    ]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
    if target.sharding is None:
        return jnp.asarray(next(iter(filled.values()))[1])
    arrays = [jax.device_put(filled[key][1], device) for key, (_, devices) in parts.items() for device in devices]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays)


def _aligned(shape, dtype):
    """An empty array that a CPU device can take for its own without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start:start + nbytes].view(dtype).reshape(shape)


def _block_rows(matrix):
    """Rows of a matrix that make about BLOCK bytes, in whole strips."""
    return STRIP * max(1, BLOCK // (STRIP * 4 * math.prod(matrix.shape[1:])))


def _fill(matrix, start, rows, views):
    """Lay rows of a matrix into views [out, in] whose first row is `start`: [(cols of the matrix, view)]."""
    first = min(cols.start for cols, _ in views)
    block = matrix.read(rows, slice(first, max(cols.stop for cols, _ in views)))
    dtype = views[0][1].dtype
    if block.ndim == 1:
        with np.errstate(over='ignore'):  # reported by the check
            values = block.astype(dtype)
        _check_finite(values, block, matrix)
        for _, view in views:
            view[rows.start - start:rows.stop - start] = values
        return
    # Fresh memory for every strip would cost more than the rest; a row length that is a power of two would map a
    # column of the strip onto a few lines of the cache.
    width = block.shape[1]
    strip = np.empty((STRIP, width + 32), dtype)
    scratch = np.empty((STRIP, width), EXPONENTS[dtype.name].dtype)
    for at in range(0, len(block), STRIP):
        theirs = block[at:at + STRIP]
        values = strip[:len(theirs), :width]
        with np.errstate(over='ignore'):  # reported by the check
            values[...] = theirs
        _check_finite(values, theirs, matrix, scratch[:len(theirs)])
        out = slice(rows.start + at - start, rows.start + at - start + len(theirs))
        for cols, view in views:
            view.T[:, out] = values.T[cols.start - first:cols.stop - first]


EXPONENTS = {  # the bits that are all set in infinities and not-a-numbers alone
    'float32': np.uint32(0x7F800000), 'float16': np.uint16(0x7C00), 'bfloat16': np.uint16(0x7F80),
}


def _check_finite(values, theirs, matrix, scratch=None):
    """Refuse values, converted from theirs, unless all are finite; many times faster than np.isfinite."""
    mask = EXPONENTS[values.dtype.name]
    bits = values.view(mask.dtype)
    if np.bitwise_and(bits, mask, out=scratch).max() == mask:
        raise ValueError(
            f'{matrix.where} has values that are not finite in {values.dtype.name}; '
            + ('load it in a wider dtype' if np.isfinite(theirs).all() else 'the weights are damaged'))


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def check_params(config, params):
    """Refuse params that are not those of the config, or not all in this process."""
    leaves = _named_leaves(params)
    size, entries = llama.dims(config), named_entries(config)
    if set(leaves) != set(entries):
        odd = sorted(set(leaves) ^ set(entries))
        raise ValueError(f'params and config disagree about {", ".join(odd)}; pass the params\' own config')
    for name, entry in entries.items():
        shape = tuple(size[x] for x in entry.letters)
        if leaves[name].shape != shape:
            raise ValueError(f'params.{name} has shape {leaves[name].shape}; the config asks for {shape}')
        if isinstance(leaves[name], jax.Array) and not leaves[name].is_fully_addressable:
            raise ValueError(
                f'params.{name} is spread over several processes; gather it or restore the checkpoint in one '
                'process to save it')


def _named_leaves(params):
    return {
        '.'.join(key.name for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def save(config, params, matrices):
    """Write params, device by device, into {(our name, layer or None): Matrix of writable arrays}."""
    for name, leaf in _named_leaves(params).items():
        letters = named_entries(config)[name].letters
        shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else None
        if shards is None:
            parts = [((ALL,) * leaf.ndim, leaf)]
        else:
            parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]
        for index, data in parts:
            data = np.asarray(data)
            if not letters.startswith('L'):
                _write(matrices[name, None], config, letters, index, data, name)
                continue
            for i, layer in enumerate(range(config.num_layers)[index[0]]):
                _write(matrices[name, layer], config, letters[1:], index[1:], data[i], f'{name}[{layer}]')


def _write(matrix, config, letters, index, data, name):
    dtype = matrix.pieces[0].dtype
    with np.errstate(over='ignore'):  # reported below
        values = data.astype(dtype)
    if not np.isfinite(values).all():
        raise ValueError(f'params.{name} has values that are not finite in {dtype.name}; nothing was saved')
    rows, cols = _rectangle(config, letters, index)
    if not their_letters(letters)[1]:
        matrix.write(rows, cols, values)
        return
    values = values.reshape(cols.stop - cols.start, -1)  # [in, out]: turned by whole heads, a strip at a time
    step = -(-STRIP // (matrix.head_dim or 1)) * (matrix.head_dim or 1)
    strip = np.empty((len(values), step + 16), dtype)  # as in _fill
    for at in range(0, values.shape[1], step):
        some = strip[:, :min(step, values.shape[1] - at)]
        some[...] = values[:, at:at + step]
        matrix.write(slice(rows.start + at, rows.start + at + some.shape[1]), cols, some.T)
