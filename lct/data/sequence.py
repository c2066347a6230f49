"""One training sequence as references into a token store, which can be read in any range of its columns."""

from typing import NamedTuple

import numpy as np


class Sequence(NamedTuple):
    """One sequence, ready to be read in any part.

    document, start, stop: int64 [P], of the store, or of ids where document is -1. segment: int32 [P], from
    1. position: int64 [P] of each piece's first token. weight: float32 [P] of the loss of predicting a
    piece's tokens. follows: bool [P], whether the piece goes on with the text of the one before it in the
    sequence, whose last target is then its first token. continues: bool [P], whether the document has a
    token at stop, which is then the target of the piece's last token.
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

    def counts(self):
        """-> (tokens, query-key pairs that are visible)."""
        n = self.stop - self.start
        return int(n.sum()), int((n * self.position + n * (n + 1) // 2).sum())
