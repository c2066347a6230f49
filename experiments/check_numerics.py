"""Check that a model gives the same logits, loss and gradients on these devices for every way to split it.

    python experiments/check_numerics.py                                   the shipped base, every combination
    python experiments/check_numerics.py --model /models/Llama-3.2-1B --dtype bfloat16 --packed
    python experiments/check_numerics.py --random llama3-8b --layers 2 --tensor 2 --length 4096

Every combination of ring size, layout, strategy and kernel runs forward and backward and is compared with
one device, whose attention is compared with dense attention in float64. Errors are relative, in the
Euclidean norm. Without accelerators the devices are virtual CPU devices. The exit status is 1 if anything
fails. Settings that cannot run here are listed with the reason. The model must fit on one device: for a
large one use --random with a few --layers.
"""

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import sys
import time

from lct.cli.flags import length
from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.files import write_atomically
from lct.text import aligned

TOTALS = ('logits', 'loss', 'gradient norm', 'gradient')  # errors that are not of one kind of parameter


def parse_args():
    from lct.data.layout import LAYOUTS
    from lct.models.llama_sizes import SIZES
    from lct.models.memory import REMAT
    from lct.ops.strategies import KERNELS, STRATEGIES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument('--model', default='base', help='a Hugging Face Llama folder; default: shipped base')
    model.add_argument('--random', choices=SIZES, help='random weights in this shape instead')
    parser.add_argument('--layers', type=int, help='with --random: number of layers instead of all')
    parser.add_argument('--length', type=length, default=1024, help='tokens of the one row')
    parser.add_argument('--packed', action='store_true',
                        help='eight documents and padding instead of one document')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32',
                        help='dtype of the computation')
    parser.add_argument('--devices', type=int, help='number of devices; virtual ones (8) on a CPU')
    parser.add_argument('--ring-sizes', type=int, nargs='+',
                        help='default: the powers of two that fit the devices')
    parser.add_argument('--tensor', type=int, default=1, help='degree of tensor parallelism')
    parser.add_argument('--node-size', type=int,
                        help='devices per node for two-level strategies; default: half the ring')
    parser.add_argument('--strategies', nargs='+', choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument('--kernels', nargs='+', choices=KERNELS, default=list(KERNELS))
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument('--remat', choices=REMAT, default='full', help='remat policy of every setting')
    parser.add_argument('--query-passes', type=int, default=1,
                        help='passes over the queries in every setting')
    parser.add_argument('--output', type=pathlib.Path, help='also write all results to this file')
    return parser.parse_args()


def set_up_devices(requested):
    """The number of devices to use. Creates virtual CPU devices, so it must run before any computation."""
    import jax

    from lct import cpu_devices

    cpu_devices.provide(requested or 8)
    available = jax.device_count()
    if requested is not None and not 1 <= requested <= available:
        raise ValueError(f'--devices {requested} must be 1 to {available}, the devices of this process')
    return requested or available


def load_model(args):
    """(name, LlamaConfig, float32 Params on the host)."""
    import jax

    from lct.models import llama
    from lct.models.llama_sizes import SIZES
    from lct.weights import llama_hf

    if not args.random:
        if args.layers is not None:
            raise ValueError(
                '--layers cuts random weights only; leave it out, or use --random SIZE for --model')
        return args.model, *jax.device_get(llama_hf.load(find_model(args.model), 'float32'))
    config = SIZES[args.random]
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    return f'random {args.random}', config, jax.device_get(llama.init(config, jax.random.key(0)))


def table_row(cells):
    return aligned(cells, widths=(16, 4, 11, 4, 7, 7, 7, 7, 7, 26, 4), left=(0, 2, 4, 9))


def cells_of(setting, record, limits):
    """The cells of a table row, with the parameter kind that is closest to its limit or farthest above it."""
    split = (setting.strategy, setting.ring_size, setting.layout, setting.node_size, setting.kernel)
    if 'error' in record:
        return *split, '-', '-', '-', '-', record['error'].splitlines()[0][:26], 'FAIL'
    errors = record['errors']
    excess = lambda name: float('inf') if math.isnan(errors[name]) else errors[name] / limits[name]
    worst = max((name for name in errors if name not in TOTALS), key=excess)
    return (*split, *(f'{errors[name]:.1e}' for name in TOTALS), f'{errors[worst]:.1e} {worst}',
            'pass' if record['passed'] else 'FAIL')


def print_limits(dtype, limits):
    from lct.eval import numerics

    if dtype == 'float32':
        print(f'limits: logits {numerics.FLOAT32_LOGITS:.0e}, all else {numerics.FLOAT32_LIMIT:.0e}')
    else:
        print(f'limits: {numerics.BFLOAT16_MODEL} x the error of one device against float32 for logits and '
              f'the whole gradient,\n  {numerics.BFLOAT16_KIND} x for one kind of parameter, '
              f'{numerics.BFLOAT16_ROUNDING:.1e} for loss and gradient norm:')
        print('  ' + ', '.join(f'{name} {limit:.1e}' for name, limit in limits.items()))


def print_refused(refused, layouts):
    """The settings that do not run, by reason; layouts are named where only some of them cannot run."""
    reasons = collections.defaultdict(lambda: collections.defaultdict(list))
    for setting, reason in refused.items():
        name = f'{setting.strategy} on {setting.ring_size} {setting.kernel}'
        reasons[reason][name].append(setting.layout)
    for reason, settings in reasons.items():
        print(f'not run: {reason}\n  ' + ', '.join(
            name if len(refused_layouts) == len(layouts) else f'{name} {"/".join(refused_layouts)}'
            for name, refused_layouts in settings.items()))


def check_attention(params, config, batch, dtype, kernels):
    """A record for each kernel, printed: attention on one device against the dense oracle."""
    from lct.eval import numerics

    records = []
    for kernel in kernels:
        errors, limits = numerics.attention_errors(params, config, batch, dtype, kernel)
        passed = numerics.within(errors, limits)
        records.append({'kernel': kernel, 'errors': errors, 'limits': limits, 'passed': passed})
        print(f'attention on one device, kernel {kernel}, first '
              f'{min(numerics.ORACLE_LENGTH, batch["tokens"].shape[1])} tokens, against dense float64: '
              + ', '.join(f'{name} {errors[name]:.1e} of {limits[name]:.1e}' for name in errors)
              + (': pass' if passed else ': FAIL'), flush=True)
    return records


def check_settings(args, settings, params, config, batch):
    """(records of the settings, limits), printed as rows of a table: each setting against one device."""
    from lct.eval import numerics

    reference = numerics.run(params, config, batch, 'float32')
    one_device = reference if args.dtype == 'float32' else numerics.run(params, config, batch, args.dtype)
    limits = numerics.limits(args.dtype, numerics.errors(one_device, reference))
    print_limits(args.dtype, limits)
    print(table_row(('strategy', 'ring', 'layout', 'node', 'kernel', 'logits', 'loss', '|grad|', 'grad',
                     'worst kind of parameter', '')), flush=True)
    records = []
    for number, setting in enumerate(settings, 1):
        print(f'[{number}/{len(settings)}] {setting.strategy} on {setting.ring_size}, {setting.layout}: '
              'compiling, running', file=sys.stderr, end='\r', flush=True)
        start = time.monotonic()
        try:
            errors = numerics.errors(numerics.run(params, config, batch, args.dtype, setting), reference)
            record = {'errors': errors, 'passed': numerics.within(errors, limits)}
        except Exception as error:  # a compiler or device error fails this setting, not the whole check
            record = {'error': f'{type(error).__name__}: {error}', 'passed': False}
        seconds = round(time.monotonic() - start, 1)
        records.append({**dataclasses.asdict(setting), **record, 'seconds': seconds})
        print(' ' * 79, file=sys.stderr, end='\r', flush=True)
        print(table_row(cells_of(setting, records[-1], limits)), flush=True)
    return records, limits


def choose_settings(args, config, num_devices):
    """([Setting] that can run, {Setting that cannot: reason})."""
    from lct.eval import numerics

    ring_sizes = args.ring_sizes or [1 << i for i in range(max(num_devices // args.tensor, 1).bit_length())]
    if min(*ring_sizes, args.tensor, args.node_size or 1, args.layers or 1) < 1:
        raise ValueError('--ring-sizes, --tensor, --node-size and --layers must be at least 1')
    settings = list(numerics.settings(
        ring_sizes, args.tensor, args.layouts, args.strategies, args.kernels, args.node_size,
        args.remat, args.query_passes))
    reasons = {setting: numerics.refusal(config, args.length, args.dtype, setting) for setting in settings}
    return ([setting for setting in settings if not reasons[setting]],
            {setting: reason for setting, reason in reasons.items() if reason})


def main():
    args = parse_args()
    num_devices = set_up_devices(args.devices)
    import jax

    from lct.eval import numerics

    name, config, params = load_model(args)
    settings, refused = choose_settings(args, config, num_devices)
    batch = numerics.make_batch(config.vocab_size, args.length, args.packed)
    devices = f'{num_devices} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    print(f'{name}: {config.num_layers} layers of {config.num_heads}/{config.num_kv_heads} heads x '
          f'{config.head_dim}, {args.length} tokens, {"packed" if args.packed else "one document"}, '
          f'{args.dtype}, remat {args.remat}, {args.query_passes} query passes; {devices}', flush=True)

    kernels = list(dict.fromkeys(setting.kernel for setting in settings))
    attention = check_attention(params, config, batch, args.dtype, kernels)
    records, limits = check_settings(args, settings, params, config, batch)
    print_refused(refused, args.layouts)
    for record in records:
        if 'error' in record:
            print(f'{record["strategy"]} on {record["ring_size"]} {record["layout"]}: {record["error"]}')
    failed = sum(not record['passed'] for record in attention + records)
    print(f'{len(records)} settings and {len(attention)} attention ops: {failed} failed; '
          f'{len(refused)} not run')
    if args.output:
        write_atomically(args.output, json.dumps({
            'model': name, 'length': args.length, 'packed': args.packed, 'dtype': args.dtype,
            'devices': devices, 'attention': attention, 'limits': limits, 'settings': records,
            'not_run': [{**dataclasses.asdict(setting), 'reason': reason}
                        for setting, reason in refused.items()],
        }, indent=1) + '\n')
    if failed or not records:
        sys.exit(1)


if __name__ == '__main__':
    run_script(main, urls=('--model',))
