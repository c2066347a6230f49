"""Programs to compile without data: functions with abstract arguments, placed on a mesh."""

import functools

import jax
import jax.numpy as jnp

from lct import sharding


def attention(op, mesh, size, dtype):
    """The two programs of an attention op: {'forward': (function, arguments), 'backward': ...}.

    The backward stands alone: it takes what the forward saved, so that what a compiler says of it is said of it.

    Args:
      op: (q, k, v, positions, segment_ids, axis_name=...) -> out, called inside shard_map.
      size: {letter: whole size} of B, T, N, K and H.
    """
    def array(letters, dtype):
        place = jax.NamedSharding(mesh, sharding.spec(letters))
        return jax.ShapeDtypeStruct(tuple(size[letter] for letter in letters), dtype, sharding=place)

    q, k, tokens = array('BTNH', dtype), array('BTKH', dtype), array('BT', jnp.int32)
    layouts = tuple(sharding.spec(letters) for letters in ('BTNH', 'BTKH', 'BTKH', 'BT', 'BT'))
    attend = jax.shard_map(
        functools.partial(op, axis_name='sequence'), mesh=mesh, in_specs=layouts, out_specs=layouts[0])

    def saving(q, k, v, positions, segment_ids):
        return jax.vjp(lambda *qkv: attend(*qkv, positions, segment_ids), q, k, v)

    def placed(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec))

    arguments = (q, k, k, tokens, tokens)
    _, pull = jax.eval_shape(saving, *arguments)
    return {
        'forward': (attend, arguments),
        'backward': (lambda pull, dout: pull(dout), (jax.tree.map(placed, pull), q)),
    }
