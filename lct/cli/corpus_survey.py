"""How many tokens the documents of a corpus have, and what of them can be held out for evaluations."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lct.cli.corpus import check_size, read_documents, tokenize_documents
from lct.data.corpus import documents
from lct.data.corpus.store import Store, is_store
from lct.data.tokenizer import Tokenizer

BYTES_PER_TOKEN = 4  # of English text, where there is no tokenizer to count with
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)  # of the documents that may be held out
SOME = 4  # held-out documents, over which a mean has an error


class Survey(NamedTuple):
    """The documents of a corpus.

    lengths: int [documents], tokens of each. documents: with their texts; None for a store.
    estimated: whether the tokens are estimated from bytes.
    """

    lengths: np.ndarray
    documents: list[documents.Document] | None
    estimated: bool

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())


class HeldOut(NamedTuple):
    """What a fraction of the documents gives: held-out documents, their tokens, those of the longest one, and
    the tokens that are left to train on."""

    fraction: float
    documents: int
    tokens: int
    longest: int
    training: int


def survey(spec: str, tokenizer: Tokenizer | None, exclude: Sequence[str] = (),
           text_field: str = 'text') -> Survey:
    """Read a corpus and count its tokens.

    tokenizer: None estimates them.

    Raises:
      ValueError: for a corpus that cannot be read, or not into memory.
    """
    if is_store(spec):
        return Survey(Store(spec).lengths, None, estimated=False)
    check_size(spec, exclude, None)
    found = read_documents(spec, exclude=exclude, text_field=text_field, log=print)
    if tokenizer is None:
        lengths = np.array([-(-len(one.text.encode()) // BYTES_PER_TOKEN) for one in found])
    else:
        lengths = np.array([len(ids) for ids in tokenize_documents(tokenizer, found)])
    return Survey(lengths, found, estimated=tokenizer is None)


def hold_out(corpus: Survey, wanted: int, needed: int) -> HeldOut:
    """The smallest fraction of FRACTIONS that gives `wanted` tokens in some documents, one of them as long as
    most, and leaves `needed` for training; without one, what comes nearest.

    Raises:
      ValueError: if the corpus cannot be split.
    """
    choices = [_of_store(corpus, fraction) if corpus.documents is None else _of_documents(corpus, fraction)
               for fraction in FRACTIONS]
    fitting = [one for one in choices if one.training >= needed] or choices[:1]
    median = int(np.median(corpus.lengths))
    some = min(SOME, len(corpus.lengths) // 10 + 1)
    enough = [one for one in fitting
              if one.tokens >= wanted and one.longest >= min(median, wanted) and one.documents >= some]
    return enough[0] if enough else max(fitting, key=lambda one: (min(one.tokens, wanted), one.longest))


def _of_documents(corpus, fraction):
    sizes = {one.name: int(n) for one, n in zip(corpus.documents, corpus.lengths, strict=True)}
    training, held = documents.split(corpus.documents, fraction)
    held, training = ([sizes[one.name] for one in side] for side in (held, training))
    return HeldOut(fraction, len(held), sum(held), max(held), sum(training))


def _of_store(corpus, fraction):
    held = np.sort(corpus.lengths)[::-1]
    count = max(int(len(held) * fraction), 1)
    sample = held[::max(len(held) // count, 1)][:count]  # as a draw by names would give on average
    longest = int(sample[len(sample) // 4])
    return HeldOut(fraction, count, int(fraction * corpus.num_tokens), longest,
                   int((1 - fraction) * corpus.num_tokens))


def tokenizer_of(folder: Path | None) -> Tokenizer | None:
    """The tokenizer of a folder, None without one."""
    from lct.data import tokenizer as tokenizers

    return tokenizers.load(folder) if folder else None
