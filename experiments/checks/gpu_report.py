"""What one GPU makes of lct: is it right there, how fast is its attention, how long a context does it train?

    python experiments/checks/gpu_report.py --json experiments/results/gpu_h200.json        about eight minutes
    python experiments/checks/gpu_report.py --quick --json /tmp/quick.json                  tiny shapes, any device

Three parts, and the JSON is written after every line of them. *Numerics*: every op and kernel, values and
gradients, against libraries' dense versions in float64 on the host. *Attention*: the inner block against the library
kernels that run on the card, taking turns in every round, as TFLOP/s and as a fraction of a matmul measured in the
same process. *Training*: steps of --model at doubling lengths, up to the longest that fits its memory. What a card
cannot run is reported with its reason and is no failure; a wrong number is, and ends with status 1.
"""

import argparse
import functools
import json
import pathlib
import statistics
import sys
import time

from lct.cli.main import run_script

ROUNDING = 4  # errors of bfloat16 results, in units of the error of rounding the exact result once
SLOW = 3.0  # seconds of one call, after which it takes no second turn
FLOAT32 = 1e-5  # relative error of float32 results


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--model', default='llama3.2-1b', help='whose shape is trained, with random weights')
    parser.add_argument('--layers', type=int, help='so many of its layers instead of all')
    parser.add_argument('--lengths', type=int, nargs='+', default=[16384, 32768, 65536, 131072])
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--minutes', type=float, default=9.0, help='no new measurement begins after so many')
    parser.add_argument('--quick', action='store_true', help='tiny shapes: does the script itself run?')
    parser.add_argument('--json', type=pathlib.Path, required=True, help='where the report is written')
    return parser.parse_args()


class Report:
    """The JSON so far, and the time left."""

    def __init__(self, args):
        import jax

        self.path, self.start, self.limit = args.json, time.monotonic(), 60 * args.minutes
        self.failed = 0
        self.found = {'device': jax.devices()[0].device_kind, 'jax': jax.__version__,
                      'command': ' '.join(['python', *sys.argv]), **{part: [] for part in PARTS}}

    def add(self, part, record, line):
        self.found[part].append(record)
        self.failed += record.get('passed') is False
        self.path.write_text(json.dumps(self.found, indent=1) + '\n')
        print(f'{time.monotonic() - self.start:5.0f}s  {line}', flush=True)

    def late(self, part, what):
        """Whether time is up; if so, that `what` was left out is part of the report."""
        if time.monotonic() - self.start < self.limit:
            return False
        self.add(part, {'what': what, 'error': 'left out: time was up'}, f'{what}: left out, time was up')
        return True


def reason(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


# ---------------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------------


def attention_case(heads, kv_heads, head_dim, dtype, packed, length):
    """q, k, v, cotangent, positions, segments."""
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.standard_normal((1, length, n, head_dim), np.float32), dtype)
    index, document = np.arange(length, dtype=np.int32)[None], length // 3 if packed else length
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), index % document, 1 + index // document


def both_ways(attend):
    """Jitted (q, k, v, cotangent, positions, segments) -> out, dq, dk, dv."""
    import jax

    def op(q, k, v, cotangent, positions, segments):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, positions, segments), q, k, v)
        return out, *pull(cotangent)

    return jax.jit(op)


def exact(op, *args):
    """op on the host in float64."""
    import jax
    import numpy as np

    widen = lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype.kind not in 'iub' else np.asarray(x)
    with jax.enable_x64(True), jax.default_device(jax.devices('cpu')[0]):
        return jax.device_get(op(*jax.tree.map(widen, args)))


def judge(report, what, names, ours, theirs, dtype):
    """One row of the numerics."""
    import numpy as np

    from lct.eval.numerics import relative_error

    errors = {name: relative_error(a, b) for name, a, b in zip(names, ours, theirs)}
    # a single number can be rounded without error, by luck
    limits = {name: FLOAT32 if dtype == 'float32' else ROUNDING * relative_error(b.astype(dtype), b) if np.ndim(b)
              else ROUNDING * 2**-9 for name, b in zip(names, theirs)}
    passed = all(errors[name] <= limits[name] for name in errors)
    shown = ', '.join(f'{name} {error:.1e}' for name, error in errors.items())
    report.add('numerics', {'what': what, 'errors': errors, 'limits': limits, 'passed': passed},
               f'{"pass" if passed else "FAIL"}  {what}: {shown}')


