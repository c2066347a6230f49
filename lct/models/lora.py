"""LoRA (Hu et al. 2021, arXiv 2106.09685) on the attention projections, as LongLoRA (Chen et al. 2023, arXiv
2309.12307) trains it for longer contexts: low-rank adapters on wq, wk, wv and wo, norms trained whole and, where
its many parameters can be afforded, the embedding too; everything else stands still.

Letters as in llama, and R the rank. A weight W acts as W + alpha / R * down @ up, and up starts at zero.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lct import sharding
from lct.models import llama
from lct.ops import rope
from lct.ops.cross_entropy import cross_entropy_sum
from lct.ops.norms import rms_norm

ADAPTED = {'wq': ('D', 'NH'), 'wk': ('D', 'KH'), 'wv': ('D', 'KH'), 'wo': ('NH', 'D')}  # what each reads and writes
WHOLE = ('embed', 'attn_norm', 'mlp_norm', 'w_gate', 'w_up', 'w_down', 'final_norm', 'lm_head')


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is trained of a model that is otherwise frozen.

    rank, alpha: of the adapters; their product counts alpha / rank times. LongLoRA's are 8 and 16.
    also_train: parameters trained whole, by their names in llama.Params; LongLoRA's are the norms and the embedding.
    frozen_dtype: in which the frozen weights are kept, best that of the activations; None is that of the trained.
    seed: of the adapters' start.

    Share of Llama-3 8B (8,030,261,248) that is trained at rank 8: adapters 6,815,744 and norms 266,240, 0.09%; with
    the embedding 6.6%, because Llama-3's vocabulary is four times that of the Llama-2 of the paper.
    """

    rank: int = 8
    alpha: float = 16.0
    also_train: tuple = ('attn_norm', 'mlp_norm', 'final_norm')
    frozen_dtype: str | None = None
    seed: int = 0

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f'adapter rank {self.rank!r} must be a positive integer, for example 8')
        if not 0 < self.alpha < math.inf:
            raise ValueError(f'adapter alpha {self.alpha!r} must be a positive number, for example 16')
        for name in self.also_train:
            if name not in WHOLE:
                why = 'has an adapter' if name in ADAPTED else 'is no parameter'
                raise ValueError(f'adapter also_train: {name!r} {why}; choose from {", ".join(WHOLE)}')
        if self.frozen_dtype not in (None, 'float32', 'bfloat16'):
            raise ValueError(f"adapter frozen_dtype {self.frozen_dtype!r} must be 'float32', 'bfloat16' or None")


class LowRank(struct.PyTreeNode):
    down: Any  # [L, D, R] of wq, wk, wv; [L, N, H, R] of wo
    up: Any  # [L, R, N, H] of wq, [L, R, K, H] of wk and wv, [L, R, D] of wo
    scale: float = struct.field(pytree_node=False)  # alpha / R


class Adapters(struct.PyTreeNode):
    wq: LowRank
    wk: LowRank
    wv: LowRank
    wo: LowRank


class Trained(struct.PyTreeNode):
    """What the optimizer sees. whole: llama.Params with None for what is frozen."""

    adapters: Adapters
    whole: llama.Params


def table(adapter):
    """Adapters of llama.Entry rows: letters, and the standard deviation of the start in units of the fan-in's."""
    def row(reads, writes):
        return LowRank(llama.Entry(f'L{reads}R', 1.0), llama.Entry(f'LR{writes}', 0.0), adapter.alpha / adapter.rank)

    return Adapters(**{name: row(*letters) for name, letters in ADAPTED.items()})


def _is_entry(x):
    return isinstance(x, llama.Entry)


def part(params, adapter):
    """(trained whole, frozen): params twice, each with None where the other holds the leaf.

    Raises:
      ValueError: for a head that is to be trained where it is the embedding.
    """
    if 'lm_head' in adapter.also_train and params.lm_head is None:
        raise ValueError("adapter also_train: 'lm_head' is the embedding in this model; name 'embed' instead")

    def keep(wanted):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if (path[-1].name in adapter.also_train) == wanted else None, params)

    return keep(True), keep(False)


def join(whole, frozen):
    """The llama.Params that part() parted."""
    return jax.tree.map(lambda a, b: b if a is None else a, whole, frozen, is_leaf=lambda x: x is None)


def abstract(config, adapter, dtype=jnp.float32):
    """(Trained, frozen) of ShapeDtypeStructs, sharded on the current concrete mesh if there is one."""
    mesh = jax.sharding.get_mesh()
    size = llama.dims(config) | {'R': adapter.rank}

    def leaf(entry):
        placed = None if mesh.empty else jax.NamedSharding(mesh, sharding.weight_spec(entry.letters))
        return jax.ShapeDtypeStruct(tuple(size[x] for x in entry.letters), dtype, sharding=placed)

    whole, frozen = part(llama.abstract(config, dtype), adapter)
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, adapter.frozen_dtype or dtype, sharding=x.sharding), frozen)
    return Trained(jax.tree.map(leaf, table(adapter), is_leaf=_is_entry), whole), frozen


