"""Compile an attention op or a whole training step for a machine that is not here; report what its compiler says.

    python experiments/compile_report.py --target l40s:8 --op ring --direction both --length-per-device 8192
    python experiments/compile_report.py --target l40s:512 --step experiments/configs/published/gradient_llama3_8b.py --stage 3

Prints, per program, every collective with its bytes, whether it is hidden behind matmuls, the memory of one
device and the largest tensor; the same goes to experiments/results/compile_<target>.json. Needs the extra
'aot-cuda' or 'aot-tpu'. Nothing is executed: memory and schedule are the compiler's, and time is unknown.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import pathlib
import time

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli.config import load_config, make_run, windowed
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder


def attention_programs(mesh, args):
    """{title: lowered program} of the attention op, forward and backward."""
    import jax

    from lct.ops import strategies
    from lct.ops.blockwise_attention import Chunks
    from lct.plan import programs

    size = {'B': args.batch or mesh.shape['data'] * mesh.shape['fsdp'],
            'T': args.length_per_device * mesh.shape['sequence'],
            'N': args.heads, 'K': args.kv_heads, 'H': args.head_dim}
    dtype = args.dtype or 'bfloat16'
    shape = ' '.join(f'{letter}={n}' for letter, n in size.items())
    attention = strategies.Attention(args.op, chunks=Chunks(args.chunk, args.chunk))
    op = functools.partial(strategies.attend, attention=attention)
    return {
        f'{args.op} {direction} {shape} {dtype}': jax.jit(function).lower(*arguments)
        for direction, (function, arguments) in programs.attention(op, mesh, size, dtype).items()
        if args.direction in (direction, 'both')
    }


def stage_of(args):
    """The Run of a config, its stage changed as the flags say."""
    run = make_run(load_config(args.step))
    if not 0 <= args.stage < len(run.stages):
        raise ValueError(f'--stage {args.stage}: {args.step} has stages 0 to {len(run.stages) - 1}')
    stages = list(run.stages)
    stage = stages[args.stage]
    stages[args.stage] = dataclasses.replace(
        stage, mesh=args.mesh or stage.mesh, batch_size=args.batch or stage.batch_size,
        memory=dataclasses.replace(stage.memory, remat=args.remat or stage.memory.remat))
    return dataclasses.replace(run, stages=tuple(stages), param_dtype=args.dtype or run.param_dtype)


def model_of(args):
    """The name in SIZES that is trained."""
    from lct.models.llama_sizes import SIZES

    stem = pathlib.Path(args.step).stem.replace('_', '-')
    name = args.model or next((size for size in SIZES if stem.endswith(size)), stem)
    if name not in SIZES:
        raise ValueError(f'--model {name!r} is not one of {sorted(SIZES)}; name the model that {args.step} trains')
    return name


def predicted_bytes(run, args, platform):
    """What lct.plan.buffers says of the step's memory."""
    from lct.models.llama_sizes import SIZES
    from lct.plan.buffers import buffers
    from lct.plan.cost import Step

    stage = run.stages[args.stage]
    model = windowed(SIZES[model_of(args)], load_config(args.step))
    step = Step(model, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, stage.memory,
                run.param_dtype, stage.layout)
    return buffers(step, platform).peak


def training_programs(run, mesh, args):
    """{title: lowered program} of one optimizer step of a stage: lct.train.step.train_step as the loop calls it, but
    with abstract arguments."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lct import sharding
    from lct.models.llama_sizes import SIZES
    from lct.ops import rope
    from lct.train import optimizer, stages, state
    from lct.train.step import train_step

    name, stage = model_of(args), run.stages[args.stage]
    model = windowed(SIZES[name], load_config(args.step))
    rope_config = stages.configs(run.stages, model)[args.stage].rope
    tables = jax.eval_shape(lambda: rope.make_tables(rope_config, model.head_dim, stage.seq_len))
    shape = (stage.accumulation, stage.batch_size, stage.seq_len)
    place = jax.NamedSharding(mesh, P(None, *sharding.spec('BT')))
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == 'loss_mask' else jnp.int32, sharding=place)
             for name in ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')}
    tx = optimizer.make(run.optimizer)
    lowered = train_step.lower(
        state.abstract(model, tx, jnp.dtype(run.param_dtype)), batch, tables, config=model.architecture(),
        memory=stage.memory, tx=tx, schedule=optimizer.schedule(run.stages))
    return {f'{name} step {stage.name} B={stage.batch_size} T={stage.seq_len} {stage.memory.remat} {run.param_dtype}':
            lowered}


def report(compiled, degrees):
    """What the compiler says of a program, as a dict for JSON; bytes and counts are those of one device."""
    from lct.plan import hlo

    program = hlo.Program(compiled.as_text())
    largest, name = program.largest()
    return {
        'memory': hlo.memory_of(compiled),
        'largest': {'bytes': largest.size, 'tensor': str(largest), 'name': name},
        'transfers': [
            {**dataclasses.asdict(t), 'hidden': t.hidden, 'shapes': [str(shape) for shape in t.shapes]}
            for t in program.transfers(degrees)
        ],
    }


def show(title, record):
    """Print one record; transfers that are alike share a line."""
    from lct.plan import hlo

    memory = '  '.join(f'{name} {size / 2**20:,.1f}' for name, size in record['memory'].items() if size)
    largest = record['largest']
    print(f'\n{title}: compiled in {record["seconds"]:.1f} s')
    print(f'  memory of a device, MiB: {memory}')
    if record['device_memory']:
        taken = hlo.device_bytes(record['memory']) / record['device_memory']
        room = record['device_memory'] / 2**20
        if 'predicted' in record:
            size, guess = hlo.device_bytes(record['memory']), record['predicted']
            print(f'  compiled {size / 2**20:,.0f} MiB, predicted {guess / 2**20:,.0f} MiB: {guess / size:.2f}x')
        print(f'  {"fits" if taken < 1 else "DOES NOT FIT"}: it takes {taken:.0%} of the {room:,.0f} MiB of a device')
    print(f'  largest tensor: {largest["tensor"]} {largest["bytes"] / 2**20:,.1f} MiB ({largest["name"]})')
    alike, total = collections.Counter(), collections.Counter()
    for t in record['transfers']:
        state = 'hidden' if t['hidden'] else 'exposed' if t['asynchronous'] else 'exposed, synchronous'
        along = '+'.join(t['axes']) or 'no axis'
        times = f'{"" if t["exact"] else ">="}{t["times"]}'
        alike[f'{times} x {t["kind"]} over {along}, {t["sent"] / 2**20:,.2f} MiB of '
              f'{" ".join(t["shapes"])}: {state}'] += 1
        total[along, t['kind'], state] += t['times'] * t['sent']
    for line, count in alike.items():
        print(f'  {count:>3} at {line}')
    for (along, kind, state), sent in sorted(total.items()):
        print(f'  in all {sent / 2**20:,.1f} MiB sent by {kind} over {along}: {state}')


def save(path, target, records):
    """Add records to the target's JSON; a program that is there already is replaced."""
    old = json.loads(path.read_text())['programs'] if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({'target': target.name, 'programs': {**old, **records}}, indent=1) + '\n')
    print(f'\nwritten to {path}')


def flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--target', required=True, help='l40s:8, h100:512, v5e:4x4, v5p:4x4x4, ...')
    parser.add_argument('--mesh', type=lambda text: tuple(int(d) for d in text.split(',')),
                        help='degrees of data,fsdp,sequence,tensor; default: all devices on sequence, or as the stage')
    parser.add_argument('--batch', type=int, help='rows in all; default: one for each ring, or as the stage')
    parser.add_argument('--dtype', help='of the arrays, default bfloat16, or of the parameters, default as the config')
    parser.add_argument('--results', default=str(experiments_folder() / 'results'), help='folder of the JSON')
    parser.add_argument('--hlo', help='also write the HLO text of each program into this folder')
    op = parser.add_argument_group('an attention op')
    op.add_argument('--op', default='ring', help='strategy: a key of lct.ops.strategies.STRATEGIES')
    op.add_argument('--direction', choices=('forward', 'backward', 'both'), default='both')
    op.add_argument('--length-per-device', type=int, default=8192, help='tokens of one row on one device')
    op.add_argument('--heads', type=int, default=32)
    op.add_argument('--kv-heads', type=int, default=8)
    op.add_argument('--head-dim', type=int, default=128)
    op.add_argument('--chunk', type=int, default=512, help='query and key chunk of attention')
    step = parser.add_argument_group('a whole training step instead')
    step.add_argument('--step', help='a Python file with get_config()')
    step.add_argument('--stage', type=int, default=0, help='number of the stage, from 0')
    step.add_argument('--model', help='of lct.models.llama_sizes; default: the one that the file of the config names')
    step.add_argument('--remat', help='another remat policy than that of the stage')
    return parser.parse_args(argv)


def run(argv=None):
    args = flags(argv)
    import jax

    from lct.plan import hardware, targets

    target = targets.parse(args.target)
    plan = stage_of(args) if args.step else None
    mesh = targets.mesh(target, plan.stages[args.stage].mesh if plan else args.mesh or (1, 1, target.count, 1))
    print(f'{target.name}: mesh {dict(mesh.shape)}')
    distances = targets.neighbour_distances(target, mesh, 'sequence')
    if distances:
        print(f'links between neighbours of the ring, and how many hops: {distances}')
    common = {'jax': jax.__version__, 'options': targets.options(target), 'neighbour_distances': distances,
              'device_memory': targets.memory(target)}
    records = {}
    if args.step:
        common['predicted'] = predicted_bytes(plan, args, hardware.find(target.kind).platform)
    with jax.set_mesh(mesh):
        todo = training_programs(plan, mesh, args) if args.step else attention_programs(mesh, args)
    for title, lowered in todo.items():
        title = f'{title}, mesh {"x".join(str(d) for d in mesh.shape.values())}'
        start = time.monotonic()
        compiled = lowered.compile(compiler_options=targets.options(target))
        records[title] = {'seconds': round(time.monotonic() - start, 1), **common, **report(compiled, dict(mesh.shape))}
        show(title, records[title])
        if args.hlo:
            pathlib.Path(args.hlo, f'{title.replace(" ", "_")}.txt').write_text(compiled.as_text())
    save(pathlib.Path(args.results, f'compile_{target.name.replace(":", "_")}.json'), target, records)


if __name__ == '__main__':
    run_script(run)
