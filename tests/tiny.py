"""A tiny Llama and a batch of packed documents, shared by the model and training tests."""

import dataclasses

import jax
import numpy as np

from lct import sharding
from lct.data.layout import permutation
from lct.models import llama
from lct.ops import rope
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention

CONFIG = llama.LlamaConfig(
    vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
    max_position_embeddings=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1000.0),
)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
MEMORY = llama.Memory(remat='none', attention=Attention(chunks=Chunks(8, 8)), loss_chunk=8)


def batch(rows, seq_len, seed=0, ring_size=1, layout='zigzag'):
    """A dict of host arrays [rows, seq_len]: two packed documents and two tokens of padding per row."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CONFIG.vocab_size, (rows, seq_len + 1)).astype(np.int32)
    positions = np.tile(np.arange(seq_len, dtype=np.int32), (rows, 1))
    segments = np.ones((rows, seq_len), np.int32)
    mask = np.ones((rows, seq_len), np.float32)
    for row in range(rows):
        cut = int(rng.integers(4, seq_len - 4))
        positions[row, cut:] -= cut
        segments[row, cut:] = 2
        mask[row, cut - 1] = 0
    segments[:, -2:] = 0
    mask[:, -2:] = 0
    full = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:], 'positions': positions,
            'segment_ids': segments, 'loss_mask': mask}
    order = permutation(layout, seq_len, ring_size)
    return {name: x[:, order] for name, x in full.items()}


def place(host_batch, leading=()):
    """The batch on the current mesh, with the spec of [..., B, T]."""
    spec = jax.sharding.PartitionSpec(*leading, *sharding.spec('BT'))
    return {name: sharding.put(x, spec) for name, x in host_batch.items()}


def tables(config=CONFIG, seq_len=64):
    return rope.make_tables(config.rope, config.head_dim, seq_len)


def leaves_equal(a, b):
    """Whether two trees of arrays have the same dtypes and values."""
    return all(jax.tree.leaves(jax.tree.map(
        lambda x, y: x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y)), a, b)))
