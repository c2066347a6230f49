"""The fused GPU kernels: their numbers interpreted as plain XLA on this machine, their code compiled ahead of
time for GPUs. Positions and segments are data, so one program serves every layout and every packing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import inputs, relative_error
from jax.experimental.pallas import triton as pallas_triton

from lct.data.layout import permutation
from lct.ops import blockwise_attention, strategies
from lct.ops.attention import attention
from lct.ops.blockwise_attention import (
    MASK_VALUE,
    Chunks,
    KVBlock,
    QueryBlock,
    Residuals,
    init_accumulator,
    init_grads,
)
from lct.ops.kernels import triton_attention
from lct.ops.kernels.choice import choose
from lct.ops.masks import Tokens
from lct.plan import hlo, programs, targets
from lct.sharding import make_mesh, spec

LENGTH, HEAD_DIM, CHUNKS = 96, 16, Chunks(32, 16)
HEADS = {'mha': (2, 2), 'gqa': (4, 2), 'mqa': (4, 1), 'groups of three': (3, 1)}
NAMES = ('out', 'lse', 'dq', 'dk', 'dv')


def gpu(kind):
    """A mesh of one CUDA device that is not present."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform='gpu')
    return jax.sharding.AbstractMesh(
        (1,), ('x',), axis_types=(jax.sharding.AxisType.Explicit,), abstract_device=device)


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(triton_attention, 'INTERPRET', True)


def case(heads, packed, dtype=jnp.float32):
    """q, k, v, dout as an inner block takes them, and their Tokens."""
    rng = np.random.default_rng(3)
    q, k, v, positions, segments, g = inputs(rng, 1, LENGTH, *HEADS[heads], HEAD_DIM, packed, dtype)
    grouped = lambda x: x.reshape(1, LENGTH, HEADS[heads][1], -1, HEAD_DIM)
    return (grouped(q), k.swapaxes(1, 2), v.swapaxes(1, 2), grouped(g)), Tokens(positions, segments)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(module, window, chunks, args, queries, keys, total, grads):
    """Results as NAMES, from (q, k, v, dout), and the Tokens of queries and of keys."""
    q, k, v, dout = args
    queries, block = QueryBlock(q, queries), KVBlock.create(k, v, keys)
    out, lse = module.attend(total, queries, block, chunks, window)
    residuals = Residuals(dout, lse, jnp.sum(dout.astype(jnp.float32) * out, -1))
    dq, dk, dv = module.attend_backward(
        (module.init_dq(q), *grads[1:]), queries, block, residuals, chunks, window)
    return out, lse, grads[0] + module.finalize_dq(dq, q), dk, dv


triton = functools.partial(run, triton_attention, None, CHUNKS)


def compare(args, queries, keys, total=None, window=None, chunks=CHUNKS):
    """Relative errors of the kernels against blockwise_attention, both starting from total or no keys."""
    start = total or init_accumulator(args[0]), init_grads(*args[:3])
    ours, theirs = (run(module, window, chunks, args, queries, keys, *start)
                    for module in (triton_attention, blockwise_attention))
    assert all(x.dtype == jnp.float32 for x in ours)
    return dict(zip(NAMES, map(relative_error, ours, theirs)))


@pytest.mark.parametrize(('heads', 'window'), [('gqa', None), ('mqa', 24)])
def test_kernels_equal_blockwise_attention(interpreted, heads, window):
    for packed in (False, True):
        args, tokens = case(heads, packed)
        errors = compare(args, tokens, tokens, window=window)
        assert max(errors.values()) < 1e-6, f'packed {packed}: {errors}'


def test_kernels_equal_dense_attention(interpreted):
    args, tokens = case('gqa', True)
    q, k, v, g = args
    dense = lambda q, k, v: attention(
        q.reshape(1, LENGTH, -1, HEAD_DIM), k.swapaxes(1, 2), v.swapaxes(1, 2), tokens, tokens)

    @jax.jit
    def textbook(q, k, v, g):
        out, vjp, lse = jax.vjp(dense, q, k, v, has_aux=True)
        return out, lse, *vjp(g.reshape(out.shape))

    ours = triton(args, tokens, tokens, init_accumulator(q), init_grads(q, k, v))
    for name, a, b in zip(NAMES, ours, textbook(*args)):
        assert relative_error(a.reshape(b.shape), b) < 1e-6, name


