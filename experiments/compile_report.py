"""Compile an attention op or a training step for a machine that is not present, and report on the program.

    python experiments/compile_report.py --target l40s:8 --op ring --direction both --length-per-device 8192
    python experiments/compile_report.py --target l40s:512 --stage 3 \\
        --step experiments/configs/published/gradient_llama3_8b.py

Prints, per program, every collective with its bytes and whether it is hidden behind matmuls, the memory of
one device and the largest tensor, and writes the same to experiments/results/compile_<target>.json. Needs the
extra 'aot-cuda' or 'aot-tpu'. Nothing is executed: memory and schedule are the compiler's, and the time is
unknown.
"""

import argparse
import dataclasses
import functools
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli.config import load_checked, make_run, windowed
from lct.cli.flags import length
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder


def attention_programs(mesh, args):
    """{title: lowered program} of the attention op, forward and backward."""
    import jax

    from lct.ops import strategies
    from lct.ops.blockwise_attention import Chunks
    from lct.plan import programs

    size = {'B': args.rows or mesh.shape['data'] * mesh.shape['fsdp'],
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


def changed_run(args, config):
    """The Run of a config, with its stage changed by the flags."""
    run = make_run(config)
    if not 0 <= args.stage < len(run.stages):
        raise ValueError(f'--stage {args.stage}: {args.config} has stages 0 to {len(run.stages) - 1}')
    stages = list(run.stages)
    stage = stages[args.stage]
    stages[args.stage] = dataclasses.replace(
        stage, mesh=args.mesh or stage.mesh, batch_size=args.rows or stage.batch_size,
        memory=dataclasses.replace(stage.memory, remat=args.remat or stage.memory.remat,
                                   offload_state=args.offload_state or stage.memory.offload_state))
    return dataclasses.replace(run, stages=tuple(stages), param_dtype=args.dtype or run.param_dtype)


def model_name(args):
    """The key of SIZES that a config trains."""
    from lct.models.llama_sizes import SIZES

    stem = pathlib.Path(args.config).stem.replace('_', '-')
    name = args.model or next((size for size in SIZES if stem.endswith(size)), stem)
    if name not in SIZES:
        raise ValueError(f'--model {name!r} is not one of {sorted(SIZES)}; '
                         f'name the model that {args.config} trains')
    return name


def flags(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--target', required=True, help='l40s:8, h100:512, v5e:4x4, v5p:4x4x4, ...')
    parser.add_argument('--mesh', type=lambda text: tuple(int(d) for d in text.split(',')),
                        help='degrees of data,fsdp,sequence,tensor; '
                             'default: all devices on sequence, or as in the stage')
    parser.add_argument('--rows', type=int,
                        help='total rows; default: one for each ring, or as in the stage')
    parser.add_argument('--dtype',
                        help='dtype of the arrays (default: bfloat16), '
                             'or of the parameters (default: as in the config)')
    parser.add_argument('--output', type=pathlib.Path, default=experiments_folder() / 'results',
                        help='folder of the JSON')
    parser.add_argument('--hlo', type=pathlib.Path, help='folder that also gets the HLO text of each program')
    op = parser.add_argument_group('an attention op')
    op.add_argument('--op', default='ring', help='strategy: a key of lct.ops.strategies.STRATEGIES')
    op.add_argument('--direction', choices=('forward', 'backward', 'both'), default='both')
    op.add_argument('--length-per-device', type=length, default=8192, help='tokens of one row on one device')
    op.add_argument('--heads', type=int, default=32, help='query heads')
    op.add_argument('--kv-heads', type=int, default=8, help='key/value heads')
    op.add_argument('--head-dim', type=int, default=128, help='dims of a head')
    op.add_argument('--chunk', type=int, default=512, help='query and key chunk of attention')
    step = parser.add_argument_group('a whole training step instead')
    step.add_argument('--config', help='a Python file with get_config()')
    step.add_argument('--stage', type=int, default=0, help='number of the stage, from 0')
    step.add_argument('--model',
                      help='a name of lct.models.llama_sizes; default: the one in the config\'s file name')
    step.add_argument('--remat', help='remat policy, if not the one of the stage')
    step.add_argument('--offload-state', help='none, moments or all, if not as in the stage')
    return parser.parse_args(argv)


def run(argv=None):
    args = flags(argv)
    import jax

    from lct.cli import compile as compiling
    from lct.models.llama_sizes import SIZES
    from lct.plan import targets

    target = targets.parse(args.target)
    if args.config:
        name, config = model_name(args), load_checked(args.config)
        model = windowed(SIZES[name], config)
        compiling.compile_stage(
            changed_run(args, config), args.stage, name, model, target, args.output, args.hlo)
        return
    mesh = compiling.announced_mesh(target, args.mesh or (1, 1, target.count, 1))
    with jax.set_mesh(mesh):
        lowered = attention_programs(mesh, args)
    compiling.compile_all(lowered, target, mesh, args.output, args.hlo)


if __name__ == '__main__':
    run_script(run)
