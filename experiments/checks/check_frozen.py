"""Loss with the frozen weights of an adapter run in bfloat16 and in 8 bits, beside that with float32.

    python experiments/checks/check_frozen.py --models base smollm2 --output experiments/results/frozen.json

The adapters are at their start, where they change nothing, and activations are float32, so that the weights
alone differ. Texts as in check_caches.py.
"""

import argparse
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from check_caches import TEXTS, text_windows

from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.text import table

DTYPES = ('float32', 'bfloat16', 'int8')
LIMIT = 0.005  # nats
LONGEST = 2048  # tokens of a window


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['base', 'smollm2'])
    parser.add_argument('--windows', type=int, default=4, help='windows of each text')
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    results = {name: measure(name, args.windows) for name in args.models}
    print(table(('model', 'tokens', 'float32', 'bfloat16', 'int8', 'bytes a weight in int8'), [
        (name, one['tokens'], f'{one["loss"]:.4f}',
         *(f'{one[dtype]["difference"]:+.5f} ± {one[dtype]["standard_error"]:.5f}' for dtype in DTYPES[1:]),
         f'{one["bytes_a_weight"]:.4f}') for name, one in results.items()]))
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + '\n')
    if max(abs(one['int8']['difference']) for one in results.values()) > LIMIT:
        raise SystemExit(f'int8 differs by more than {LIMIT} nats')


def measure(name, count):
    """The mean loss of a model with float32 weights, and what other dtypes add to it, in nats."""
    from lct.data import tokenizer as tokenizers
    from lct.models import lora
    from lct.weights import llama_hf

    folder = pathlib.Path(find_model(name))
    tokenizer = tokenizers.load(folder)
    config, params = llama_hf.load(folder, 'float32')
    length = min(config.max_position_embeddings, LONGEST)
    windows = [ids for path in TEXTS for ids in text_windows(tokenizer, path, length, count)]
    losses = {dtype: np.stack([loss_of(config, params, lora.Adapter(frozen_dtype=dtype), ids)
                               for ids in windows]) for dtype in DTYPES}
    frozen = lora.freeze(params, lora.Adapter(frozen_dtype='int8'))[1]
    row = {'windows': len(windows), 'length': length, 'tokens': losses['float32'].size,
           'loss': float(losses['float32'].mean()),
           'bytes_a_weight': sum(x.nbytes for x in jax.tree.leaves(frozen))
           / sum(x.size for x in jax.tree.leaves(lora.partition(params, lora.Adapter())[1]))}
    for dtype in DTYPES[1:]:
        means = (losses[dtype] - losses['float32']).astype(np.float64).mean(1)
        row[dtype] = {'difference': float(means.mean()),
                      'standard_error': float(means.std(ddof=1) / len(means)**0.5)}
    return row


def loss_of(config, params, adapter, ids):
    """float32 [T]: the loss of every token of ids [T + 1] but the first."""
    from lct.models import lora
    from lct.ops import rope

    whole, frozen = lora.freeze(params, adapter)
    trained = lora.Trained(lora.init(config, adapter), whole)
    tables = rope.make_tables(config.rope, config.head_dim, len(ids) - 1)
    return np.asarray(_losses(trained, frozen, config.architecture(), ids[None], tables))[0]


@functools.partial(jax.jit, static_argnames='config')
def _losses(trained, frozen, config, ids, tables):
    from lct.models import lora
    from lct.models.memory import Memory
    from lct.ops.cross_entropy import cross_entropy

    memory, tokens = Memory(dtype='float32'), ids[:, :-1]
    positions, ones = jnp.arange(tokens.shape[1])[None], jnp.ones(tokens.shape, jnp.int32)
    x = lora.hidden_states(trained, frozen, config, tokens, positions, ones, tables, memory)
    return cross_entropy(x, lora.head(trained, frozen, memory), ids[:, 1:], ones.astype('float32'),
                         memory.loss_chunk)


if __name__ == '__main__':
    run_script(main)
