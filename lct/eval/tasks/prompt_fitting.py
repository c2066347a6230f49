"""Prompts of an exact size, put together from fragments of text whose tokens are counted once.

Every fragment ends with a line or begins with a space. Today's tokenizers split there anyway, so the tokens
of fragments add up. Whether they do is measured for the tokenizer in use, never assumed.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from lct.data.tokenizer import Tokenizer

FIRST_FRAGMENTS = 256
LONG = 32768  # tokens: from here on counting a prompt again takes longer than making it


class TokenCounter:
    """Counts the tokens of texts and of fragments.

    is_additive: whether the counts of fragments have always added up to the count of the text they form.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos = int(tokenizer.bos_id is not None)
        # Fragments are counted after a line end: some tokenizers put a space before whatever comes first.
        self._line_end = len(tokenizer.encode('\n'))
        self.is_additive = True

    def count(self, text: str) -> int:
        """Tokens of a text that stands alone, without special tokens."""
        return len(self.tokenizer.encode(text))

    def count_each(self, fragments: Iterable[str]) -> np.ndarray:
        """int [n]: tokens of each fragment within a longer text."""
        ids = self.tokenizer.encode_batch(['\n' + fragment for fragment in fragments])
        return np.array([len(x) for x in ids], np.int64) - self._line_end

    def count_one(self, fragment: str) -> int:
        """Tokens of a fragment within a longer text."""
        return int(self.count_each([fragment])[0])

    def count_head(self, head: str) -> int:
        """Tokens of a text that more text follows.

        Two line ends may be one token at the end of a text, and two tokens before a word.
        """
        return self.count(head + 'Word') - self.count_one('Word')

    def check_additive(self, fragments: Sequence[str]) -> None:
        """Count the fragments together and alone; after one difference is_additive stays False."""
        together = self.count('\n' + ''.join(fragments)) - self._line_end
        self.is_additive &= bool(together == self.count_each(fragments).sum())

    def trusts_sums(self, length: int) -> bool:
        """Whether a prompt of length tokens may rely on the sum of its fragments without another count."""
        return length >= LONG and self.is_additive and self._is_additive_when_long

    def margin(self, length: int) -> int:
        """Tokens to leave free at first, so that few prompts turn out too long."""
        return 0 if length < LONG or self._is_additive_when_long else 4 * length // LONG

    @functools.cached_property
    def _is_additive_when_long(self):
        # Tokenizers that encode in blocks (tiktoken overflows its stack otherwise) cut a word in two where
        # a block ends. Only the count of a long text of long words shows it.
        word = 'Honorificabilitudinitatibus' * 3 + '\n'
        together = self.count('\n' + word * 10_000) - self._line_end
        return together == 10_000 * self.count_one(word)


class FragmentPool:
    """Fragments that are made and counted when they are first needed.

    source: an endless or finite iterable, the same each time for the same seed.
    """

    def __init__(self, counter: TokenCounter, source: Iterable[str]):
        self._counter, self._source = counter, iter(source)
        self.fragments, self.tokens = [], np.zeros(0, np.int64)

    def at_least(self, tokens: float) -> tuple[list[str], np.ndarray]:
        """(fragments, their tokens [n]): the first 256 * 2^k of at least `tokens` tokens, or all there are.

        Their number depends on `tokens` alone and not on earlier calls.
        """
        count = FIRST_FRAGMENTS
        while True:
            self._grow(count)
            if count > len(self.fragments) or self.tokens[:count].sum() >= tokens:
                return self.fragments[:count], self.tokens[:count]
            count *= 2

    def first(self, count: int) -> list[str]:
        """The first `count` fragments, fewer if there are no more."""
        self._grow(count)
        return self.fragments[:count]

    def _grow(self, count):
        new = list(itertools.islice(self._source, max(count - len(self.fragments), 0)))
        if not new:
            return
        self.fragments += new
        self.tokens = np.concatenate([self.tokens, self._counter.count_each(new)])


class CyclicText:
    """Lines of a text that start over after the last one, for excerpts of any length from any line.

    lines: each ends in a line end and holds more than white space.
    """

    def __init__(self, counter: TokenCounter, lines: list[str]):
        self.counter, self.lines = counter, lines
        self.tokens = counter.count_each(lines)
        self._ends = np.concatenate([[0], np.cumsum(self.tokens)])
        counter.check_additive(lines[:4 * FIRST_FRAGMENTS])

    def excerpt(self, start: int, room: int) -> tuple[list[str], np.ndarray]:
        """(lines, their tokens [n]) from line `start` that fit into room tokens.

        They are complete lines, then as many words of the next line as fit.
        """
        count = len(self.lines)
        cycles, rest = divmod(int(self._ends[start]) + room, int(self._ends[-1]))
        stop = cycles * count + int(np.searchsorted(self._ends, rest, 'right')) - 1
        chosen = np.arange(start, stop) % count
        lines, tokens = [self.lines[i] for i in chosen], self.tokens[chosen]
        return append_partial_line(self.counter, lines, tokens, self.lines[stop % count], room)


def count_fitting(tokens: np.ndarray, room: int) -> int:
    """How many of the first lines, of tokens [n], fit into room tokens."""
    return int(np.searchsorted(np.cumsum(tokens), room, 'right'))


def append_partial_line(
    counter: TokenCounter, lines: list[str], tokens: np.ndarray, following: str, room: int,
) -> tuple[list[str], np.ndarray]:
    """(lines, tokens) with the words of the line `following` appended that fit into room tokens in total."""
    words = following.rstrip('\n').split(' ')
    left = room - int(tokens.sum())
    # Search for the largest number of words that fits; the complete line does not.
    fits, over = 0, len(words)
    partial_line, size = None, 0
    while over - fits > 1:
        middle = (fits + over) // 2
        candidate = ' '.join(words[:middle]) + '\n'
        count = counter.count_one(candidate)
        if count <= left:
            fits, partial_line, size = middle, candidate, count
        else:
            over = middle
    if partial_line is None or not partial_line.strip():
        return lines, tokens
    return [*lines, partial_line], np.append(tokens, size)


def insert_lines(
    lines: list[str], tokens: np.ndarray, inserts: list[tuple[float, str]], counter: TokenCounter,
) -> tuple[str, list[float]]:
    """Insert lines into a text at depths (0 its beginning, 1 its end), measured in tokens of the text.

    Args:
      lines, tokens: the text and the tokens [n] of its lines.
      inserts: [(depth, line)]; lines of equal depth keep their order.
    Returns:
      (text, [depth of each inserted line in that text, in the order of inserts]).
    """
    ends = np.concatenate([[0], np.cumsum(tokens)])
    sizes = counter.count_each([line for _, line in inserts]) if inserts else np.zeros(0, np.int64)
    indices = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth, _ in inserts]
    order = sorted(range(len(inserts)), key=lambda i: (indices[i], inserts[i][0]))
    total = max(int(ends[-1] + sizes.sum()), 1)
    out, last, before, depths = [], 0, 0, [0.0] * len(inserts)
    for i in order:
        out += lines[last:indices[i]]
        out.append(inserts[i][1])
        depths[i] = float((ends[indices[i]] + before) / total)
        last, before = indices[i], before + int(sizes[i])
    return ''.join(out + lines[last:]), depths
