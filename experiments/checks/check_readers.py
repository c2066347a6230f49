"""Read exported folders with other libraries: transformers (any version), mlx-lm and CTranslate2.

Each library is installed in a virtual environment of its own, without this package.

    python experiments/checks/check_readers.py write DIR           SmolLM2 with four RoPE scalings, our logits
    python experiments/checks/check_readers.py transformers DIR    pip install torch transformers
    python experiments/checks/check_readers.py mlx DIR             pip install 'mlx[cpu]' mlx-lm
    python experiments/checks/check_readers.py ctranslate2 DIR     pip install ctranslate2 transformers torch

DIR takes 1.1 GB. The output is max |logit difference| over the last positions of a page, absolute and
relative to the largest logit, and the mean and largest difference of a next-token log-probability over the
page. The limit applies to the relative difference and to the mean: at the worst position float32 itself is
uncertain by 1e-4 after thirty layers.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
LIMIT = 1e-4
LAST = 16  # positions whose logits are saved
SCALINGS = {  # fields of RopeConfig; the page is longer than the original lengths
    'default': {},
    'linear': {'type': 'linear', 'factor': 2.0},
    'llama3': {'type': 'llama3', 'factor': 8.0, 'original_max_position': 256},
    'yarn': {'type': 'yarn', 'factor': 4.0, 'original_max_position': 256},
}


def write(folder):
    from lct.models import llama
    from lct.weights import llama_hf, smollm2

    source = smollm2.model_folder()
    config, params = llama_hf.load(source)
    tokens = np.array([json.loads((ROOT / 'tests' / 'golden' / 'smollm2.json').read_text())['page'][:512]])
    folder.mkdir(parents=True, exist_ok=True)
    plain = None
    for name, fields in SCALINGS.items():
        long = fields.get('original_max_position', 1024) * int(fields.get('factor', 8))
        scaled = dataclasses.replace(config, rope=dataclasses.replace(config.rope, **fields),
                                     max_position_embeddings=long)
        llama_hf.save(folder / name, scaled, params, tokenizer_from=source, max_shard_bytes=150_000_000)
        read, exact = llama_hf.load(folder / name, 'float32')
        logits = np.asarray(llama.logits(exact, read, tokens))[0]
        np.savez(folder / name / 'expected.npz', tokens=tokens[0], logits=logits[-LAST:],
                 log_probs=log_probs(logits, tokens[0]))
        plain = logits if plain is None else plain
        effect = np.abs(logits - plain).max()
        print(f'{folder / name}: the scaling changes logits by up to {effect:.2f}')


def with_transformers(path, tokens):
    import torch
    import transformers
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation='eager', output_loading_info=True)
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise ValueError(f'{path} does not load cleanly: {problems}')
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens[None]), use_cache=False).logits[0].numpy()


def with_mlx(path, tokens):
    import mlx.core as mx
    from mlx_lm.utils import load_model
    model, _ = load_model(path)
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(tokens[None])))[0]


def with_ctranslate2(path, tokens):
    import tempfile

    import ctranslate2
    if json.loads((path / 'config.json').read_text())['rope_parameters']['rope_type'] == 'llama3':
        # 4.8.5 converts the fields of llama3 and then computes without scaling: to 1.4e-4 its logits equal
        # those of transformers for the same folder with rope_type 'default'.
        raise NotImplementedError('it reads llama3 and computes default')
    with tempfile.TemporaryDirectory() as target:
        converter = ctranslate2.converters.TransformersConverter(str(path))
        converter.convert(target, force=True)
        generator = ctranslate2.Generator(target, device='cpu', compute_type='float32')
        return np.array(generator.forward_batch([tokens.tolist()]))[0]


READERS = {'transformers': with_transformers, 'mlx': with_mlx, 'ctranslate2': with_ctranslate2}


def log_probs(logits, tokens):
    """[T - 1]: log-probability of each next token."""
    logits = logits[:-1].astype(np.float64)
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(-1))
    return logits[np.arange(len(tokens) - 1), tokens[1:]] - total


def check(reader, folder):
    passed = True
    for path in sorted(path.parent for path in folder.glob('*/expected.npz')):
        expected = np.load(path / 'expected.npz')
        tokens = expected['tokens'].astype(np.int64)
        try:
            logits = READERS[reader](path, tokens)
        except NotImplementedError as error:
            print(f'{path.name}: {reader} does not support it ({str(error).splitlines()[0][:80]})')
            continue
        absolute = np.abs(logits[-LAST:] - expected['logits']).max()
        relative = absolute / np.abs(expected['logits']).max()
        probs = np.abs(log_probs(logits, tokens) - expected['log_probs'])
        passed &= bool(max(relative, probs.mean()) <= LIMIT)
        print(f'{path.name}: logits {absolute:.1e} absolute, {relative:.1e} relative; log-probabilities '
              f'{probs.mean():.1e} mean, {probs.max():.1e} max')
    return passed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('action', choices=['write', *READERS])
    parser.add_argument('folder', type=pathlib.Path)
    args = parser.parse_args()
    if args.action == 'write':
        write(args.folder)
    elif not check(args.action, args.folder):
        sys.exit(f'above the limit {LIMIT}')


if __name__ == '__main__':
    main()
