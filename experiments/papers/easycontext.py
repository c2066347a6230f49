"""EasyContext (github.com/jzhang38/EasyContext): tokens/s of Llama-2-7B on eight A100, predicted.

    python experiments/papers/easycontext.py

Config: experiments/configs/published/easycontext_llama2_7b.py. The rows are those of their README, predicted
with efficiencies that were chosen on Gradient's stages and not on any of these. They run weights sharded over
all GPUs with the optimizer in host memory, offloaded activation checkpoints, and zigzag ring attention.
"""

import claims
from llama1_sizes import SIZES

from lct.cli.main import run_script
from lct.eval.report import svg
from lct.models.llama import Memory
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.plan import buffers, cost, hardware, search, timing

A100, K = hardware.find('a100'), 2**10
RING, ROWS = (1, 1, 8, 1), (1, 8, 1, 1)
PUBLISHED = (  # tokens of a row, mesh, tokens/s of the eight together
    (64 * K, ROWS, 10240), (64 * K, RING, 7816), (128 * K, RING, 4266), (512 * K, RING, 2133),
    (700 * K, RING, 1603))


def table():
    rows = []
    for length, mesh, published in PUBLISHED:
        memory = Memory('offload', Attention('ring', 1, Chunks(512, 512)), 8, dtype='bfloat16')
        step = cost.Step(SIZES['7B'], mesh, length, mesh[1], 1, memory, 'bfloat16')
        times = timing.seconds(step, A100)
        total = sum(times.values())
        needed = buffers.buffers(step)
        rows.append({'tokens of a row': length, 'mesh': 'ring of 8' if mesh == RING else 'a row each',
                     'published tokens/s': published,
                     'predicted tokens/s': step.tokens / total, 'ratio': step.tokens / total / published,
                     'FLOPs of a token': cost.model_flops(step) / step.tokens,
                     'share of attention': times['attention'] / total,
                     'MFU': timing.utilisation(step, A100, total),
                     'GiB of a device': needed.peak / 2**30,
                     'fits': needed.peak <= search.USABLE * A100.memory})
    return rows


def claims_of(rows):
    pairs = [(row['predicted tokens/s'], row['published tokens/s']) for row in rows]
    right, count = claims.ordered(pairs)
    ring = rows[1:4]
    fall, grow = ([b / a for a, b in zip(x, x[1:])] for x in (
        [1 / row['published tokens/s'] for row in ring], [row['FLOPs of a token'] for row in ring]))
    return [
        claims.Claim('tokens/s on eight A100, 64K to 700K', 'predicted',
                     ', '.join(f'{p:,}' for _, p in pairs),
                     ', '.join(f'{f:,.0f}' for f, _ in pairs)
                     + f': ratios {min(f / p for f, p in pairs):.2f} to '
                     f'{max(f / p for f, p in pairs):.2f}, {right} of {count} pairs in their order',
                     'yes' if claims.within(pairs, 2) == len(pairs) and right == count else 'in part',
                     'None of these rows was used to choose an efficiency. The largest error is at 128K: '
                     f'their rate falls by {fall[0]:.1f} from 64K to 128K and by {fall[1]:.1f} from there to '
                     f'512K, where the FLOPs of a token grow by {grow[0]:.1f} and {grow[1]:.1f}.'),
        claims.Claim('Llama-2-7B trains at 700K tokens on eight A100 of 80 GB', 'predicted', 'fits',
                     f'{rows[-1]["GiB of a device"]:.0f} GiB of {A100.memory / 2**30:.0f}',
                     'yes' if rows[-1]['fits'] else 'no',
                     'Layer inputs are offloaded to the host; theirs keeps the optimizer there too.'),
    ]


def run(argv=None):
    args = claims.flags(__doc__, argv)
    rows = table()
    names = [f'{row["tokens of a row"] // K}K, {row["mesh"]}' for row in rows]
    picture = svg.bars(names, {name: [row[f'{name} tokens/s'] for row in rows]
                               for name in ('published', 'predicted')},
                           'tokens/s', 'Llama-2-7B on eight A100')
    claims.report(args.output, 'easycontext', 'README of EasyContext', {'tokens per second': rows},
                  claims_of(rows), speed=picture)


if __name__ == '__main__':
    run_script(run)
