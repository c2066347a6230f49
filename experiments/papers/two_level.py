"""All-to-all, ring, and both: USP (Fang & Zhao 2024) and LoongTrain (Gu et al. 2024).

    python experiments/papers/two_level.py

The papers are arXiv 2405.07719 and 2406.18485. Counted: bytes that a device sends for the attention of one
layer, against their formulas. Predicted: their runs with our strategies all_to_all (Ulysses), ring, and
all_to_all_ring, which is all-to-all among neighbours and a ring of such nodes. The networks of their clusters
are assumptions, stated beside each row.
"""

import dataclasses

import claims
from llama1_sizes import SIZES

from lct.cli.main import run_script
from lct.eval.report import svg
from lct.models.llama import Memory
from lct.models.llama_sizes import LLAMA3_8B
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import STRATEGIES, Attention
from lct.plan import cost, hardware, timing

K, GB = 2**10, 1e9
# an A100 with NVLink at 400 GB/s, both ways together
A800 = dataclasses.replace(hardware.find('a100'), name='a800', inside=200 * GB, inside_all=200 * GB)
# assumption: an L40S with a third of its compute; the same PCIe 4.0, 48 GB, 864 GB/s
L20 = dataclasses.replace(hardware.find('l40s'), name='l20', flops=119.5e12)
LLAMA2_7B_GQA = dataclasses.replace(SIZES['7B'], num_kv_heads=8)  # LoongTrain's 7B with eight key/value heads
# tokens/s/GPU; ring: Megatron
LOONGTRAIN = (('all_to_all', 629.9), ('ring', 706.2), ('all_to_all_ring', 838.1))
COMPARED = (*LOONGTRAIN, ('double_ring', None), ('all_gather_ring', None))


def step_of(config, ring, seq_len, strategy, node_size=1, remat='full'):
    attention = Attention(strategy, node_size if STRATEGIES[strategy].two_level else 1, Chunks(512, 512))
    memory = Memory(remat, attention, 8, dtype='bfloat16')
    return cost.Step(config, (1, 1, ring, 1), seq_len, 1, 1, memory, 'bfloat16')


def seconds(step, kind):
    return sum(timing.seconds(step, kind).values())


def volumes():
    """Bytes of one layer's attention, forward and backward, against table 2 of USP.

    The unit is an activation [tokens of a device, D] in bfloat16. In units of the whole sequence the table
    has 8 / n for all-to-all and 4 for a ring, which are 8 and 4 n of a device.
    """
    rows = []
    for kv_heads, name in ((32, 'one key/value head a head'), (8, 'four heads to a key/value head')):
        config = dataclasses.replace(SIZES['7B'], num_layers=1, num_kv_heads=kv_heads)
        for n in (4, 8):
            row = {'heads': name, 'devices': n}
            for strategy, theirs in (('all_to_all', 8), ('ring', 4 * n)):
                step = step_of(config, n, 64 * K, strategy, remat='attention')
                sent = sum(t.bytes for t in cost.transfers(step) if t.axis == 'sequence')
                unit = step.local * config.embed_dim * step.width
                group = config.num_heads // kv_heads
                fewer = (1 + 1 / group) / 2 if strategy == 'all_to_all' else 1 / group
                row |= {strategy: sent / unit, f'{strategy}, theirs': theirs * fewer}
            rows.append(row)
    return rows


def loongtrain():
    """7B at 128K on 32 A100, tokens/s per GPU; their best split is 8 by all-to-all, 4 by ring."""
    kind, rows = hardware.find('a100'), []
    for strategy, published in COMPARED:
        step = step_of(LLAMA2_7B_GQA, 32, 128 * K, strategy, 8)
        total = seconds(step, kind)
        rows.append({'strategy': strategy, 'published tokens/s/GPU': published,
                     'predicted tokens/s/GPU': step.tokens / 32 / total,
                     'predicted MFU': timing.utilisation(step, kind, total)})
    return rows


def loongtrain_million():
    """The same at 1M: utilisation."""
    kind, rows = hardware.find('a100'), []
    for strategy, published in (('all_to_all', 0.365), ('all_to_all_ring', 0.448)):
        step = step_of(LLAMA2_7B_GQA, 32, K * K, strategy, 8)
        total = seconds(step, kind)
        rows.append({'strategy': strategy, 'published MFU': published,
                     'predicted MFU': timing.utilisation(step, kind, total)})
    return rows


def usp():
    """Llama-3 8B at 208K on two nodes of eight A800, and on one machine of eight L20 without NVLink."""
    rows = []
    for machine, kind, ring, length in (('2 x 8 A800', A800, 16, 208 * K), ('8 x L20, PCIe', L20, 8, 64 * K)):
        for split in (1, 2, 4, 8):
            strategy = 'ring' if split == 1 else 'all_to_all' if split == ring else 'all_to_all_ring'
            step = step_of(LLAMA3_8B, ring, length, strategy, split)
            total = seconds(step, kind)
            used = timing.utilisation(step, kind, total)
            pairs = 12 * LLAMA3_8B.num_layers * LLAMA3_8B.embed_dim * length
            rows.append({'machine': machine, 'all-to-all x ring': f'{split} x {ring // split}',
                         's a step': total,
                         'MFU': used,
                         'MFU, all pairs': used * (1 + pairs / 2 * step.tokens / cost.model_flops(step))})
    return rows


