"""Documents of generated forms that fill a row: text with statements in it, and questions about them at the
end."""

from collections.abc import Callable

import numpy as np

from lct.data.synthetic.forms.chains import chains
from lct.data.synthetic.forms.counts import counts
from lct.data.synthetic.forms.facts import facts
from lct.data.synthetic.forms.passages import PassageEncoder, Problem
from lct.data.synthetic.forms.records import records
from lct.data.synthetic.forms.shots import shots
from lct.data.synthetic.forms.strings import ALL_WORDS, chance, pick
from lct.data.synthetic.recall import Row

HAYSTACK_WEIGHT = 0.1  # of text between statements
SHORTEST = 48  # tokens of a document
TRIES = 8
LINE_SEARCH = 48  # tokens within which a line end is looked for
MAX_SIZE = 6000  # tokens of the statements of a document

Form = Callable[[np.random.Generator, int], Problem]
FORMS: tuple[Form, ...] = (*[facts] * 14, *[chains] * 4, counts, *[shots] * 3, records)
NOISE_VERBS = ('waits', 'sleeps', 'is open', 'turns', 'goes on', 'is far away', 'stays', 'sings', 'is warm',
               'falls')


def form_documents(rng: np.random.Generator, encoder: PassageEncoder, haystack: np.ndarray,
                   seq_len: int) -> list[Row]:
    """Documents that fill a row of seq_len tokens, with a bos before each.

    haystack int [n]: tokens of text. Half of the rows are one document,
    half hold several of log-uniform lengths.
    """
    single = chance(rng, 0.5) or seq_len <= 2 * SHORTEST
    rows, left = [], seq_len
    while left:
        n = left
        if not single and left > 2 * SHORTEST:
            n = min(left, int(np.exp(rng.uniform(np.log(SHORTEST), np.log(seq_len)))))
            n = left if left - n < SHORTEST else n
        rows.append(_document(rng, encoder, haystack, n - len(encoder.bos)))
        left -= n
    return rows


def _document(rng: np.random.Generator, encoder: PassageEncoder, haystack: np.ndarray, length: int) -> Row:
    """A document of `length` tokens; nothing but text where no problem fits."""
    form = pick(rng, FORMS)
    # How much of a document is text: none of it, any share, or nearly all.
    share = 0.0 if form is shots else pick(rng, (0.0, 0.0, rng.uniform(0, 0.9), rng.uniform(0.4, 0.95)))
    size = int(min(max((1 - share) * length, 40), MAX_SIZE))
    for _ in range(TRIES if length >= SHORTEST // 2 else 0):
        problem = form(rng, size)
        rows = [encoder.encode(passages) for passages in (problem.head, problem.statements, problem.tail)]
        used = sum(len(ids) for part in rows for ids, _ in part)
        if used <= length:
            filler = _filler(rng, encoder, haystack, length - used)
            return _assemble(rng, encoder, rows, filler, problem.is_scattered)
        size = int(0.8 * size * length / used)
    return _haystack(rng, haystack, length)


def _filler(rng: np.random.Generator, encoder: PassageEncoder, haystack: np.ndarray, n: int) -> Row:
    """n tokens of text, or in one document of eight of a few sentences that repeat."""
    if n == 0 or chance(rng, 0.875):
        return _haystack(rng, haystack, n)
    sentences = [f'{pick(rng, ("The", "A", "This", "Our"))} {pick(rng, ALL_WORDS)} {pick(rng, NOISE_VERBS)}.'
                 for _ in range(int(rng.integers(1, 6)))]
    mark = pick(rng, (' ', '\n'))
    ids = encoder.tokenizer.encode(mark.join(sentences) + mark.rstrip(' ') + '\n')
    return np.resize(np.array(ids, np.int32), n), np.full(n, HAYSTACK_WEIGHT, np.float32)


def _haystack(rng: np.random.Generator, haystack: np.ndarray, n: int) -> Row:
    start = int(rng.integers(len(haystack)))
    ids = np.take(haystack, np.arange(start, start + n), mode='wrap')
    return ids.astype(np.int32), np.full(n, HAYSTACK_WEIGHT, np.float32)


def _assemble(rng: np.random.Generator, encoder: PassageEncoder, rows: list[list[Row]], filler: Row,
              is_scattered: bool) -> Row:
    """Head, statements with the filler between them, tail. Statements that are not scattered stay
    together."""
    head, statements, tail = rows
    ids, weights = filler
    groups = [statements] if not is_scattered or chance(rng, 0.1) else [[one] for one in statements]
    gaps = rng.exponential(size=len(groups) + 1)
    # In some documents the first statement is at the very beginning, and the last one right before the
    # questions.
    gaps[[0, -1]] *= rng.random(2) < 0.8
    gaps = np.cumsum(gaps / max(gaps.sum(), 1e-9))
    cuts = _line_starts(encoder, ids, np.floor(np.minimum(gaps, 1) * len(ids)).astype(int))
    blocks, last = list(head), 0
    for cut, group in zip(cuts, [*groups, tail], strict=True):
        blocks += [(ids[last:cut], weights[last:cut]), *group]
        last = cut
    return (np.concatenate([ids for ids, _ in blocks]).astype(np.int32),
            np.concatenate([weights for _, weights in blocks]).astype(np.float32))


def _line_starts(encoder: PassageEncoder, ids: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Places in the text, moved to the next beginning of a line if there is one near; the last is the end.

    Elsewhere a line end replaces what precedes the place in ids.
    """
    places, ends = places.copy(), encoder.line_ends(ids)
    places[-1] = len(ids)
    starts = np.append(np.flatnonzero(ends) + 1, len(ids))
    found = starts[np.searchsorted(starts, places)]
    near = (found - places <= LINE_SEARCH) & (places > 0)
    places = np.where(near, found, places)
    size = len(encoder.line_end)
    for place in places[places >= size]:
        if not ends[place - 1]:
            ids[place - size:place] = encoder.line_end
    return places
