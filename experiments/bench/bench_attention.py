"""Time and memory of attention over a ring: ours, BAIR's, dense JAX and PyTorch, side by side in one process.

    python experiments/bench/bench_attention.py --devices 8 --lengths 8192 16384 --rounds 5 \\
        --contestants lct:ring bair:256 bair:128 dense torch

Contestants take turns within every round, so a ratio compares runs that are seconds apart; the table gives
the median ratio against the first contestant and its spread over the rounds. On a CPU the steady figure is
CPU seconds; with one core per virtual device wall time also shows the balance of the work.

    lct:STRATEGY[:QUERY_CHUNK,KEY_CHUNK]   ring, all_gather, ... (lct/ops/strategies.py), zigzag
    bair:QUERY_CHUNK[,KEY_CHUNK]           PyPI ringattention 0.1.2, contiguous, float32 logits, K/V repeated
                                           to all heads because it has no GQA. It asks jax.lib.xla_bridge for
                                           the backend on import, which newer jax lacks: one line puts it back
    dense                                  jax.nn.dot_product_attention on one device
    torch                                  torch scaled_dot_product_attention, as many threads as cores

FLOPs count the unmasked half of the square: 2 * B * N * S^2 * H forward, 3.5 times that with backward.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import time
import types


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--contestants', nargs='+', default=['lct:ring', 'bair:256', 'bair:128'])
    parser.add_argument('--devices', type=int, default=8)
    parser.add_argument('--lengths', type=int, nargs='+', default=[8192], help='tokens of the whole sequence')
    parser.add_argument('--directions', nargs='+', default=['forward', 'both'], choices=['forward', 'both'])
    parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
    parser.add_argument('--heads', type=int, default=8)
    parser.add_argument('--kv-heads', type=int, default=8)
    parser.add_argument('--head-dim', type=int, default=64)
    parser.add_argument('--documents', type=int, default=1,
                        help='documents packed into the sequence (lct only)')
    parser.add_argument('--layout', default='zigzag', choices=['contiguous', 'zigzag', 'striped'])
    parser.add_argument('--node-size', type=int, default=1,
                        help='devices of a node, for two-level strategies')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--compile-only', action='store_true', help='memory figures alone')
    parser.add_argument('--output', type=pathlib.Path, help='append one line per measurement to this file')
    return parser.parse_args()


ARGS = arguments()
os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + f' --xla_force_host_platform_device_count={ARGS.devices}')

import jax  # noqa: E402  the number of devices comes first
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from lct.cli.main import check_positive, run_script  # noqa: E402
from lct.data.layout import permutation  # noqa: E402
from lct.ops.blockwise_attention import Chunks  # noqa: E402
from lct.sharding import make_mesh, spec  # noqa: E402
from lct.text import table  # noqa: E402

HEADER = ('contestant', 'CPU s', 'wall s', 'first/this CPU', 'first/this wall', '% peak', 'temp MiB')


class Case:
    """One problem: host arrays in the order of the text, with positions and segments for the mask."""

    def __init__(self, length):
        rng = np.random.default_rng(0)
        heads, kv, dim = ARGS.heads, ARGS.kv_heads, ARGS.head_dim
        draw = lambda n: rng.standard_normal((1, length, n, dim), np.float32)
        self.q, self.k, self.v, self.cotangent = draw(heads), draw(kv), draw(kv), draw(heads)
        self.positions = np.arange(length, dtype=np.int32)[None] % (length // ARGS.documents)
        self.segments = 1 + np.arange(length, dtype=np.int32)[None] // (length // ARGS.documents)
        self.flops = 2 * heads * length**2 * dim / ARGS.documents


def with_gradients(attention, direction):
    """attention(q, k, v, *rest) -> jittable (q, k, v, cotangent, *rest) -> out, or the three gradients."""
    if direction == 'forward':
        return lambda q, k, v, cotangent, *rest: attention(q, k, v, *rest)

    def gradients(q, k, v, cotangent, *rest):
        return jax.vjp(lambda *x: attention(*x, *rest), q, k, v)[1](cotangent)

    return gradients


def lct(case, direction, strategy='ring', chunks=None):
    from lct.ops import strategies

    order = permutation(ARGS.layout, case.q.shape[1], ARGS.devices)
    mesh = make_mesh((1, 1, ARGS.devices, 1))
    chunks = Chunks(*map(int, chunks.split(','))) if chunks else Chunks()
    split = strategies.Attention(strategy, ARGS.node_size, chunks)
    heads, tokens = spec('BTNH'), spec('BT')

    def attention(q, k, v, positions, segments):
        local = lambda *x: strategies.attend(*x, 'sequence', split)
        return jax.shard_map(local, in_specs=(heads,) * 3 + (tokens,) * 2, out_specs=heads)(
            q, k, v, positions, segments)

    with jax.set_mesh(mesh):
        place = lambda x, dtype, p: jax.device_put(jnp.asarray(x[:, order], dtype), p)
        args = [place(x, ARGS.dtype, heads) for x in (case.q, case.k, case.v, case.cotangent)]
        args += [place(x, jnp.int32, tokens) for x in (case.positions, case.segments)]
        program = jax.jit(with_gradients(attention, direction)).lower(*args).compile()
    return program, args


def bair(case, direction, chunks='256'):
    import jax.extend.backend
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    jax.lib.xla_bridge = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)  # the shim
    from ringattention import ringattention_jax

    chunks = [int(c) for c in chunks.split(',')]
    settings = {
        'causal_block_size': 1, 'query_chunk_size': chunks[0], 'key_chunk_size': chunks[-1],
        'dtype': jnp.float32,
        'deterministic': True, 'dropout_rng': None, 'attn_pdrop': 0.0, 'precision': None,
        'prevent_cse': False,
        'policy': jax.checkpoint_policies.nothing_saveable,
    }
    mesh = jax.make_mesh((ARGS.devices,), ('sp',), axis_types=(AxisType.Auto,))

    def local(q, k, v):
        return ringattention_jax(q, k, v, None, None, None, 'sp', True, settings)

    split = P(None, 'sp')
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(split,) * 3, out_specs=split, check_vma=False)
    group = ARGS.heads // ARGS.kv_heads

    def attention(q, k, v):
        return sharded(q, jnp.repeat(k, group, 2), jnp.repeat(v, group, 2))

    args = [jax.device_put(jnp.asarray(x, ARGS.dtype), NamedSharding(mesh, split))
            for x in (case.q, case.k, case.v, case.cotangent)]
    return jax.jit(with_gradients(attention, direction)).lower(*args).compile(), args


def dense(case, direction):
    attention = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    args = [jnp.asarray(x, ARGS.dtype) for x in (case.q, case.k, case.v, case.cotangent)]
    return jax.jit(with_gradients(attention, direction)).lower(*args).compile(), args


def torch(case, direction):
    import torch

    torch.set_num_threads(os.cpu_count())
    args = [torch.tensor(x).to(getattr(torch, ARGS.dtype)).transpose(1, 2).contiguous()
            for x in (case.q, case.k, case.v, case.cotangent)]
    attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=ARGS.heads != ARGS.kv_heads)

    def program(q, k, v, cotangent):
        if direction == 'forward':
            with torch.no_grad():
                return attend(q, k, v)
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        return torch.autograd.grad(attend(q, k, v), (q, k, v), cotangent)

    return program, args


BUILDERS = {'lct': lct, 'bair': bair, 'dense': dense, 'torch': torch}


def timed(program, args):
    """(CPU seconds of the whole process, wall seconds) of one call."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    cpu, wall = used(), time.perf_counter()
    jax.block_until_ready(program(*args))
    return used() - cpu, time.perf_counter() - wall


