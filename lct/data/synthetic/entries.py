"""Entries of random tokens: keys with values, stated once and then asked for again and again.

They are facts without a wording. Half of the tokens are answers, and keys and values of a small alphabet can
only be told apart by several tokens, so a model learns from few rows to look up a key of several tokens.
"""

import numpy as np

from lct.data.synthetic.recall import Row

NOVEL_WEIGHT = 0.02  # loss weight of what nothing predicts
SMALLEST_ALPHABET = 8
MOST_VALUES = 4  # of a key


def entries_row(rng: np.random.Generator, vocab_ids: np.ndarray, length: int) -> Row:
    """A row of `length` tokens: entries, then queries of random keys with all their values in order.

    vocab_ids int [m]: the ids of random tokens.

    Raises:
      ValueError: if they are too few for marks and an alphabet.
    """
    if len(vocab_ids) < 2 * SMALLEST_ALPHABET:
        raise ValueError(f'text of {len(vocab_ids)} different tokens is too uniform for entries, which need '
                         f'{2 * SMALLEST_ALPHABET}; use other text or no entries')
    vocab_ids = rng.permutation(vocab_ids)
    marks, vocab_ids = vocab_ids[:3], vocab_ids[3:]
    after_key, between, end = marks[:1], marks[1:2], marks[2:3]
    keys, values = (_Strings(rng, vocab_ids, most) for most in (4, 12))
    repeats = int(rng.integers(2, MOST_VALUES + 1)) if rng.random() < 0.3 else 1
    known, parts, left = {}, [], int(length * rng.uniform(0.2, 0.5))
    while left > 0 or not known:
        is_repeated = bool(known) and rng.random() >= 1 / repeats
        key = list(known)[rng.integers(len(known))] if is_repeated else keys.draw(rng)
        if is_repeated == (key in known):
            known.setdefault(key, []).append(value := values.draw(rng))
            parts.append((np.concatenate([key, after_key, value, end]), NOVEL_WEIGHT))
            left -= len(parts[-1][0])
        else:
            left -= 1  # an alphabet may have too few keys
    left = length - sum(len(ids) for ids, _ in parts)
    while left > 0:
        key = list(known)[rng.integers(len(known))]
        answer = [token for value in known[key] for token in (*between, *value)][1:]
        parts += [(np.array([*key, *after_key]), NOVEL_WEIGHT), (np.array([*answer, *end]), 1.0)]
        left -= len(key) + len(answer) + 2
    ids = np.concatenate([ids for ids, _ in parts])[:length]
    weights = np.concatenate([np.full(len(ids), weight) for ids, weight in parts])[:length]
    return ids.astype(np.int32), weights.astype(np.float32)


class _Strings:
    """Strings of up to `most` tokens, of one length or of several, over an alphabet of random size."""

    def __init__(self, rng: np.random.Generator, vocab_ids: np.ndarray, most: int):
        size = np.exp(rng.uniform(np.log(SMALLEST_ALPHABET), np.log(len(vocab_ids))))
        self._alphabet = vocab_ids[rng.permutation(len(vocab_ids))[:int(size)]]
        self._longest = int(np.exp(rng.uniform(0, np.log(most + 1))))
        self._shortest = self._longest if rng.random() < 0.7 else max(self._longest // 2, 1)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        count = int(rng.integers(self._shortest, self._longest + 1))
        return tuple(self._alphabet[rng.integers(len(self._alphabet), size=count)].tolist())