def test_a_zigzag_ring_step_continues_from_the_steps_before(interpreted):
    """Device 1 of 3: its own block, one that its second half attends to, one that both halves attend to."""
    order = permutation('zigzag', 3 * LENGTH, 3).astype(np.int32).reshape(3, 1, LENGTH)
    args, (_, ones) = case('gqa', False)
    others, _ = case('gqa', True)
    queries, total = Tokens(order[1], ones), None
    for owner in (1, 0, 2):
        keys = Tokens(order[owner], ones)
        block = (args[0], *others[1:3], args[3]) if owner != 1 else args
        errors = compare(block, queries, keys, total)
        assert max(errors.values()) < 1e-6, f'block of {owner}: {errors}'
        total = triton(
            block, queries, keys, total or init_accumulator(args[0]), init_grads(*block[:3]))[:2]


def test_gradients_continue_from_those_of_earlier_blocks(interpreted):
    args, tokens = case('gqa', True)
    zero, before = init_grads(*args[:3]), tuple(x.astype(jnp.float32) for x in args[:3])
    from_zero, from_before = (triton(args, tokens, tokens, init_accumulator(args[0]), start)[2:]
                              for start in (zero, before))
    for a, b, start in zip(from_zero, from_before, before):
        np.testing.assert_allclose(a + start, b, rtol=1e-6, atol=1e-6)


def test_rows_without_keys_are_zero_and_padding_rows_pass(interpreted):
    args, tokens = case('gqa', False)
    padded = tokens._replace(segment_ids=tokens.segment_ids.at[:, 40:].set(0))
    start = init_accumulator(args[0]), init_grads(*args[:3])
    out, lse, dq, dk, dv = triton(args, padded, tokens, *start)
    assert (np.asarray(out[:, 40:]) == 0).all() and (np.asarray(lse[:, 40:]) == np.float32(MASK_VALUE)).all()
    assert (np.asarray(dq[:, 40:]) == 0).all() and (np.asarray(dk[:, :, 40:]) == 0).all()
    assert max(compare(args, padded, tokens).values()) < 1e-6
    later = tokens._replace(positions=tokens.positions + LENGTH)  # keys that all come after
    total = (jnp.ones_like(out), jnp.ones_like(lse))
    same = triton(args, tokens, later, total, start[1])
    for a, b in zip(same, (*total, *start[1])):
        np.testing.assert_array_equal(a, b)


def test_bf16_costs_no_more_than_rounding_the_weights(interpreted):
    """Weights and ds are rounded for the matrix instruction; everything else is float32."""
    args, tokens = case('mha', True, jnp.bfloat16)
    errors = compare(args, tokens, tokens)
    assert errors.pop('lse') < 1e-6
    assert max(errors.values()) < 2**-8, errors


def test_lengths_that_tiles_do_not_divide(interpreted):
    args, (positions, segments) = case('groups of three', True)
    q, k, v, g = args[0][:, :45], args[1][:, :, :77], args[2][:, :, :77], args[3][:, :45]
    tokens = Tokens(positions[:, 32:77], segments[:, 32:77]), Tokens(positions[:, :77], segments[:, :77])
    assert max(compare((q, k, v, g), *tokens, chunks=Chunks(45, 77)).values()) < 1e-6


def test_gathered_zigzag_shards(interpreted):
    """Keys out of order, values and gradients, by the switch in Attention. Interpreted kernels do not pass
    shard_map's check of varying axes; compiled ones do, below."""
    q, k, v, positions, segments, g = inputs(np.random.default_rng(4), 1, 64, 2, 1, HEAD_DIM, True)
    order = permutation('zigzag', 64, 2)
    heads, tokens = spec('BTNH'), spec('BT')

    config = lambda kernel: strategies.Attention('all_gather', chunks=Chunks(16, 16), kernel=kernel)

    def program(kernel):
        local = lambda *x: strategies.attend(*x, 'sequence', config(kernel))
        op = jax.shard_map(local, in_specs=(heads,) * 3 + (tokens,) * 2, out_specs=heads, check_vma=False)
        out, vjp = jax.vjp(lambda q, k, v: op(q, k, v, *args[3:5]), *args[:3])
        return (out, *vjp(args[5]))

    with jax.set_mesh(make_mesh((1, 1, 2, 1))):
        args = [jax.device_put(x[:, order], spec('BTNH'[:x.ndim])) for x in (q, k, v, positions, segments, g)]
        for a, b in zip(*(jax.jit(program, static_argnums=0)(kernel) for kernel in ('triton', 'xla'))):
            assert relative_error(a, b) < 1e-6


