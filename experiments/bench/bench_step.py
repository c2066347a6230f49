"""A whole training step on CPUs beside torch and transformers, in turns on equal shapes.

    python experiments/bench/bench_step.py --python .venv_hf/bin/python --lengths 4096,8192 --rounds 5 \\
        --output experiments/results/bench_step.json

The model is a Llama of 31M parameters (embed_dim 512, 8 layers, 8/2 heads, vocabulary 8,192), in float32, the
batch one row, the step forward, backward and AdamW. Sides: `ring N`, lct on N virtual devices, which keeps
layer inputs and attention's output; `sdpa` and `sdpa, checkpointed`, transformers with and without gradient
checkpointing. Each side is a process of its own that takes a step when it is its turn; seconds are medians
over the rounds after one that compiles, the peak that of the process. --python has torch and transformers.
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import sys
import time

import turns

from lct.text import table

SIDES = ('ring 2', 'ring 1', 'sdpa', 'sdpa, checkpointed')
EMBED, MLP, LAYERS, HEADS, KV_HEADS, VOCAB = 512, 1408, 8, 8, 2, 8192
RATE = 1e-4


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--python', default=sys.executable, help='with torch and transformers')
    parser.add_argument('--lengths', default='4096,8192')
    parser.add_argument('--sides', default=';'.join(SIDES), help='separated by semicolons')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=pathlib.Path)
    parser.add_argument('--worker', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.worker[0], int(args.worker[1]))
        return
    results = {}
    for length in map(int, args.lengths.split(',')):
        results[length] = compare(args, length)
        print(show(length, results[length]), flush=True)
        if args.output:
            kept = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps(kept | {str(length): results[length]}, indent=1) + '\n')


def compare(args, length):
    """{side: {'s': [...], 'cpu_s': [...], 'peak_gb', 'loss'}} of steps in turns."""
    sides = args.sides.split(';')
    workers = {side: start(args.python if side.startswith('sdpa') else sys.executable, side, length)
               for side in sides}
    found = {side: {'s': [], 'cpu_s': []} for side in sides}
    for number in range(args.rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            step = turns.take(workers[side])
            print(number, length, side, json.dumps(step), flush=True)
            if number:
                found[side]['s'].append(step['s'])
                found[side]['cpu_s'].append(step['cpu_s'])
            found[side] |= {'peak_gb': step['peak_gb'], 'loss': step['loss']}
    turns.end(workers.values())
    return found


def start(python, side, length):
    return turns.start([python, __file__, '--worker', side, str(length)])


def show(length, found):
    """Medians and ratios to the first side: above 1 where that one is faster."""
    seconds = {side: statistics.median(one['s']) for side, one in found.items()}
    first = next(iter(seconds.values()))
    rows = [(side, f'{seconds[side]:.2f}', f'{statistics.median(one["cpu_s"]):.2f}', f'{one["peak_gb"]:.2f}',
             f'{seconds[side] / first:.2f}x', f'{one["loss"]:.4f}') for side, one in found.items()]
    return f'{length} tokens\n' + table(('side', 's', 'CPU s', 'peak GB', 'time', 'loss'), rows, left=(0,))


# ---------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------


def work(side, length):
    """Take a step for every line of stdin."""
    step = torch_step(length, side.endswith('checkpointed')) if side.startswith('sdpa') else (
        lct_step(length, int(side.removeprefix('ring '))))
    for _ in sys.stdin:
        before, began = time.process_time(), time.monotonic()
        loss = step()
        record = {'s': round(time.monotonic() - began, 3), 'cpu_s': round(time.process_time() - before, 3),
                  'peak_gb': round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                  'loss': round(loss, 5)}
        print(json.dumps(record), flush=True)


def tokens_of(length):
    """Tokens that no side can learn quickly."""
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (1, length + 1), np.int32)


def lct_step(length, ring_size):
    os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={ring_size}'
    import jax
    import numpy as np

    from lct import sharding
    from lct.data import layout
    from lct.models import llama
    from lct.ops import rope
    from lct.train import optimizer, state
    from lct.train.step import train_step

    jax.set_mesh(sharding.make_mesh((1, 1, ring_size, 1)))
    config = llama.LlamaConfig(VOCAB, EMBED, MLP, LAYERS, HEADS, KV_HEADS, EMBED // HEADS,
                               max_position_embeddings=length)
    tx, tokens = optimizer.make(optimizer.OptimizerConfig()), tokens_of(length)
    batch = {'tokens': tokens[:, :-1], 'targets': tokens[:, 1:],
             'positions': np.arange(length, dtype=np.int32)[None],
             'segment_ids': np.ones((1, length), np.int32), 'loss_mask': np.ones((1, length), np.float32)}
    order = layout.permutation('zigzag', length, ring_size)
    batch = {name: sharding.put(x, sharding.spec('BT'))[None]
             for name, x in layout.permute(batch, order).items()}
    current = [state.create(llama.init(config, jax.random.key(0)), tx)]
    tables = rope.make_tables(config.rope, config.head_dim, length)
    memory = llama.Memory(remat='attention_output')

    def step():
        current[0], metrics = train_step(current[0], batch, tables, config.architecture(), memory, tx,
                                         constant_rate)
        return float(metrics['loss'])
    return step


def constant_rate(step):
    return RATE


def torch_step(length, checkpointed):
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=EMBED, intermediate_size=MLP, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=length,
        attn_implementation='sdpa', use_cache=False, tie_word_embeddings=False))
    if checkpointed:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    tokens = torch.tensor(tokens_of(length), dtype=torch.long)

    def step():
        logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


if __name__ == '__main__':
    main()