def numerics(args, report):
    import jax
    import jax.numpy as jnp

    from lct.ops import strategies
    from lct.ops.masks import visible
    from lct.ops.strategies import KERNELS, Attention

    length = 48 if args.quick else 768
    dims = (16,) if args.quick else (64, 128, 256)
    cases = [(4, 2, dim, mask) for dim in dims for mask in ('causal', 'packed', 'window')]
    cases += [(4, 4, dims[-1], 'packed'), (4, 1, dims[-1], 'packed')]
    for dtype in ('float32', 'bfloat16'):
        for heads, kv_heads, dim, mask in cases:
            window = length // 5 if mask == 'window' else None
            given = attention_case(heads, kv_heads, dim, dtype, mask == 'packed', length)

            def dense(q, k, v, positions, segments, window=window):
                seen = visible(positions, positions, segments, segments, window)[:, None]
                return jax.nn.dot_product_attention(q, k, v, mask=seen)

            right = exact(both_ways(dense), *given)
            for kernel in KERNELS:
                what = f'attention {kernel}, {dtype}, heads {heads}/{kv_heads} x {dim}, {mask}'
                attend = lambda *x, kernel=kernel, window=window: strategies.attend(
                    *x, None, Attention(kernel=kernel), window)
                try:
                    strategies.check(Attention(kernel=kernel), 1, heads, kv_heads)
                    ours = jax.device_get(both_ways(attend)(*given))
                except Exception as error:  # a compiler's refusal is a finding, not the end
                    record = {'what': what, 'error': reason(error)}
                    if jax.default_backend() == 'gpu':
                        record['passed'] = False
                    report.add('numerics', record, f'none  {what}: {reason(error)}')
                    continue
                judge(report, what, ('out', 'dq', 'dk', 'dv'), ours, right, dtype)
        others(report, jnp.dtype(dtype), args.quick)


