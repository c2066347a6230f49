"""Does a model give the same logits, loss and gradients on these devices however it is split?

    python experiments/check_numerics.py                                    the shipped base, every combination
    python experiments/check_numerics.py --model /models/Llama-3.2-1B --dtype bfloat16 --packed
    python experiments/check_numerics.py --random llama3-8b --layers 2 --tensor 2 --length 4096

Every combination of ring size, layout, strategy and kernel runs forward and backward and is compared with one
device, whose attention is compared with dense attention in float64; errors are relative, in the Euclidean norm.
Without accelerators the devices are virtual CPU devices. Ends with status 1 if anything fails; what cannot run
here is listed with its reason. The model must fit one device: of a large one take --random with a few --layers.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import sys
import time

from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.text import aligned


def flags():
    from lct.data.layout import LAYOUTS
    from lct.models.llama_sizes import SIZES
    from lct.ops.strategies import KERNELS, STRATEGIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument('--model', default='base', help='a Hugging Face Llama folder, default the shipped base')
    model.add_argument('--random', choices=SIZES, help='random weights in this shape instead')
    parser.add_argument('--layers', type=int, help='with --random: so many layers instead of all')
    parser.add_argument('--length', type=int, default=1024, help='tokens of the one row')
    parser.add_argument('--packed', action='store_true', help='eight documents and padding instead of one document')
    parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32', help='of the computation')
    parser.add_argument('--devices', type=int, help='use so many; virtual ones, 8 if not said, on a CPU')
    parser.add_argument('--ring-sizes', type=int, nargs='+', help='default: the powers of two that fit the devices')
    parser.add_argument('--tensor', type=int, default=1, help='degree of tensor parallelism')
    parser.add_argument('--node-size', type=int, help='of two-level strategies; default: half the ring')
    parser.add_argument('--strategies', nargs='+', choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument('--kernels', nargs='+', choices=KERNELS, default=list(KERNELS))
    parser.add_argument('--layouts', nargs='+', choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument('--json', type=pathlib.Path, help='also write everything into this file')
    return parser.parse_args()


def devices(wanted):
    """How many devices to use, made if they are virtual; before jax computes anything."""
    import jax

    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        jax.config.update('jax_num_cpu_devices', wanted or 8)
    if wanted is not None and not 1 <= wanted <= jax.device_count():
        raise ValueError(f'--devices {wanted}: this process sees {jax.device_count()}; use 1 to that many')
    return wanted or jax.device_count()


def model_of(args):
    """(name, LlamaConfig, host Params in float32)."""
    import jax

    from lct.models import llama
    from lct.models.llama_sizes import SIZES
    from lct.weights import llama_hf

    if not args.random:
        if args.layers is not None:
            raise ValueError('--layers cuts random weights only; leave it out, or use --random SIZE for --model')
        return args.model, *jax.device_get(llama_hf.load(find_model(args.model), 'float32'))
    config = SIZES[args.random]
    config = dataclasses.replace(config, num_layers=args.layers or config.num_layers)
    return f'random {args.random}', config, jax.device_get(llama.init(config, jax.random.key(0)))


def row(cells):
    return aligned(cells, widths=(16, 4, 11, 4, 7, 7, 7, 7, 7, 26, 4), left=(0, 2, 4, 9))


def cells_of(setting, record, allowed):
    """A record as a line of the table; of the parameter kinds the one nearest to, or farthest above, its limit."""
    split = (setting.strategy, setting.ring_size, setting.layout, setting.node_size, setting.kernel)
    if 'error' in record:
        return *split, '-', '-', '-', '-', record['error'].splitlines()[0][:26], 'FAIL'
    found = record['errors']
    whole = ('logits', 'loss', 'gradient norm', 'gradient')
    excess = lambda name: float('inf') if found[name] != found[name] else found[name] / allowed[name]
    worst = max((name for name in found if name not in whole), key=excess)
    return *split, *(f'{found[name]:.1e}' for name in whole), f'{found[worst]:.1e} {worst}', \
        'pass' if record['passed'] else 'FAIL'


def show_limits(dtype, allowed):
    from lct.eval import numerics

    if dtype == 'float32':
        print(f'limits: logits {numerics.FLOAT32_LOGITS:.0e}, all else {numerics.FLOAT32_LIMIT:.0e}')
    else:
        print(f'limits: {numerics.BFLOAT16_MODEL} x the error of one device against float32 for logits and the whole '
              f'gradient,\n  {numerics.BFLOAT16_KIND} x for one kind of parameter, {numerics.BFLOAT16_ROUNDING:.1e} for '
              'loss and gradient norm:')
        print('  ' + ', '.join(f'{name} {limit:.1e}' for name, limit in allowed.items()))


def show_refused(refused, layouts):
    """What is not run, with its reason; layouts are named where only some of them cannot be."""
    reasons = collections.defaultdict(lambda: collections.defaultdict(list))
    for setting, reason in refused.items():
        which = f'{setting.strategy} on {setting.ring_size} {setting.kernel}'
        reasons[reason][which].append(setting.layout)
    for reason, settings in reasons.items():
        print(f'not run: {reason}\n  ' + ', '.join(
            which if len(some) == len(layouts) else f'{which} {"/".join(some)}' for which, some in settings.items()))


def check_attention(params, config, batch, dtype, kernels):
    """One record for each kernel, printed: the attention op on one device against the dense oracle."""
    from lct.eval import numerics

    records = []
    for kernel in kernels:
        found, allowed = numerics.attention_errors(params, config, batch, dtype, kernel)
        records.append({'kernel': kernel, 'errors': found, 'limits': allowed, 'passed': numerics.within(found, allowed)})
        print(f'attention on one device, kernel {kernel}, first '
              f'{min(numerics.ORACLE_LENGTH, batch["tokens"].shape[1])} tokens, against dense float64: '
              + ', '.join(f'{name} {found[name]:.1e} of {allowed[name]:.1e}' for name in found)
              + (': pass' if records[-1]['passed'] else ': FAIL'), flush=True)
    return records


def check_setting(params, config, batch, dtype, setting, reference, allowed):
    """The record of one setting. Whatever a compiler or a device throws is this setting's failure, not the end."""
    from lct.eval import numerics

    start = time.monotonic()
    try:
        found = numerics.errors(numerics.run(params, config, batch, dtype, setting), reference)
        record = {'errors': found, 'passed': numerics.within(found, allowed)}
    except Exception as error:
        record = {'error': f'{type(error).__name__}: {error}', 'passed': False}
    return {**dataclasses.asdict(setting), **record, 'seconds': round(time.monotonic() - start, 1)}


