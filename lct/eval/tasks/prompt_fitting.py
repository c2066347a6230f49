"""Prompts of an exact size: text made of pieces whose tokens are counted once, however often it is put together.

Every piece ends where a line ends, or begins with a space: there the tokenizers of today cut anyway, so that
the tokens of pieces add up. Whether they do is measured for the tokenizer at hand, never assumed.
"""

import functools
import itertools

import numpy as np

FIRST_PIECES = 256
LONG = 32768  # tokens: from here on counting a text again would take longer than making it


class Counter:
    """Tokens of texts and of pieces of text; adds_up: whether the pieces' sum has always been the text's count."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos = int(tokenizer.bos_id is not None)
        # Pieces are counted behind a line end: some tokenizers put a space before whatever comes first.
        self._line_end = len(tokenizer.encode('\n'))
        self.adds_up = True

    def text(self, text):
        """Tokens of a whole text, without specials."""
        return len(self.tokenizer.encode(text))

    def pieces(self, pieces):
        """int [n]: tokens of each piece where it stands in a longer text."""
        ids = self.tokenizer.encode_batch(['\n' + piece for piece in pieces])
        return np.array([len(x) for x in ids], np.int64) - self._line_end

    def before(self, head):
        """Tokens of a text where a piece follows: line ends at the end of a text may be one token, and two where a
        word comes next."""
        return self.text(head + 'Word') - int(self.pieces(['Word'])[0])

    def check(self, pieces):
        """Count the pieces together and alone; one difference and adds_up is False from then on."""
        together = self.text('\n' + ''.join(pieces)) - self._line_end
        self.adds_up &= bool(together == self.pieces(pieces).sum())

    def trusted(self, length):
        """Whether sums of pieces are to be believed for texts of length tokens, instead of counting the whole."""
        return length >= LONG and self.adds_up and self._exact_when_long

    def margin(self, length):
        """Tokens to leave free at first, so that few texts turn out too long."""
        return 0 if length < LONG or self._exact_when_long else 4 * length // LONG

    @functools.cached_property
    def _exact_when_long(self):
        # Tokenizers that encode in blocks (tiktoken overflows its stack otherwise) cut words in two where
        # a block ends: in a text of long words nothing but the sum tells.
        word = 'Honorificabilitudinitatibus' * 3 + '\n'
        together = self.text('\n' + word * 10_000) - self._line_end
        return together == 10_000 * int(self.pieces([word])[0])


class Pool:
    """Pieces that are made and counted when they are first needed.

    pieces: an endless or finite iterator, the same each time for the same seed.
    """

    def __init__(self, counter, pieces):
        self._counter, self._source = counter, iter(pieces)
        self.pieces, self.tokens = [], np.zeros(0, np.int64)

    def up_to(self, tokens):
        """-> (pieces, tokens [n]): the first 256 * 2^k with that many tokens or more, or all there are.

        So what is drawn depends on the tokens asked for and not on what was asked before.
        """
        count = FIRST_PIECES
        while True:
            self._grow(count)
            if count > len(self.pieces) or self.tokens[:count].sum() >= tokens:
                return self.pieces[:count], self.tokens[:count]
            count *= 2

    def first(self, count):
        """-> (pieces, tokens [count])."""
        self._grow(count)
        return self.pieces[:count], self.tokens[:count]

    def _grow(self, count):
        new = list(itertools.islice(self._source, max(count - len(self.pieces), 0)))
        if not new:
            return
        self.pieces += new
        self.tokens = np.concatenate([self.tokens, self._counter.pieces(new)])


class Cycle:
    """A text as lines that begin anew where they end: any length from any start.

    lines: each ends in a line end and holds more than white space.
    """

    def __init__(self, counter, lines):
        self.counter, self.lines = counter, lines
        self.tokens = counter.pieces(lines)
        self._ends = np.concatenate([[0], np.cumsum(self.tokens)])
        counter.check(lines[:4 * FIRST_PIECES])

    def cut(self, start, room):
        """-> (lines, tokens [n]) from line `start`: as many whole lines as fit into room tokens, then the
        words of the next that fit."""
        count = len(self.lines)
        turns, rest = divmod(int(self._ends[start]) + room, int(self._ends[-1]))
        stop = turns * count + int(np.searchsorted(self._ends, rest, 'right')) - 1
        chosen = np.arange(start, stop) % count
        lines, tokens = [self.lines[i] for i in chosen], self.tokens[chosen]
        return with_part(self.counter, lines, tokens, self.lines[stop % count], room)


def whole(lines, tokens, room):
    """How many of the lines fit into room tokens."""
    return int(np.searchsorted(np.cumsum(tokens), room, 'right'))


def with_part(counter, lines, tokens, following, room):
    """-> (lines, tokens) with as many words of the line `following` as fit behind them into room tokens."""
    words = following.rstrip('\n').split(' ')
    left = room - int(tokens.sum())
    # Search for the largest number of words that fits; the line as a whole does not.
    fits, over = 0, len(words)
    part, size = None, 0
    while over - fits > 1:
        middle = (fits + over) // 2
        candidate = ' '.join(words[:middle]) + '\n'
        count = int(counter.pieces([candidate])[0])
        if count <= left:
            fits, part, size = middle, candidate, count
        else:
            over = middle
    if part is None or not part.strip():
        return lines, tokens
    return [*lines, part], np.append(tokens, size)


def insert(lines, tokens, inserts, counter):
    """Put lines into a text at depths (0 its beginning, 1 its end), measured in tokens of the text.

    inserts: [(depth, line)]; lines of equal depth keep their order.
    Returns:
      (text, [depth of each line in the finished text, in the order of inserts]).
    """
    ends = np.concatenate([[0], np.cumsum(tokens)])
    sizes = counter.pieces([line for _, line in inserts]) if inserts else np.zeros(0, np.int64)
    places = [int(np.abs(ends - depth * ends[-1]).argmin()) for depth, _ in inserts]
    order = sorted(range(len(inserts)), key=lambda i: (places[i], inserts[i][0]))
    total = max(int(ends[-1] + sizes.sum()), 1)
    parts, last, before, depths = [], 0, 0, [0.0] * len(inserts)
    for i in order:
        parts += lines[last:places[i]]
        parts.append(inserts[i][1])
        depths[i] = float((ends[places[i]] + before) / total)
        last, before = places[i], before + int(sizes[i])
    return ''.join(parts + lines[last:]), depths