def test_unsupported_inputs_are_refused():
    with pytest.raises(ValueError, match="kernel 'cudnn' is not one of auto, xla, triton, mosaic"):
        strategies.Attention(kernel='cudnn')
    explicit = strategies.Attention(kernel='triton')
    with pytest.raises(ValueError, match="kernel triton cannot run here, because the platform is cpu; use"):
        strategies.check(explicit, 1, 4, 4)
    with jax.sharding.use_abstract_mesh(gpu('NVIDIA H100')):
        strategies.check(explicit, 1, 4, 4, 64, 'bfloat16')
        with pytest.raises(ValueError, match='head_dim 80 is not one of 16, 32, 64, 128, 256; use kernel'):
            strategies.check(explicit, 1, 4, 4, 80)
    (q, k, v, _), tokens = case('mha', False)
    attend = lambda q, k, v: triton_attention.attend(
        init_accumulator(q.astype(jnp.float32)), QueryBlock(q, tokens), KVBlock.create(k, v, tokens), CHUNKS)
    with pytest.raises(ValueError, match="head_dim .* got float32 and 12; use kernel 'xla'"):
        attend(q[..., :12], k[..., :12], v[..., :12])
    with pytest.raises(ValueError, match='takes bfloat16'):
        attend(q.astype(jnp.float8_e4m3fn), k, v)


def test_auto_is_the_fused_block_where_it_applies():
    assert str(choose('auto', 64, 'bfloat16')) == 'xla, because the platform is cpu'
    assert choose('triton', 64, 'bfloat16').kernel == 'triton'
    for kind, head_dim, dtype, kernel, reason in (
        ('NVIDIA A100-SXM4-80GB', 64, 'bfloat16', 'triton', 'the devices are NVIDIA A100-SXM4-80GB and'),
        ('NVIDIA H100', 80, 'bfloat16', 'xla', 'head_dim 80 is not one of'),
        ('NVIDIA H100', 128, 'float8_e4m3fn', 'xla', 'dtype float8_e4m3fn is not one of'),
        ('NVIDIA H100', 128, 'float32', 'xla', 'no matrix instruction multiplies float32'),
        ('AMD Instinct MI300X', 128, 'bfloat16', 'xla', 'made for CUDA'),
    ):
        with jax.sharding.use_abstract_mesh(gpu(kind)):
            chosen = choose('auto', head_dim, dtype)
            assert chosen.kernel == kernel and reason in chosen.reason


@pytest.mark.parametrize(('kind', 'head_dim'), [('NVIDIA A100-SXM4-80GB', 64), ('NVIDIA H200', 128)])
def test_auto_lowers_the_fused_block_for_cuda_without_a_card(kind, head_dim):
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    q, k = (jax.ShapeDtypeStruct((1, 256, heads, head_dim), jnp.bfloat16) for heads in (4, 2))

    def program(q, k, v, positions, segments):
        attend = lambda *x: strategies.attend(*x, positions, segments, None, strategies.Attention())
        out, vjp = jax.vjp(attend, q, k, v)
        return out, vjp(out)

    with jax.sharding.use_abstract_mesh(gpu(kind)):
        text = jax.jit(program).trace(q, k, k, tokens, tokens).lower(lowering_platforms=('cuda',)).as_text()
    assert all(f'name = "{name}"' in text for name in ('attend', 'attend_backward_q', 'attend_backward_kv'))


# Of the devices that this jax compiles for, the one with the least shared memory: newer jax has no L40S.
SMALL = 'a100:8' if hasattr(pallas_triton, 'get_gpu_info') else 'l40s:8'


@pytest.mark.parametrize('target', (SMALL, 'h100:8'))
@pytest.mark.parametrize('head_dim', (64, 128, 256))
def test_a_ring_compiles_for_gpus_within_their_shared_memory(target, head_dim):
    """What needs more than an SM of the target has is refused by the compiler. Keys and values still hide."""
    pytest.importorskip('jax_cuda12_plugin', reason="needs the extra 'aot-cuda'")
    target = targets.parse(target)
    mesh = targets.mesh(target, (1, 1, target.count, 1))
    size = {'B': 1, 'T': 512 * target.count, 'N': 8, 'K': 2, 'H': head_dim}
    with jax.set_mesh(mesh):
        config = strategies.Attention(chunks=Chunks(128, 128), kernel='triton')
        strategies.check(config, target.count, 8, 2)
        op = lambda *x, axis_name: strategies.attend(*x, axis_name, config)
        lowered = {direction: jax.jit(function).lower(*args) for direction, (function, args)
                   in programs.attention(op, mesh, size, jnp.bfloat16).items()}
    kernels_of = {'forward': ['attend'], 'backward': ['attend_backward_q', 'attend_backward_kv']}
    for direction, kernels in kernels_of.items():
        text = lowered[direction].compile(compiler_options=targets.options(target)).as_text()
        assert all(f'name = "{name}"' in lowered[direction].as_text() for name in kernels)
        transfers = hlo.Program(text).transfers(dict(mesh.shape))
        assert [t.name for t in transfers if not t.hidden] == []
