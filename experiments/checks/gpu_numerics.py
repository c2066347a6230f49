"""Numerics of gpu_report.py: values and gradients of every op and kernel against float64 on the host."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lct.eval.numerics import relative_error
from lct.ops import strategies
from lct.ops.blockwise_ffn import blockwise_ffn
from lct.ops.cross_entropy import cross_entropy_sum
from lct.ops.kernels import choice
from lct.ops.masks import Tokens, attention_mask
from lct.ops.strategies import KERNELS, Attention

ROUNDING = 4  # limit of bfloat16 results, in units of the error of rounding the exact result once
FLOAT32 = 1e-5  # limit of the relative error of float32 results


class Case(NamedTuple):
    """One attention problem. mask: 'causal', 'packed' or 'window'."""

    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    mask: str

    def __str__(self):
        return f'{self.dtype}, heads {self.heads}/{self.kv_heads} x {self.head_dim}, {self.mask}'


def attention_inputs(case, length):
    """q, k, v, cotangent, positions, segments of one row."""
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.standard_normal((1, length, n, case.head_dim), np.float32), case.dtype)
    index = np.arange(length, dtype=np.int32)[None]
    document = length // 3 if case.mask == 'packed' else length
    heads, kv_heads = case.heads, case.kv_heads
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), index % document, 1 + index // document


def with_gradients(attend):
    """Jitted (q, k, v, cotangent, positions, segments) -> out, dq, dk, dv."""
    def op(q, k, v, cotangent, positions, segments):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, positions, segments), q, k, v)
        return out, *pull(cotangent)

    return jax.jit(op)


def exact(op, *args):
    """op on the host in float64."""
    def widen(x):
        x = np.asarray(x)
        return x if x.dtype.kind in 'iub' else x.astype(np.float64)

    with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
        return jax.device_get(op(*jax.tree.map(widen, args)))


def error_text(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def compare(report, title, names, results, expected, dtype):
    """Report one row: the errors of results by name, and whether all are within their limits."""
    errors = {name: relative_error(a, b) for name, a, b in zip(names, results, expected)}
    limits = {name: _limit(value, dtype) for name, value in zip(names, expected)}
    passed = all(errors[name] <= limits[name] for name in errors)
    shown = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
    report.add('numerics', {'what': title, 'errors': errors, 'limits': limits, 'passed': passed},
               f'{"pass" if passed else "FAIL"}  {title}: {shown}')


def _limit(value, dtype):
    if dtype == 'float32':
        return FLOAT32
    # a scalar may happen to be rounded without error
    return ROUNDING * (relative_error(value.astype(dtype), value) if np.ndim(value) else 2**-9)


def numerics(args, report):
    """Compare every op and kernel with its dense version."""
    length = 48 if args.quick else 768
    dims = (16,) if args.quick else (64, 128, 256)
    shapes = [(4, 2, dim, mask) for dim in dims for mask in ('causal', 'packed', 'window')]
    shapes += [(4, 4, dims[-1], 'packed'), (4, 1, dims[-1], 'packed')]
    for dtype in ('float32', 'bfloat16'):
        for shape in shapes:
            check_attention(report, Case(dtype, *shape), length)
        check_loss(report, dtype, args.quick)
    check_ffn(report, args.quick)


def check_attention(report, case, length):
    """Every kernel on one case."""
    window = length // 5 if case.mask == 'window' else None
    inputs = attention_inputs(case, length)

    def dense(q, k, v, positions, segments):
        tokens = Tokens(positions, segments)
        mask = attention_mask(tokens, tokens, window)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    expected = exact(with_gradients(dense), *inputs)
    for kernel in KERNELS:
        title, attention = f'attention {kernel}, {case}', Attention(kernel=kernel)
        attend = lambda *x, attention=attention: strategies.attend(*x, None, attention, window)
        if reason := choice.obstacle(kernel, case.head_dim, case.dtype):
            report.add('numerics', {'what': title, 'error': reason}, f'none  {title}: {reason}')
            continue
        try:
            results = jax.device_get(with_gradients(attend)(*inputs))
        except Exception as error:  # a compiler that refuses is a result, not a reason to stop
            record = {'what': title, 'error': error_text(error)}
            if jax.default_backend() == 'gpu':
                record['passed'] = False
            report.add('numerics', record, f'none  {title}: {error_text(error)}')
        else:
            compare(report, title, ('out', 'dq', 'dk', 'dv'), results, expected, case.dtype)


def _random(dtype, first, *others):
    """A generator, activations of the first shape, and weights of the others."""
    rng = np.random.default_rng(1)
    arrays = [jnp.asarray(rng.standard_normal(first), dtype)]
    arrays += [jnp.asarray(rng.standard_normal(shape) / shape[-2]**0.5, dtype) for shape in others]
    return rng, *arrays


def _flat(result):
    """(value, *gradients) of a value_and_grad."""
    return result[0], *result[1]


def check_loss(report, dtype, quick):
    """The loss in chunks against the plain formula."""
    tokens, dim, vocab = (32, 16, 64) if quick else (1024, 512, 8192)
    rng, x, head = _random(dtype, (1, tokens, dim), (dim, vocab))
    targets = rng.integers(0, vocab, (1, tokens))
    mask = (rng.random((1, tokens)) < 0.9).astype(np.float32)

    def plain(x, head, targets, mask):
        logits = x @ head
        target_logits = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (mask * (jax.nn.logsumexp(logits, -1) - target_logits)).sum()

    chunked = jax.jit(lambda *x: cross_entropy_sum(*x, chunk=tokens // 4))
    gradients = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))
    compare(report, f'cross-entropy in chunks, {dtype}', ('value', 'dx', 'dhead'),
            _flat(jax.device_get(gradients(chunked)(x, head, targets, mask))),
            _flat(exact(gradients(plain), x, head, targets, mask)), dtype)


def check_ffn(report, quick):
    """The FFN in chunks against the plain formula, in float32.

    Its rounding in bfloat16 is the rounding of plain matmuls, which chunks do not change.
    """
    tokens, dim, hidden = (32, 16, 32) if quick else (1024, 512, 1024)
    _, x, *weights = _random('float32', (1, tokens, dim), (dim, hidden), (dim, hidden), (hidden, dim))
    swiglu = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down
    chunked = lambda x, *w: (blockwise_ffn(lambda y: swiglu(y, *w), x, 4) ** 2).sum()
    plain = lambda *x: (swiglu(*x) ** 2).sum()
    gradients = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 3)))
    with jax.default_matmul_precision('highest'):
        results = jax.device_get(gradients(chunked)(x, *weights))
    compare(report, 'FFN in chunks, float32', ('value', 'dx', 'dgate', 'ddown'), _flat(results),
            _flat(exact(gradients(plain), x, *weights)), 'float32')
