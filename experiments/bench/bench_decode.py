"""Decoding on a ring: its equality with the forward pass, and the cost of a token.

    python experiments/bench/bench_decode.py --check     1,000 decoded tokens against a forward, on every mesh
    python experiments/bench/bench_decode.py             32K on 8 devices beside 4K on one, interleaved
    python experiments/bench/bench_decode.py --caches    SmolLM2's shape with a cache in float32 and in int8
    ... --output experiments/results/decode.json            keeps the figures of either

A ring of 8 holds 4K of the 32K tokens on each device and reads all weights there, as one device does at 4K.
Virtual devices share the cores of the machine, so eight take eight times as long even if nothing is lost. The
cost of the split is therefore the ratio per device: the time of the ring over 8 times the time of one device.
A second reference is 8 devices that decode a 4K text each: the same work and load on the same cores and
caches, and nothing to merge.

The cost of a token is the difference between long and short answers, over the tokens between them. What an
answer costs once, above all gathering the weights that are split over the ring, is reported separately.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import time

import jax

from lct.cli.main import run_script

jax.config.update('jax_num_cpu_devices', 8)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402

from lct import sharding  # noqa: E402
from lct.data import layout  # noqa: E402
from lct.models import decode, llama, row_linear  # noqa: E402
from lct.models.kv_cache import empty_cache  # noqa: E402
from lct.models.session import Session  # noqa: E402
from lct.ops import rope  # noqa: E402
from lct.ops.blockwise_attention import Chunks  # noqa: E402
from lct.ops.strategies import Attention  # noqa: E402

MESHES = [(1, 1, 1, 1), (1, 1, 8, 1), (2, 1, 4, 1), (1, 1, 4, 2)]
SMALL = llama.LlamaConfig(vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2,
                          head_dim=8, rope=rope.RopeConfig(theta=10000.0))
BENCH = llama.LlamaConfig(vocab_size=1024, embed_dim=256, mlp_dim=768, num_layers=4, num_heads=8,
                          num_kv_heads=4,
                          head_dim=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1e6))
SMOLLM2 = llama.LlamaConfig(vocab_size=49152, embed_dim=576, mlp_dim=1536, num_layers=30, num_heads=9,
                            num_kv_heads=3, head_dim=64, tie_embeddings=True,
                            rope=rope.RopeConfig(theta=1e5))
MEMORY = llama.Memory(remat='none', attention=Attention(chunks=Chunks(32, 32)), ffn_chunks=2)
LENGTHS, NEW, SEQ_LEN = (50, 3, 17, 200), 1000, 1280
STEPS = 33  # tokens of a long answer


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--caches', action='store_true')
    parser.add_argument('--lengths', type=int, nargs='+', default=[2048, 8192], help='of --caches, in tokens')
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--output', type=pathlib.Path, help='JSON file, of which this run replaces its half')
    args = parser.parse_args()
    if args.check:
        result = {'exact': check()}
    elif args.caches:
        result = {'caches': bench_caches(args.lengths, args.rounds)}
    else:
        result = {'speed': bench(args.rounds)}
    if args.output:
        kept = json.loads(args.output.read_text()) if args.output.is_file() else {}
        args.output.write_text(json.dumps({**kept, **result}, indent=1) + '\n')


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
        for chunk in (None, 64):
            with on(degrees):
                placed = jax.tree.map(sharding.put, params, llama.specs(SMALL))
                indices = layout.permutation('striped', SEQ_LEN, degrees[2])
                session = Session(placed, SMALL, len(LENGTHS), SEQ_LEN, indices, MEMORY)
                session.read([row[:n].tolist() for row, n in zip(whole, LENGTHS)], chunk)
                got = follow(placed, session.cache, session.slot_of,
                             sharding.put(forced, sharding.spec('BD')),
                             sharding.put(session.lengths, sharding.spec('B')), session.tables)
                first = np.abs(np.asarray(session.logits) - expected[:, 0]).max()
                later = np.abs(np.asarray(got).swapaxes(0, 1) - expected[:, 1:]).max()
            name = f"{','.join(map(str, degrees))} " + ('whole' if chunk is None else f'pieces of {chunk}')
            errors[name] = {'first': float(first), f'{NEW} decoded': float(later)}
            print(f'{name:24s} prefill {first:.1e}   {NEW} decoded tokens {later:.1e}', flush=True)
    return errors


@jax.jit
def follow(params, cache, slot_of, forced, lengths, tables):
    """Logits [n, B, V] after each of the forced tokens [B, n]."""
    params = row_linear.for_decoding(params, SMALL)

    def step(cache, inputs):
        token, i = inputs
        positions = lengths + i
        slots = decode.rows_at(slot_of, positions)
        return decode.decode_step(params, SMALL.architecture(), cache, token, positions, slots, tables)

    return lax.scan(step, cache, (forced.T, jnp.arange(forced.shape[1])))[1]


def bench(rounds):
    """Milliseconds per token and once per answer, rounds interleaved, ratios within a round."""
    sides = {'1 device, 4K': side((1, 1, 1, 1), 4096), '8 devices, 32K': side((1, 1, 8, 1), 32768),
             '8 devices, 4K each': side((8, 1, 1, 1), 4096)}
    measured = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            measured[name].append(run())
    tokens, once = ({name: [pair[i] for pair in pairs] for name, pairs in measured.items()} for i in (0, 1))
    for name, values in tokens.items():
        print(f'{name:18s} {statistics.median(values):6.2f} ms per token ({min(values):.2f} to '
              f'{max(values):.2f}), {statistics.median(once[name]):.1f} ms once per answer')
    one, ring, apart = (np.array(values) for values in tokens.values())
    ratios = {'per_device': ring / one / 8, 'to_eight_apart': ring / apart}
    for name, values in ratios.items():
        print(f'{name:18s} {np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})')
    return {'ms_a_token': tokens, 'ms_once': once, 'cores': os.cpu_count(), 'jax': jax.__version__,
            **{name: float(np.median(values)) for name, values in ratios.items()}}


def bench_caches(lengths, rounds):
    """Milliseconds and CPU milliseconds per token with full caches in float32 and int8, rounds interleaved,
    ratios within a round."""
    out = {'cores': os.cpu_count(), 'jax': jax.__version__}
    for length in lengths:
        sides = {dtype: side((1, 1, 1, 1), length, SMOLLM2, dtype) for dtype in ('float32', 'int8')}
        wall, cpu = ({dtype: [] for dtype in sides} for _ in range(2))
        for i in range(rounds):
            for dtype in sorted(sides, reverse=i % 2):
                begin = time.process_time()
                wall[dtype].append(sides[dtype]()[0])
                cpu[dtype].append((time.process_time() - begin) * 1e3 / (STEPS + 1))
        ratios = [np.array(times['int8']) / times['float32'] for times in (wall, cpu)]
        for dtype in sides:
            print(f'{length} tokens, {dtype:8s} {statistics.median(wall[dtype]):6.1f} ms per token, '
                  f'{statistics.median(cpu[dtype]):6.1f} CPU ms', flush=True)
        for name, values in zip(('time', 'CPU time'), ratios):
            print(f'{length} tokens, int8 / float32, {name}: {np.median(values):.2f} ({values.min():.2f} to '
                  f'{values.max():.2f})', flush=True)
        out[str(length)] = {'ms_a_token': wall, 'cpu_ms_a_token': cpu,
                            'int8_to_float32': [float(np.median(values)) for values in ratios]}
    return out


def side(degrees, length, config=BENCH, dtype='float32'):
    """A function that decodes with full caches of a dtype, one row of `length` tokens per replica.

    It returns (milliseconds per token, milliseconds once per answer).
    """
    rows = degrees[0]
    with on(degrees):
        params = llama.init(config, jax.random.key(0))
        tables = rope.make_tables(config.rope, config.head_dim, length)
        indices = layout.permutation('striped', length, degrees[2]).astype(np.int32)
        positions = sharding.put(np.tile(indices, (rows, 1)), sharding.spec('BS'))
        slot_of = sharding.put(layout.inverse(indices), jax.P(None))
        row = lambda x: sharding.put(np.full(rows, x, np.int32), sharding.spec('B'))
        start, stop = row(length - STEPS - 1), np.zeros(config.vocab_size, bool)
        filled = jax.jit(lambda positions: empty_cache(config, positions, dtype).replace(
            segment_ids=(positions < length - STEPS).astype(jnp.int32)))
        cache = filled(positions)
        logits = sharding.put(np.zeros((rows, config.vocab_size), np.float32), sharding.spec('BV'))
        step = jax.jit(decode.decode, static_argnames='config', donate_argnames='cache')

    def seconds(count):
        """Seconds of an answer of count tokens, which overwrites the slots of the previous answer."""
        nonlocal cache
        request = decode.place_request(np.full(rows, count, np.int32), stop, STEPS)
        jax.block_until_ready((cache, request))
        begin = time.perf_counter()
        cache, tokens, _ = step(params, config.architecture(), cache, logits, start, slot_of, request, tables)
        jax.block_until_ready((cache, tokens))
        return time.perf_counter() - begin

    def run():
        with on(degrees):
            short, long = seconds(1), seconds(STEPS)
            return (long - short) * 1e3 / (STEPS - 1), short * 1e3

    run()
    return run


if __name__ == '__main__':
    run_script(main)
