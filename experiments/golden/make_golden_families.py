"""Compute with Hugging Face transformers what the tests compare every family with: logits, gradients and
greedy continuations of the tiny models of tiny_families.py.

Needs the 'oracle' extra (torch and transformers); the tests need neither.

    python experiments/golden/make_golden_families.py                      writes tests/golden/families.npz
    python experiments/golden/make_golden_families.py --check-export DIR   compares each folder DIR/CASE, as
        check_families.py --export writes them, with its source: logits and greedy tokens
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import tiny_families

from lct.cli.main import needs, run_script

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'families.npz'


def open_case(name):
    """The model of a case."""
    from oracle import open_model

    with tempfile.TemporaryDirectory() as folder:
        tiny_families.write_case(name, folder)
        return open_model(folder)


def logits(model, tokens):
    """Logits [2, T, V] of tokens [2, T] as a torch tensor."""
    import torch

    return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits


def greedy(model, name):
    """int32 [prompts, NEW_TOKENS] after the prompts of a case, each alone, with a cache."""
    import torch

    rows = []
    for prompt in tiny_families.prompts(name):
        ids = torch.tensor([prompt])  # without the mask of all ones, a token 0 would be taken for padding
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None,
                             pad_token_id=0, max_new_tokens=tiny_families.NEW_TOKENS,
                             min_new_tokens=tiny_families.NEW_TOKENS)
        rows.append(out[0, len(prompt):].tolist())
    return np.array(rows, np.int32)


def compute(name):
    """{array name: array} of one case: logits, 'grad/<tensor>' of the mean cross-entropy, greedy tokens."""
    import torch

    model = open_case(name)
    tokens, targets = tiny_families.tokens(name)
    found = logits(model, tokens)
    loss = torch.nn.functional.cross_entropy(found.flatten(0, 1), torch.tensor(targets.ravel()).long())
    loss.backward()
    gradients = {f'grad/{key}': value.grad.numpy() for key, value in model.named_parameters()}
    with torch.no_grad():
        return {'logits': found.detach().numpy(), 'greedy': greedy(model, name), **gradients}


def check_export(folder):
    """Compare the exported folders with their sources; True if there is no difference at all."""
    import torch
    from oracle import open_model

    passed = True
    for name in (name for name in tiny_families.CASES if (folder / name).is_dir()):
        source, exported = open_case(name), open_model(folder / name)
        tokens = tiny_families.tokens(name)[0]
        with torch.no_grad():
            error = float((logits(source, tokens) - logits(exported, tokens)).abs().max())
            same = bool((greedy(source, name) == greedy(exported, name)).all())
        passed &= error == 0 and same
        print(f'{name:12} {type(exported).__name__:22} largest difference of a logit {error:.1e}, greedy '
              f'tokens {"equal" if same else "DIFFER"}')
    return passed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--golden', type=pathlib.Path, default=GOLDEN)
    parser.add_argument('--check-export', type=pathlib.Path, metavar='DIR')
    args = parser.parse_args()
    with needs("'.[oracle]'"):
        import torch
        import transformers
    torch.set_num_threads(1)
    print(f'transformers {transformers.__version__}, torch {torch.__version__}')
    if args.check_export:
        if not check_export(args.check_export):
            sys.exit('an exported folder is not its source')
        return
    arrays = {f'{name}/{key}': value for name in tiny_families.CASES for key, value in compute(name).items()}
    np.savez_compressed(args.golden, **arrays)
    print(f'{args.golden}: {args.golden.stat().st_size / 1e6:.2f} MB')


if __name__ == '__main__':
    run_script(main)