def num_trained(config, adapter):
    """Exact number of trained parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config, adapter)[0]))


def num_low_rank(config, adapter):
    """Of these, the number in the adapters themselves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config, adapter)[0].adapters))


def init(config, adapter, dtype=jnp.float32):
    """Adapters that change nothing yet, on the current mesh: down normal, up zero."""
    target = abstract(config, adapter, dtype)[0].adapters

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, target))
    def draw(key):
        leaves, tree = jax.tree.flatten(target)
        rows = jax.tree.leaves(table(adapter), is_leaf=_is_entry)
        keys = jax.random.split(key, len(leaves))
        return tree.unflatten([
            row.stddev * math.prod(leaf.shape[1:-1]) ** -0.5 * jax.random.normal(key, leaf.shape, dtype)
            for leaf, row, key in zip(leaves, rows, keys, strict=True)])

    return draw(jax.random.key(adapter.seed))


def freeze(params, adapter):
    """(trained whole, frozen) of params, the frozen in their dtype."""
    whole, frozen = part(params, adapter)
    return whole, jax.tree.map(lambda x: x.astype(adapter.frozen_dtype or x.dtype), frozen)


@jax.jit
def merge(trained, frozen):
    """The llama.Params that act alike without adapters; the merged weights are float32."""
    params = join(trained.whole, frozen)

    def merged(name):
        reads, writes = ADAPTED[name]
        weight, adapter = getattr(params.layers, name), getattr(trained.adapters, name)
        place = None if sharding.current_mesh() is None else sharding.weight_spec(f'L{reads}{writes}')
        product = jnp.einsum(f'L{reads}R,LR{writes}->L{reads}{writes}', adapter.down.astype(jnp.float32),
                             adapter.up.astype(jnp.float32), precision='highest', out_sharding=place)
        return weight.astype(jnp.float32) + adapter.scale * product

    return params.replace(layers=params.layers.replace(**{name: merged(name) for name in ADAPTED}))


# ---------------------------------------------------------------------------------------------------
# Forward: llama's block and scan, with the adapters beside the projections
# ---------------------------------------------------------------------------------------------------


def low_rank(name, x, adapters):
    """What the adapter of a projection adds to its output."""
    (reads, writes), adapter = ADAPTED[name], getattr(adapters, name)
    inner = sharding.einsum(f'BT{reads},{reads}R->BTR', x, adapter.down)
    return adapter.scale * sharding.einsum(f'BTR,R{writes}->BT{writes}', inner, adapter.up)


def block(x, layer, adapters, angles, positions, segment_ids, config, memory):
    """llama.block with adapters. Rotation is linear, so the parts of q and k may be rotated apart: the small one
    is then not rounded away inside the weight, as bfloat16 would where the two are summed first."""
    x = checkpoint_name(x, 'layer_input')
    y = rms_norm(x, layer.attn_norm, config.norm_eps)
    q, k, v = llama.project_qkv(x, layer, angles, config)
    q = q + rope.rotate(low_rank('wq', y, adapters), angles)
    k = k + rope.rotate(low_rank('wk', y, adapters), angles)
    v = v + low_rank('wv', y, adapters)
    out = llama.attention(q, k, v, positions, segment_ids, memory.attention, config.window)
    x = x + sharding.einsum('BTNH,NHD->BTD', out, layer.wo) + low_rank('wo', out, adapters)
    return x + llama.ffn(x, layer, config, memory.ffn_chunks)


def hidden_states(trained, frozen, config, tokens, positions, segment_ids, tables, memory):
    """llama.hidden_states with adapters: the final normed hidden states [B, T, D]."""
    params = join(trained.whole, frozen)
    angles = rope.angles(tables, positions)

    def step(x, layer):
        return block(x, *layer, angles, positions, segment_ids, config, memory), None

    if memory.remat != 'none':
        step = jax.checkpoint(step, policy=llama.REMAT[memory.remat], prevent_cse=False)
    x = llama.embed_tokens(params.embed, tokens)
    x, _ = lax.scan(step, x.astype(memory.dtype or x.dtype), (params.layers, trained.adapters))
    return rms_norm(x, params.final_norm, config.norm_eps)


def loss_sum(trained, frozen, config, batch, tables, memory):
    """llama.loss_sum with adapters."""
    x = hidden_states(
        trained, frozen, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory)
    head = llama.head(join(trained.whole, frozen))
    return cross_entropy_sum(x, head, batch['targets'], batch['loss_mask'], memory.loss_chunk)
