"""Per-source length up-sampling: long documents come more often inside each source, each source as often as before.

Fu et al. 2024, "Data Engineering for Scaling Language Models to 128K Context" (arXiv:2402.10171): what makes
SlimPajama long-context data is not more books. Their released recipe drops nine in ten of the documents under
4,096 tokens, in every source alike, and fills each source up to the share of tokens that it had.
"""

from typing import NamedTuple

import numpy as np

from lct.data.batches.random_order import uniform


class Upsample(NamedTuple):
    """Documents of at_least tokens come once an epoch, shorter ones with probability keep, others in each epoch."""

    at_least: int = 4096
    keep: float = 0.1

    def check(self):
        if self.at_least < 1 or not 0 <= self.keep <= 1:
            raise ValueError(f'up-sampling from {self.at_least} tokens on, keeping {self.keep} of the shorter documents, '
                             'is no recipe; use at least 1 token and a fraction in [0, 1], such as 4096 and 0.1')
        return self


def chosen(upsample, documents, lengths, key):
    """-> bool [n]: which of documents int64 [n], lengths int64 [n] long, come in the epoch of key."""
    return (lengths >= upsample.at_least) | (uniform(documents, key) < upsample.keep)


def token_shares(store):
    """{source: its share of the tokens}: the mix that is kept. One pass over the lengths."""
    tokens = np.bincount(store.source_of, store.lengths, len(store.sources))
    if not tokens.sum():
        raise ValueError('the store holds no tokens; tokenize documents with text into it')
    return {name: float(n) for name, n in zip(store.sources, tokens / tokens.sum(), strict=True) if n}


def profile(lengths, source_of, num_sources, at_least=4096):
    """-> (share of tokens by source float64 [num_sources], share of all tokens in documents of at_least tokens):
    what up-sampling is judged by."""
    tokens = np.bincount(source_of, lengths, num_sources)
    total = max(tokens.sum(), 1)
    return tokens / total, float(lengths[lengths >= at_least].sum() / total)
