"""Gradient's Llama-3 to a million tokens and beyond: the minutes on their model cards, predicted.

    python experiments/papers/gradient.py

Configs: experiments/configs/published/gradient_llama3_8b.py and gradient_llama3_70b.py. Every stage is
predicted on its own mesh with the efficiencies of lct.plan.timing, then on the same network under the
two-level strategies and with other numbers of rings side by side. The network of their nodes was not
published. The one in lct.plan.hardware was chosen so that these nine rows come within a factor of two, so
they are not an independent test of it.
"""

import dataclasses

import claims

from lct.cli.config import load_config, make_run
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.eval.report import svg
from lct.models.llama_sizes import LLAMA3_8B, LLAMA3_70B
from lct.ops.strategies import STRATEGIES, Attention
from lct.plan import buffers, cost, hardware, search, timing

L40S = hardware.find('l40s')
RECIPES = {'8B': ('gradient_llama3_8b', LLAMA3_8B), '70B': ('gradient_llama3_70b', LLAMA3_70B)}
TWO_LEVEL = [name for name, facts in STRATEGIES.items() if facts.two_level]
SPEEDUP = 33  # of 'layered parallelism', by the 8B model's card


def stages():
    """Iterator of (model, stage, the fields of its config, Step)."""
    for model, (name, config) in RECIPES.items():
        raw = load_config(experiments_folder() / 'configs' / 'published' / f'{name}.py')
        for stage, fields in zip(make_run(raw).stages, raw.stages, strict=True):
            memory = dataclasses.replace(stage.memory, dtype='bfloat16')
            yield model, stage, fields, cost.Step(config, stage.mesh, stage.seq_len, stage.batch_size,
                                                  stage.accumulation, memory)


def minutes(step, num_steps, kind=L40S):
    return sum(timing.seconds(step, kind).values()) * num_steps / 60


def under(step, strategy):
    """The step under a two-level strategy; None where a ring is at most a node."""
    chunks = step.memory.attention.chunks
    if step.mesh[2] <= L40S.node_size:
        return None
    return dataclasses.replace(step, memory=dataclasses.replace(step.memory,
                                                                attention=Attention(strategy, L40S.node_size,
                                                                                    chunks)))


def table():
    rows = []
    for model, stage, fields, step in stages():
        predicted, published = minutes(step, stage.num_steps), fields.published.minutes
        times = timing.seconds(step, L40S)
        beyond = sum(times[f'transfers beyond {behind} attention'] for behind in ('forward', 'backward'))
        row = {'model': model, 'stage': stage.name, 'GPUs': step.devices, 'rings': step.mesh[1],
               'GPUs of a ring': step.mesh[2],
               'tokens of a GPU': step.shard, 'predicted min': predicted, 'published min': published,
               'ratio': predicted / published,
               'transfers that attention does not hide': beyond / sum(times.values())}
        for strategy in TWO_LEVEL:
            other = under(step, strategy)
            row[strategy] = None if other is None else minutes(other, stage.num_steps)
        rows.append(row)
    return rows


