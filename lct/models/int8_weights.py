"""Frozen weights in 8 bits (ops.int8_blocks), dequantized a layer at a time and where they are used.

A block is 32 numbers of an input dim, and the stored shards hold complete blocks. Vectors, which are the
norms and biases, are not quantized. Letters as in llama.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import embedding
from lct.models.config import LlamaConfig
from lct.ops import int8_blocks
from lct.ops.int8_blocks import BLOCK, Int8Blocks

QUANTIZED = {  # weight -> its letters without L, and the input dim that is cut into blocks
    'embed': ('VD', 'D'), 'wq': ('DNH', 'D'), 'wk': ('DKH', 'D'), 'wv': ('DKH', 'D'), 'wo': ('NHD', 'H'),
    'w_gate': ('DF', 'D'), 'w_up': ('DF', 'D'), 'w_down': ('FD', 'F'), 'lm_head': ('DV', 'D'),
}


def is_quantized(x: Any) -> bool:
    """is_leaf for trees with Int8Blocks, which are themselves tuples."""
    return isinstance(x, Int8Blocks)


def check(config: LlamaConfig, degrees: tuple[int, ...]) -> None:
    """Check that no block of a weight straddles two devices of a mesh.

    Raises:
      ValueError: naming the size that does not divide.
    """
    _, fsdp, sequence, tensor = degrees
    for name, axis, degree in (('embed_dim', 'fsdp * sequence', fsdp * sequence),
                               ('mlp_dim', 'tensor', tensor), ('head_dim', 'no axis', 1)):
        value = getattr(config, name)
        if value % (BLOCK * degree):
            split = f' of each of {degree} devices of {axis}' if degree > 1 else ''
            raise ValueError(
                f"adapter frozen_dtype 'int8' cuts {name} {value} into blocks of {BLOCK}{split}, which does "
                f"not come out even; {f'use a smaller degree of {axis}, or ' if split else 'use '}"
                "frozen_dtype 'bfloat16'")


def map_named(function: Any, params: Any) -> Any:
    """function(name, leaf) over llama.Params or Layers; a quantized weight is one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: function(path[-1].name, x), params, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnames='name')
def quantize(name: str, weight: jax.Array) -> jax.Array | Int8Blocks:
    """A weight, stacked on L if it is one of the layers, in 8 bits on the mesh. Vectors, and weights that are
    quantized already, as they are."""
    if name not in QUANTIZED or is_quantized(weight):
        return weight
    letters, axis = _letters(name, weight.ndim)
    return _on_shards(functools.partial(int8_blocks.quantize, axis=axis), sharding.weight_spec(letters),
                      weight)


def abstract(name: str, weight: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct | Int8Blocks:
    """quantize, of shapes."""
    if name not in QUANTIZED:
        return weight
    _, axis = _letters(name, len(weight.shape))
    sizes = list(weight.shape)
    sizes[axis] //= BLOCK
    return Int8Blocks(jax.ShapeDtypeStruct(weight.shape, jnp.int8, sharding=weight.sharding),
                      jax.ShapeDtypeStruct(tuple(sizes), jnp.float16, sharding=weight.sharding))


def dequantize(params: Any, dtype: Any) -> Any:
    """llama.Params or Layers with all quantized weights in dtype, in the shards in which they are stored."""
    def one(name, x):
        if not is_quantized(x):
            return x
        letters, axis = _letters(name, x.values.ndim)
        return _dequantize(x, axis, dtype, sharding.weight_spec(letters))

    return map_named(one, params)


def gather_layer(layer: Any, dtype: Any) -> Any:
    """The Layers of one layer, without L, in dtype; quantized weights are gathered over fsdp and sequence in
    8 bits, and stay sharded over tensor."""
    def one(name, x):
        if not is_quantized(x):
            return x
        letters, axis = _letters(name, x.values.ndim)
        spec = P(*(None if letter == 'D' else sharding.WEIGHT_RULES.get(letter) for letter in letters))
        return _dequantize(jax.tree.map(lambda part: sharding.reshard(part, spec), x), axis, dtype, spec)

    return map_named(one, layer)


def embed_tokens(embed: jax.Array | Int8Blocks, tokens: jax.Array, dtype: Any) -> jax.Array:
    """embedding.embed_tokens; of a quantized table only the rows of tokens [B, T] are dequantized."""
    if not is_quantized(embed):
        return embedding.embed_tokens(embed, tokens)
    rows = jax.tree.map(lambda table: embedding.lookup(table, tokens), embed)
    return _dequantize(rows, -1, dtype, sharding.spec('BTD'))


def _letters(name, ndim):
    """The letters of a weight with or without L, and the axis of its blocks, counted from the end."""
    letters, dim = QUANTIZED[name]
    return 'L' * (ndim - len(letters)) + letters, letters.index(dim) - len(letters)


def _dequantize(x, axis, dtype, spec):
    return _on_shards(functools.partial(int8_blocks.dequantize, axis=axis, dtype=dtype), spec, x)


def _on_shards(function, spec, x):
    """function(x) on the shards of every device: reshapes then never cut across them."""
    if sharding.current_mesh() is None:
        return function(x)
    return jax.shard_map(function, in_specs=(spec,), out_specs=spec)(x)
