"""Ring Attention (Liu, Zaharia & Abbeel 2023, arXiv 2310.01889): tables 2 and 3 and figure 5, predicted.

    python experiments/papers/ring_attention.py
    python experiments/papers/ring_attention.py --compile    (extra 'aot-cuda'; about a minute per program)

Table 3 is the longest context that trains, by hardware, model and method. Here a context is doubled until it
no longer fits the device by lct.plan.buffers. The methods are our own program under other policies: attention
that builds its scores, attention in chunks, the FFN in chunks as well, and a ring of all devices. --compile
compiles the real training step at the published context for A100s and records its memory per device.
"""

import dataclasses

import claims
from llama1_sizes import SIZES

from lct.cli.main import run_script
from lct.eval.report import svg
from lct.models.llama import Memory
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.plan import buffers, cost, hardware, timing
from lct.plan.longest import longest_context

GB, TERA, GiB, K = 1e9, 1e12, 2**30, 2**10
V4 = hardware.find('v4')
A100 = hardware.find('a100')
V3 = dataclasses.replace(V4, name='v3', memory=16 * GiB, flops=123e12)  # their table 2; a device is a core
# Their names of TPU slices count cores; from v4 on a device is a chip.
MACHINES = {'8x A100 NVLink': (A100, 8), '32x A100 InfiniBand': (A100, 32), 'TPUv3-512': (V3, 512),
            'TPUv4-1024': (V4, 512), 'TPUv5e-256': (hardware.find('v5e'), 256)}
METHODS = ('vanilla', 'chunked attention', 'chunked attention and FFN', 'ring')
TABLE_2 = (  # host, FLOP/s, bytes/s one way, least block and least sequence of a device, thousands of tokens
    ('A100 NVLink', 312 * TERA, 300 * GB, 1.0, 6.2), ('A100 InfiniBand', 312 * TERA, 12.5 * GB, 24.5, 149.5),
    ('TPU v3', 123 * TERA, 112 * GB, 1.1, 6.6), ('TPU v4', 275 * TERA, 268 * GB, 1.0, 6.2),
    ('TPU v5e', 196 * TERA, 186 * GB, 1.1, 6.3))
TABLE_3 = (  # machine, model, thousands of tokens by METHODS
    ('8x A100 NVLink', '3B', 4, 32, 64, 512), ('8x A100 NVLink', '7B', 2, 16, 32, 256),
    ('8x A100 NVLink', '13B', 2, 4, 16, 128), ('32x A100 InfiniBand', '7B', 4, 64, 128, 4096),
    ('32x A100 InfiniBand', '13B', 4, 32, 64, 2048), ('TPUv3-512', '7B', 1, 4, 8, 2048),
    ('TPUv3-512', '13B', 1, 2, 8, 1024), ('TPUv4-1024', '3B', 8, 16, 32, 16384),
    ('TPUv4-1024', '7B', 4, 8, 16, 8192), ('TPUv4-1024', '13B', 4, 8, 16, 4096),
    ('TPUv4-1024', '30B', 2, 4, 8, 2048),
    ('TPUv5e-256', '3B', 4, 8, 32, 4096), ('TPUv5e-256', '7B', 2, 8, 16, 2048))
FIGURE_5 = (  # embed_dim, length, FLOPs of a dataset over those at 4K
    ('7B', 4096, 32, 2.0), ('7B', 4096, 128, 5.4), ('7B', 4096, 256, 10.0), ('7B', 4096, 1024, 37.4),
    ('13B', 5120, 1024, 31.0), ('65B', 8192, 1024, 20.6), ('175B', 12288, 1024, 14.4))


