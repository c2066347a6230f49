"""The linear layers of decoding and of short chunks, where few tokens meet all weights.

A step moves the activations, which are small, to the weights instead of the other way round ("weight
stationary" in Pope et al. 2022, "Efficiently Scaling Transformer Inference").

Letters: B batch, T tokens of a chunk, N query heads, K key/value heads, H head_dim, D embed_dim, F mlp_dim,
V vocab, L layers.
"""

import functools
import operator
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.models import llama
from lct.models.config import LlamaConfig
from lct.ops.kernels.choice import device

RING = 'sequence'
SPLIT_LETTERS = 'F', 'H', 'V'  # what a weight is split by over the ring: the first that it has

STATIONARY_CHUNK = 512  # tokens; beyond, nothing is gained

_kept = {}  # {(function, id of params, config, mesh): its result}, of params that exist


def for_chunks(params: llama.Params, config: LlamaConfig) -> llama.Params:
    """The weights gathered over 'fsdp' and split over the ring by another dim than D where it divides, so
    that one layer needs few and small transfers of few tokens."""
    ring = sharding.axis_size(RING)
    if params.lm_head is None and (device()[0] == 'cpu' or ring > 1):
        params = params.replace(lm_head=params.embed.T)
    if sharding.current_mesh() is not None:
        table = llama.param_table(config)
        if params.lm_head is not None:
            table = table.replace(lm_head=llama.ParamInfo('DV', 0.0))
        place = lambda info, w: jax.reshard(w, _spec(info.letters, w.shape, ring))
        embed = jax.reshard(params.embed, P(None, RING if ring > 1 else None))
        params = jax.tree.map(place, table, params, is_leaf=llama.is_param_info).replace(embed=embed)
    return params


def for_decoding(params: llama.Params, config: LlamaConfig) -> llama.Params:
    """for_chunks, as decode_step reads it fastest. On CPUs the layers become a tuple of Layers and the head a
    matrix of its own, because XLA would copy what it takes out of a stack or transposes, for every token,
    which takes longer than to multiply with it."""
    params = for_chunks(params, config)
    if device()[0] != 'cpu':
        return params
    layers = llama.with_constants(params.layers, config)
    return params.replace(layers=tuple(jax.tree.map(operator.itemgetter(i), layers)
                                       for i in range(config.num_layers)))


def placed(params: llama.Params, config: LlamaConfig) -> llama.Params:
    """for_decoding outside of a program. On CPUs the result is kept as long as params, for every answer;
    elsewhere it is made again, as the next text needs the memory."""
    if device()[0] != 'cpu':
        return _for_decoding(params, config)
    shared = sharding.current_mesh() is None and _is_on_one_device(params)
    return _keep(_views if shared else _for_decoding, params, config)


def placed_for_chunks(params: llama.Params, config: LlamaConfig) -> llama.Params:
    """for_chunks outside of a program, kept as long as params."""
    return _keep(_for_chunks, params, config)


def is_stationary(size: int) -> bool:
    """Whether a ring takes longer to gather the stored weights for a chunk of `size` tokens than to send the
    tokens to those of placed_for_chunks: on CPUs, where there is memory for both."""
    return size <= STATIONARY_CHUNK and sharding.axis_size(RING) > 1 and device()[0] == 'cpu'


def _keep(make, params, config):
    key = make, id(params), config, sharding.current_mesh()
    if key not in _kept:
        made = make(params, config)
        weakref.finalize(params, _kept.pop, key, None)  # first: another object may get the id
        _kept[key] = made
    return _kept[key]


def _is_on_one_device(params):
    return all(isinstance(x, jax.Array) and x.sharding.num_devices == 1 for x in jax.tree.leaves(params))


def _views(params, config):
    """for_decoding on one CPU device without a mesh: the layers share the memory of their stacks."""
    stacks = jax.tree.map(np.asarray, llama.with_constants(params.layers, config))
    layers = tuple(jax.tree.map(operator.itemgetter(i), stacks) for i in range(config.num_layers))
    layers = jax.device_put(layers, next(iter(params.embed.devices())) if params.embed.committed else None)
    head = _transpose(params.embed) if params.lm_head is None else params.lm_head
    return params.replace(layers=layers, lm_head=head)


def _spec(letters, shape, ring):
    """PartitionSpec of a weight: over 'tensor' as stored, and matrices over the ring."""
    axes = ['tensor' if letter in 'NKFV' else None for letter in letters]
    split = next((letter for letter in SPLIT_LETTERS if letter in letters), None)
    if ring > 1 and split and 'D' in letters:
        i = letters.index(split)
        own = (axes[i],) if axes[i] else ()
        if shape[i] % (ring * (sharding.axis_size('tensor') if own else 1)) == 0:
            axes[i] = *own, RING
    return P(*axes)


def linear(name: str, x: jax.Array, layer: llama.Layers, leading: int = 1) -> jax.Array:
    """llama.linear for x [B, ...], one token per row, or with leading = 2 for a chunk [B, T, ...]. Of a
    result in F each device keeps its share, for all tokens."""
    equation, bias = llama.LINEARS[name]
    out, bias = product(x, getattr(layer, name), leading), getattr(layer, bias)
    letters = equation.split('->')[1]
    if 'F' not in letters:
        out = sharding.reshard(out, sharding.spec(letters if leading == 2 else letters.replace('T', '')))
    if bias is None:
        return out
    if sharding.current_mesh() is not None:
        bias = jax.reshard(bias, P(*jax.typeof(out).sharding.spec[leading:]))
    return (out + bias.astype(jnp.float32)).astype(out.dtype)


mlp = functools.partial(llama.mlp, linear=linear)
chunk_linear = functools.partial(linear, leading=2)
chunk_mlp = functools.partial(llama.mlp, linear=chunk_linear)


def product(x: jax.Array, w: jax.Array, leading: int = 1) -> jax.Array:
    """x [B, ...], or [B, T, ...] with leading = 2, times w over the first dims of w, which are the other ones
    of x -> [B, ...] or [B, T, ...], split as w is."""
    count = x.ndim - leading
    contracted = tuple(range(leading, x.ndim)), tuple(range(count))
    precision = 'highest' if x.dtype == jnp.float32 else None
    options: dict[str, Any] = {'precision': precision, 'preferred_element_type': jnp.float32}
    if sharding.current_mesh() is not None:
        axes, tokens = stationary_axes(w), (sharding.BATCH_AXES, None)[:leading]
        w, x = jax.reshard(w, P(*axes)), jax.reshard(x, P(*tokens, *axes[:count]))
        options['out_sharding'] = P(*tokens, *axes[count:])
    return lax.dot_general(x, w.astype(x.dtype), (contracted, ((), ())), **options).astype(x.dtype)


def stationary_axes(w: jax.Array) -> list[Any]:
    """The mesh axes of each dim of a weight, without 'fsdp', over which other rows are split."""
    dims = (axes if isinstance(axes, tuple) else (axes,) for axes in jax.typeof(w).sharding.spec)
    return [tuple(axis for axis in axes if axis not in (None, *sharding.BATCH_AXES)) or None for axes in dims]


_for_chunks = jax.jit(for_chunks, static_argnames='config')
_for_decoding = jax.jit(for_decoding, static_argnames='config')
_transpose = jax.jit(jnp.transpose)
