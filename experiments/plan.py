"""Before you rent it: what fits, how fast it goes and what it costs.

    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --price-per-hour 1.2
    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --compile l40s:512
    python experiments/plan.py --recipe experiments/configs/published/gradient_llama3_8b.py

The first searches meshes, strategies and memory policies, prints the best plan in full and why others were refused,
and writes it as a config for experiments/extend.py. The second reckons a recipe stage by stage, on the meshes that it
names or on the best of --devices, beside the minutes that its authors published. Everything here is predicted; figures
of a compiler, where check_plan_memory.py has any of the same program, stand in a column of their own.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import compile_report  # noqa: E402

from lct.cli.config import load_config, make_run, windowed
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.models.llama import LlamaConfig  # noqa: E402
from lct.models.llama_sizes import SIZES  # noqa: E402
from lct.ops import rope  # noqa: E402
from lct.plan import hardware, search, serving, targets, timing  # noqa: E402
from lct.plan.buffers import buffers  # noqa: E402
from lct.plan.cost import Step  # noqa: E402
from lct.plan.hlo import device_bytes  # noqa: E402
from lct.text import parse_length, table  # noqa: E402
from lct.train import stages  # noqa: E402

GiB = 2**30
DEFAULT_TOKENS = 50 * 2**23  # of Gradient's stage at 1M: 419,430,400
MODELS = {**SIZES, 'llama2-7b': LlamaConfig(  # meta-llama/Llama-2-7b-hf: what LWM and EasyContext began with
    vocab_size=32000, embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128,
    max_position_embeddings=4096, rope=rope.RopeConfig(theta=10000.0))}
CONFIG = '''"""Written by experiments/plan.py for {devices} x {hardware}.

    python experiments/extend.py --config {path} --workdir runs/{name} \\\\
        --set model_folder=YOUR_FOLDER --set corpus=YOUR_DOCUMENTS

Predicted: {prediction}.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict({fields})
    config.stages = tuple(ConfigDict(stage) for stage in {stages})
    return config
