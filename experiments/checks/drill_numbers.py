"""Drills of numbers and memory: steps that are not finite, spikes, memory that runs out, uneven batches."""

import json
import math
import pathlib

from drill import NotHere, drill, expect, training

K = 5  # skipped steps in a row that end a run: loop.Run.max_skips_in_row


def rows_of(path):
    """The dicts of a JSONL file, read as strict JSON."""
    def refuse(constant):
        raise ValueError(f'{constant} is not JSON')

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def error_of(ended):
    """The one line of error that a process ended with, or ''. Lines of XLA may precede it."""
    last = ended.stderr[-1] if ended.stderr else ''
    traceback = any(line.startswith('Traceback') for line in ended.stderr)
    return last if last.startswith('error: ') and not traceback else ''


@drill(11, 'NaN at the first step, inf, a spike of 500x, no target, NaN for K steps')
def bad_steps(folder: pathlib.Path) -> str:
    faults = {1: 'not finite', 7: 'not finite', 14: 'far above', 16: 'no target'}
    options = ('--steps', 20, '--mesh', '1,1,1,1')
    mixed = training(folder / 'mixed', *options, '--spike-factor', 50,
                     '--bad-batches', 'nan@1,inf@7,spike@14,no_target@16')
    expect(mixed.status == 0, f'status {mixed.status}: {mixed.stderr[-1:]}')
    found = {row['step']: row for row in rows_of(folder / 'mixed/bad_steps.jsonl')}
    expect(found.keys() == faults.keys() and all(
        reason in found[step]['reason'] for step, reason in faults.items()),
        f'bad steps {[(step, row["reason"]) for step, row in found.items()]}')
    expect(all(row['rows'][0]['documents'] for row in found.values()), 'rows without documents')
    metrics = rows_of(folder / 'mixed/metrics/metrics.jsonl')
    good = [row for row in metrics if row['step'] not in faults]
    expect(len(metrics) == 40 and all(math.isfinite(row['loss']) for row in good) and mixed.weights,
           'other steps are not finite')
    expect(metrics[-1]['skipped'] == 3, f'{metrics[-1]["skipped"]} steps were skipped')
    size = found[14]['grad_norm'] / sorted(row['grad_norm'] for row in good if row['step'] < 14)[6]
    expect(size > 100, f'the spike was only {size:.0f}x')

    several = training(folder / 'several', *options, '--bad-batches', f'nan@9-{8 + K}')
    expect(several.status == 1 and 'not finite in 5 steps' in error_of(several),
           f'status {several.status}: {several.stderr[-3:]}')
    expect(len(rows_of(folder / 'several/bad_steps.jsonl')) == K, 'the rows are not named')
    again = training(folder / 'several', *options)
    whole = training(folder / 'whole', *options)
    expect(again.status == 0 and again.weights == whole.weights,
           f'the run that goes on ends with status {again.status} and other weights: {again.stderr[-1:]}')
    return (f'skipped exactly those (the spike was {size:.0f}x), rows named, all else finite; {K} in a row '
            'end the run, and without the fault it ends with the weights of a run that had none')


@drill(25, 'memory runs out in stage 2')
def out_of_memory(folder: pathlib.Path) -> str:
    small = ('--rows', 4096, '--address-space', 2)
    refused = training(folder / 'refused', *small, '--check-memory')
    expect(refused.status == 1 and 'does not fit' in error_of(refused),
           f'the plan did not refuse: status {refused.status}, {refused.stderr[-3:]}')
    expect(not any('| step' in line for line in refused.stdout), 'it trained before it refused')
    ended = training(folder / 'run', *small)
    if ended.status < 0:
        raise NotHere(f'this system kills the process (signal {-ended.status}) instead of refusing memory')
    message = error_of(ended)
    expect(ended.status == 1 and 'stage long: out of memory by step' in message,
           f'status {ended.status}: {ended.stderr[-3:]}')
    expect('remedies, cheapest first: ' in message and message.count(' or ') >= 2, f'no remedies: {message}')
    table = any('memory of a device at its peak' in line for line in ended.stdout)
    expect(table, "the plan's table is missing")
    again = training(folder / 'run', '--rows', 64, '--accumulation', 64, '--address-space', 2,
                     limit_s=1200)
    expect(again.status == 0 and any('continuing after step 6' in line for line in again.stdout),
           f'with a remedy: status {again.status}, {again.stderr[-1:]}')
    return 'refused before the start; else one line with three remedies under the table; one continues'


@drill(28, 'gradient accumulation with very uneven numbers of targets')
def uneven_accumulation(folder: pathlib.Path) -> str:
    import jax
    import numpy as np

    from lct.models import llama
    from lct.ops import rope
    from lct.train.step import loss_and_grads

    config = llama.LlamaConfig(
        vocab_size=64, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_position_embeddings=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1000.0))
    rng, (rows, length) = np.random.default_rng(0), (4, 64)
    targets = (1, 64, 3, 0)
    batch = {
        'tokens': rng.integers(0, 64, (rows, length)), 'targets': rng.integers(0, 64, (rows, length)),
        'positions': np.tile(np.arange(length), (rows, 1)), 'segment_ids': np.ones((rows, length), int)}
    batch = {name: x.astype(np.int32) for name, x in batch.items()}
    batch['loss_mask'] = (np.arange(length) < np.array(targets)[:, None]).astype(np.float32)
    params, memory = llama.init(config, jax.random.key(0)), llama.Memory(remat='none', loss_chunk=16)
    tables = rope.make_tables(config.rope, config.head_dim, length)
    step = jax.jit(lambda split: loss_and_grads(params, config.architecture(), split, tables, memory))
    whole, parts = (step({name: x.reshape(*shape, length) for name, x in batch.items()})
                    for shape in ((1, rows), (rows, 1)))
    worst = max(float(abs(a - b).max() / abs(a).max()) for a, b in zip(*map(jax.tree.leaves, (whole, parts))))
    expect(worst < 1e-5, f'loss or gradient differ by {worst:.1e}')
    return f'{targets} targets in four micro-batches: equal to one batch of four rows within {worst:.1e}'
