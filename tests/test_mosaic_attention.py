"""The fused kernels for Hopper: their code, lowered for CUDA without a card on every supported jax. Their
numbers are compared by interpretation in experiments/checks/check_mosaic.py, which takes minutes."""

import jax
import jax.numpy as jnp
import pytest
from test_triton_attention import gpu

from lct.ops import strategies
from lct.ops.blockwise_attention import Chunks, KVBlock, QueryBlock, init_accumulator
from lct.ops.kernels import choice, mosaic_attention
from lct.ops.masks import Tokens
from lct.plan import hlo, programs, targets


def forward_and_backward(q, k, v, positions, segments):
    attention = strategies.Attention(kernel='mosaic')
    attend = lambda *x: strategies.attend(*x, positions, segments, None, attention, 100)
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(out)


@pytest.mark.parametrize('head_dim', (64, 128))
def test_it_lowers_for_cuda_without_a_card(head_dim):
    """Mosaic checks layouts, tiles and register types as it lowers. 200 tokens: the last block is padded."""
    tokens = jax.ShapeDtypeStruct((1, 200), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((1, 200, heads, head_dim), jnp.bfloat16) for heads in (4, 2))
    with jax.sharding.use_abstract_mesh(gpu('NVIDIA H100')):
        traced = jax.jit(forward_and_backward).trace(q, k, k, tokens, tokens)
        text = traced.lower(lowering_platforms=('cuda',)).as_text()
    assert text.count('custom_call @mosaic_gpu') == 3  # forward, dq, and dk with dv


def test_unsupported_inputs_are_refused():
    q, k = jnp.ones((1, 8, 2, 1, 32), jnp.bfloat16), jnp.ones((1, 2, 8, 32), jnp.bfloat16)
    tokens = Tokens(*jnp.ones((2, 1, 8), jnp.int32))
    with pytest.raises(ValueError, match="head_dim 64, 128, got bfloat16 and 32; use kernel 'xla'"):
        mosaic_attention.attend(
            init_accumulator(q), QueryBlock(q, tokens), KVBlock.create(k, k, tokens), Chunks())
    assert choice.obstacle('mosaic', 64, 'bfloat16') == 'the platform is cpu'
    with jax.sharding.use_abstract_mesh(gpu('NVIDIA H100')):
        assert choice.obstacle('mosaic', 64, 'bfloat16') == ''
        assert choice.obstacle('mosaic', 256, 'bfloat16') == 'head_dim 256 is not one of 64, 128'
        assert choice.obstacle('mosaic', 64, 'float32') == 'dtype float32 is not one of bfloat16, float16'
        assert choice.choose('auto', 64, 'bfloat16').kernel == 'triton'


def test_a_ring_compiles_for_hopper():
    """The assembler for sm_90a runs too. Transfers of keys and values overlap with the kernels."""
    pytest.importorskip('jax_cuda12_plugin', reason="needs the extra 'aot-cuda'")
    target = targets.parse('h100:8')
    mesh = targets.mesh(target, (1, 1, target.count, 1))
    size = {'B': 1, 'T': 512 * target.count, 'N': 8, 'K': 2, 'H': 128}
    with jax.set_mesh(mesh):
        config = strategies.Attention(kernel='mosaic')
        op = lambda *x, axis_name: strategies.attend(*x, axis_name, config)
        for function, args in programs.attention(op, mesh, size, jnp.bfloat16).values():
            compiled = jax.jit(function).lower(*args).compile(compiler_options=targets.options(target))
            transfers = hlo.Program(compiled.as_text()).transfers(dict(mesh.shape))
            assert transfers and [t.name for t in transfers if not t.hidden] == []
