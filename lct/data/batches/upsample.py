"""Per-source length up-sampling: more long documents in each source, with the same mix of sources.

Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context" (arXiv:2402.10171): more books
are not what makes SlimPajama long-context data. Their released recipe drops nine in ten of the documents
under 4,096 tokens, in every source alike, and fills each source up to its original share of the tokens.
"""

from typing import NamedTuple, Self

import numpy as np

from lct.data.batches.random_order import uniform
from lct.data.corpus.store import Store


class Upsample(NamedTuple):
    """How often documents come: those of at_least tokens once per epoch, shorter ones with probability keep.

    Each epoch draws its own short documents.
    """

    at_least: int = 4096
    keep: float = 0.1

    def check(self) -> Self:
        """This recipe; ValueError if its values are out of range."""
        if self.at_least < 1 or not 0 <= self.keep <= 1:
            raise ValueError(f'up-sampling with at_least={self.at_least} and keep={self.keep} is not '
                             'possible; use at least 1 token and a fraction in [0, 1], such as 4096 and 0.1')
        return self


def chosen(upsample: Upsample, documents: np.ndarray, lengths: np.ndarray,
           key: tuple[int, ...]) -> np.ndarray:
    """bool [n]: which of documents int64 [n] with lengths int64 [n] come in the epoch of key."""
    return (lengths >= upsample.at_least) | (uniform(documents, key) < upsample.keep)


def token_shares(store: Store) -> dict[str, float]:
    """{source: its share of the tokens}, the mix that up-sampling preserves. One pass over the lengths."""
    tokens = np.bincount(store.source_of, store.lengths, len(store.sources))
    if not tokens.sum():
        raise ValueError('the store holds no tokens; tokenize documents with text into it')
    return {name: float(n) for name, n in zip(store.sources, tokens / tokens.sum(), strict=True) if n}


def profile(lengths: np.ndarray, source_of: np.ndarray, num_sources: int,
            at_least: int = 4096) -> tuple[np.ndarray, float]:
    """(share of the tokens by source float64 [num_sources], share of all tokens in documents of at_least).

    These are the two measures of up-sampling.
    """
    tokens = np.bincount(source_of, lengths, num_sources)
    total = max(tokens.sum(), 1)
    return tokens / total, float(lengths[lengths >= at_least].sum() / total)
