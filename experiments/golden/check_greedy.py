"""The answers of an evaluation beside transformers' greedy decoding of the same prompts, token for token.

    pip install '.[oracle]'
    python experiments/evaluate.py --model smollm2 --suite ruler,comprehension --samples 8,6,3,2 \\
        --lengths 1024,2048,4096,8192 --workdir RUN
    python experiments/golden/check_greedy.py RUN --prompts 200 --output FILE

The prompts are made again from what RUN/results.json says of them, and their hashes compared. transformers
goes one token beyond each answer: there has to be a token that ends it, or the limit of the task. Where the
answers part, the token of lct has to be transformers' second choice by less than TIE logits.
"""

import argparse
import json
import pathlib
import random
import sys

import numpy as np

from lct.cli.corpus import read_documents
from lct.cli.main import check_positive, needs, run_script
from lct.cli.model import add_model_flags, load_model
from lct.eval import answers, provenance
from lct.eval.suites import SUITES, Plan
from lct.eval.suites.plan import make_material

TIE = 1e-3  # logits


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', type=pathlib.Path, help='work directory of evaluate.py')
    parser.add_argument('--prompts', type=int, default=200, help='how many, drawn from all of its answers')
    parser.add_argument('--output', type=pathlib.Path, help='JSON of every prompt')
    args = parser.parse_args()
    check_positive(args, 'prompts')
    with needs("'.[oracle]'"):
        import transformers

    model, pairs, reader = open_run(args.run)
    about = json.loads((args.run / 'results.json').read_text())['about']
    chosen, records = draw(pairs, args.prompts), []
    for suite, item, row in chosen:
        record = {'suite': suite, 'task': item.task, 'length': item.length, 'index': item.index,
                  **compare(model, reader, item, row)}
        records.append(record)
        different = count(records, 'different')
        print(f'{len(records)} of {len(chosen)}, {different} different, {count(records, "tie")} by a tie',
              flush=True)
        if record['outcome'] != 'equal':
            print(json.dumps(record), flush=True)
        if args.output:
            content = {'model': about['model'], 'weights_sha256': about['weights_sha256'],
                       'transformers': transformers.__version__, 'tie_logits': TIE,
                       'tokens': sum(one['tokens'] for one in records), 'records': records}
            args.output.write_text(json.dumps(content, indent=1) + '\n')
    for length in sorted({record['length'] for record in records}):
        outcomes = [record['outcome'] for record in records if record['length'] == length]
        print(f'{length} tokens: {outcomes.count("equal")} of {len(outcomes)} answers equal')
    sys.exit(bool(count(records, 'different')))


def draw(pairs, wanted):
    """So many of the pairs, from short to long: a number of each length in inverse proportion to its square,
    and the shortest of the rest."""
    pairs = random.Random(0).sample(pairs, len(pairs))
    lengths = sorted({item.length for _, item, _ in pairs})
    share = wanted / sum(length**-2 for length in lengths)
    of_length = {length: [pair for pair in pairs if pair[1].length == length] for length in lengths}
    taken = {length: int(share / length**2) for length in lengths}
    first = [pair for length in lengths for pair in of_length[length][:taken[length]]]
    rest = [pair for length in lengths for pair in of_length[length][taken[length]:]]
    return sorted(first + rest[:wanted - len(first)], key=lambda pair: pair[1].length)


def count(records, outcome):
    return sum(record['outcome'] == outcome for record in records)


def open_run(folder):
    """-> (the runner.Model of a work directory, its [(suite, item, row of the answer)], transformers')."""
    from oracle import open_model

    results = json.loads((folder / 'results.json').read_text())
    about, counts = results['about'], {int(key): value for key, value in results['samples'].items()}
    parser = argparse.ArgumentParser()
    add_model_flags(parser)
    plain = ['--plain'] * (about['template'] == 'none')
    model, model_folder = load_model(parser.parse_args(['--model', about['model'], *plain]))
    haystack = about['samples_from']['haystack']
    material = make_material(model, read_documents(haystack), haystack, about['seed'])
    plan, pairs, identity = Plan(material, tuple(sorted(counts)), counts), [], provenance.identity_of(about)
    for suite in results['results']:
        rows, _ = answers.read(folder / f'{suite}.jsonl', identity)
        items = SUITES[suite].items(plan) if rows else []
        pairs += [(suite, item, rows[item.key]) for item in items if item.key in rows]
    return model, pairs, open_model(model_folder)


def compare(model, reader, item, row):
    """{'outcome': equal, tie or different, 'tokens': of the answer, ...}."""
    sample = item.make()
    prompt, wanted, length = model.prompt_ids(sample), row['text'], row['new_tokens']
    if answers.digest(prompt) != row['prompt']:
        raise ValueError(f'the prompt of {item.task} {item.length} {item.index} is not the one that was '
                         'answered; evaluate again with this version')
    ends = length < sample.max_new_tokens
    ids, margins, seconds = greedy(reader, prompt, length + ends)
    stop = model.stop_mask(item.one_line)
    if model.tokenizer.decode(ids[:length]) == wanted and not stop[ids[:length]].any() and (
            not ends or stop[ids[-1]]):
        return {'outcome': 'equal', 'tokens': length}
    at = parting(model, ids, wanted, length)
    tie = margins[at] < TIE and (
        at == length or wanted.startswith(model.tokenizer.decode([*ids[:at], seconds[at]])))
    return {'outcome': 'tie' if tie else 'different', 'tokens': length, 'at': at,
            'margin': round(float(margins[at]), 6), 'text': wanted, 'theirs': model.tokenizer.decode(ids)}


def parting(model, ids, wanted, length):
    """The number of the first token that is not in the answer, which is its length where only the end is."""
    for i in range(min(length, len(ids))):
        if not wanted.startswith(model.tokenizer.decode(ids[:i + 1]).rstrip('\ufffd')):
            return i
    return len(ids) - 1


def greedy(reader, prompt, new):
    """-> (token ids, distance in logits to the second choice, second choices), each of `new` tokens."""
    import torch

    tokens = torch.tensor([prompt])
    with torch.no_grad():
        out = reader.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new,
                              min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0,
                              output_logits=True, return_dict_in_generate=True)
    best = torch.stack(out.logits)[:, 0].topk(2)
    values, choices = best.values.numpy(), best.indices.numpy()
    ids = out.sequences[0, len(prompt):].tolist()
    return ids, values[:, 0] - values[:, 1], np.asarray(choices[:, 1]).tolist()


if __name__ == '__main__':
    run_script(main)