def matmul_peak():
    """A matmul of 2 * 2048^3 FLOPs, timed between the rounds: the float32 peak of this machine."""
    x = jnp.ones((2048, 2048), jnp.float32)
    return jax.jit(lambda x: x @ x).lower(x).compile(), [x], 2 * 2048**3


def temporaries(program):
    """MiB of temporaries per device as the compiler reports them; None for a program it did not compile."""
    if not hasattr(program, 'memory_analysis'):
        return None
    stats = program.memory_analysis()
    return None if stats is None else round(stats.temp_size_in_bytes / 2**20, 2)


def check_args():
    """Refuse flags that fit no contestant."""
    check_positive(ARGS, 'lengths', 'devices', 'heads', 'kv_heads', 'head_dim', 'documents', 'rounds')
    if unknown := [name for name in ARGS.contestants if name.split(':')[0] not in BUILDERS]:
        raise ValueError(f'contestant {unknown[0]!r} must begin with one of {", ".join(BUILDERS)}')
    if ARGS.heads % ARGS.kv_heads:
        raise ValueError(f'--heads {ARGS.heads} must be a multiple of --kv-heads {ARGS.kv_heads}')
    for length in ARGS.lengths:
        if length % ARGS.documents:
            raise ValueError(f'--lengths {length} must be a multiple of --documents {ARGS.documents}')
        permutation(ARGS.layout, length, ARGS.devices)


