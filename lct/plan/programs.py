"""Programs to compile without data: functions with abstract arguments, placed on a mesh."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lct import sharding


def attention(op: Callable, mesh: jax.sharding.Mesh, size: dict[str, int],
              dtype: jax.typing.DTypeLike) -> dict[str, tuple[Callable, tuple]]:
    """The two programs of an attention op: {'forward' or 'backward': (function, arguments)}.

    The backward is a program of its own, which takes the residuals of the forward, so that a compiler's
    report covers the backward alone.

    Args:
      op: (q, k, v, positions, segment_ids, axis_name=...) -> out, called inside shard_map.
      size: {letter: global size} of B, T, N, K and H.
    """
    def array(letters, dtype):
        placed = jax.NamedSharding(mesh, sharding.spec(letters))
        return jax.ShapeDtypeStruct(tuple(size[letter] for letter in letters), dtype, sharding=placed)

    q, k, tokens = array('BTNH', dtype), array('BTKH', dtype), array('BT', jnp.int32)
    layouts = tuple(sharding.spec(letters) for letters in ('BTNH', 'BTKH', 'BTKH', 'BT', 'BT'))
    attend = jax.shard_map(
        functools.partial(op, axis_name='sequence'), mesh=mesh, in_specs=layouts, out_specs=layouts[0])

    def forward(q, k, v, positions, segment_ids):
        return jax.vjp(lambda *qkv: attend(*qkv, positions, segment_ids), q, k, v)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, x.sharding.spec))

    arguments = (q, k, k, tokens, tokens)
    _, pull = jax.eval_shape(forward, *arguments)
    return {
        'forward': (attend, arguments),
        'backward': (lambda pull, dout: pull(dout), (jax.tree.map(abstract, pull), q)),
    }
