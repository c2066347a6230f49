"""Plan before you rent: what fits, how fast it runs, what it costs, as a config that extend.py runs.

    python experiments/plan.py --model FOLDER --context 64K --hardware rtx4090 --devices 1 --corpus TEXTS \\
        --output runs/mine.py
    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --price-per-hour 1
    python experiments/plan.py --model llama3-8b --context 1M --hardware l40s --devices 512 --compile l40s:512
    python experiments/plan.py --config experiments/configs/published/gradient_llama3_8b.py

The first reads the folder and the corpus, chooses stages, thetas, meshes, strategies, memory policies and
steps, sizes the evaluations to the text that can be held out, and checks the config that it writes as
extend.py does. A name in place of a folder plans by published sizes. The last predicts a recipe stage by
stage, on the meshes that it names or on the best mesh of --devices, beside the minutes that its authors
published. All figures are predictions. Where checks/check_plan_memory.py has compiled the same program, the
compiler's figure stands in a column of its own.
"""

import argparse
import dataclasses
import os
import pathlib
import sys

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli import plan_run, planned_config
from lct.cli.config import EVALUATE, load_config, make_run
from lct.cli.corpus_survey import survey, tokenizer_of
from lct.cli.flags import add_exclude_flag
from lct.cli.host_memory import host_memory
from lct.cli.main import check_positive, run_script
from lct.cli.model import parse_lengths
from lct.cli.plan_models import MODELS, resolve
from lct.cli.plan_recipe import hardware_of, plan_recipe, price
from lct.cli.problems import Problems
from lct.plan import hardware, serving, tables, targets, timing
from lct.plan.tables import GiB
from lct.text import parse_length, short_length, table


def make_request(args):
    """The plan_run.Request of the flags.

    Raises:
      ValueError: for everything that is wrong with them, each with its remedy.
    """
    problems, model, kind, context, lengths, corpus = Problems(), None, None, None, (), None
    for flag in ('model', 'context'):
        if getattr(args, flag) is None:
            problems.extend([f'--{flag} is needed, or a --config'])
    with problems.collect():
        model = args.model and resolve(args.model)
    with problems.collect():
        context = args.context and parse_length(args.context)
    with problems.collect():
        lengths = () if args.stages == 'auto' else parse_lengths('--stages', args.stages)
    with problems.collect():
        args.devices = args.devices if args.devices is not None else 1 if args.hardware == 'cpu' else None
        if args.devices is None:
            raise ValueError('--devices is needed, or a --config')
        if args.devices < 1:
            raise ValueError(f'--devices {args.devices} must be at least 1')
    for flag in ('rows', 'tokens'):
        with problems.collect():
            check_positive(args, flag)
    with problems.collect():
        kind = hardware_of(args)
    with problems.collect():
        if args.compile and kind and args.devices:
            check_target(args)
    with problems.collect():
        if args.corpus:
            corpus = survey(args.corpus, model and tokenizer_of(model.folder), args.exclude, args.text_field)
    problems.check()
    if kind.platform == 'cpu':
        kind = hardware.cpu(args.devices, host_memory())
    request = plan_run.Request(model, context, kind, args.devices, lengths, corpus, args.tokens, args.rows,
                               args.param_dtype, args.theta, args.train)
    plan_run.check_lengths(request)
    return request


def check_target(args):
    target = targets.parse(args.compile)
    if (target.kind, target.count) != (args.hardware, args.devices):
        raise ValueError(f'--compile {args.compile} is {target.count} x {target.kind}, the plan is for '
                         f'{args.devices} x {args.hardware}; name the same machine')


def plan_context(args):
    request = make_request(args)
    problems, planned, sized, notes = Problems(), [], {}, []
    with problems.collect():
        planned = plan_run.one_way_to_train(request, plan_run.plan_stages(request))
    with problems.collect():
        if planned:
            sized, notes = plan_run.evaluations(request.corpus, planned)
    problems.check()
    name, kind, last = request.model.name, request.kind, planned[-1]
    print(f'{name}, native context {request.model.config.max_position_embeddings:,}, {args.devices} x '
          f'{kind.name}, parameters in {args.param_dtype}, computation in {last.plan.step.memory.dtype}. '
          f'PREDICTED: nothing was run or compiled.\n{tables.assumptions(kind)}\n')
    print_stages(planned)
    print(f'\nThe last stage, {last.rows} rows of {last.seq_len:,} tokens per step:')
    print_plan(last, kind, args)
    print_alternatives(last.result, kind, args.show)
    run = f'{name}-{short_length(request.context).lower()}-{args.devices}x{kind.name}'
    more = {'evaluate': args.evaluate}
    if args.corpus:
        more |= {'corpus': corpus_path(args.corpus), 'exclude': tuple(args.exclude),
                 'text_field': args.text_field}
    fields, found = plan_run.config_of(request, planned, sized, run, more)
    path = pathlib.Path(args.output or f'runs/{run}.py')
    planned_config.write(path, fields, kind.name, last.plan.step,
                         f'{sum(one.days for one in planned):.2f} days, {plan_run.peak(planned):.1f} GiB of '
                         f'{kind.memory / GiB:.1f} per device')
    print_notes(request, planned, [*found, *notes])
    if request.model.folder and args.corpus:
        check_written(path, kind)
    print(f'\nwritten to {path}')
    if args.compile:
        from lct.cli.compile import compile_stage

        compile_stage(make_run(load_config(path)), len(planned) - 1, name, request.model.config,
                      targets.parse(args.compile), path.parent)


def corpus_path(spec):
    """The spec of a corpus for a config, which may be used from another folder."""
    return str(pathlib.Path(spec).absolute()) if os.path.exists(spec) else spec