def main():
    check_args()
    peak = matmul_peak()
    timed(*peak[:2])
    for length in ARGS.lengths:
        case = Case(length)
        for direction in ARGS.directions:
            built = {}
            for name in ARGS.contestants:
                kind, *options = name.split(':')
                built[name] = BUILDERS[kind](case, direction, *options)
            times, peaks = ({name: [] for name in built}, []) if ARGS.compile_only else measure(built, peak)
            flops = case.flops * (1.0 if direction == 'forward' else 3.5)
            show(length, direction, built, times, flops, peaks)


def measure(built, peak):
    """({name: (CPU, wall) seconds by round}, FLOP/s of the matmul by round), after a warm-up call."""
    program, args, flops = peak
    times, peaks = {name: [] for name in built}, []
    for name in built:
        timed(*built[name])
    for number in range(ARGS.rounds):
        order = list(built)
        for name in order[number % len(order):] + order[:number % len(order)]:
            times[name].append(timed(*built[name]))
        peaks.append(flops / timed(program, args)[0])
    return times, peaks


def summary(times, first, flops, peak):
    """A contestant's figures for the JSON. first: times of the first contestant. peak: FLOP/s of a core."""
    ratios = [[a[i] / b[i] for a, b in zip(first, times)] for i in (0, 1)]
    cpu, wall = (statistics.median(t[i] for t in times) for i in (0, 1))
    return {'cpu_s': cpu, 'wall_s': wall, 'cpu_ratio': statistics.median(ratios[0]),
            'wall_ratio': statistics.median(ratios[1]), 'cpu_ratios': ratios[0], 'wall_ratios': ratios[1],
            'percent_of_peak': 100 * flops / cpu / peak, 'peak_gflops_per_core': peak / 1e9,
            'machine': platform.processor() or platform.machine(), 'jax': jax.__version__}


def cells(row):
    """A row of the JSON as a line of the table."""
    memory = '-' if row['temp_mib'] is None else row['temp_mib']
    if 'cpu_s' not in row:
        return row['contestant'], *5 * ('-',), memory
    spread = lambda r: f'{statistics.median(r):.2f} ({min(r):.2f}-{max(r):.2f})'
    return (row['contestant'], f'{row["cpu_s"]:.2f}', f'{row["wall_s"]:.2f}', spread(row['cpu_ratios']),
            spread(row['wall_ratios']), f'{row["percent_of_peak"]:.0f}%', memory)


def show(length, direction, built, times, flops, peaks):
    """Print one table, with ratios against the first contestant, and append its rows to the JSON."""
    print(f'\nS {length}, {direction}, {ARGS.dtype}, heads {ARGS.heads}/{ARGS.kv_heads} x {ARGS.head_dim}, '
          f'{ARGS.devices} devices, {ARGS.layout}, {ARGS.documents} document(s)')
    settings = {key: value for key, value in vars(ARGS).items()
                if key not in ('output', 'lengths', 'directions', 'contestants')}
    rows = []
    for name, (program, _) in built.items():
        row = {'contestant': name, 'length': length, 'direction': direction, 'temp_mib': temporaries(program),
               **settings}
        if times[name]:
            row |= summary(times[name], times[next(iter(built))], flops, statistics.median(peaks))
        rows.append(row)
    print(table(HEADER, map(cells, rows)), flush=True)
    if ARGS.output:
        with ARGS.output.open('a') as file:
            file.writelines(json.dumps(row) + '\n' for row in rows)


if __name__ == '__main__':
    run_script(main)
