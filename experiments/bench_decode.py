"""Decoding on a ring: is it the forward pass to the last digit, and what does a token cost?

    python experiments/bench_decode.py --check     1,000 decoded tokens against a plain forward, on every mesh
    python experiments/bench_decode.py             a token at 32K on 8 devices next to one at 4K on one, interleaved

Virtual devices share the cores of the machine: eight of them do eight times the work of one on the same cores, so
that the ratio to look at is per device, the time on 8 over 8 times the time on one.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import time

import jax

jax.config.update('jax_num_cpu_devices', 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from lct import sharding  # noqa: E402
from lct.data import layout  # noqa: E402
from lct.models import decode, llama  # noqa: E402
from lct.models.kv_cache import KVCache, empty_cache  # noqa: E402
from lct.models.session import Session  # noqa: E402
from lct.ops import rope  # noqa: E402
from lct.ops.blockwise_attention import Chunks  # noqa: E402
from lct.ops.strategies import Attention  # noqa: E402

MESHES = [(1, 1, 1, 1), (1, 1, 8, 1), (2, 1, 4, 1), (1, 1, 4, 2)]
SMALL = llama.LlamaConfig(vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
                          head_dim=8, rope=rope.RopeConfig(theta=10000.0))
BENCH = llama.LlamaConfig(vocab_size=1024, embed_dim=256, mlp_dim=768, num_layers=4, num_heads=8, num_kv_heads=4,
                          head_dim=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1e6))
MEMORY = llama.Memory(remat='none', attention=Attention(chunks=Chunks(32, 32)), ffn_chunks=2)
LENGTHS, NEW, SEQ_LEN = (50, 3, 17, 200), 1000, 1280
STEPS = 16


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--out', type=pathlib.Path, help='JSON of the figures')
    args = parser.parse_args()
    result = check() if args.check else bench(args.rounds)
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + '\n')


def on(degrees):
    return contextlib.nullcontext() if set(degrees) == {1} else jax.set_mesh(sharding.make_mesh(degrees))


def check():
    """The largest difference of any logit from the forward's, after prompts of unequal lengths."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, llama.init(SMALL, jax.random.key(0)))
    whole = rng.integers(1, SMALL.vocab_size, (len(LENGTHS), SEQ_LEN)).astype(np.int32)
    expected = np.asarray(llama.logits(params, SMALL, whole))
    at = np.array(LENGTHS)[:, None] - 1 + np.arange(NEW + 1)
    expected = np.take_along_axis(expected, at[:, :, None], 1)
    forced = np.take_along_axis(whole, at[:, 1:], 1)
    errors = {}
    for degrees in MESHES:
        for piece in (None, 64):
            with on(degrees):
                placed = jax.tree.map(sharding.put, params, llama.specs(SMALL))
                indices = layout.permutation('striped', SEQ_LEN, degrees[2])
                session = Session(placed, SMALL, len(LENGTHS), SEQ_LEN, indices, MEMORY)
                session.read([row[:n].tolist() for row, n in zip(whole, LENGTHS)], piece)
                got = follow(placed, session.cache, session.slot_of, sharding.put(forced, sharding.spec('BD')),
                             sharding.put(session.lengths, sharding.spec('B')), session.tables)
                first = np.abs(np.asarray(session.logits) - expected[:, 0]).max()
                later = np.abs(np.asarray(got).swapaxes(0, 1) - expected[:, 1:]).max()
            name = f"{','.join(map(str, degrees))} " + ('whole' if piece is None else f'pieces of {piece}')
            errors[name] = {'first': float(first), f'{NEW} decoded': float(later)}
            print(f'{name:24s} prefill {first:.1e}   {NEW} decoded tokens {later:.1e}', flush=True)
    return errors


@jax.jit
def follow(params, cache, slot_of, forced, lengths, tables):
    """Logits [n, B, V] after each of the forced tokens [B, n]."""
    params = decode.gathered(params, SMALL)

    def step(cache, inputs):
        token, i = inputs
        positions = lengths + i
        slots = decode.rows_at(slot_of, positions)
        return decode.decode_step(params, SMALL.architecture(), cache, token, positions, slots, tables)

    return lax.scan(step, cache, (forced.T, jnp.arange(forced.shape[1])))[1]


def bench(rounds):
    """Milliseconds a token, rounds interleaved."""
    sides = {'1 device, 4K': side((1, 1, 1, 1), 4096), '8 devices, 32K': side((1, 1, 8, 1), 32768)}
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            times[name].append(run())
    one, eight = times.values()
    ratios = sorted(b / a for a, b in zip(one, eight))
    for name, values in times.items():
        print(f'{name:16s} {statistics.median(values):.2f} ms a token ({min(values):.2f} to {max(values):.2f})')
    ratio = statistics.median(ratios)
    print(f'ratio {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), per device {ratio / 8:.2f}; '
          f'{os.cpu_count()} cores')
    return {'ms': times, 'ratio': ratio, 'per_device': ratio / 8, 'cores': os.cpu_count(), 'jax': jax.__version__}


def side(degrees, length):
    """A function that decodes STEPS tokens behind a full cache -> milliseconds a token."""
    with on(degrees):
        params = llama.init(BENCH, jax.random.key(0))
        tables = rope.make_tables(BENCH.rope, BENCH.head_dim, length)
        indices = layout.permutation('striped', length, degrees[2]).astype(np.int32)
        positions = sharding.put(indices[None], sharding.spec('BS'))
        slot_of = sharding.put(layout.inverse(indices), jax.P(None))
        row = lambda x: sharding.put(np.array([x], np.int32), sharding.spec('B'))
        start, limits, stop = row(length - STEPS - 1), *decode.place_limits(np.array([STEPS], np.int32),
                                                                            np.zeros(BENCH.vocab_size, bool))

        @jax.jit
        def filled(positions):
            cache = empty_cache(BENCH, positions, jnp.float32)
            return KVCache(cache.k, cache.v, positions, (positions < length - STEPS).astype(jnp.int32))

        logits = sharding.put(np.zeros((1, BENCH.vocab_size), np.float32), sharding.spec('BV'))
        step = jax.jit(decode.decode, static_argnames=('config', 'max_new_tokens'), donate_argnames='cache')

        def run():
            with on(degrees):
                cache = jax.block_until_ready(filled(positions))
                begin = time.perf_counter()
                jax.block_until_ready(step(params, BENCH.architecture(), cache, logits, start, slot_of, limits, stop,
                                           tables, STEPS))
                return (time.perf_counter() - begin) * 1e3 / (STEPS - 1)

        run()
        return run


if __name__ == '__main__':
    main()
