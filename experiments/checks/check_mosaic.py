"""The Mosaic kernels against plain XLA, interpreted on this machine: no GPU is needed.

    python experiments/checks/check_mosaic.py                       every case, some minutes
    python experiments/checks/check_mosaic.py --cases packed        one of them

jax simulates warpgroups, copies and barriers, and reports a deadlock or a barrier that is left behind. Blocks
are smaller than on a GPU, so that short sequences have several. Layouts in registers are not simulated; those
the compiler checks (tests/test_mosaic_attention.py). The exit status is 1 if an error is beyond rounding.
"""

import argparse
import functools
import sys
import time

from lct.cli.main import run_script

NAMES = ('out', 'lse', 'dq', 'dk', 'dv')
LIMITS = dict.fromkeys(NAMES, 2**-7) | {'lse': 1e-6}  # weights and ds are rounded to bfloat16
QUERIES, KEYS, BLOCK = 40, 72, 32  # no multiples of a block


def cases():
    """name -> (positions and segments of the queries, of the keys, window, whether blocks came before)."""
    import numpy as np

    keys, one = np.arange(KEYS), np.ones(KEYS, int)
    packed = np.repeat((1, 2, 3, 0), (20, 30, 15, 7))
    last = slice(KEYS - QUERIES, None)
    zigzag = np.concatenate([np.arange(KEYS, KEYS + QUERIES // 2), np.arange(QUERIES // 2)])
    return {
        'causal': ((keys[last], one[last]), (keys, one), None, False),
        'packed': ((keys[last], packed[last]), (keys, packed), None, False),
        'window': ((keys[last], one[last]), (keys, one), 17, False),
        'ring step': ((zigzag, one[:QUERIES]), (keys, one), None, True),
        'nothing to attend to': ((keys[:QUERIES], one[:QUERIES]), (keys + QUERIES, one), None, True),
    }


@functools.cache
def program(kernel, window, group, head_dim):
    """Jitted (seed, query tokens, key tokens, share of an earlier block) -> results as NAMES."""
    import jax
    import jax.numpy as jnp

    from lct.ops.blockwise_attention import Chunks, KVBlock, QueryBlock, Residuals
    from lct.ops.context_parallel import inner_block

    block, chunks = inner_block(kernel), Chunks(16, 16)

    @jax.jit
    def run(key, queries, tokens, before):
        shapes = [(1, QUERIES, 1, group, head_dim)] * 2 + [(1, 1, KEYS, head_dim)] * 2
        q, dout, k, v = (jax.random.normal(key, shape, jnp.bfloat16)
                         for key, shape in zip(jax.random.split(key, 4), shapes))
        wide = lambda x: before * x.astype(jnp.float32)
        lse = jnp.where(before > 0, wide(q[..., 0]), -1e30)
        kv = KVBlock.create(k, v, tokens)
        out, lse = block.attend((wide(dout), lse), QueryBlock(q, queries), kv, chunks, window)
        residuals = Residuals(dout, lse, jnp.sum(dout.astype(jnp.float32) * out, -1))
        dq, dk, dv = block.attend_backward((block.init_dq(q), wide(k), wide(v)), QueryBlock(q, queries), kv,
                                           residuals, chunks, window)
        return out, lse, block.finalize_dq(dq, q), dk, dv

    return run


def interpret():
    """Let Mosaic kernels be interpreted, in small blocks."""
    from jax.experimental.pallas import mosaic_gpu

    from lct.ops.kernels import mosaic_attention, mosaic_tiles

    try:
        params = mosaic_gpu.InterpretGPUParams
    except AttributeError:  # jax 0.10
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as params
    mosaic_tiles.INTERPRET = params()
    mosaic_tiles.BLOCK, mosaic_tiles.ROWS = BLOCK, BLOCK // 2
    mosaic_attention.FORWARD, mosaic_attention.BACKWARD = BLOCK, BLOCK // 2


def check(name, case, group, head_dim):
    """Whether the errors of a case, relative to the largest number, are within their limits; printed."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lct.ops.masks import Tokens

    queries, keys, window, continued = case
    tokens = [Tokens(*(jnp.asarray(x, jnp.int32)[None] for x in side)) for side in (queries, keys)]
    start = time.monotonic()
    ours, theirs = (jax.device_get(program(kernel, window, group, head_dim)(
        jax.random.key(1), *tokens, jnp.float32(continued))) for kernel in ('mosaic', 'xla'))
    masked = lambda x: np.where(x < -1e29, 0, x)  # lse of rows without keys
    errors = {key: float(np.abs(masked(a) - masked(b)).max() / max(np.abs(masked(b)).max(), 1e-6))
              for key, a, b in zip(NAMES, ours, theirs)}
    passed = all(errors[key] <= LIMITS[key] for key in NAMES)
    print(f'{"pass" if passed else "FAIL"}  {name}, {group} query heads x {head_dim}: '
          f'{", ".join(f"{key} {error:.1e}" for key, error in errors.items())}; '
          f'{time.monotonic() - start:.0f} s', flush=True)
    return passed


def run():
    names = list(cases())
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', choices=names, default=names)
    parser.add_argument('--group', type=int, default=2, help='query heads that share a key/value head')
    parser.add_argument('--head-dim', type=int, default=64)
    args = parser.parse_args()
    interpret()
    results = [check(name, cases()[name], args.group, args.head_dim) for name in args.cases]
    print(f'{results.count(False)} of {len(results)} failed')
    sys.exit(results.count(False) > 0)


if __name__ == '__main__':
    run_script(run)