def run():
    args = flags()
    count = devices(args.devices)
    import jax

    from lct.eval import numerics

    name, config, params = model_of(args)
    sizes = args.ring_sizes or [1 << i for i in range(max(count // args.tensor, 1).bit_length())]
    if min(*sizes, args.tensor, args.node_size or 1, args.layers or 1) < 1:
        raise ValueError('--ring-sizes, --tensor, --node-size and --layers must be at least 1')
    batch = numerics.make_batch(config.vocab_size, args.length, args.packed)
    kind = f'{count} x {jax.devices()[0].device_kind}, jax {jax.__version__}'
    print(f'{name}: {config.num_layers} layers of {config.num_heads}/{config.num_kv_heads} heads x {config.head_dim}, '
          f'{args.length} tokens, {"packed" if args.packed else "one document"}, {args.dtype}; {kind}', flush=True)

    todo, refused = [], {}
    for setting in numerics.settings(
            sizes, args.tensor, args.layouts, args.strategies, args.kernels, args.node_size):
        reason = numerics.refusal(config, args.length, args.dtype, setting)
        refused |= {setting: reason} if reason else {}
        todo += [] if reason else [setting]
    usable = list(dict.fromkeys(setting.kernel for setting in todo))
    attention = check_attention(params, config, batch, args.dtype, usable)

    reference = numerics.run(params, config, batch, 'float32')
    one = reference if args.dtype == 'float32' else numerics.run(params, config, batch, args.dtype)
    allowed = numerics.limits(args.dtype, numerics.errors(one, reference))
    show_limits(args.dtype, allowed)
    print(row(('strategy', 'ring', 'layout', 'node', 'kernel', 'logits', 'loss', '|grad|', 'grad',
               'worst kind of parameter', '')), flush=True)
    records = []
    for number, setting in enumerate(todo):
        print(f'[{number + 1}/{len(todo)}] {setting.strategy} on {setting.ring_size}, {setting.layout}: compiling, '
              'running', file=sys.stderr, end='\r', flush=True)
        records.append(check_setting(params, config, batch, args.dtype, setting, reference, allowed))
        print(' ' * 79, file=sys.stderr, end='\r', flush=True)
        print(row(cells_of(setting, records[-1], allowed)), flush=True)

    show_refused(refused, args.layouts)
    for record in records:
        if 'error' in record:
            print(f'{record["strategy"]} on {record["ring_size"]} {record["layout"]}: {record["error"]}')
    failed = sum(not record['passed'] for record in attention + records)
    print(f'{len(records)} settings and {len(attention)} attention ops: {failed} failed; {len(refused)} not run')
    if args.json:
        args.json.write_text(json.dumps({
            'model': name, 'length': args.length, 'packed': args.packed, 'dtype': args.dtype, 'devices': kind,
            'attention': attention, 'limits': allowed, 'settings': records,
            'not_run': [{**dataclasses.asdict(s), 'reason': reason} for s, reason in refused.items()]}, indent=1) + '\n')
    if failed or not records:
        sys.exit(1)


if __name__ == '__main__':
    run_script(run)