def check_written(path, kind):
    """Everything that extend.py checks before it trains.

    Raises:
      ValueError: if it would refuse the config.
    """
    from lct.cli.extension import check_without_devices, describe

    config = load_config(path)
    config.check_memory = False  # the plan is the check
    print(f'\nchecked as extend.py does: {describe(check_without_devices(config, kind))}')


def print_notes(request, planned, notes):
    """Lines on what the plan does not do."""
    if planned[0].adapter and request.train == 'auto':
        frozen = ' on weights in 8 bits' if planned[0].adapter.quantized else ''
        notes.insert(0, f'training all weights does not fit {request.devices} x {request.kind.name}, so '
                        f'low-rank adapters{frozen} and the norms are trained; --train all shows what it '
                        'would take')
    if request.corpus and request.corpus.estimated:
        notes.append('tokens of the corpus are estimated from its bytes; name a model folder to count them')
    if request.kind.platform == 'cpu' and not request.tokens:
        notes.append(f'{sum(one.num_steps * one.rows * one.seq_len for one in planned):,} tokens are trained '
                     f'on, a trial of about {plan_run.CPU_S // 60} minutes; --tokens sets their number')
    for note in dict.fromkeys(notes):
        print(f'note: {note}')


def print_stages(planned):
    """A row for every stage."""
    print(table(
        ('stage', 'theta', 'mesh', 'policy', 'rows', 'steps', 's/step', 'GiB', 'days'),
        [(short_length(one.seq_len), one.theta, one.plan.step.mesh,
          (f'adapters on {one.adapter.frozen_dtype}, ' if one.adapter else '') + tables.policy(one.plan.step),
          one.rows, one.num_steps,
          f'{one.plan.seconds:.1f}', f'{one.plan.buffers.peak / GiB:.1f}', f'{one.days:.2f}')
         for one in planned], left=(0, 1, 3)))


def print_plan(planned, kind, args):
    """The best plan of a stage in full."""
    plan, step = planned.plan, planned.plan.step
    tokens = planned.rows * planned.seq_len
    degrees = dict(zip(('data', 'fsdp', 'sequence', 'tensor'), step.mesh))
    print(f'mesh {degrees}; {tables.policy(step)}; {step.batch_size} rows at a time, '
          f'{step.accumulation} times\n')
    print(tables.memory_table(plan.buffers, kind), '\n', tables.seconds_table(plan.times), sep='\n')
    print(f'\n{tokens / plan.seconds:,.0f} tokens/s, model FLOPs utilisation '
          f'{timing.utilisation(step, kind, plan.seconds, plan.adapter):.1%}; {planned.num_steps} steps of '
          f'{tokens:,} tokens take {planned.days:.2f} '
          f'days{price(24 * planned.days, args.devices, args.price_per_hour)}')
    print(f'on the same mesh {step.batch_size} prompts of {step.seq_len:,} tokens are prefilled in '
          f'{sum(serving.prefill_seconds(step, kind).values()):.1f} s; decoding with weights split over it:')
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


def flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', help=f'a Hugging Face Llama folder, or one of {", ".join(MODELS)}')
    parser.add_argument('--context', help='tokens of a row: 1048576, 1M, 64K')
    parser.add_argument('--stages', default='auto',
                        help="lengths of all stages, such as 64K,256K,1M, or 'auto'")
    parser.add_argument('--hardware',
                        help=f'one of {", ".join(hardware.TABLE)}; '
                             'default: the device on which a recipe was published')
    parser.add_argument('--devices', type=int, help='number of devices of all machines')
    parser.add_argument('--corpus', help='your text: a folder, glob, file or token store')
    add_exclude_flag(parser)
    parser.add_argument('--text-field', default='text',
                        help="field of a record that holds its text; 'a.b' is field b of the object a")
    parser.add_argument('--train', choices=('auto', 'all', 'adapter'), default='auto',
                        help='all weights, low-rank adapters, or (auto) all weights where they fit')
    parser.add_argument('--evaluate', choices=tuple(EVALUATE), default='before_and_after',
                        help='when the model is measured')
    parser.add_argument('--network', type=float,
                        help='GB/s one way from a node to the others; default: as in the table')
    parser.add_argument('--rows', type=int, help='rows per step; default: up to 4M tokens, at least one row')
    parser.add_argument('--tokens', type=float,
                        help=f'tokens to train on; default: {plan_run.DEFAULT_TOKENS:,}, as Gradient at 1M, '
                             f'or {plan_run.EPOCHS} times those of a smaller corpus')
    parser.add_argument('--param-dtype', choices=('float32', 'bfloat16'), default='float32',
                        help='dtype of the stored parameters and moments; the computation is in bfloat16, on '
                             'CPUs in float32')
    parser.add_argument('--theta', type=float, help='RoPE theta to train with; default: the critical base')
    parser.add_argument('--price-per-hour', type=float, help='price of one device for an hour')
    parser.add_argument('--config', help='a Python file with get_config() whose stages to predict instead')
    parser.add_argument('--show', type=int, default=8, help='number of plans to list')
    parser.add_argument('--compile', metavar='TARGET',
                        help='also compile the step of the best plan for l40s:512, v5p:8x8x8, ...: as many '
                             'devices of --hardware (extra aot-cuda or aot-tpu)')
    parser.add_argument('--output',
                        help='the config; default: runs/MODEL-CONTEXT-DEVICESxHARDWARE.py, none for --config')
    return parser.parse_args(argv)


def run(argv=None):
    args = flags(argv)
    return plan_recipe(args) if args.config else plan_context(args)


if __name__ == '__main__':
    run_script(lambda: run(sys.argv[1:]), urls=('--model', '--corpus'))