def step_of(machine, model, method, seq_len=K):
    """The training step of a cell of table 3: float32 on GPUs, products in bfloat16 on TPUs."""
    kind, devices = MACHINES[machine]
    ring = devices if method == 'ring' else 1
    ffn_chunks = 1 if method in METHODS[:2] else 16
    memory = Memory('full', Attention('ring', 1, Chunks(512, 512), 'xla'), ffn_chunks,
                    dtype='bfloat16' if kind.platform == 'tpu' else None)
    return cost.Step(SIZES[model], (1, devices // ring, ring, 1), seq_len, devices // ring, 1, memory)


def scores(step):
    """Bytes of the scores of a layer and of their gradient, which vanilla attention builds in float32."""
    return 2 * step.config.num_heads * step.rows * step.seq_len**2 * cost.FLOAT32


def table_2():
    rows = []
    for host, flops, link, block, sequence in TABLE_2:
        least = timing.least_block(flops, link)
        rows.append({'host': host, 'least block': least / 1e3, 'published block': block,
                     'least sequence': 6 * least / 1e3, 'published sequence': sequence})
    return rows


def table_2_today():
    """The same for current hardware: tokens per device that hide the transfer of a block of our ring."""
    rows = []
    for kind in (hardware.TABLE[name] for name in hardware.CLUSTERS):
        row = {'hardware': kind.name}
        for name, group in (('8B', 4), ('70B', 8)):  # query heads per key/value head
            for place, link in (('inside', kind.inside), ('between', kind.between)):
                row[f'{name}, {place} nodes'] = round(timing.least_block(kind.flops, link, group,
                                                                         causal=True))
        rows.append(row)
    return rows


def table_3():
    rows = []
    for machine, model, *published in TABLE_3:
        found = [longest_context(step_of(machine, model, method), MACHINES[machine][0],
                                 scores if method == 'vanilla' else lambda step: 0) // K
                 for method in METHODS]
        contexts = {method: f'{ours} | {theirs}' for method, ours, theirs in zip(METHODS, found, published)}
        rows.append({'machine': machine, 'model': model, **contexts,
                     'ring gains': found[3] / found[2], 'published gain': published[3] / published[2]})
    return rows


def cells(rows, method):
    """[(found, published)] of a column of table_3."""
    return [tuple(map(int, row[method].split(' | '))) for row in rows]


def figure_5():
    """FLOPs of a dataset cut into rows of a length over those of the same dataset in rows of 4K."""
    rows = []
    for model, embed_dim, length, published in FIGURE_5:
        formula = (6 * embed_dim + length * K) / (6 * embed_dim + 4 * K)  # their appendix D
        row = {'model': model, 'length': f'{length}K', 'published': published, 'their formula': formula}
        if model in SIZES:
            row['our count, all pairs'] = per_token(model, length, False) / per_token(model, 4, False)
            row['our count, causal'] = per_token(model, length, True) / per_token(model, 4, True)
        rows.append(row)
    return rows


def per_token(model, length, causal):
    """FLOPs of a forward for each token of a row."""
    one = cost.Step(SIZES[model], (1, 1, 1, 1), length * K, memory=Memory('none'))
    work = cost.work(one, causal)
    return (work.matmul / 3 + work.attention_forward) / one.tokens


def compile_cells(known):
    """Compile the training step for A100s, for the cells of table 3 at their published contexts.

    Adds each missing cell to known, then yields.
    """
    from lct.cli.compile import step_memory
    from lct.plan import hlo, targets

    for machine, model, *published in TABLE_3:
        kind, devices = MACHINES[machine]
        if kind is not A100 or model == '3B':  # for a width of 3,200 the compiler finds no tiles in float32
            continue
        for method, context in list(zip(METHODS, published))[2:]:
            key = {'machine': machine, 'model': model, 'method': method, 'context': context}
            if any(key.items() <= row.items() for row in known):
                continue
            step = step_of(machine, model, method, context * K)
            memory = step_memory(targets.parse(f'a100:{devices}'), step)
            known.append({**key, 'compiled GiB': hlo.device_bytes(memory) / GiB})
            yield


def compiled_table(known):
    """The rows of compile_cells with the prediction for the same step."""
    rows = []
    for row in known:
        step = step_of(row['machine'], row['model'], row['method'], row['context'] * K)
        predicted = buffers.buffers(step, 'gpu').peak / GiB
        rows.append({**row, 'predicted GiB': predicted,
                     'predicted / compiled': predicted / row['compiled GiB'],
                     'device GiB': A100.memory / GiB})
    return rows


def claims_of(tables):
    """The claims of the paper, beside what came out here."""
    found = [least_block_claim(tables['table 2']), flops_claim(tables['figure 5']),
             *(context_claim(tables['table 3'], method) for method in METHODS), gain_claim(tables['table 3'])]
    compiled = tables.get('table 3, compiled', [])
    return [*found, compiled_claim(compiled)] if compiled else found


def least_block_claim(rows):
    ratios = [(row['least block'], row['published block']) for row in rows]
    return claims.Claim(
        'attention hides a transfer if a device holds at least F / B tokens (table 2)', 'predicted',
        ', '.join(f'{p:g}K' for _, p in ratios), ', '.join(f'{f:.2f}K' for f, _ in ratios),
        'yes' if claims.within(ratios, 1.1) == len(ratios) else 'no',
        'The same formula, lct.plan.timing.least_block, on the same figures, which they round. With grouped '
        'heads and balanced causal work it is 2 F / (g B): half as much for Llama-3 8B.')


def flops_claim(rows):
    return claims.Claim(
        'FLOPs of a dataset grow slower than its rows (figure 5)', 'counted',
        ', '.join(f'{row["model"]} {row["length"]} {row["published"]:g}' for row in rows),
        ', '.join(f'{row["their formula"]:.1f}' for row in rows),
        'yes' if all(abs(row['their formula'] - row['published']) < 0.06 for row in rows) else 'no',
        'Their formula gives their figures. Our counter on the real sizes, with the vocabulary, is within 5% '
        'of it when it counts all pairs, and lower where masked work is skipped.')


def context_claim(rows, method):
    pairs = [(max(f, 0.5), p) for f, p in cells(rows, method)]
    near = claims.within(pairs, 2)
    return claims.Claim(
        f'longest context, {method} (table 3)', 'predicted', ', '.join(f'{p}K' for _, p in pairs),
        f'{", ".join(f"{f:g}K" for f, _ in pairs)}: {near} of {len(pairs)} within one doubling',
        'yes' if near == len(pairs) else 'in part' if near > len(pairs) / 2 else 'no', WHY[method])


def gain_claim(rows):
    gains = [(row['ring gains'], row['published gain']) for row in rows]
    return claims.Claim(
        'a ring of n devices multiplies the context by n (table 3, last column)', 'predicted',
        ', '.join(f'{p:g}x' for _, p in gains), ', '.join(f'{f:g}x' for f, _ in gains),
        'yes' if claims.within(gains, 2) == len(gains) else 'in part',
        'Everything that grows with the context is split over the ring: n, to the power of two below or '
        'above. They name TPU slices by cores, so TPUv4-1024 has 512 devices, and print 256 or 128 for the '
        'larger models there.')


def compiled_claim(rows):
    fits = sum(row['compiled GiB'] <= row['device GiB'] for row in rows)
    sizes = [row['compiled GiB'] for row in rows]
    error = max(abs(row['predicted / compiled'] - 1) for row in rows)
    return claims.Claim(
        'the published contexts of A100s train in 80 GB (table 3)', 'compiled', f'{len(rows)} cells',
        f'{fits} of {len(rows)} fit; {min(sizes):.0f} to {max(sizes):.0f} GiB of {A100.memory / GiB:.0f}',
        'yes' if fits == len(rows) else 'in part',
        'The real training step in float32, compiled for A100s at their contexts. The largest error of '
        f'buffers.py is {error:.0%}. 7B on 32 GPUs does not fit: the layer inputs of 128K tokens per device '
        'alone are 64 GiB in float32.')


WHY = {
    'vanilla': 'The scores of one layer and their gradient, as full checkpointing keeps them, leave far more '
               'room than they print: 7B at 2K has 0.5 GiB of scores on a device of 80. What else was in '
               'memory is not published.',
    'chunked attention': 'Layer inputs and the FFN of one layer decide. Their cells are below ours by what '
                         'their table 1 does not count.',
    'chunked attention and FFN': 'What the layers keep for the backward decides, 4 bytes per token, width '
                                 'and layer in float32.',
    'ring': 'As the row before, times the devices of the ring, which also splits the weights. Predicted for '
            '3B over 512 and 256 devices too, although this program refuses to split a width of 3,200 '
            'so far.',
}


def run(argv=None):
    args = claims.flags(__doc__, argv, compile={
        'action': 'store_true', 'help': 'table 3 for A100s, compiled'})
    known = claims.earlier(args.output, 'ring_attention', 'table 3, compiled')
    known = [{key: row[key] for key in ('machine', 'model', 'method', 'context', 'compiled GiB')}
             for row in known]
    if args.compile:
        for _ in compile_cells(known):
            write(args.output, known)
    write(args.output, known)


def write(out, known):
    tables = {'table 2': table_2(), 'least tokens of a device today, causal, grouped heads': table_2_today(),
              'table 3': table_3(), 'figure 5': figure_5()}
    if known:
        tables['table 3, compiled'] = compiled_table(known)
    three = tables['table 3']
    picture = svg.bars(
        [f'{row["machine"]} {row["model"]}' for row in three],
        {'BPT, predicted': [f for f, _ in cells(three, METHODS[2])],
         'BPT, published': [p for _, p in cells(three, METHODS[2])],
         'ring, predicted': [f for f, _ in cells(three, 'ring')],
         'ring, published': [p for _, p in cells(three, 'ring')]},
        'thousands of tokens', 'longest context that trains', log_y=True)
    lengths = [4 * K << n for n in range(9)]
    ratio = lambda d: [(6 * d + length) / (6 * d + 4 * K) for length in lengths]
    flops = svg.lines(
        {**{f'{name}, their formula': (lengths, ratio(d)) for name, d in (('7B', 4096), ('175B', 12288))},
         '7B, our program, causal': (lengths, [per_token('7B', n // K, True) / per_token('7B', 4, True)
                                               for n in lengths]),
         '7B (published)': ([n * K for _, d, n, _ in FIGURE_5 if d == 4096],
                            [p for _, d, _, p in FIGURE_5 if d == 4096])},
        'tokens of a row', 'FLOPs of a dataset / those at 4K', log_y=True)
    claims.report(out, 'ring_attention', 'Ring Attention, arXiv 2310.01889', tables, claims_of(tables),
                  contexts=picture, flops=flops)


if __name__ == '__main__':
    run_script(run)
