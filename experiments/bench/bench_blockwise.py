"""Time and memory of the loss and of the FFN in chunks: ours, the plain formula and others, side by side.

    python experiments/bench/bench_blockwise.py --part loss --output experiments/results/bench_blockwise.json
    python experiments/bench/bench_blockwise.py --part ffn --output experiments/results/bench_blockwise.json

Value of the loss of x [1, T, D] and head [D, V], with both gradients:
    whole              all logits at once
    lct:CHUNK          lct.ops.cross_entropy
    checkpoint:CHUNK   a scan over chunks whose backward makes the logits once more
FFN (SwiGLU with residual, --layers of them), with the gradients of input and weights:
    whole              all tokens at once
    lct:CHUNK          lct.ops.blockwise_ffn
    bair:CHUNK         blockwise_feedforward of PyPI ringattention 0.1.2 around a rematerialised linen module.
                       On import it needs jax.lib.xla_bridge, which newer jax lacks: one line restores it

One device, float32. Contestants take turns within every round, so a ratio compares runs that are seconds
apart; the table gives the median of this / first contestant and its spread over the rounds: below 1 is
better. CPU seconds are the steady figure on a busy machine. The compiler reports the temporaries; 'error'
is the largest relative difference of loss or gradient (norm) from the first contestant's.
"""

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import sys
import time
import types

import jax
import jax.numpy as jnp
from jax import lax

from lct.cli.main import check_positive, run_script
from lct.ops.blockwise_ffn import blockwise_ffn
from lct.ops.cross_entropy import cross_entropy_sum
from lct.text import table

CONTESTANTS = {
    'loss': ['whole', 'lct:256', 'lct:512', 'checkpoint:512'],
    'ffn': ['whole', 'lct:512', 'bair:512'],
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--part', required=True, choices=list(CONTESTANTS))
    parser.add_argument('--contestants', nargs='+', help=f'default: {CONTESTANTS}')
    parser.add_argument('--tokens', type=int, default=4096, help='tokens of the timed runs')
    parser.add_argument('--memory-tokens', type=int, default=16384,
                        help='tokens of the programs that are only compiled')
    parser.add_argument('--embed-dim', type=int, default=512)
    parser.add_argument('--mlp-dim', type=int, default=2048)
    parser.add_argument('--layers', type=int, default=4)
    parser.add_argument('--vocab-size', type=int, default=128256)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=pathlib.Path,
                        help='JSON file for the table, under the name of --part')
    return parser.parse_args()


ARGS = arguments()


def whole_loss(x, head, targets, mask):
    logits = jnp.einsum('...D,DV->...V', x, head, precision='highest')
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (mask * (jax.nn.logsumexp(logits, -1) - picked)).sum()


def checkpointed_loss(x, head, targets, mask, chunk):
    loss = jax.checkpoint(whole_loss)
    chunks = [a.reshape(-1, chunk, *a.shape[2:]) for a in (x, targets, mask)]
    return lax.scan(lambda total, one: (total + loss(one[0], head, *one[1:]), None), 0.0, chunks)[0]


def swiglu(x, weights):
    product = lambda a, b: jnp.matmul(a, b, precision='highest')
    hidden = jax.nn.silu(product(x, weights['gate'])) * product(x, weights['up'])
    return product(hidden, weights['down'])


def whole_ffn(x, weights):
    for layer in weights.values():
        x = x + swiglu(x, layer)
    return x


