"""Large World Model (Liu et al. 2024, arXiv 2402.08268): the text stages on a TPU v4-512, predicted.

    python experiments/papers/lwm.py

Config: experiments/configs/published/lwm_text_7b.py, with their meshes. The paper's text gives about seven
minutes per gradient step at 1M (cited second hand); its table has no hours. Three times are predicted: of our
program; of one that computes every pair of the square, as theirs does, because an unbalanced ring gains
nothing from skipping; and of the best plan of the search.
"""

import dataclasses

import claims
from llama1_sizes import SIZES

from lct.cli.config import load_config, make_run
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.eval.report import svg
from lct.plan import cost, hardware, search, timing

V4 = hardware.find('v4')
SECONDS_AT_1M = 7 * 60


def stages():
    """Iterator of (stage, Step) of the config."""
    raw = load_config(experiments_folder() / 'configs' / 'published' / 'lwm_text_7b.py')
    for stage in make_run(raw).stages:
        memory = dataclasses.replace(stage.memory, dtype='bfloat16')
        yield stage, cost.Step(SIZES['7B'], stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation,
                               memory)


def of_all_pairs(step):
    """Seconds of a program that computes the whole square of attention."""
    times = timing.seconds(step, V4)
    more = cost.work(step, causal=False).total - cost.work(step).total
    return sum(times.values()) + more / (V4.flops * timing.Efficiency().attention)


def table():
    rows = []
    for stage, step in stages():
        times = timing.seconds(step, V4)
        total = sum(times.values())
        best = search.best(search.Job(step.config, stage.seq_len, stage.batch_size * stage.accumulation), V4,
                           step.devices).plans[0]
        rows.append({'stage': stage.name, 'mesh': str(step.mesh), 'steps': stage.num_steps, 's a step': total,
                     'all pairs, s a step': of_all_pairs(step), 'hours': total * stage.num_steps / 3600,
                     'all pairs, hours': of_all_pairs(step) * stage.num_steps / 3600,
                     'waits for tensor axis': times['partial sums'] / total,
                     'MFU': timing.utilisation(step, V4, total),
                     'best mesh': str(best.step.mesh), 'best, s a step': best.seconds})
    return rows


def claims_of(rows):
    last = rows[-1]
    near = claims.within([(last['all pairs, s a step'], SECONDS_AT_1M)], 1.25)
    return [
        claims.Claim(
            'a gradient step of 4M tokens at 1M takes about 7 minutes on a v4-512', 'predicted',
            f'{SECONDS_AT_1M} s',
            f'{last["s a step"]:.0f} s for our program, '
            f'{last["all pairs, s a step"]:.0f} s if every pair is computed',
            'yes' if near else 'in part',
            'Cited second hand. The difference between the two is causal work that is skipped and balanced. '
            'The rest is float32, which they list for the computation and for which the table of hardware '
            'has no peak.'),
        claims.Claim(
            'up to 16-way tensor parallelism first, then rings of 2 and 4', 'predicted', last['mesh'],
            f'best of the search at 1M: {last["best mesh"]}, {last["best, s a step"]:.0f} s a step against '
            f'{last["s a step"]:.0f}', 'no',
            f'All-reduces of the tensor axis are exposed ({last["waits for tensor axis"]:.0%} of a step at '
            '1M), transfers of a ring are not. Weights sharded over the ring save the memory that would '
            'favour the tensor axis.'),
    ]


def run(argv=None):
    args = claims.flags(__doc__, argv)
    rows = table()
    column = lambda key: [row[key] for row in rows]
    picture = svg.bars(
        column('stage'), {
            'our program, their mesh': column('s a step'),
            'all pairs, their mesh': column('all pairs, s a step'),
            'our program, best mesh': column('best, s a step'),
            'published': [None] * (len(rows) - 1) + [SECONDS_AT_1M]},
        'seconds a step', 'LWM text stages on a TPU v4-512, predicted')
    claims.report(args.output, 'lwm', 'Large World Model, arXiv 2402.08268', {'text stages': rows},
                  claims_of(rows),
                  steps=picture)


if __name__ == '__main__':
    run_script(run)
