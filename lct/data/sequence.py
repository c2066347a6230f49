"""One training sequence as references into a token store. Any range of its columns can be read."""

from typing import NamedTuple

import numpy as np

TEXT = 'text'  # in the weights of a mixture: all sources in their own proportion
KINDS = ('long', 'chat', 'recall', 'copy', 'forms')  # sequences made of random documents of the store


class Sequence(NamedTuple):
    """P fragments, one after the other; a fragment is a range of tokens of one document.

    document, start, stop: int64 [P]; tokens of the store, or of ids where document is -1.
    segment: int32 [P], from 1. position: int64 [P], of each fragment's first token.
    weight: float32 [P], of the loss of predicting a token of the fragment.
    follows: bool [P], whether a fragment continues the text of the fragment before it, whose last target is
      then its first token.
    continues: bool [P], whether the document has a token at stop, which is then the target of the last token.
    """

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    segment: np.ndarray
    position: np.ndarray
    weight: np.ndarray
    follows: np.ndarray
    continues: np.ndarray
    ids: np.ndarray = np.zeros(0, np.int32)

    def counts(self, window: int | None = None) -> tuple[int, int]:
        """(tokens, query-key pairs under the causal mask, each query with at most window keys)."""
        n = self.stop - self.start
        pairs = causal_pairs(self.position + n, window) - causal_pairs(self.position, window)
        return int(n.sum()), int(pairs.sum())


def causal_pairs(length: np.ndarray, window: int | None = None) -> np.ndarray:
    """Query-key pairs of the first `length` tokens of a document, each query with at most window keys."""
    full = length if window is None else np.minimum(length, window)
    return full * (full + 1) // 2 + (length - full) * full
