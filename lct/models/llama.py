"""Llama-3 as one parameter table and pure functions (Touvron et al. 2023; Llama Team 2024).

Letters: B batch, T sequence, N query heads, K key/value heads, H head_dim, D embed_dim, F mlp_dim,
V vocab, L layers. Field names of Params and Layers are the checkpoint keys; layers are stacked on L.
Rotary dims use the half-split order of Hugging Face; Meta's interleaved order is permuted at the door.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.ops import rope, strategies
from lct.ops.blockwise_ffn import blockwise_ffn
from lct.ops.cross_entropy import cross_entropy_sum
from lct.ops.norms import rms_norm
from lct.ops.rope import RopeConfig
from lct.ops.strategies import Attention


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """What a Hugging Face config.json says about a Llama, in the words of this package."""

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_position_embeddings: int = 8192
    rope: RopeConfig = RopeConfig(theta=500000.0)
    window: int | None = None  # tokens that a query attends to, itself included; None for all before it

    def __post_init__(self):
        for field in ('vocab_size', 'embed_dim', 'mlp_dim', 'num_layers', 'num_heads', 'num_kv_heads',
                      'head_dim', 'max_position_embeddings'):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f'{field} must be a positive integer, got {value!r}')
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f'num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}; '
                'every key/value head must serve the same number of query heads'
            )
        if self.head_dim % 2:
            raise ValueError(f'head_dim {self.head_dim} must be even: RoPE rotates pairs of dims')
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f'window {self.window!r} must be an integer of at least 1, because a query attends to '
                             'itself, or None for full causal attention')

    @property
    def rope_theta(self):
        return self.rope.theta

    def architecture(self):
        """The config without its positions: equal for a model before and after extension, so that
        one compiled program serves both (the rotary tables are arguments)."""
        return dataclasses.replace(self, max_position_embeddings=1, rope=rope.RopeConfig(theta=1.0))


@dataclasses.dataclass(frozen=True)
class Memory:
    """The one place that trades memory for time.

    remat: 'none' keeps every activation; 'dots' keeps matmul outputs; 'attention' keeps only what the
      attention backward needs (q, k, v, out, lse); 'full' keeps only each layer's input; 'offload'
      is 'full' with that input in host memory.
    attention: how attention is split over the sequence axis and into tiles.
    ffn_chunks: number of chunks the sequence is cut into inside the FFN.
    loss_chunk: tokens of a device whose logits exist at one time.
    dtype: of activations and of weights in use; None is that of the stored parameters. Gradients, their sums over
      devices and the stored parameters are not affected.
    """

    remat: str = 'full'
    attention: Attention = Attention()
    ffn_chunks: int = 1
    loss_chunk: int = 512
    dtype: str | None = None

    def __post_init__(self):
        if self.dtype not in (None, 'float32', 'bfloat16'):
            raise ValueError(f"dtype {self.dtype!r} of activations must be 'float32', 'bfloat16' or None")
        if self.remat not in REMAT:
            raise ValueError(f'remat {self.remat!r} is not one of {sorted(REMAT)}')
        if min(self.ffn_chunks, self.loss_chunk) < 1:
            raise ValueError(f'ffn_chunks {self.ffn_chunks} and loss_chunk {self.loss_chunk} must be positive')


class Entry(NamedTuple):
    """One row of the parameter table: dims by letter, and the standard deviation of its init
    (0 means ones)."""

    letters: str
    stddev: float


class Layers(struct.PyTreeNode):
    attn_norm: Any  # [L, D]
    wq: Any  # [L, D, N, H]
    wk: Any  # [L, D, K, H]
    wv: Any  # [L, D, K, H]
    wo: Any  # [L, N, H, D]
    mlp_norm: Any  # [L, D]
    w_gate: Any  # [L, D, F]
    w_up: Any  # [L, D, F]
    w_down: Any  # [L, F, D]


class Params(struct.PyTreeNode):
    embed: Any  # [V, D]
    layers: Layers
    final_norm: Any  # [D]
    lm_head: Any = None  # [D, V], None when tied to embed


def table(config):
    """The parameter table: Params whose leaves are Entry rows. Everything else derives from it."""
    wide = config.embed_dim**-0.5
    residual = (2 * config.num_layers) ** -0.5  # GPT-2: keep the residual stream's variance with depth
    return Params(
        embed=Entry('VD', wide),
        layers=Layers(
            attn_norm=Entry('LD', 0.0),
            wq=Entry('LDNH', wide),
            wk=Entry('LDKH', wide),
            wv=Entry('LDKH', wide),
            wo=Entry('LNHD', residual * (config.num_heads * config.head_dim) ** -0.5),
            mlp_norm=Entry('LD', 0.0),
            w_gate=Entry('LDF', wide),
            w_up=Entry('LDF', wide),
            w_down=Entry('LFD', residual * config.mlp_dim**-0.5),
        ),
        final_norm=Entry('D', 0.0),
        lm_head=None if config.tie_embeddings else Entry('DV', wide),
    )


def _over_table(function, config):
    return jax.tree.map(function, table(config), is_leaf=lambda x: isinstance(x, Entry))


def dims(config):
    """Size of each weight letter."""
    return {
        'V': config.vocab_size, 'D': config.embed_dim, 'F': config.mlp_dim, 'L': config.num_layers,
        'N': config.num_heads, 'K': config.num_kv_heads, 'H': config.head_dim,
    }


def shapes(config):
    """Params of shape tuples."""
    size = dims(config)
    return _over_table(lambda entry: tuple(size[letter] for letter in entry.letters), config)


def specs(config):
    """Params of PartitionSpecs."""
    return _over_table(lambda entry: sharding.weight_spec(entry.letters), config)


def abstract(config, dtype=jnp.float32):
    """Params of ShapeDtypeStructs, sharded on the current concrete mesh if there is one."""
    mesh = jax.sharding.get_mesh()
    size = dims(config)

    def leaf(entry):
        placed = None if mesh.empty else jax.NamedSharding(mesh, sharding.weight_spec(entry.letters))
        return jax.ShapeDtypeStruct(tuple(size[x] for x in entry.letters), dtype, sharding=placed)

    return _over_table(leaf, config)


def num_params(config):
    """Exact number of parameters; a tied head counts once."""
    leaves = jax.tree.leaves(shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    return sum(math.prod(shape) for shape in leaves)


def check_mesh(config, degrees):
    """Raise ValueError if the weights do not divide over the mesh degrees (data, fsdp, sequence, tensor)."""
    _, fsdp, sequence, tensor = degrees
    for name, axis, degree in (
        ('embed_dim', 'fsdp * sequence', fsdp * sequence), ('num_heads', 'tensor', tensor),
        ('num_kv_heads', 'tensor', tensor), ('mlp_dim', 'tensor', tensor), ('vocab_size', 'tensor', tensor),
    ):
        value = getattr(config, name)
        if value % degree:
            raise ValueError(
                f'{name} {value} is not a multiple of the mesh degree {axis} = {degree}, over which it is split; '
                'choose degrees that divide it'
            )


def init(config, key, dtype=jnp.float32):
    """Random Params, drawn sharded on the current mesh."""
    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract(config)))
    def draw(key):
        leaves, tree = jax.tree.flatten(table(config), is_leaf=lambda x: isinstance(x, Entry))
        keys = jax.random.split(key, len(leaves))
        size = dims(config)
        arrays = []
        for entry, k in zip(leaves, keys):
            shape = tuple(size[letter] for letter in entry.letters)
            if entry.stddev == 0:
                arrays.append(jnp.ones(shape, dtype))
            else:
                arrays.append((entry.stddev * jax.random.normal(k, shape)).astype(dtype))
        return jax.tree.unflatten(tree, arrays)

    return draw(key)


# ---------------------------------------------------------------------------------------------------
# Forward
# ---------------------------------------------------------------------------------------------------


def embed_tokens(embed, tokens):
    """tokens [B, T] int32 -> [B, T, D] in embed's dtype; its gradient is summed in float32: a sum in bfloat16
    stands still at 256 times its terms, and words occur more often."""
    wide = embed.astype(jnp.float32)
    if sharding.current_mesh() is None:
        return wide[tokens].astype(embed.dtype)
    # Said aloud, or XLA falls back to 'involuntary full rematerialization'. The table is small next to the
    # activations that it fills.
    wide = jax.reshard(wide, P(None, None))
    return wide.at[tokens].get(out_sharding=sharding.spec('BTD')).astype(embed.dtype)


def project_qkv(x, layer, angles, config):
    """Normed, projected, rotated q [B, T, N, H], k and v [B, T, K, H]."""
    y = rms_norm(x, layer.attn_norm, config.norm_eps)
    q = rope.rotate(sharding.einsum('BTD,DNH->BTNH', y, layer.wq), angles)
    k = rope.rotate(sharding.einsum('BTD,DKH->BTKH', y, layer.wk), angles)
    v = sharding.einsum('BTD,DKH->BTKH', y, layer.wv)
    return q, k, v


def mlp(x, layer, config):
    """SwiGLU of the normed x [B, T, D], without the residual."""
    y = rms_norm(x, layer.mlp_norm, config.norm_eps)
    gate = sharding.einsum('BTD,DF->BTF', y, layer.w_gate)
    up = sharding.einsum('BTD,DF->BTF', y, layer.w_up)
    return sharding.einsum('BTF,FD->BTD', jax.nn.silu(gate) * up, layer.w_down)


def ffn(x, layer, config, num_chunks):
    """mlp in chunks of the sequence, its weights gathered once for all of them."""
    letters = {'w_gate': 'DF', 'w_up': 'DF', 'w_down': 'FD'}
    layer = layer.replace(**{name: sharding.gather(getattr(layer, name), letters[name], x.dtype) for name in letters})
    return blockwise_ffn(lambda y: mlp(y, layer, config), x, num_chunks)


def attention(q, k, v, positions, segment_ids, split, window=None):
    """Causal attention within documents, the sequence split over the current mesh as the Attention `split` says."""
    if sharding.current_mesh() is None:
        return strategies.attend(q, k, v, positions, segment_ids, None, split, window)
    heads, kv, tokens = (sharding.spec(letters) for letters in ('BTNH', 'BTKH', 'BT'))
    local = functools.partial(strategies.attend, axis_name='sequence', attention=split, window=window)
    return jax.shard_map(
        local, in_specs=(heads, kv, kv, tokens, tokens), out_specs=heads
    )(q, k, v, positions, segment_ids)


def block(x, layer, angles, positions, segment_ids, config, memory):
    """One transformer layer: x [B, T, D] -> [B, T, D]."""
    x = checkpoint_name(x, 'layer_input')
    q, k, v = project_qkv(x, layer, angles, config)
    out = attention(q, k, v, positions, segment_ids, memory.attention, config.window)
    x = x + sharding.einsum('BTNH,NHD->BTD', out, layer.wo)
    return x + ffn(x, layer, config, memory.ffn_chunks)


REMAT = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
    'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=['layer_input'],
        offload_src='device', offload_dst='pinned_host',
    ),
}


def hidden_states(params, config, tokens, positions, segment_ids, tables, memory=None):
    """The final normed hidden states [B, T, D].

    tables: rope.Tables of the config, an argument so that a changed theta needs no new compilation.
    """
    memory = memory or Memory(remat='none')
    angles = rope.angles(tables, positions)

    def step(x, layer):
        return block(x, layer, angles, positions, segment_ids, config, memory), None

    policy = REMAT[memory.remat]
    if memory.remat != 'none':
        step = jax.checkpoint(step, policy=policy, prevent_cse=False)
    x = embed_tokens(params.embed, tokens)
    x, _ = lax.scan(step, x.astype(memory.dtype or x.dtype), params.layers)
    return rms_norm(x, params.final_norm, config.norm_eps)


def head(params):
    """The output projection [D, V]: its own, or the transposed embedding."""
    return params.embed.T if params.lm_head is None else params.lm_head


def logits(params, config, tokens, positions=None, segment_ids=None):
    """Logits [B, T, V] in float32 of tokens [B, T], for small checks: it builds the whole [B, T, V].

    positions default to 0..T-1 and segment_ids to one document per row. As in Hugging Face, 'dynamic'
    and 'longrope' scaling look at the longest position of the batch.
    """
    if not isinstance(tokens, jax.Array) and not 0 <= np.min(tokens) <= np.max(tokens) < config.vocab_size:
        raise ValueError(f"ids from {np.min(tokens)} to {np.max(tokens)} are not all among the model's 0 to "
                         f"{config.vocab_size - 1}; encode with the model's own tokenizer")
    tokens = jnp.asarray(tokens)
    if tokens.shape[1] % (ring := sharding.axis_size('sequence')):
        raise ValueError(f'{tokens.shape[1]} tokens a row do not divide over the {ring} devices of the sequence axis; '
                         'cut or pad them to a multiple')
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones(tokens.shape, jnp.int32)
    seq_len = int(jnp.max(jnp.asarray(positions))) + 1
    batch = [sharding.put(x, sharding.spec('BT')) for x in (tokens, positions, segment_ids)]
    tables = rope.make_tables(config.rope, config.head_dim, seq_len)
    return _logits(params, config.architecture(), *batch, tables)


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config, tokens, positions, segment_ids, tables):
    x = hidden_states(params, config, tokens, positions, segment_ids, tables)
    return sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), head(params).astype(jnp.float32))


def loss_sum(params, config, batch, tables, memory):
    """Sum over the batch of loss_mask * cross-entropy, float32; the caller divides by the sum of the
    mask over the whole global batch.

    batch: dict of tokens, targets, positions, segment_ids int32 [B, T] and loss_mask float32 [B, T].
    """
    x = hidden_states(
        params, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory
    )
    return cross_entropy_sum(x, head(params), batch['targets'], batch['loss_mask'], memory.loss_chunk)
