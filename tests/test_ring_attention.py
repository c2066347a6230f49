"""What the ring sends, how its work is balanced, what it refuses. Its values: test_strategies.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import inputs, permutes

from lct.data.layout import permutation
from lct.ops.blockwise_attention import Chunks, fit
from lct.ops.context_parallel import AttentionOptions
from lct.ops.masks import Tokens, chunk_classes
from lct.ops.ring_attention import ring_attention
from lct.sharding import make_mesh, spec

LENGTH, HEAD_DIM = 128, 16
LAYOUTS = ('contiguous', 'zigzag', 'striped')
HEADS = {'mha': (4, 4), 'gqa': (4, 2), 'mqa': (4, 1)}


@functools.cache
def case(heads, packed, dtype=jnp.float32):
    return inputs(np.random.default_rng(5), 1, LENGTH, *HEADS[heads], HEAD_DIM, packed, dtype)


def test_forward_rotates_the_unrepeated_keys_and_values_in_a_loop_of_ring_size_minus_one():
    mesh = make_mesh((1, 1, 8, 1))
    q, k, v, positions, segments, _ = case('gqa', False, jnp.bfloat16)
    ring = functools.partial(ring_attention, axis_name='sequence', options=AttentionOptions(Chunks(8, 8)))
    with jax.set_mesh(mesh):
        kv, tokens = spec('BTKH'), spec('BT')
        ring = jax.shard_map(ring, in_specs=(spec('BTNH'), kv, kv, tokens, tokens), out_specs=spec('BTNH'))
        args = [jax.device_put(x, jax.NamedSharding(mesh, spec('BTNH'[: x.ndim])))
                for x in (q, k, v, positions, segments)]
        jaxpr = jax.make_jaxpr(ring)(*args)
    sent = list(permutes(jaxpr.jaxpr, 1))
    per_rotation = [(aval.shape, aval.dtype) for aval, _ in sent if aval.ndim == 4]
    assert [times for _, times in sent] == [7] * len(sent)
    assert per_rotation == [((1, 2, LENGTH // 8, HEAD_DIM), jnp.bfloat16)] * 2


@pytest.mark.parametrize('ring_size', [2, 4, 8, 32])
def test_zigzag_balances_the_chunks_that_are_computed_and_skips_half(ring_size):
    chunk = fit(256, 64)
    order = permutation('zigzag', 64 * ring_size, ring_size).astype(np.int32)
    ones = np.ones((1, 64), np.int32)
    shards = [Tokens(positions, ones) for positions in order.reshape(ring_size, 1, 64)]
    work = [sum(int((chunk_classes(queries, keys, chunk, chunk) > 0).sum()) for keys in shards)
            for queries in shards]
    assert max(work) == min(work)
    assert sum(work) == ring_size * (2 * ring_size + 1)  # of the 4 * ring_size^2 pairs of half blocks


def test_heads_that_do_not_group_are_refused():
    q, k, v, positions, segments, _ = case('mha', False)
    with pytest.raises(ValueError, match='num_heads 4 is not a multiple of num_kv_heads 3'):
        ring_attention(q, k[:, :, :3], v[:, :, :3], positions, segments, None)