def others(report, dtype, quick):
    """FFN in chunks and the loss in chunks, against the plain formulas."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lct.ops.blockwise_ffn import blockwise_ffn
    from lct.ops.cross_entropy import cross_entropy_sum

    tokens, dim, hidden, words = (32, 16, 32, 64) if quick else (1024, 512, 1024, 8192)
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / shape[-2]**0.5, dtype)
    x, head = jnp.asarray(rng.standard_normal((1, tokens, dim)), dtype), draw(dim, words)
    targets, mask = rng.integers(0, words, (1, tokens)), (rng.random((1, tokens)) < 0.9).astype(np.float32)

    def plain(x, head, targets, mask):
        logits = x @ head
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (mask * (jax.nn.logsumexp(logits, -1) - picked)).sum()

    ours = jax.jit(lambda *x: cross_entropy_sum(*x, chunk=tokens // 4))
    take = lambda f: jax.jit(jax.value_and_grad(f, (0, 1)))
    flat = lambda result: (result[0], *result[1])
    judge(report, f'cross-entropy in chunks, {dtype.name}', ('value', 'dx', 'dhead'),
          flat(jax.device_get(take(ours)(x, head, targets, mask))),
          flat(exact(take(plain), x, head, targets, mask)), dtype.name)

    if dtype == jnp.float32:  # in bfloat16 its rounding is that of plain matmuls, which no chunk changes
        weights = draw(dim, hidden), draw(dim, hidden), draw(hidden, dim)
        swiglu = lambda x, gate, up, down: (jax.nn.silu(x @ gate) * (x @ up)) @ down
        chunked = lambda x, *w: (blockwise_ffn(lambda y: swiglu(y, *w), x, 4) ** 2).sum()
        whole = lambda *x: (swiglu(*x) ** 2).sum()
        take = lambda f: jax.jit(jax.value_and_grad(f, (0, 1, 3)))
        with jax.default_matmul_precision('highest'):
            found = jax.device_get(take(chunked)(x, *weights))
        judge(report, 'FFN in chunks, float32', ('value', 'dx', 'dgate', 'ddown'), flat(found),
              flat(exact(take(whole), x, *weights)), 'float32')


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
            **{f'lct xla {chunk}': ours('xla', chunk) for chunk in (256, 1024)},
            'cudnn': cudnn, 'pallas mha': pallas, 'tokamax': tokamax}


def attention(args, report):
    import jax

    from lct.train.metrics import measured_peak

    heads, kv_heads, dim = (4, 2, 16) if args.quick else (32, 8, 128)
    peak = measured_peak('bfloat16')
    report.add('attention', {'what': 'matmul', 'TFLOP/s': peak / 1e12}, f'bfloat16 matmul {peak / 1e12:.0f} TFLOP/s')
    for length in ([64] if args.quick else args.lengths):
        given = attention_case(heads, kv_heads, dim, 'bfloat16', False, length)
        for direction, factor in (('forward', 1.0), ('forward+backward', 3.5)):
            if report.late('attention', f'{direction} {length}'):
                return
            flops = factor * 2 * heads * length**2 * dim
            programs, slow = {}, {}
            for name, attend in contestants().items():
                run = both_ways(attend) if factor > 1 else jax.jit(lambda q, k, v, g, p, s, f=attend: f(q, k, v, p, s))
                try:
                    programs[name] = run.lower(*given).compile()
                    jax.block_until_ready(programs[name](*given))
                    slow[name] = timed(programs[name], given) > SLOW
                except Exception as error:
                    programs.pop(name, None)
                    what = f'{name}, {direction}, S {length}'
                    report.add('attention', {'what': what, 'error': reason(error)}, f'none  {what}: {reason(error)}')
            times = {name: [] for name in programs}
            for number in range(args.rounds):
                for name, program in programs.items():
                    if number == 0 or not slow[name]:
                        times[name].append(timed(program, given))
            library = min((statistics.median(t) for name, t in times.items() if not name.startswith('lct')), default=None)
            for name, seconds in times.items():
                median = statistics.median(seconds)
                record = {'what': name, 'direction': direction, 'length': length, 'seconds': seconds,
                          'TFLOP/s': flops / median / 1e12, 'of matmul': flops / median / peak,
                          'speed of best library': library and library / median,
                          'temporary bytes': programs[name].memory_analysis().temp_size_in_bytes}
                against = f', {library / median:.2f}x the best library' if library else ''
                report.add('attention', record,
                           f'{name:<16} {direction:<16} S {length:>7}: {1e3 * median:8.2f} ms '
                           f'({min(seconds) * 1e3:.2f}-{max(seconds) * 1e3:.2f}), {record["TFLOP/s"]:6.1f} TFLOP/s, '
                           f'{100 * record["of matmul"]:.0f}% of matmul{against}')


def timed(program, given):
    import jax

    start = time.perf_counter()
    jax.block_until_ready(program(*given))
    return time.perf_counter() - start


# ---------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------


def training(args, report):
    import dataclasses

    import jax

    from lct.models.llama import Memory
    from lct.models.llama_sizes import SIZES
    from lct.ops.strategies import Attention

    if args.model not in SIZES:
        raise ValueError(f'--model {args.model} is not one of {", ".join(SIZES)}')
    config = SIZES[args.model]
    if args.quick:
        config = dataclasses.replace(config, vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4,
                                     num_kv_heads=2, head_dim=16)
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    kernels = ('triton', 'xla') if jax.default_backend() == 'gpu' else ('xla',)
    memories = {f'{kernel} {remat}': Memory(remat=remat, attention=Attention(kernel=kernel), ffn_chunks=8,
                                            loss_chunk=1024, dtype='bfloat16')
                for remat in ('full', 'offload') for kernel in kernels}
    for name, memory in memories.items():
        length = 64 if args.quick else 32768
        while not report.late('training', f'{name}, {length} tokens'):
            try:
                record = steps(config, memory, length)
            except Exception as error:  # out of memory has no type of its own
                report.add('training', {'what': name, 'length': length, 'error': reason(error)},
                           f'none  {name}, {length} tokens: {reason(error)}')
                break
            report.add('training', {'what': name, 'length': length, **record},
                       f'{name}, {length} tokens: {record["step seconds"]:.2f} s a step, '
                       f'{record["tokens/s"]:,.0f} tokens/s, {record["TFLOP/s"]:.0f} TFLOP/s, loss {record["losses"]}')
            if args.quick:
                break
            length *= 2


def steps(config, memory, length, count=3):
    """What count training steps of one row of length tokens take, compilation apart."""
    import jax
    import numpy as np

    from lct.eval.numerics import make_batch
    from lct.models import llama
    from lct.ops import rope
    from lct.train import metrics, optimizer, state
    from lct.train.step import train_step

    tx = optimizer.make(optimizer.OptimizerConfig())
    tables = rope.make_tables(config.rope, config.head_dim, length)
    batch = {name: x[None] for name, x in make_batch(config.vocab_size, length, packed=False).items()}
    now = state.create(llama.init(config, jax.random.key(0)), tx)
    step = functools.partial(train_step, tables=tables, config=config.architecture(), memory=memory, tx=tx,
                             schedule=constant_rate)
    seconds, losses = [], []
    for _ in range(count + 1):
        start = time.perf_counter()
        now, found = step(now, batch)
        losses.append(round(float(found['loss']), 4))  # waits
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])
    stats = jax.local_devices()[0].memory_stats() or {}
    if not np.isfinite(losses).all():
        return {'losses': losses, 'passed': False, 'step seconds': median, 'tokens/s': length / median, 'TFLOP/s': 0}
    return {'losses': losses, 'step seconds': median, 'tokens/s': length / median, 'first step seconds': seconds[0],
            'TFLOP/s': metrics.step_flops(config, batch) / median / 1e12,
            'peak bytes in use': stats.get('peak_bytes_in_use')}


def constant_rate(step):
    return 1e-4


PARTS = {'numerics': numerics, 'attention': attention, 'training': training}


def run():
    args = flags()
    report = Report(args)
    print(f'{report.found["device"]}, jax {report.found["jax"]}', flush=True)
    for part in args.parts:
        PARTS[part](args, report)
    print(f'{report.failed} failed; {args.json} holds the report')
    if report.failed:
        sys.exit(1)


if __name__ == '__main__':
    run_script(run)
