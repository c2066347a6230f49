"""Give a small base model more tokens and one more layer, so that training can continue from it.

    python experiments/studies/grow_base.py SOURCE TARGET

The words of names become one token each, also after a hyphen and at the start of a line: a head that matches
one earlier token then finds a name by its last word. The new layer comes second and adds nothing at first,
so the model's outputs change only where the tokens do.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain_base import copy_tokenizer

from lct.cli.main import run_script

COMMON = ('Question|Answer| Answer|Which| Which|What| What| The|The| are| has| number| names| above| and'
          '| with| For| have| that').split('|')
PARTS_OF_WORDS = (300, 1000)  # ids of the old vocabulary
NOISE = 0.1  # of a new token's vector, in standard deviations of the old ones


def grow(config: Any, params: Any, vocabulary: Mapping[str, int]) -> tuple[Any, Any]:
    """(config, params) of the model with a new second layer and the vocabulary {token: id}, old tokens first.

    A word begins as the same word after a space, a word with a hyphen as that and the hyphen, any other token
    as the mean of random parts of words.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lct.models import llama
    embed, rng = np.asarray(params.embed), np.random.default_rng(0)
    known = {token: i for token, i in vocabulary.items() if i < config.vocab_size}
    rows = []
    for token in sorted(vocabulary, key=vocabulary.get)[config.vocab_size:]:
        word = known.get('Ġ' + token.lstrip('-'))
        if word is None:
            row = embed[rng.integers(*PARTS_OF_WORDS, size=8)].mean(0)
        else:
            row = embed[word] if token[0] != '-' else 0.9 * embed[word] + 0.5 * embed[known['-']]
        rows.append(row + NOISE * embed.std() * rng.normal(size=embed.shape[1]))
    grown = dataclasses.replace(config, vocab_size=len(vocabulary), num_layers=config.num_layers + 1)
    fresh = llama.init(grown, jax.random.key(7)).layers
    fresh = fresh.replace(wo=jnp.zeros_like(fresh.wo), w_down=jnp.zeros_like(fresh.w_down))
    layers = jax.tree.map(lambda old, new: jnp.concatenate([old[:1], new[1:2], old[1:]]), params.layers,
                          fresh)
    embed = jnp.asarray(np.concatenate([embed, np.array(rows, embed.dtype)]))
    return grown, params.replace(embed=embed, layers=layers)


def run():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('source', type=Path, help='Hugging Face folder of the model')
    parser.add_argument('target', type=Path, help='new folder')
    args = parser.parse_args()
    from lct.data.added_tokens import add_tokens
    from lct.data.synthetic.recall import ADJECTIVES, NOUNS
    from lct.models import llama
    from lct.weights import llama_hf
    parts = (*ADJECTIVES, *NOUNS)
    config, params = llama_hf.load(args.source, dtype='float32')
    with tempfile.TemporaryDirectory() as folder:
        copy_tokenizer(args.source, Path(folder))
        strings = [*parts, *(f'-{part}' for part in parts), *COMMON]
        vocabulary = add_tokens(Path(folder, 'tokenizer.json'), strings)
        config, params = grow(config, params, vocabulary)
        llama_hf.save(args.target, config, params, dtype='float32', tokenizer_from=folder)
    print(f'wrote {args.target}: {config.vocab_size:,} tokens, {llama.num_params(config):,} parameters')


if __name__ == '__main__':
    run_script(run)
