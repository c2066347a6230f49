"""Plan before you rent: what fits, how fast it runs and what it costs.

    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --price-per-hour 1
    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --compile l40s:512
    python experiments/plan.py --recipe experiments/configs/published/gradient_llama3_8b.py

The first searches meshes, strategies and memory policies, prints the best plan in full and why others were
rejected, and writes it as a config for experiments/extend.py. The last predicts a recipe stage by stage, on
the meshes that it names or on the best mesh of --devices, beside the minutes that its authors published. All
figures are predictions. Where checks/check_plan_memory.py has compiled the same program, the compiler's
figure stands in a column of its own.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli import planned_config
from lct.cli.config import load_config, make_run, windowed
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.models.family_sizes import ALL as SIZES
from lct.models.llama import LlamaConfig
from lct.ops import rope
from lct.plan import compiled, hardware, search, serving, tables, targets, timing
from lct.plan.buffers import Buffers, buffers
from lct.plan.cost import Step
from lct.plan.tables import GiB
from lct.text import parse_length, table
from lct.train import stages

DEFAULT_TOKENS = 50 * 2**23  # of Gradient's stage at 1M: 419,430,400
# meta-llama/Llama-2-7b-hf, the base model of LWM and EasyContext
MODELS = {**SIZES, 'llama2-7b': LlamaConfig(
    vocab_size=32000, embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128,
    max_position_embeddings=4096, rope=rope.RopeConfig(theta=10000.0))}


def recipe_model(config, name):
    """(name, LlamaConfig) of the base model of a recipe: --model, or the one that its config names."""
    name = name or config.get('base', {}).get('model')
    if not name:
        raise ValueError('the recipe names no base model; add --model, or base.model to the config')
    name = hardware.lookup(name, MODELS, 'model')
    return name, MODELS[name]


def licence_of(name):
    """The identifier of the licence of a model, for the card of its extension."""
    families = {'qwen': 'apache-2.0', 'mistral': 'apache-2.0', 'smollm': 'apache-2.0', 'phi3': 'mit',
                'llama2': 'llama2'}
    return next((licence for start, licence in families.items() if name.startswith(start)), 'llama3')


def hardware_of(args, published=''):
    """The Hardware of the flags, or the published device of a recipe, with the network of the flags."""
    names = (part for part in re.split(r'[\s-]', published.lower()) if part in hardware.TABLE)
    name = args.hardware or next(names, None)
    if name is None:
        raise ValueError(f'--hardware is needed; choose from {", ".join(hardware.TABLE)}')
    kind = hardware.find(name)
    if args.network:
        flow = min(kind.between, args.network * 1e9) if kind.network > kind.between else args.network * 1e9
        kind = dataclasses.replace(kind, network=args.network * 1e9, between=flow)
    return kind


def theta_for(config, context, theta):
    """The theta to train with at a context: of the flags, if it reaches that far, or the critical base."""
    trained = config.max_position_embeddings
    if context <= trained:
        return 'keep'
    if theta is None:
        return 'critical_base'
    reach = rope.extrapolation_bound(theta, config.rope_theta, trained, config.head_dim)
    if reach < context:
        needed = rope.critical_base(config.rope_theta, trained, context)
        raise ValueError(f'context {context} is beyond the {reach:,.0f} tokens that theta {theta:,.0f} '
                         f'reaches by the RoPE scaling law; use --theta {math.ceil(needed)}, or leave it out')
    return theta


def price(hours, devices, per_hour):
    return f', {hours * devices * per_hour:,.0f} at {per_hour} per device and hour' if per_hour else ''


# ---------------------------------------------------------------------------------------------------
# One context
# ---------------------------------------------------------------------------------------------------


class Budget(NamedTuple):
    """The cost of the training tokens with one plan."""

    num_steps: int
    tokens_per_step: int
    days: float


def plan_context(args):
    name = hardware.lookup(args.model, MODELS, 'model')
    config, kind, context = MODELS[name], hardware_of(args), parse_length(args.context)
    theta = theta_for(config, context, args.theta)
    rows = args.rows or max(2**22 // context, 1)
    result = search.best(search.Job(config, context, rows, args.param_dtype), kind, args.devices)
    plan = result.plans[0]
    num_steps = max(round((args.tokens or DEFAULT_TOKENS) / (rows * context)), 1)
    budget = Budget(num_steps, rows * context, num_steps * plan.seconds / 86400)

    print(f'{name}, {rows} rows of {context:,} tokens per step, {args.devices} x {kind.name}, parameters in '
          f'{args.param_dtype}, computation in bfloat16. PREDICTED: nothing was run or compiled.\n'
          f'{tables.assumptions(kind)}\n')
    print_plan(plan, budget, kind, args)
    print_alternatives(result, kind, args.show)
    run = f'{name}-{args.context.lower()}-{args.devices}x{kind.name}'
    path = pathlib.Path(args.out or f'runs/{run}.py')
    stage = {'name': args.context, 'num_steps': num_steps, 'learning_rate': 2e-5, 'warmup_steps': 0,
             'final_fraction': 1.0, 'theta': theta, 'mixture': {'text': 1.0}}
    fields = planned_config.config_fields(run, licence_of(name), config,
                                          planned_config.stage_fields(stage, plan.step))
    planned_config.write(path, fields, kind.name, plan.step,
                         f'{plan.seconds:.1f} s/step, {budget.tokens_per_step / plan.seconds:,.0f} tokens/s, '
                         f'{budget.days:.2f} days, {plan.buffers.peak / GiB:.1f} GiB per device')
    if args.compile:
        from lct.cli.compile import compile_stage

        compile_stage(make_run(load_config(path)), 0, name, config, targets.parse(args.compile), path.parent)


def print_plan(plan, budget, kind, args):
    """The best plan in full."""
    step = plan.step
    degrees = dict(zip(('data', 'fsdp', 'sequence', 'tensor'), step.mesh))
    print(f'mesh {degrees}; {tables.policy(step)}; {step.batch_size} rows at a time, '
          f'{step.accumulation} times\n')
    print(tables.memory_table(plan.buffers, kind), '\n', tables.seconds_table(plan.times), sep='\n')
    print(f'\n{budget.tokens_per_step / plan.seconds:,.0f} tokens/s, model FLOPs utilisation '
          f'{timing.utilisation(step, kind, plan.seconds):.1%}; {budget.num_steps} steps of '
          f'{budget.tokens_per_step:,} tokens take {budget.days:.2f} '
          f'days{price(24 * budget.days, args.devices, args.price_per_hour)}')
    print(f'on the same mesh {step.batch_size} prompts of {step.seq_len:,} tokens are prefilled in '
          f'{sum(serving.prefill_seconds(step, kind).values()):.1f} s; weights are gathered for every token:')
    for dtype in ('bfloat16', 'int8'):
        cached = dataclasses.replace(step, memory=dataclasses.replace(step.memory, cache_dtype=dtype))
        print(f'  cache in {dtype}: {serving.cache_bytes(cached) / GiB:.2f} GiB per device, a token in '
              f'{1000 * sum(serving.decode_seconds(cached, kind).values()):.0f} ms')
    print()


def print_alternatives(result, kind, count):
    """The first plans of a search, and the reasons for its rejections."""
    print(f'{len(result.plans)} plans are feasible, best first:')
    print(tables.plans_table(result.plans[:count], kind))
    print(f'\n{len(result.rejections)} are not:')
    for number, reason, step in result.reasons():
        print(f'  {number:>5}, for example mesh {step.mesh} with {step.memory.attention.strategy}, remat '
              f'{step.memory.remat}: {reason}')


# ---------------------------------------------------------------------------------------------------
# A recipe
# ---------------------------------------------------------------------------------------------------


class PlannedStage(NamedTuple):
    """A stage of a recipe and its predictions. published: the 'published' fields of the config."""

    name: str
    num_steps: int
    step: Step
    kind: hardware.Hardware
    times: dict[str, float]
    buffers: Buffers
    published: dict

    @property
    def seconds(self):
        return sum(self.times.values())

    @property
    def minutes(self):
        return self.seconds * self.num_steps / 60

    @property
    def comparable(self):
        """Whether there are published minutes of the same devices."""
        return bool(self.published.get('minutes')) and self.published.get('devices') == self.step.devices \
            and self.kind.name in self.published['device'].lower()


def plan_recipe(args):
    for flag in ('rows', 'tokens', 'theta'):
        if getattr(args, flag):
            raise ValueError(f'--{flag} is set by the recipe {args.recipe}; '
                             'drop the flag or write another recipe')
    raw = load_config(args.recipe)
    run, (name, config) = make_run(raw), recipe_model(raw, args.model)
    config = windowed(config, raw)
    context = args.context and parse_length(args.context)
    check_recipe_context(args, run, config, context)
    placement = f'on the best mesh of {args.devices} devices' if args.devices else 'on its own meshes'
    print(f'{name}, {args.recipe}: stage by stage, parameters in {args.param_dtype}, computation in '
          f'bfloat16, {placement}\n')
    all_fields = [fields.to_dict() for fields in raw.stages]
    planned = [plan_stage(stage, fields, config, args) for stage, fields in zip(run.stages, all_fields)
               if not context or stage.seq_len <= context]
    print_stages(planned, name)
    hours = sum(one.minutes / 60 * one.step.devices for one in planned)
    days = sum(one.minutes for one in planned) / 60 / 24
    last = planned[-1]
    print(f'\n{days:.2f} days, {hours:,.0f} device-hours in total{price(hours, 1, args.price_per_hour)}\n\n'
          f'{tables.assumptions(last.kind)}')
    print_agreement([(one.minutes, one.published['minutes']) for one in planned if one.comparable])
    if args.out:
        fields = [planned_config.stage_fields(fields, one.step) for fields, one in zip(all_fields, planned)]
        others = raw.to_dict()
        if context:  # the probe must not read further than the last stage trains
            others['needle']['lengths'] = tuple(n for n in raw.needle.lengths if n <= last.step.seq_len)
        planned_config.write(pathlib.Path(args.out), {**others, 'stages': fields}, last.kind.name,
                             last.step, f'{hours:,.0f} device-hours')


def check_recipe_context(args, run, config, context):
    """Refuse a --context beyond the last stage of a recipe."""
    last = run.stages[-1]
    if context and context > last.seq_len:
        theta = stages.configs(run.stages, config)[-1].rope_theta
        raise ValueError(f'context {args.context} is beyond the {last.seq_len} tokens for which the last '
                         f'stage of {args.recipe} sets theta {theta:,.0f}; add a stage with theta '
                         'critical_base, or drop --context')


def plan_stage(stage, fields, config, args):
    """The PlannedStage of a stage, on its own mesh or on the best one of --devices."""
    published = fields.get('published', {})
    kind = hardware_of(args, published.get('device', ''))
    if args.devices:
        job = search.Job(config, stage.seq_len, stage.batch_size * stage.accumulation, args.param_dtype)
        step = search.best(job, kind, args.devices).plans[0].step
    else:
        memory = dataclasses.replace(stage.memory, dtype='bfloat16')
        step = Step(config, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, memory,
                    args.param_dtype, stage.layout)
        step.check()
    return PlannedStage(stage.name, stage.num_steps, step, kind, timing.seconds(step, kind),
                        buffers(step, kind.platform), published)


def print_stages(planned, model):
    """The stages of a recipe, and the seconds of a step of each."""
    path = experiments_folder() / 'results' / 'plan_memory.json'
    memory_table = json.loads(path.read_text()) if path.exists() else {}
    header = ('stage', 'hardware', 'mesh', 'policy', 's/step', 'tokens/s', 'MFU', 'GiB', 'predicted min',
              'published min', 'ratio', 'compiled GiB')
    print(table(header, [stage_row(one, compiled.step_bytes(memory_table, one.kind.name, model, one.step))
                         for one in planned], left=(0, 3)))
    print('\nGiB: predicted, per device; ! where that is more than the usable memory. ratio: predicted to '
          'published, where hardware and devices are theirs.')
    names = list(dict.fromkeys(name for one in planned for name in one.times))
    print('\nseconds of a step, predicted:')
    print(table(('stage', *names),
                [(one.name, *(f'{one.times.get(name, 0):.1f}' for name in names)) for one in planned]))


def stage_row(one, compiled_bytes):
    """A stage in the table of a recipe. compiled_bytes: per device, or None."""
    step, published = one.step, one.published.get('minutes')
    full = one.buffers.peak > search.USABLE * one.kind.memory
    return (one.name, f'{step.devices} x {one.kind.name}', step.mesh, tables.policy(step),
            f'{one.seconds:.1f}',
            f'{step.tokens / one.seconds:,.0f}', f'{timing.utilisation(step, one.kind, one.seconds):.1%}',
            f'{one.buffers.peak / GiB:.1f}{"!" if full else ""}', f'{one.minutes:.0f}', published or '-',
            f'{one.minutes / published:.2f}' if one.comparable else '-',
            f'{compiled_bytes / GiB:.1f}' if compiled_bytes else '-')


def print_agreement(minutes):
    """Print how well minutes agree. minutes: [(predicted, published)]."""
    if len(minutes) < 2:
        return
    pairs = [(a, b) for i, a in enumerate(minutes) for b in minutes[i + 1:]]
    ordered = sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in pairs)
    worst = max(max(predicted / published, published / predicted) for predicted, published in minutes)
    print(f'against the published minutes: at worst a factor {worst:.2f}; {ordered} of {len(pairs)} pairs of '
          'stages are in the published order')


def flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', help=f'one of {", ".join(MODELS)}')
    parser.add_argument('--context', help='tokens of a row: 1048576, 1M, 64K')
    parser.add_argument('--hardware',
                        help=f'one of {", ".join(hardware.TABLE)}; '
                             'default: the device on which a recipe was published')
    parser.add_argument('--devices', type=int)
    parser.add_argument('--network', type=float,
                        help='GB/s one way from a node to the others; default: as in the table')
    parser.add_argument('--rows', type=int, help='rows per step; default: 4M tokens, at least one row')
    parser.add_argument('--tokens', type=float,
                        help=f'tokens to train on; default: {DEFAULT_TOKENS:,}, as Gradient at 1M')
    parser.add_argument('--param-dtype', choices=('float32', 'bfloat16'), default='float32',
                        help='dtype of the stored parameters and moments; the computation is in bfloat16')
    parser.add_argument('--theta', type=float, help='RoPE theta to train with; default: the critical base')
    parser.add_argument('--price-per-hour', type=float, help='price of one device for an hour')
    parser.add_argument('--recipe', help='a Python file with get_config() whose stages to predict instead')
    parser.add_argument('--show', type=int, default=8, help='number of plans to list')
    parser.add_argument('--compile', metavar='TARGET',
                        help='also compile the step of the best plan for l40s:512, v5p:8x8x8, ...: as many '
                             'devices of --hardware (extra aot-cuda or aot-tpu)')
    parser.add_argument('--out', help='path of the config; default: runs/MODEL-CONTEXT-DEVICESxHARDWARE.py, '
                                      'and none for a recipe')
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
            raise ValueError(f'--compile {args.compile} is {target.count} x {target.kind}, the plan is for '
                             f'{args.devices} x {args.hardware}; name the same machine')
    return plan_context(args)


if __name__ == '__main__':
    run_script(lambda: run(sys.argv[1:]))