def rings():
    """Minutes and memory per device of the 8B model's 524K stage on 512 GPUs, by number of rings."""
    rows = []
    (_, stage, _, base), = [one for one in stages() if one[0] == '8B' and one[1].name == '524K']
    for count in (1, 2, 4, 8, 16):
        step = dataclasses.replace(base, mesh=(1, count, base.devices // count, 1))
        row = {'rings': count, 'GPUs of a ring': step.mesh[2], 'tokens of a GPU': step.shard,
               'ring': minutes(step, stage.num_steps)}
        for strategy in TWO_LEVEL:
            row[strategy] = minutes(under(step, strategy), stage.num_steps)
        needed = buffers.buffers(step).peak
        rows.append({**row, 'GiB of a device': needed / 2**30, 'fits': needed <= search.USABLE * L40S.memory})
    return rows


def networks():
    """Minutes of the same stage on its own mesh with more network adapters per node."""
    (_, stage, _, step), = [one for one in stages() if one[0] == '8B' and one[1].name == '524K']
    rows = []
    for adapters in (1, 2, 4, 8):
        kind = dataclasses.replace(L40S, network=adapters * L40S.between)
        rows.append({'adapters of a node': adapters, 'ring': minutes(step, stage.num_steps, kind), **{
            strategy: minutes(under(step, strategy), stage.num_steps, kind) for strategy in TWO_LEVEL}})
    return rows


def tokens_per_minute(rows, stage, column):
    """Tokens per minute of a stage of the 8B model, by the minutes of a column."""
    (row,) = [row for row in rows if row['model'] == '8B' and row['stage'] == stage]
    (fields,) = [fields for model, one, fields, _ in stages() if model == '8B' and one.name == stage]
    return fields.seq_len * fields.batch_size * fields.accumulation * fields.num_steps / row[column]


def claims_of(tables):
    rows = tables['stages']
    return [minutes_claim(rows), ring_size_claim(rows), speedup_claim(rows, tables['rings side by side']),
            two_level_claim(rows, tables['more adapters'][-1])]


def minutes_claim(rows):
    pairs = [(row['predicted min'], row['published min']) for row in rows]
    right, count = map(sum, zip(*(
        claims.ordered([(r['predicted min'], r['published min']) for r in rows if r['model'] == model])
        for model in RECIPES), strict=True))
    near = claims.within(pairs, 2)
    return claims.Claim(
        'minutes of all nine stages', 'predicted',
        ', '.join(f'{row["model"]} {row["stage"]} {row["published min"]}' for row in rows),
        ', '.join(f'{f:.0f}' for f, _ in pairs)
        + f': {near} of {len(pairs)} within 2x, {right} of {count} pairs of '
        'stages in their order', 'yes' if near == len(pairs) and right == count else 'in part',
        'One network constant for all nodes. Their single rings of 32 and 128 GPUs took longer than it '
        'explains: in each model one pair of stages changes places.')


def ring_size_claim(rows):
    inside, between = (timing.least_block(L40S.flops, link, 4, True) for link in (L40S.inside, L40S.network))
    return claims.Claim(
        'a ring has as many GPUs as the row has shards of 8,192 tokens, other GPUs make more rings',
        'counted',
        '8, 32, 64, 64 GPUs per ring (8B), 8, 32, 64, 128 (70B)',
        ', '.join(f'{row["model"]} {row["stage"]}: {row["rings"]} of {row["GPUs of a ring"]}'
                  for row in rows), 'yes',
        f'8,192 tokens are more than the {inside:,.0f} that hide a transfer inside a node and fewer than the '
        f'{between:,.0f} that hide one between nodes. The latter is exposed, and less so with the 16,384 '
        'that the 8B model held at 1048K.')


def speedup_claim(rows, side_by_side):
    predicted, published = (tokens_per_minute(rows, '524K', column) / tokens_per_minute(rows, '262K', column)
                            for column in ('predicted min', 'published min'))
    one, eight = (next(row for row in side_by_side if row['rings'] == count) for count in (1, 8))
    return claims.Claim(
        f'rings side by side gave a {SPEEDUP}x speedup (524K and 1048K against 65K and 262K)', 'predicted',
        f'{published:.0f}x tokens/s at 524K over 262K', f'{predicted:.0f}x',
        'yes' if claims.within([(predicted, published)], 2) else 'no',
        'A factor of sixteen is the GPUs, 512 for 32. The rest is the two rows of the table with the largest '
        'errors, in opposite directions. That rings side by side pay is predicted: on the same 512 GPUs '
        f'eight rings of 64 take {eight["ring"]:.0f} predicted minutes and one ring of 512 takes '
        f'{one["ring"]:.0f}: {one["ring"] / eight["ring"]:.1f}x.')


def two_level_claim(rows, more):
    gains = []
    for row in rows:
        if row['double_ring']:
            best = min(row[strategy] for strategy in TWO_LEVEL)
            gains.append(f'{row["model"]} {row["stage"]} {best:.0f} min ({row["predicted min"] / best:.1f}x)')
    return claims.Claim(
        'what a two-level strategy would have given them', 'predicted', 'none', ', '.join(gains),
        'not published',
        'Little: in a ring of 64 one GPU of a node sends its 63 blocks to the next node, or eight send 7 '
        'each, and one adapter carries both. It pays where a node has several adapters, of which a single '
        f'ring uses one: with {more["adapters of a node"]} of them 524K takes {more["double_ring"]:.0f} '
        f'minutes instead of {more["ring"]:.0f}.')


def run(argv=None):
    args = claims.flags(__doc__, argv)
    rows = table()
    tables = {'stages': rows, 'rings side by side': rings(), 'more adapters': networks()}
    names = [f'{row["model"]} {row["stage"]}' for row in rows]
    best = [row['double_ring'] and min(row[strategy] for strategy in TWO_LEVEL) for row in rows]
    picture = svg.bars(names, {'published': [row['published min'] for row in rows],
                                   'predicted': [row['predicted min'] for row in rows],
                                   'predicted, best two-level strategy': best}, 'minutes',
                       "Gradient's stages", log_y=True)
    claims.report(args.output, 'gradient', 'model cards of gradientai/Llama-3-8B-Instruct-Gradient-4194k and '
                  'Llama-3-70B-Instruct-Gradient-1048k', tables, claims_of(tables), minutes=picture)


if __name__ == '__main__':
    run_script(run)