'''


def recipe_model(path, name):
    """(name, LlamaConfig) that a recipe begins with: --model, or the one that its file is named after."""
    if name is None:
        stem = pathlib.Path(path).stem.replace('_', '-')
        family = {'lwm-text-7b': 'llama2-7b', 'easycontext-llama2-7b': 'llama2-7b'}
        name = family.get(stem) or next((one for one in MODELS if stem.endswith(one)), stem)
    name = hardware.known(name, MODELS, 'model')
    return name, MODELS[name]


def machine(args, published=''):
    """The Hardware of the flags, or the one that a recipe's device is, with the network of the flags."""
    words = re.split(r'[\s-]', published.lower())
    name = args.hardware or next((word for word in words if word in hardware.TABLE), None)
    if name is None:
        raise ValueError(f'--hardware is needed; choose from {", ".join(hardware.TABLE)}')
    kind = hardware.find(name)
    if args.network:
        flow = min(kind.between, args.network * 1e9) if kind.network > kind.between else args.network * 1e9
        kind = dataclasses.replace(kind, network=args.network * 1e9, between=flow)
    return kind


def theta_for(config, context, theta):
    """The theta that is to be trained at a context: the critical base, or the one asked for if it reaches that far."""
    trained = config.max_position_embeddings
    if context <= trained:
        return 'keep'
    if theta is None:
        return 'critical_base'
    reach = rope.extrapolation_bound(theta, config.rope_theta, trained, config.head_dim)
    if reach < context:
        needed = rope.critical_base(config.rope_theta, trained, context)
        raise ValueError(f'context {context} is beyond the {reach:,.0f} tokens that theta {theta:,.0f} reaches by the '
                         f'RoPE scaling law; use --theta {math.ceil(needed)}, or leave it out')
    return theta


# ---------------------------------------------------------------------------------------------------
# Printing
# ---------------------------------------------------------------------------------------------------


def assumptions(kind):
    values = ', '.join(f'{name} {value}' for name, value in dataclasses.asdict(timing.Efficiency()).items())
    return (f'Assumed shares of nominal peaks (lct/plan/timing.py, Efficiency): {values}; usable memory {search.USABLE}.\n'
            f'{kind.name}: {kind.flops / 1e12:.0f} TFLOP/s bfloat16, {kind.memory / GiB:.1f} GiB, nodes of '
            f'{kind.node_size} with {kind.inside / 1e9:.0f} GB/s between neighbours, {kind.network / 1e9:,.2f} GB/s from '
            'node to node (sources: lct/plan/hardware.py).')


def policy(step):
    memory, attention = step.memory, step.memory.attention
    node = f' in nodes of {attention.node_size}' if attention.node_size > 1 else ''
    return f'{attention.strategy}{node}, remat {memory.remat}, ffn_chunks {memory.ffn_chunks}'


def by_part(parts):
    total = sum(parts.values())
    rows = [(name, f'{s:.2f}', f'{s / total:.1%}') for name, s in parts.items() if s >= total / 1000]
    rows.append(('step', f'{total:.2f}', ''))
    return table(('part of the step, predicted', 's', 'share'), rows, footer=1)


def by_buffer(needed, kind):
    rows = [(name, f'{size / GiB:.2f}') for name, size in needed.at_peak().items() if size >= GiB / 100]
    totals = [(f'peak, in phase {needed.phase!r}', f'{needed.peak / GiB:.2f}'),
              ('of the device', f'{kind.memory / GiB:.2f}')]
    totals += [(f'host memory: {name}', f'{size / GiB:.2f}') for name, size in needed.host.items()]
    return table(('memory of a device at its peak, predicted', 'GiB'), rows + totals, footer=len(totals))


def money(hours, devices, price):
    return f', {hours * devices * price:,.0f} at {price} per device and hour' if price else ''


def program(name, step):
    """What tells one training step of a model from another, as text."""
    memory, attention = step.memory, step.memory.attention
    parts = (name, 'x'.join(map(str, step.mesh)), step.batch_size, step.accumulation, step.seq_len, memory.remat,
             attention.strategy, attention.node_size, memory.ffn_chunks, step.dtype, memory.dtype or step.dtype)
    return ' '.join(map(str, parts))


def compiled_size(kind, name, step):
    """Bytes of a device that a compiler gave this very step (results of check_plan_memory.py), or None."""
    path = experiments_folder() / 'results' / 'plan_memory.json'
    found = json.loads(path.read_text()) if path.exists() else {}
    for key, memory in found.items():
        target, _, text = key.partition(' ')
        if target.startswith(f'{kind.name}:') and text == program(name, step):
            return device_bytes(memory)
    return None


# ---------------------------------------------------------------------------------------------------
# One context
# ---------------------------------------------------------------------------------------------------


def plan_context(args):
    name = hardware.known(args.model, MODELS, 'model')
    config, kind, context = MODELS[name], machine(args), parse_length(args.context)
    theta = theta_for(config, context, args.theta)
    rows = args.rows or max(2**22 // context, 1)
    found = search.best(search.Job(config, context, rows, args.param_dtype), kind, args.devices)
    plan = found.plans[0]
    step, tokens = plan.step, rows * context
    num_steps = max(round((args.tokens or DEFAULT_TOKENS) / tokens), 1)
    hours = num_steps * plan.seconds / 3600

    print(f'{name}, {rows} rows of {context:,} tokens a step, {args.devices} x {kind.name}, parameters in {args.param_dtype}, '
          f'computing in bfloat16. PREDICTED, nothing was run or compiled.\n{assumptions(kind)}\n')
    degrees = dict(zip(('data', 'fsdp', 'sequence', 'tensor'), step.mesh))
    print(f'mesh {degrees}; {policy(step)}; {step.batch_size} rows at a time, {step.accumulation} times\n')
    print(by_buffer(plan.buffers, kind), '\n', by_part(plan.parts), sep='\n')
    print(f'\n{tokens / plan.seconds:,.0f} tokens/s, model FLOPs utilisation '
          f'{timing.utilisation(step, kind, plan.seconds):.1%}; {num_steps} steps of {tokens:,} tokens take '
          f'{hours / 24:.2f} days{money(hours, args.devices, args.price_per_hour)}')
    reading, writing = (sum(f(step, kind).values()) for f in (serving.prefill_seconds, serving.decode_seconds))
    print(f'on the same mesh a prompt of {context:,} tokens is read in {reading:.1f} s, {step.batch_size} at a time, and '
          f'a token written in {1000 * writing:.0f} ms (weights are gathered for every token)\n')
    print(f'{len(found.plans)} plans are feasible, best first:')
    print(table(('s a step', 'MFU', 'GiB', 'mesh', 'rows x times', 'policy'), [
        (f'{p.seconds:.1f}', f'{timing.utilisation(p.step, kind, p.seconds):.1%}', f'{p.buffers.peak / GiB:.1f}',
         p.step.mesh, f'{p.step.batch_size} x {p.step.accumulation}', policy(p.step)) for p in found.plans[:args.show]], left=(5,)))
    print(f'\n{len(found.refusals)} are not:')
    for count, reason, where in found.reasons():
        print(f'  {count:>5}, for example mesh {where.mesh} with {where.memory.attention.strategy}, remat '
              f'{where.memory.remat}: {reason}')
    run = f'{name}-{args.context.lower()}-{args.devices}x{kind.name}'
    fields = {
        'name': run, 'model_folder': '', 'license': 'llama2' if name.startswith('llama2') else 'llama3', 'seed': 0,
        'base': {'max_position_embeddings': config.max_position_embeddings, 'rope_theta': config.rope_theta},
        'corpus': '', 'corpus_bytes': 2_000_000_000, 'held_out': 0.01,
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1}, 'checkpoint_every': 10,
        'stages': [stage_fields(
            {'name': args.context, 'num_steps': num_steps, 'learning_rate': 2e-5, 'warmup_steps': 0,
             'final_fraction': 1.0, 'theta': theta, 'mixture': {'text': 1.0}}, step)],
        'needle': {'lengths': tuple(2**n for n in range(10, context.bit_length())), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0),
                   'samples': 2},
        'loss': {'seq_len': min(context, 2**17), 'windows': 16, 'rotations': 4},
    }
    path = args.out or f'runs/{run}.py'
    write(path, fields, kind, step,
          f'{plan.seconds:.1f} s a step, {tokens / plan.seconds:,.0f} tokens/s, {hours / 24:.2f} days, '
          f'{plan.buffers.peak / GiB:.1f} GiB a device')
    if args.compile:
        compile_report.run(['--target', args.compile, '--step', str(path), '--model', name,
                            '--results', str(pathlib.Path(path).parent)])


def stage_fields(fields, step):
    """The fields of a stage in a config with the plan in them."""
    memory, attention = step.memory, step.memory.attention
    return {
        **fields, 'seq_len': step.seq_len, 'batch_size': step.batch_size, 'accumulation': step.accumulation,
        'mesh': step.mesh, 'layout': step.layout,
        'memory': {**fields.get('memory', {}), 'remat': memory.remat, 'strategy': attention.strategy, 'node_size': attention.node_size,
                   'query_chunk': attention.chunks.query, 'key_chunk': attention.chunks.key,
                   'ffn_chunks': memory.ffn_chunks, 'loss_chunk': memory.loss_chunk, 'dtype': 'bfloat16'},
    }


def write(path, fields, kind, step, prediction):
    """A config for extend.py."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = {key: value for key, value in fields.items() if key != 'stages'} | {'param_dtype': step.dtype}
    path.write_text(CONFIG.format(devices=step.devices, hardware=kind.name, path=path, name=path.stem, prediction=prediction,
                                  fields=literal(rest, 4), stages=literal(fields['stages'], 4)))
    print(f'\nwritten to {path}')


def literal(value, indent):
    """Plain values as Python source, a key a line."""
    if isinstance(value, dict):
        lines = [f'{" " * (indent + 4)}{key!r}: {literal(inner, indent + 4)},' for key, inner in value.items()]
        return '\n'.join(['{', *lines, f'{" " * indent}}}'])
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return f'[{", ".join(literal(inner, indent) for inner in value)}]'
    return repr(value)


# ---------------------------------------------------------------------------------------------------
# A recipe
# ---------------------------------------------------------------------------------------------------


def plan_recipe(args):
    for flag in ('rows', 'tokens', 'theta'):
        if getattr(args, flag):
            raise ValueError(f'--{flag} is set by the recipe {args.recipe}; drop the flag or write another recipe')
    raw = load_config(args.recipe)
    run, (name, config) = make_run(raw), recipe_model(args.recipe, args.model)
    config = windowed(config, raw)
    last = run.stages[-1]
    if args.context and parse_length(args.context) > last.seq_len:
        theta = stages.configs(run.stages, config)[-1].rope_theta
        raise ValueError(f'context {args.context} is beyond the {last.seq_len} tokens for which the last stage of '
                         f'{args.recipe} sets theta {theta:,.0f}; add a stage with theta critical_base, or drop --context')
    where = f'on the best mesh of {args.devices} devices' if args.devices else 'on its own meshes'
    print(f'{name}, {args.recipe}: stage by stage, parameters in {args.param_dtype}, computing in bfloat16, {where}\n')
    header = ('stage', 'hardware', 'mesh', 'policy', 's/step', 'tokens/s', 'MFU', 'GiB', 'predicted min',
              'published min', 'ratio', 'compiled GiB')
    rows = []
    parts, seconds, planned, hours, days = [], [], [], 0.0, 0.0
    for stage, fields in zip(run.stages, (one.to_dict() for one in raw.stages)):
        if args.context and stage.seq_len > parse_length(args.context):
            break
        published = fields.get('published', {})
        kind = machine(args, published.get('device', ''))
        if args.devices:
            job = search.Job(config, stage.seq_len, stage.batch_size * stage.accumulation, args.param_dtype)
            step = search.best(job, kind, args.devices).plans[0].step
        else:
            step = Step(config, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation,
                        dataclasses.replace(stage.memory, dtype='bfloat16'), args.param_dtype, stage.layout)
            step.check()
        part, needed = timing.seconds(step, kind), buffers(step, kind.platform)
        total = sum(part.values())
        minutes, told = total * stage.num_steps / 60, published.get('minutes')
        same = told and published.get('devices') == step.devices and kind.name in published['device'].lower()
        seen = compiled_size(kind, name, step)
        size = needed.peak / GiB
        rows.append((
            stage.name, f'{step.devices} x {kind.name}', step.mesh, policy(step), f'{total:.1f}',
            f'{step.tokens / total:,.0f}', f'{timing.utilisation(step, kind, total):.1%}',
            f'{size:.1f}{"!" if needed.peak > search.USABLE * kind.memory else ""}', f'{minutes:.0f}', told or '-',
            f'{minutes / told:.2f}' if same else '-', f'{seen / GiB:.1f}' if seen else '-'))
        parts.append((stage.name, part))
        if same:
            seconds.append((minutes, told))
        planned.append(stage_fields(fields, step))
        hours += minutes / 60 * step.devices
        days += minutes / 60 / 24
    print(table(header, rows, left=(0, 3)))
    print('\nGiB: predicted, of one device; ! where that is more than can be used. ratio: predicted to '
          'published, where hardware and devices are theirs.')
    names = list(dict.fromkeys(name for _, part in parts for name in part))
    print('\nseconds of a step, predicted:')
    print(table(('stage', *names), [(stage, *(f'{part.get(one, 0):.1f}' for one in names)) for stage, part in parts]))
    print(f'\n{days:.2f} days, {hours:,.0f} device-hours in all{money(hours, 1, args.price_per_hour)}\n\n{assumptions(kind)}')
    report_agreement(seconds)
    if args.out:
        write(args.out, {**raw.to_dict(), 'stages': planned}, kind, step, f'{hours:,.0f} device-hours')


def report_agreement(seconds):
    """How well minutes agree: [(predicted, published)]."""
    if len(seconds) < 2:
        return
    pairs = [(a, b) for i, a in enumerate(seconds) for b in seconds[i + 1:]]
    right = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    worst = max(max(p / told, told / p) for p, told in seconds)
    print(f'against the published minutes: at worst a factor {worst:.2f}; {right} of {len(pairs)} pairs of stages are '
          'in the published order')


def flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', help=f'of {", ".join(MODELS)}')
    parser.add_argument('--context', help='tokens of a row: 1048576, 1M, 64K')
    parser.add_argument('--hardware', help=f'of {", ".join(hardware.TABLE)}; default: what a recipe was published on')
    parser.add_argument('--devices', type=int)
    parser.add_argument('--network', type=float, help='GB/s one way from a node to the others, if not the table\'s')
    parser.add_argument('--rows', type=int, help='rows a step; default: 4M tokens, one row at least')
    parser.add_argument('--tokens', type=float, help=f'to train on; default {DEFAULT_TOKENS:,}, as Gradient at 1M')
    parser.add_argument('--param-dtype', choices=('float32', 'bfloat16'), default='float32',
                        help='of the stored parameters and moments; computing is in bfloat16')
    parser.add_argument('--theta', type=float, help='RoPE theta to train with; default: the critical base')
    parser.add_argument('--price-per-hour', type=float, help='of one device')
    parser.add_argument('--recipe', help='a Python file with get_config(): reckon its stages instead')
    parser.add_argument('--show', type=int, default=8, help='how many plans to list')
    parser.add_argument('--compile', metavar='TARGET', help='also compile the step of the best plan for l40s:512, '
                        'v5p:8x8x8, ...: that many devices of --hardware (extra aot-cuda or aot-tpu)')
    parser.add_argument('--out', help='where to write the config; default runs/MODEL-CONTEXT-DEVICESxHARDWARE.py, '
                        'none of a recipe')
    return parser.parse_args(argv)


def run(argv=None):
    args = flags(argv)
    if args.recipe:
        return plan_recipe(args)
    missing = [flag for flag in ('model', 'context', 'hardware', 'devices') if getattr(args, flag) is None]
    if missing:
        raise ValueError(f'--{missing[0]} is needed, or a --recipe')
    if args.devices < 1:
        raise ValueError(f'--devices {args.devices} must be at least 1')
    if args.compile:
        target = targets.parse(args.compile)
        if (target.kind, target.count) != (args.hardware, args.devices):
            raise ValueError(f'--compile {args.compile} is {target.count} x {target.kind}, the plan is for {args.devices} x '
                             f'{args.hardware}; name the same machine')
    return plan_context(args)


if __name__ == '__main__':
    run_script(lambda: run(sys.argv[1:]))
