"""Reading a prompt and decoding behind it on CPUs beside transformers: SmolLM2-135M in float32.

    python experiments/bench/bench_generate.py --python PYTHON_WITH_TRANSFORMERS \\
        --lengths 2048,8192 --rounds 5 --output experiments/results/bench_generate.json

Each side is a process of its own that reads the prompt anew and decodes when it is its turn: `lct` as a
Session on the mesh of ask.py, transformers with SDPA and its dynamic cache. The prompt is the same, and so
must be the tokens that follow. Seconds are those until the first token, and of a token after it: medians over
the rounds after one that compiles, and medians of the ratios within a round.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import sys
import time

import turns

from lct import environment
from lct.text import table

SIDES = ('lct', 'transformers')
NEW = 33  # tokens of an answer


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--python', default=sys.executable, help='with torch, transformers and this package')
    parser.add_argument('--lengths', default='2048,8192')
    parser.add_argument('--mesh', default='1,1,1,1', help='of lct')
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--output', type=pathlib.Path)
    parser.add_argument('--worker', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker[0], int(args.worker[1]), args.worker[2])
    results = {'versions': environment.versions()}
    for length in map(int, args.lengths.split(',')):
        results[length] = compare(args, length)
        print(show(length, results[length]), flush=True)
        if args.output:
            args.output.write_text(json.dumps(results, indent=1) + '\n')


def compare(args, length):
    """{side: {'first': [s], 'token': [s]}}, the ratios of the first side to the second, whether the tokens
    are equal."""
    pythons = {'lct': sys.executable, 'transformers': args.python}
    workers = {side: turns.start([python, __file__, '--worker', side, str(length), args.mesh])
               for side, python in pythons.items()}
    found, tokens = {side: {'first': [], 'token': []} for side in SIDES}, {}
    for number in range(args.rounds + 1):
        for side in SIDES if number % 2 else reversed(SIDES):
            record = turns.take(workers[side])
            tokens[side] = record.pop('tokens')
            print(number, length, side, json.dumps(record), flush=True)
            for name, seconds in record.items() if number else ():
                found[side][name].append(seconds)
    turns.end(workers.values())
    ratios = {}
    for name in ('first', 'token'):
        ours, theirs = (found[side][name] for side in SIDES)
        ratios[name] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {**found, 'ratios': ratios, 'equal_tokens': tokens['lct'] == tokens['transformers']}


def show(length, found):
    rows = [(side, *(f'{statistics.median(found[side][name]) * 1e3:.1f}' for name in ('first', 'token')))
            for side in SIDES]
    rows.append(('ratio', *(f'{found["ratios"][name]:.2f}' for name in ('first', 'token'))))
    return f'{length} tokens, equal tokens: {found["equal_tokens"]}\n' + table(
        ('side', 'first token, ms', 'a token, ms'), rows, left=(0,))


# ---------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------


def work(side, length, mesh):
    """Read the prompt and decode for every line of stdin."""
    answer = lct_answer(length, mesh) if side == 'lct' else transformers_answer(length)
    for _ in sys.stdin:
        times, tokens = [time.perf_counter()], []
        for token in answer():
            times.append(time.perf_counter())
            tokens.append(int(token))
        print(json.dumps({'first': times[1] - times[0], 'token': (times[-1] - times[1]) / (NEW - 1),
                          'tokens': tokens}), flush=True)


def prompt_of(length, vocab_size):
    """Token ids that are text to neither side: what they are does not change what they cost."""
    import numpy as np

    return np.random.default_rng(0).integers(100, vocab_size, length).tolist()


def lct_answer(length, mesh):
    with contextlib.redirect_stdout(sys.stderr):
        from lct.cli.model import load_model, mesh_context
        args = argparse.Namespace(model='smollm2', mesh=mesh, dtype=None, cache_dtype=None, plain=True,
                                  piece=None, batch_tokens=65536)
        mesh_context(args.mesh).__enter__()
        model, _ = load_model(args)
    from lct import sharding
    from lct.models.prompt_layout import cache_len

    total = length + NEW
    slots = cache_len(total, sharding.axis_size('sequence'), model.memory.ffn_chunks)
    session = model.session(1, slots, total)
    ids = prompt_of(length, model.config.vocab_size)

    def answer():
        session.read([ids])
        for tokens in session.stream([[]], NEW):
            yield tokens[0]
    return answer


def transformers_answer(length):
    import torch
    from transformers import AutoModelForCausalLM

    from lct.cli.model import find_model

    torch.set_num_threads(os.cpu_count())
    model = AutoModelForCausalLM.from_pretrained(find_model('smollm2'), dtype=torch.float32,
                                                 attn_implementation='sdpa')
    ids = torch.tensor([prompt_of(length, model.config.vocab_size)])

    @torch.inference_mode()
    def answer():
        out = model(ids, use_cache=True, logits_to_keep=1)
        for i in range(NEW):
            token = out.logits[:, -1:].argmax(-1)
            yield token[0, 0]
            if i + 1 < NEW:
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
    return answer


if __name__ == '__main__':
    main()
