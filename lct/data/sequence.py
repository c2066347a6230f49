"""One training sequence as references into a token store. Any range of its columns can be read."""

from typing import NamedTuple

import numpy as np


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

    def counts(self) -> tuple[int, int]:
        """(tokens, query-key pairs under the causal mask)"""
        n = self.stop - self.start
        return int(n.sum()), int((n * self.position + n * (n + 1) // 2).sum())
