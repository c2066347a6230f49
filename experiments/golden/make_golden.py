"""Compute with Hugging Face transformers the logits, gradients and frequencies that the tests compare with.

Needs the 'oracle' extra (torch and transformers); the tests need neither.

    python experiments/golden/make_golden.py                      writes tests/golden/
    python experiments/golden/make_golden.py --check-export DIR   checks each folder in DIR (or DIR itself)
        that has an expected_logits.npz (tokens, logits) beside its config.json, as export_tiny.py writes them
"""

import argparse
import pathlib
import sys
import tempfile

import numpy as np
import tiny_hf

from lct.cli.main import needs, run_script

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden'


def logits_and_gradients(name):
    """{array name: array} of one case: logits [2, T, V], and 'grad/<tensor>' of the mean cross-entropy."""
    import torch
    from oracle import open_model

    with tempfile.TemporaryDirectory() as folder:
        tiny_hf.write_case(name, folder)
        model = open_model(folder)
    tokens, targets = (torch.tensor(x, dtype=torch.long) for x in tiny_hf.tokens(name))
    logits = model(tokens, use_cache=False).logits
    result = {'logits': logits.detach().numpy()}
    if tiny_hf.CASES[name].get('gradients'):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        for tensor_name, parameter in model.named_parameters():
            result[f'grad/{tensor_name}'] = parameter.grad.numpy()
    return result


def frequencies(name):
    """{array name: array}: inverse frequencies [H/2] and attention factor of one rope case."""
    import transformers

    config = transformers.LlamaConfig(**tiny_hf.rope_config_json(name))
    kind, seq_len = config.rope_parameters['rope_type'], tiny_hf.ROPE_CASES[name][3]
    if kind == 'default':
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
        inv_freq, factor = rotary.compute_default_rope_parameters(config)
    else:
        inv_freq, factor = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](config, seq_len=seq_len)
    return {f'{name}/inv_freq': inv_freq.numpy(), f'{name}/attention_factor': np.float64(factor)}


def make(folder):
    """Write all golden files of tiny_hf to a folder."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    for name in tiny_hf.CASES:
        np.savez_compressed(folder / f'{name}.npz', **logits_and_gradients(name))
    rope = {}
    for name in tiny_hf.ROPE_CASES:
        rope |= frequencies(name)
    np.savez_compressed(folder / 'rope.npz', **rope)
    size = sum(path.stat().st_size for path in folder.glob('*.npz'))
    versions = f'transformers {transformers.__version__}, torch {torch.__version__}'
    print(f'{folder}: {size / 1e6:.2f} MB by {versions}')


def check_export(folder, bar):
    """Compare every exported folder with its expected_logits.npz; True if all are within the bar."""
    import torch
    from oracle import open_model

    paths = sorted(folder.rglob('expected_logits.npz'))
    if not paths:
        raise ValueError(f'{folder} holds no expected_logits.npz beside an exported config.json')
    passed = True
    for path in paths:
        expected = np.load(path)
        with torch.no_grad():
            tokens = torch.tensor(expected['tokens'], dtype=torch.long)
            logits = open_model(path.parent)(tokens, use_cache=False).logits.numpy()
        error = np.abs(logits - expected['logits']).max() / np.abs(logits).max()
        passed &= bool(error <= bar)
        print(f'{path.parent.name}: max |logit difference| / max |logit| = {error:.2e}')
    return passed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--golden', type=pathlib.Path, default=GOLDEN)
    parser.add_argument('--check-export', type=pathlib.Path, metavar='DIR')
    parser.add_argument('--bar', type=float, default=2e-5)
    args = parser.parse_args()
    with needs("'.[oracle]'"):
        import torch
        import transformers  # noqa: F401
    torch.set_num_threads(1)
    if args.check_export is None:
        make(args.golden)
    elif not check_export(args.check_export, args.bar):
        sys.exit(f'above the bar {args.bar}')


if __name__ == '__main__':
    run_script(main)
