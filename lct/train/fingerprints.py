"""Fingerprints of arrays: 32 bits that are the same on every mesh and for every number of processes.

Orbax restores a flipped bit of an array without an error; a fingerprint stored beside the array finds it.
"""

import functools
import json
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lct.models import offload

COLUMNS, ROWS = 512, 4  # of the blocks that a CPU adds up
UNROLLED = 4  # blocks of one iteration
CHECKSUM = 'checksum'


def describe(tree: Any) -> dict[str, dict]:
    """{name: {dtype, shape}} of the arrays of a tree, or of its ShapeDtypeStructs. The name of an array is
    its path in the tree, such as 'params.layers.wq'."""
    return {name_of(path): {'dtype': jnp.dtype(x.dtype).name, 'shape': list(x.shape)}
            for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def named_leaves(tree: Any) -> dict[str, Any]:
    """{name: leaf} of a tree, in its order."""
    return {name_of(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def describe_bits(tree: Any) -> dict[str, dict]:
    """{name: {dtype, shape, fingerprint}} of the arrays of a tree, for check()."""
    values = fingerprints(tree)
    return {name: {**entry, 'fingerprint': values[name]} for name, entry in describe(tree).items()}


def check(tree: Any, expected: Mapping[str, Mapping], name: object = 'it') -> None:
    """Compare the arrays of a tree with an earlier describe_bits.

    Raises:
      ValueError: naming the first array that differs.
    """
    found = describe_bits(tree)
    changed = [key for key in expected if found.get(key) != expected[key]]
    if changed:
        more = f' and {len(changed) - 1} more arrays differ from their fingerprints'
        raise ValueError(f'{name} is not what was written: array {changed[0]}'
                         + (more if changed[1:] else ' differs from its fingerprint'))


def fingerprints(tree: Any) -> dict[str, str]:
    """{name: fingerprint, eight hexadecimal digits} of the arrays of a tree.

    The sum, modulo 2**32, over all elements of their bits times a hash of their global index. It changes with
    any change of one element; a change of several is missed once in 2**32. Each device reads its own shards
    and they exchange one number per array.
    """
    leaves = named_leaves(tree)
    on_host = {name: x for name, x in leaves.items() if offload.is_on_host(x)}
    sums = _sums({name: x for name, x in leaves.items() if name not in on_host})
    for name, x in on_host.items():  # one at a time is on the device
        sums |= _sums({name: offload.onto_device(x)})
    return {name: f'{int(sums[name]):08x}' for name in leaves}


def _sums(arrays):
    """{name: fingerprint} of arrays on the devices."""
    shardings = tuple(getattr(x, 'sharding', None) for x in arrays.values())
    return dict(zip(arrays, jax.device_get(_fingerprints(list(arrays.values()), shardings)), strict=True))


def differences(found: Mapping[str, Mapping], wanted: Mapping[str, Mapping], most: int = 4) -> str:
    """The arrays found (describe) that are not the arrays wanted, as text: 'params.embed float32 [258, 32] in
    place of bfloat16 [258, 32], ...', or ''."""
    def show(entry):
        return f'{entry["dtype"]} {list(entry["shape"])}' if entry else 'nothing'

    texts = [f'{name} {show(found.get(name))} in place of {show(wanted.get(name))}'
             for name in sorted({*found, *wanted}) if show(found.get(name)) != show(wanted.get(name))]
    return ', '.join(texts[:most]) + (f' and {len(texts) - most} more' if len(texts) > most else '')


def seal(record: Mapping) -> dict:
    """A JSON record with its own checksum."""
    record = json.loads(json.dumps(record))  # the keys and values that a reader gets
    return {**record, CHECKSUM: _checksum(record)}


def unseal(record: Mapping) -> dict:
    """The content of a sealed record.

    Raises:
      ValueError: if it is not what was sealed.
    """
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    if record.get(CHECKSUM) != _checksum(content):
        raise ValueError('its content does not match its checksum')
    return content


def _checksum(record):
    return f'{zlib.crc32(json.dumps(record, sort_keys=True).encode()):08x}'


def name_of(path: tuple) -> str:
    """The name of the array at a path of keys in a tree, such as 'params.layers.wq'."""
    return jax.tree_util.keystr(path, simple=True, separator='.')


@functools.partial(jax.jit, static_argnames='shardings')
def _fingerprints(arrays, shardings):
    """[the fingerprint of each array, uint32 []]. One program for all: of many at once, each with its sums
    over devices, virtual CPU devices may each run another one and wait for the others for ever."""
    return [_fingerprint(x, sharding) for x, sharding in zip(arrays, shardings, strict=True)]


def _fingerprint(x, sharding):
    spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
    axes = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in spec]
    axes += [()] * (x.ndim - len(axes))

    def of_shard(x):
        starts = [lax.axis_index(names) * size if names else 0 for names, size in zip(axes, x.shape)]
        tables = [_index_hash(dim, start, size) for dim, (start, size) in enumerate(zip(starts, x.shape))]
        total = _sum_rows(x, tables) if jax.default_backend() == 'cpu' else _sum(x, tables)
        names = sum(axes, ())
        return lax.psum(total, names) if names else total

    if any(axes):
        total = jax.shard_map(of_shard, mesh=sharding.mesh, in_specs=spec, out_specs=P())(x)
    else:
        total = of_shard(x)
    return total + jnp.uint32(zlib.crc32(f'{jnp.dtype(x.dtype).name}{x.shape}'.encode()))


def _index_hash(dim, start, size):
    """An even number for each global index along a dim, uint32 [size]."""
    index = lax.iota(jnp.uint32, size) + jnp.asarray(start).astype(jnp.uint32)
    x = (index + 1) * jnp.uint32(0x9E3779B1 + 2 * dim)
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)  # a bijection whose every bit depends on all bits of x
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return lax.optimization_barrier((x ^ (x >> 15)) << 1)  # not computed again for every element


def _outer_sum(tables, shape):
    """The sum of one table per dim at every index of shape."""
    return sum((lax.broadcast_in_dim(table, shape, (dim,)) for dim, table in enumerate(tables)),
               jnp.zeros(shape, jnp.uint32))


def _bits(x):
    """The bits of every element as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    if x.dtype.itemsize == 8:
        halves = lax.bitcast_convert_type(x, jnp.uint32)
        return halves[..., 0] + halves[..., 1] * jnp.uint32(0x9E3779B1)
    return lax.bitcast_convert_type(x, f'uint{8 * x.dtype.itemsize}').astype(jnp.uint32)


def _terms(x, odd_hash):
    """What each element adds. The factor is odd, so that no bit of an element is lost; without the shift a
    sign would count the same at every index."""
    bits = _bits(x)
    return (bits ^ (bits >> 16)) * odd_hash


def _sum(x, tables):
    """The sum over a shard, whose elements' hash is the sum of one table per dim."""
    return jnp.sum(_terms(x, _outer_sum(tables, x.shape) + 1), dtype=jnp.uint32)


def _sum_rows(x, tables):
    """_sum by adding rows. XLA vectorizes that on a CPU, unlike a reduction of integers to one number: it is
    up to twenty times faster."""
    split = _split(x.shape)
    rows, columns = math.prod(x.shape[:split]), math.prod(x.shape[split:])
    size = ROWS * max(1, 4 * COLUMNS // columns)
    if rows < 2 * size * UNROLLED:
        return _sum(x, tables)
    row_hash = _outer_sum(tables[:split], x.shape[:split]).reshape(rows) + 1
    column_hash = lax.optimization_barrier(_outer_sum(tables[split:], x.shape[split:]).reshape(columns))
    x = x.reshape(rows, columns)

    def block(first, count):
        hashes = lax.dynamic_slice_in_dim(row_hash, first, count)[:, None] + column_hash[None]
        return _terms(lax.dynamic_slice_in_dim(x, first, count), hashes)

    def add(i, total):
        for k in range(UNROLLED):
            total = total + block((i * UNROLLED + k) * size, size)
        return total

    blocks = rows // (size * UNROLLED)
    rest = jnp.sum(block(blocks * size * UNROLLED, rows % (size * UNROLLED)), dtype=jnp.uint32)
    return rest + jnp.sum(lax.fori_loop(1, blocks, add, add(0, 0)), dtype=jnp.uint32)


def _split(shape):
    """The number of dims before the columns: COLUMNS of them or more, if that leaves enough rows."""
    split = len(shape)
    while split and math.prod(shape[split:]) < COLUMNS:
        split -= 1
    few = math.prod(shape[:split]) < 2 * ROWS * UNROLLED
    return split + 1 if few and split + 1 < len(shape) else split
