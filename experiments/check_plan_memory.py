"""Memory of a device as lct.plan.buffers predicts it, beside what the compilers for GPUs and TPUs say.

    python experiments/check_plan_memory.py                        prints the table of results/plan_memory.json
    python experiments/check_plan_memory.py --compile cuda         compiles what is not there yet (extra 'aot-cuda')
    python experiments/check_plan_memory.py --compile tpu          (extra 'aot-tpu'; minutes a row)

Compiled is what the training step takes of one device: arguments, temporaries and outputs that take no argument's
place. (The compilers' own peak counts offloaded buffers on the host too.) Predicted and compiled are different columns;
the constants of buffers.py were counted on the rows 'seen', those 'held out' came after.
"""

import argparse
import json
import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import compile_report  # noqa: E402
import plan as planner  # noqa: E402

from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.models.llama import Memory  # noqa: E402
from lct.models.llama_sizes import SIZES  # noqa: E402
from lct.ops.blockwise_attention import Chunks  # noqa: E402
from lct.ops.strategies import Attention  # noqa: E402
from lct.plan import hardware, hlo  # noqa: E402
from lct.plan.buffers import buffers  # noqa: E402
from lct.plan.cost import Step  # noqa: E402
from lct.text import table  # noqa: E402

RESULTS = experiments_folder() / 'results' / 'plan_memory.json'
BF16, F32, MIXED = ('bfloat16', None), ('float32', None), ('float32', 'bfloat16')  # parameters, computation
# target, model, mesh, batch_size, accumulation, seq_len, remat, strategy, node_size, ffn_chunks, dtype
SEEN = (
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'attention', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'none', 'ring', 1, 1, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'double_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_gather_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_to_all_ring', 8, 8, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'all_gather', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 64, 8), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:512', 'llama3-70b', (1, 1, 512, 1), 1, 1, 2**20, 'offload', 'ring', 1, 8, F32),
    ('h100:512', 'llama3-70b', (1, 8, 64, 1), 8, 2, 2**19, 'offload', 'ring', 1, 8, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 4, 2**16, 'full', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'attention', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'dots', 'ring', 1, 1, BF16),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 1, 2**16, 'none', 'ring', 1, 1, BF16),
    ('h100:8', 'llama3-8b', (1, 1, 4, 2), 1, 1, 2**17, 'full', 'ring', 1, 4, BF16),
    ('h100:8', 'llama3-8b', (2, 1, 2, 2), 2, 1, 2**16, 'full', 'ring', 1, 4, BF16),
    ('h100:8', 'llama3.2-1b', (1, 1, 8, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('h100:8', 'llama3.2-3b', (1, 1, 8, 1), 1, 1, 2**19, 'offload', 'all_to_all', 1, 8, BF16),
    ('h100:32', 'llama3-70b', (1, 1, 8, 4), 1, 1, 2**17, 'full', 'ring', 1, 4, BF16),
    ('l40s:32', 'llama3-8b', (1, 1, 32, 1), 1, 16, 2**18, 'full', 'ring', 1, 8, BF16),
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 2, 2, 2**22, 'offload', 'ring', 1, 8, BF16),
    ('a100:8', 'llama3-8b', (1, 8, 1, 1), 8, 1, 2**15, 'full', 'ring', 1, 4, F32),
    ('l40s:8', 'llama3-8b', (1, 1, 8, 1), 1, 32, 2**16, 'full', 'ring', 1, 1, MIXED),
    ('l40s:32', 'llama3-8b', (1, 1, 32, 1), 1, 16, 2**18, 'full', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 16, 1, 2**19, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, MIXED),
    ('v5p:4x4x4', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'full', 'ring', 1, 8, BF16),
    ('v5p:8x8x8', 'llama3-8b', (1, 1, 512, 1), 1, 1, 2**20, 'full', 'ring', 1, 1, BF16),
    ('v5p:4x4x4', 'llama3-8b', (1, 4, 16, 1), 4, 1, 2**18, 'offload', 'ring', 1, 8, BF16),
    ('v5e:4x4', 'llama3.2-1b', (1, 1, 16, 1), 1, 1, 2**17, 'full', 'ring', 1, 1, BF16),
)
HELD_OUT = (
    ('h100:512', 'llama3.1-405b', (1, 1, 512, 1), 1, 1, 2**18, 'full', 'ring', 1, 8, BF16),
    ('h200:64', 'llama3-70b', (1, 2, 16, 2), 2, 1, 2**18, 'offload', 'double_ring', 4, 8, BF16),
    ('a100:64', 'llama3.2-3b', (1, 4, 16, 1), 8, 1, 2**17, 'attention', 'ring', 1, 4, BF16),
    ('l40s:64', 'llama3.2-1b', (2, 4, 8, 1), 16, 2, 2**16, 'none', 'ring', 1, 1, BF16),
    ('h100:64', 'llama3-8b', (1, 1, 64, 1), 1, 1, 2**20, 'attention', 'all_to_all_ring', 8, 2, BF16),
    ('h100:512', 'llama3-70b', (1, 4, 128, 1), 4, 1, 2**20, 'attention', 'double_ring', 8, 1, BF16),
    ('l40s:512', 'llama3-8b', (1, 1, 512, 1), 2, 2, 2**22, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-70b', (1, 64, 8, 1), 64, 1, 2**16, 'offload', 'ring', 1, 4, MIXED),
    ('l40s:512', 'llama3-70b', (1, 16, 32, 1), 16, 1, 2**18, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:512', 'llama3-70b', (1, 8, 64, 1), 8, 2, 2**19, 'offload', 'ring', 1, 8, MIXED),
    ('l40s:128', 'llama3-70b', (1, 1, 128, 1), 1, 4, 2**20, 'offload', 'ring', 1, 8, MIXED),
    ('v6e:4x4', 'llama3-8b', (1, 1, 16, 1), 1, 1, 2**18, 'full', 'ring', 1, 8, BF16),
    ('v5p:8x8x8', 'llama3-8b', (1, 8, 64, 1), 8, 1, 2**20, 'offload', 'ring', 1, 8, BF16),
    ('v5p:4x4x4', 'llama3-8b', (1, 1, 16, 4), 1, 1, 2**19, 'full', 'ring', 1, 8, BF16),
)


def step_of(point):
    """The Step of a point."""
    _, model, mesh, batch, accumulation, seq_len, remat, strategy, node_size, ffn_chunks, dtype = point
    memory = Memory(remat, Attention(strategy, node_size, Chunks(512, 512)), ffn_chunks, dtype=dtype[1])
    return Step(SIZES[model], mesh, seq_len, batch, accumulation, memory, dtype[0])


def key(point):
    return f'{point[0]} {planner.program(point[1], step_of(point))}'


def compiled(point):
    """What the compiler says of a point's memory."""
    import jax

    from lct.plan import targets
    from lct.train.loop import Run
    from lct.train.stages import Stage

    target, step = targets.parse(point[0]), step_of(point)
    mesh = targets.mesh(target, step.mesh)
    stage = Stage('', step.seq_len, 1, step.batch_size, step.accumulation, mesh=step.mesh, memory=step.memory)
    args = argparse.Namespace(step='', model=point[1], stage=0)
    with jax.set_mesh(mesh):
        programs = compile_report.training_programs(Run((stage,), param_dtype=step.dtype), mesh, args)
    (lowered,) = programs.values()
    return hlo.memory_of(lowered.compile(compiler_options=targets.options(target)))


def show(found):
    header = ('', 'target', 'model', 'mesh', 'rows x times', 'tokens', 'policy', 'dtype', 'predicted GiB',
              'compiled GiB', 'ratio')
    rows = []
    ratios = []
    for kind, points in (('seen', SEEN), ('held out', HELD_OUT)):
        for point in (p for p in points if key(p) in found):
            step = step_of(point)
            predicted = buffers(step, hardware.find(point[0].split(':')[0]).platform).peak
            peak = hlo.device_bytes(found[key(point)])
            ratios.append(predicted / peak)
            rows.append((kind, *point[:2], step.mesh, f'{step.batch_size} x {step.accumulation}', step.seq_len,
                         planner.policy(step), '/'.join(part for part in point[-1] if part), f'{predicted / 2**30:.2f}', f'{peak / 2**30:.2f}',
                         f'{ratios[-1]:.2f}'))
    print(table(header, rows, left=(0, 1, 2, 6, 7)))
    within = sum(abs(ratio - 1) <= 0.15 for ratio in ratios)
    print(f'\n{within} of {len(ratios)} within 15%; ratios {min(ratios):.2f} to {max(ratios):.2f}')


def run():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--compile', choices=('cuda', 'tpu'))
    args = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = {'gpu': 'cuda', 'tpu': 'tpu'}
    for point in SEEN + HELD_OUT:
        platform = wanted[hardware.find(point[0].split(':')[0]).platform]
        if args.compile == platform and key(point) not in found:
            found[key(point)] = compiled(point)
            found = {**(json.loads(RESULTS.read_text()) if RESULTS.exists() else {}), **found}
            RESULTS.write_text(json.dumps(found, indent=1) + '\n')
    show(found)


if __name__ == '__main__':
    run_script(run)