def lct_ffn(x, weights, chunk):
    for layer in weights.values():
        x = x + blockwise_ffn(lambda y: swiglu(y, layer), x, x.shape[1] // chunk)  # noqa: B023
    return x


def bair_ffn(x, weights, chunk):
    import jax.extend.backend
    from flax import linen

    jax.lib.xla_bridge = types.SimpleNamespace(get_backend=jax.extend.backend.get_backend)  # the shim
    from ringattention import blockwise_feedforward

    class Layer(linen.Module):
        @linen.compact
        def __call__(self, y):
            return swiglu(y, {name: self.get_variable('params', name) for name in ('gate', 'up', 'down')})

    class Stack(linen.Module):
        @linen.compact
        def __call__(self, y):
            for name in weights:
                y = y + blockwise_feedforward(linen.remat(Layer)(name=name), y, chunk, pre_remat=True)
            return y

    return Stack().apply({'params': weights}, x)


CONTESTANT = {
    'loss': {'whole': whole_loss, 'lct': cross_entropy_sum, 'checkpoint': checkpointed_loss},
    'ffn': {'whole': whole_ffn, 'lct': lct_ffn, 'bair': bair_ffn},
}


def inputs(tokens):
    """The arguments of a contestant; the first two are differentiated."""
    size, keys = ARGS.embed_dim, iter(jax.random.split(jax.random.key(0), 100))
    draw = lambda *shape: jax.random.normal(next(keys), shape) * shape[0] ** -0.5
    if ARGS.part == 'loss':
        targets = jax.random.randint(next(keys), (1, tokens), 0, ARGS.vocab_size)
        return draw(1, tokens, size), draw(size, ARGS.vocab_size), targets, jnp.ones((1, tokens))
    layer = lambda: {'gate': draw(size, ARGS.mlp_dim), 'up': draw(size, ARGS.mlp_dim),
                     'down': draw(ARGS.mlp_dim, size)}
    return draw(1, tokens, size), {f'layer_{i}': layer() for i in range(ARGS.layers)}


def compiled(contestant, args):
    """The program of a contestant's value and two gradients, or the reason why there is none."""
    name, *chunk = contestant.split(':')
    mean = lambda *args: CONTESTANT[ARGS.part][name](*args, *map(int, chunk)).sum() / args[0].shape[1]
    try:
        return jax.jit(jax.value_and_grad(mean, (0, 1))).lower(*args).compile()
    except ImportError as error:
        return f'skipped: {error}'


def timed(program, args):
    """CPU seconds of the whole process, wall seconds and the result of one call."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    cpu, wall = used(), time.perf_counter()
    out = jax.block_until_ready(program(*args))
    return used() - cpu, time.perf_counter() - wall, out


def error(ours, first):
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
               for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(first)))


def measure(programs, args):
    """Errors, and per contestant its (CPU, wall) seconds in every round, in rotated order."""
    first, *others = programs
    out = timed(programs[first], args)[2]
    errors = {first: 0.0} | {name: error(timed(programs[name], args)[2], out) for name in others}
    del out
    times = {name: [] for name in programs}
    for number in range(ARGS.rounds):
        order = list(programs)
        for name in order[number % len(order):] + order[:number % len(order)]:
            times[name].append(timed(programs[name], args)[:2])
    return errors, times


def summary(values):
    return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def measured_rows(names, small, large):
    """One row per contestant. The programs of the two lengths are built one after the other."""
    temporaries = lambda program: program.memory_analysis().temp_size_in_bytes / 2**20
    found = {name: {'contestant': name} for name in names}
    for length, args in (('memory_tokens', large), ('tokens', small)):
        programs = {name: compiled(name, args) for name in names}
        for name in [name for name, program in programs.items() if isinstance(program, str)]:
            found[name]['skipped'] = programs.pop(name)
        for name, program in programs.items():
            found[name][f'temp_mib_at_{length}'] = temporaries(program)
    errors, times = measure(programs, small) if ARGS.rounds else ({}, {})
    for name in times:
        first = times[next(iter(times))]
        found[name] |= {'error': errors[name]}
        for i, kind in enumerate(('cpu', 'wall')):
            found[name][f'{kind}_s'] = summary([t[i] for t in times[name]])
            found[name][f'{kind}_ratio'] = summary([a[i] / b[i] for a, b in zip(times[name], first)])
    return list(found.values())


def show(rows):
    lengths = ('memory_tokens', 'tokens')
    temporaries = [name for kind in lengths for name in (f'temp MiB, T {getattr(ARGS, kind)}', 'ratio')]
    header = ('contestant', *temporaries, 'CPU s', 'ratio (min-max)', 'wall s', 'ratio (min-max)', 'error')
    print(table(header, [cells(row, rows[0], lengths) for row in rows if 'skipped' not in row]))
    for row in rows:
        if 'skipped' in row:
            print(f'{row["contestant"]} {row["skipped"]}')


def cells(row, first, lengths):
    """A row of the JSON as a line of the table."""
    line = [row['contestant']]
    for kind in lengths:
        memory, reference = (one[f'temp_mib_at_{kind}'] for one in (row, first))
        line += [f'{memory:.1f}', f'{memory / reference:.3f}']
    if 'error' not in row:
        return [*line, *5 * ('-',)]
    for kind in ('cpu', 'wall'):
        ratio = row[f'{kind}_ratio']
        line += [f'{row[f"{kind}_s"]["median"]:.2f}',
                 f'{ratio["median"]:.3f} ({ratio["min"]:.3f}-{ratio["max"]:.3f})']
    return [*line, f'{row["error"]:.1e}']


def machine():
    """Name of the processor and number of cores."""
    info = pathlib.Path('/proc/cpuinfo')
    names = [line.split(':')[1].strip() for line in info.read_text().splitlines()
             if line.startswith('model name')
             ] if info.exists() else []
    return f'{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}'


def main():
    check_positive(ARGS, 'tokens', 'memory_tokens', 'embed_dim', 'mlp_dim', 'layers', 'vocab_size')
    names = ARGS.contestants or CONTESTANTS[ARGS.part]
    for name in names:
        kind, *chunk = name.split(':')
        if kind not in CONTESTANT[ARGS.part] or len(chunk) != (kind != 'whole') or not all(map(str.isdigit,
                                                                                               chunk)):
            raise ValueError(f'contestant {name!r} of --part {ARGS.part} must have the form of one of '
                             f'{", ".join(CONTESTANTS[ARGS.part])}')
    rows = measured_rows(names, inputs(ARGS.tokens), inputs(ARGS.memory_tokens))
    show(rows)
    if ARGS.output:
        kept = json.loads(ARGS.output.read_text()) if ARGS.output.exists() else {}
        settings = {name: value for name, value in vars(ARGS).items()
                    if name not in ('output', 'contestants')}
        kept[ARGS.part] = {
            'command': ' '.join(['python', *sys.argv]), 'machine': machine(), 'settings': settings,
            'versions': {'jax': jax.__version__, 'python': platform.python_version()}, 'table': rows,
        }
        ARGS.output.parent.mkdir(parents=True, exist_ok=True)
        ARGS.output.write_text(json.dumps(kept, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
