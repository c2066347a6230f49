"""Correctness and speed of lct on one GPU, and the longest context that it trains.

    python experiments/checks/gpu_report.py --output experiments/results/gpu_h200.json   eight minutes
    python experiments/checks/gpu_report.py --quick --output /tmp/quick.json   tiny shapes, any device

It measures in three steps and writes the JSON after every result. *Numerics*: every op and kernel, values
and gradients, against the dense versions of libraries in float64 on the host. *Attention*: the inner block
against the library kernels that run on the card, interleaved in every round, as TFLOP/s and as a fraction of
a matmul measured in the same process. *Training*: steps of --model at doubling lengths, up to the longest
that fits in memory. What a card cannot run is reported with its reason and does not count as a failure. A
wrong number does, and the exit status is then 1.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import statistics
import sys
import time

from gpu_numerics import Case, attention_inputs, error_text, numerics, with_gradients

from lct.cli.main import run_script

SLOW = 3.0  # seconds of one call, above which a program runs once


def flags():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--model', default='llama3.2-1b',
                        help='model whose shape is trained, with random weights')
    parser.add_argument('--layers', type=int, help='number of layers; default: all of the model')
    parser.add_argument('--lengths', type=int, nargs='+', default=[16384, 32768, 65536, 131072])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--minutes', type=float, default=9.0,
                        help='minutes after which no new measurement begins')
    parser.add_argument('--quick', action='store_true', help='tiny shapes, a test of the script itself')
    parser.add_argument('--output', type=pathlib.Path, required=True, help='path of the report')
    return parser.parse_args()


class Report:
    """The JSON so far, and the time left."""

    def __init__(self, args):
        import jax

        self.path, self.start, self.limit = args.output, time.monotonic(), 60 * args.minutes
        self.failed = 0
        self.results = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__,
                        'command': ' '.join(['python', *sys.argv]), **{part: [] for part in PARTS}}

    def add(self, part, record, line):
        self.results[part].append(record)
        self.failed += record.get('passed') is False
        self.path.write_text(json.dumps(self.results, indent=1) + '\n')
        print(f'{time.monotonic() - self.start:5.0f}s  {line}', flush=True)

    def out_of_time(self, part, title):
        """Whether the time is up; if so, the report says that a measurement was left out."""
        if time.monotonic() - self.start < self.limit:
            return False
        self.add(part, {'what': title, 'error': 'left out: time was up'}, f'{title}: left out, time was up')
        return True


# ---------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------


def contestants():
    """name -> causal attention (q, k, v, positions, segments) -> out."""
    import jax
    import jax.numpy as jnp

    from lct.ops import strategies
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention

    def ours(kernel, chunk):
        return lambda *x: strategies.attend(*x, None, Attention(chunks=Chunks(chunk, chunk), kernel=kernel))

    def cudnn(q, k, v, positions, segments):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation='cudnn')

    def pallas(q, k, v, positions, segments):
        from jax.experimental.pallas.ops.gpu.attention import mha

        repeat = lambda x: jnp.repeat(x, q.shape[2] // k.shape[2], 2)  # it has no grouped heads
        return mha(q, repeat(k), repeat(v), None, sm_scale=q.shape[-1]**-0.5, causal=True)

    def tokamax(q, k, v, positions, segments):
        import tokamax

        return tokamax.dot_product_attention(q, k, v, is_causal=True)

    return {**{f'lct triton {chunk}': ours('triton', chunk) for chunk in (256, 1024)},
            'lct mosaic': ours('mosaic', 256),
            **{f'lct xla {chunk}': ours('xla', chunk) for chunk in (256, 1024)},
            'cudnn': cudnn, 'pallas mha': pallas, 'tokamax': tokamax}


def attention(args, report):
    from lct.train.metrics import measured_peak

    shape = (4, 2, 16) if args.quick else (32, 8, 128)
    peak = measured_peak('bfloat16')
    report.add('attention', {'what': 'matmul', 'TFLOP/s': peak / 1e12},
               f'bfloat16 matmul {peak / 1e12:.0f} TFLOP/s')
    for length in ([64] if args.quick else args.lengths):
        inputs = attention_inputs(Case('bfloat16', *shape, 'causal'), length)
        for direction, factor in (('forward', 1.0), ('forward+backward', 3.5)):
            if report.out_of_time('attention', f'{direction} {length}'):
                return
            programs, slow = compile_contestants(report, direction, inputs, length)
            times = measure_rounds(programs, slow, inputs, args.rounds)
            heads, _, head_dim = shape
            show_attention(report, (direction, length), times, programs,
                           factor * 2 * heads * length**2 * head_dim, peak)


def compile_contestants(report, direction, inputs, length):
    """({name: program}, names of the slow ones), each called once to warm up. Failures are reported."""
    import jax

    programs, slow = {}, set()
    for name, attend in contestants().items():
        forward = jax.jit(lambda q, k, v, cotangent, *rest, f=attend: f(q, k, v, *rest))
        try:
            program = (forward if direction == 'forward' else with_gradients(attend)).lower(*inputs).compile()
            jax.block_until_ready(program(*inputs))
            if timed(program, inputs) > SLOW:
                slow.add(name)
            programs[name] = program
        except Exception as error:
            title = f'{name}, {direction}, S {length}'
            report.add('attention', {'what': title, 'error': error_text(error)},
                       f'none  {title}: {error_text(error)}')
    return programs, slow


def measure_rounds(programs, slow, inputs, rounds):
    """{name: seconds in every round}; slow programs run in the first round alone."""
    times = {name: [] for name in programs}
    for number in range(rounds):
        for name, program in programs.items():
            if number == 0 or name not in slow:
                times[name].append(timed(program, inputs))
    return times


def show_attention(report, case, times, programs, flops, peak):
    """Report all times of a case (direction, length). flops: of one call. peak: FLOP/s of a matmul."""
    direction, length = case
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    library = min((median for name, median in medians.items() if not name.startswith('lct')), default=None)
    for name, seconds in times.items():
        median = medians[name]
        record = {'what': name, 'direction': direction, 'length': length, 'seconds': seconds,
                  'TFLOP/s': flops / median / 1e12, 'of matmul': flops / median / peak,
                  'speed of best library': library and library / median,
                  'temporary bytes': programs[name].memory_analysis().temp_size_in_bytes}
        against = f', {library / median:.2f}x the best library' if library else ''
        report.add('attention', record,
                   f'{name:<16} {direction:<16} S {length:>7}: {1e3 * median:8.2f} ms '
                   f'({min(seconds) * 1e3:.2f}-{max(seconds) * 1e3:.2f}), {record["TFLOP/s"]:6.1f} TFLOP/s, '
                   f'{100 * record["of matmul"]:.0f}% of matmul{against}')


def timed(program, inputs):
    import jax

    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def training(args, report):
    import jax

    from lct.models.llama import Memory
    from lct.models.llama_sizes import SIZES
    from lct.ops.strategies import Attention

    if args.model not in SIZES:
        raise ValueError(f'--model {args.model} is not one of {", ".join(SIZES)}')
    config = SIZES[args.model]
    if args.quick:
        config = dataclasses.replace(config, vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2,
                                     num_heads=4,
                                     num_kv_heads=2, head_dim=16)
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    kernels = ('triton', 'xla') if jax.default_backend() == 'gpu' else ('xla',)
    for remat in ('full', 'offload'):
        for kernel in kernels:
            memory = Memory(remat=remat, attention=Attention(kernel=kernel), ffn_chunks=8, loss_chunk=1024,
                            dtype='bfloat16')
            train_longer(report, f'{kernel} {remat}', config, memory, args.quick)


def train_longer(report, name, config, memory, quick):
    """Train at doubling lengths until memory or time is used up; one length if quick."""
    length = 64 if quick else 32768
    while not report.out_of_time('training', f'{name}, {length} tokens'):
        try:
            record = time_steps(config, memory, length)
        except Exception as error:  # out of memory has no exception type of its own
            report.add('training', {'what': name, 'length': length, 'error': error_text(error)},
                       f'none  {name}, {length} tokens: {error_text(error)}')
            break
        report.add('training', {'what': name, 'length': length, **record},
                   f'{name}, {length} tokens: {record["step seconds"]:.2f} s/step, '
                   f'{record["tokens/s"]:,.0f} tokens/s, {record["TFLOP/s"]:.0f} TFLOP/s, loss '
                   f'{record["losses"]}')
        if quick:
            break
        length *= 2


def time_steps(config, memory, length, count=3):
    """The record of count training steps of one row of length tokens, after one to compile."""
    import jax
    import numpy as np

    from lct.eval.numerics import make_batch
    from lct.models import flops, llama
    from lct.ops import rope
    from lct.train import optimizer, state
    from lct.train.step import train_step

    tx = optimizer.make(optimizer.OptimizerConfig())
    tables = rope.make_tables(config.rope, config.head_dim, length)
    batch = {name: x[None] for name, x in make_batch(config.vocab_size, length, packed=False).items()}
    current = state.create(llama.init(config, jax.random.key(0)), tx)
    step = functools.partial(train_step, tables=tables, config=config.architecture(), memory=memory, tx=tx,
                             schedule=constant_rate)
    seconds, losses = [], []
    for _ in range(count + 1):
        start = time.perf_counter()
        current, step_metrics = step(current, batch)
        losses.append(round(float(step_metrics['loss']), 4))  # waits for the step
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    stats = jax.local_devices()[0].memory_stats() or {}
    if not np.isfinite(losses).all():
        return {'losses': losses, 'passed': False, 'step seconds': median, 'tokens/s': length / median,
                'TFLOP/s': 0}
    step_flops = flops.train_flops(config, length, flops.visible_pairs(length))
    return {'losses': losses, 'step seconds': median, 'tokens/s': length / median,
            'first step seconds': seconds[0], 'TFLOP/s': step_flops / median / 1e12,
            'peak bytes in use': stats.get('peak_bytes_in_use')}


def constant_rate(step):
    return 1e-4


PARTS = {'numerics': numerics, 'attention': attention, 'training': training}


def run():
    args = flags()
    report = Report(args)
    print(f'{report.results["device"]}, jax {report.results["jax"]}', flush=True)
    for part in args.parts:
        PARTS[part](args, report)
    print(f'{report.failed} failed; the report is in {args.output}')
    if report.failed:
        sys.exit(1)


if __name__ == '__main__':
    run_script(run)
