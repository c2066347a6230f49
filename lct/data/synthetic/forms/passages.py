"""Passages: text whose fragments have loss weights of their own, and the tokens of it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lct.data.synthetic.recall import Row
from lct.data.tokenizer import Tokenizer

# Loss weights of predicting a token of a generated form.
NOVEL = 0.0  # keys and values that nothing predicts
FRAME = 0.1  # the wording of statements and questions
QUERY = 0.2  # a key in a question: only its end can be predicted
PREFIX = 0.3  # the words between a question and its answer
ANSWER = 6.0
END = 2.0  # of an answer, and what separates several


class Fragment(NamedTuple):
    """Text with the loss weight of its tokens."""

    text: str
    weight: float


Passage = list[Fragment]  # ends with a line end and begins after one


class Problem(NamedTuple):
    """A text with questions about it.

    head: what precedes the statements. statements: in order; text may stand between them where
    `is_scattered`. tail: questions with their answers.
    """

    head: list[Passage]
    statements: list[Passage]
    tail: list[Passage]
    is_scattered: bool = True

    @property
    def text(self) -> str:
        return ''.join(map(text_of, [*self.head, *self.statements, *self.tail]))


def text_of(passage: Passage) -> str:
    return ''.join(fragment.text for fragment in passage)


class PassageEncoder:
    """Token ids and weights of passages, as they are after a line end."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # A line end before each passage: some tokenizers put a space before whatever comes first.
        self._anchor = tokenizer.encode('\n')
        self.line_end = tokenizer.encode('a\n')[len(tokenizer.encode('a')):]
        self._texts = {}  # of tokens

    def encode(self, passages: Sequence[Passage]) -> list[Row]:
        """The Row of each passage. A token belongs to the fragment in which it ends."""
        # One by one: a batch of short texts waits longer for its threads than encoding takes.
        return [self._row(passage, self.tokenizer.encode('\n' + text_of(passage))[len(self._anchor):])
                for passage in passages]

    def _row(self, passage: Passage, ids: list[int]) -> Row:
        weights = np.array([fragment.weight for fragment in passage], np.float32)
        fragment_ends = np.cumsum([len(fragment.text) for fragment in passage])
        token_ends = np.cumsum([len(self._text(token)) for token in ids])
        if token_ends[-1] != fragment_ends[-1]:  # a tokenizer whose tokens have no text of their own
            starts = [0] + [self._count(passage[:i]) for i in range(1, len(passage))] + [len(ids)]
            return np.array(ids, np.int32), np.repeat(weights, np.maximum(np.diff(starts), 0))[:len(ids)]
        return np.array(ids, np.int32), weights[np.searchsorted(fragment_ends, token_ends)]

    def _count(self, passage: Passage) -> int:
        """Tokens of a passage that is cut short."""
        return len(self.tokenizer.encode('\n' + text_of(passage))) - len(self._anchor)

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]

    def line_ends(self, ids: np.ndarray) -> np.ndarray:
        """bool [n]: whether each token of text ends a line. References to tokens (negative ids) do not."""
        unique, inverse = np.unique(ids, return_inverse=True)
        ends = [token >= 0 and self._text(token).endswith('\n') for token in unique.tolist()]
        return np.array(ends, bool)[inverse]