def claims_of(tables):
    return [bytes_claim(tables['bytes of a layer']),
            *loongtrain_claims(tables['LoongTrain, 7B at 128K on 32 A100'],
                               tables['LoongTrain, 7B at 1M on 32 A100']),
            *usp_claims(tables['USP, Llama-3 8B'])]


def bytes_claim(rows):
    volume = [(row[name], row[f'{name}, theirs']) for row in rows for name in ('all_to_all', 'ring')]
    return claims.Claim(
        'bytes of a layer: all-to-all 8 / n, ring 4 of an activation; '
        'grouped heads divide keys and values (USP, table 2)',
        'counted', ', '.join(f'{p:g}' for _, p in volume), ', '.join(f'{f:.1f}' for f, _ in volume),
        'yes' if claims.within(volume, 1.6) == len(volume) else 'in part',
        'A device sends n - 1 of n shares. Our ring sends n - 1 blocks forward and n - 1/2 backward, with '
        'gradients in float32, twice the width that they count, and positions and segments as well.')


def loongtrain_claims(rows, million):
    pairs = [(row['predicted tokens/s/GPU'], row['published tokens/s/GPU']) for row in rows
             if row['published tokens/s/GPU']]
    right, count = claims.ordered(pairs)
    gain = [million[1][kind] / million[0][kind] for kind in ('published MFU', 'predicted MFU')]
    return [
        claims.Claim(
            '7B at 128K on 32 A100: all-to-all, then a ring, then both (LoongTrain)', 'predicted',
            ', '.join(f'{name} {published:g}' for name, published in LOONGTRAIN),
            ', '.join(f'{f:.0f}' for f, _ in pairs)
            + f' tokens/s/GPU: {right} of {count} pairs in their order',
            'yes' if right == count else 'in part',
            'Both is first here too. The ring is last here, and all-to-all is last there. All-to-all over 32 '
            'devices repeats eight key/value heads fourfold and exposes its transfers between nodes. A '
            'network of 8 x 200 Gb/s per node is assumed.'),
        claims.Claim(
            'MFU at 1M: 0.448 for both against 0.365 for all-to-all (LoongTrain)', 'predicted',
            f'{gain[0]:.2f}x',
            f'{gain[1]:.2f}x', 'yes' if claims.within([(gain[1], gain[0])], 1.1) else 'no',
            'At 1M attention is so much of a step that no transfer counts for much. What all-to-all over 32 '
            'devices loses there is not in the bytes over links.'),
    ]


def usp_claims(rows):
    a800, l20 = ([row for row in rows if row['machine'].startswith(name)] for name in ('2 x 8', '8 x L20'))
    best_a800, best_l20 = (min(group, key=lambda row: row['s a step']) for group in (a800, l20))
    spread = max(row['s a step'] for row in l20) / best_l20['s a step']
    return [
        claims.Claim(
            '47% MFU for Llama-3 8B at 208K on two nodes of A800 (USP)', 'predicted', '47%',
            f'{best_a800["MFU"]:.0%} with {best_a800["all-to-all x ring"]}', 'in part',
            'Ours counts visible pairs and recomputes each layer in its backward. With the masked half '
            f'counted as well it would be {best_a800["MFU, all pairs"]:.0%}; which of the two they count is '
            'not known here. The network of an A100 node is assumed.'),
        claims.Claim(
            'on eight L20 over PCIe all-to-all 2 x ring 4 is best (USP)', 'predicted', '2 x 4',
            f'{best_l20["all-to-all x ring"]}; the slowest is {spread:.2f}x slower',
            'yes' if best_l20['all-to-all x ring'] == '2 x 4' else 'no',
            'All four are close. Zigzag attention with grouped heads hides all transfers of our ring even '
            'over PCIe, where an all-to-all is exposed. Their ring launches smaller kernels, whose cost is '
            'not in the model.'),
    ]


def run(argv=None):
    args = claims.flags(__doc__, argv)
    tables = {'bytes of a layer': volumes(), 'LoongTrain, 7B at 128K on 32 A100': loongtrain(),
              'LoongTrain, 7B at 1M on 32 A100': loongtrain_million(), 'USP, Llama-3 8B': usp()}
    rows = tables['LoongTrain, 7B at 128K on 32 A100']
    picture = svg.bars([row['strategy'] for row in rows], {name: [row[f'{name} tokens/s/GPU'] for row in rows]
                                                              for name in ('published', 'predicted')},
                           'tokens/s/GPU', '7B at 128K on 32 A100')
    claims.report(args.output, 'two_level', 'USP, arXiv 2405.07719, and LoongTrain, arXiv 2406.18485', tables,
                  claims_of(tables),
                  strategies=picture)


if __name__ == '__main__':
    run_script(run)
