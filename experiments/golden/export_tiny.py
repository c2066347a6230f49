"""Load each tiny Hugging Face case of the tests and save it again, with the logits of lct beside it.

Each is saved in float32 (sharded) and in bfloat16. make_golden.py --check-export compares the logits with
those of transformers.

    python experiments/golden/export_tiny.py DIR                    the tiny cases
    python experiments/golden/export_tiny.py DIR --model FOLDER     a copy of an exported folder
"""

import argparse
import pathlib
import shutil
import tempfile

import numpy as np
import tiny_hf

from lct.cli.main import run_script
from lct.models import llama
from lct.weights import llama_hf


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--model', type=pathlib.Path)
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    if args.model:
        target = shutil.copytree(args.model, folder / args.model.name, dirs_exist_ok=True)
        config, params = llama_hf.load(target, 'float32')
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 2 * 1024))
        write_logits(target, config, params, tokens)
        return
    for name in tiny_hf.CASES:
        tokens = tiny_hf.tokens(name)[0]
        with tempfile.TemporaryDirectory() as source:
            tiny_hf.write_case(name, source)
            config, params = llama_hf.load(source)
        for dtype, max_shard_bytes in (('float32', 20_000), ('bfloat16', 1_000_000)):
            target = folder / f'{name}-{dtype}'
            llama_hf.save(target, config, params, dtype=dtype, max_shard_bytes=max_shard_bytes)
            config, saved = llama_hf.load(target, 'float32')
            write_logits(target, config, saved, tokens)


def write_logits(target, config, params, tokens):
    """Write expected_logits.npz."""
    logits = np.asarray(llama.logits(params, config, tokens))
    np.savez(target / 'expected_logits.npz', tokens=tokens, logits=logits)
    print(f'{target}: {llama.num_params(config)} parameters')


if __name__ == '__main__':
    run_script(main)
