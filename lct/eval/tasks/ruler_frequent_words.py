"""RULER's frequent words extraction task (Hsieh et al. 2024, section 3)."""

import dataclasses
import string

import numpy as np

from lct.eval import samples
from lct.eval.tasks import ruler_text
from lct.eval.tasks.material import Material, PromptFrame

END = ' END\n'


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall as rank ** -alpha.

    Dots are the most frequent, and the question asks for the next `top_words`. vocab_size: None for a
    fiftieth of the length.
    """

    task: str = 'fwe'
    alpha: float = 2.0
    word_len: int = 6
    vocab_size: int | None = None
    top_words: int = 3
    max_new_tokens: int = 50

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng, counter = material.rng(self, length, index), material.counter
        frame = PromptFrame(
            'Count how often each coded word appears in the text below, and disregard the dots.\n\n'
            'Coded text:',
            f'Question: Which {self.top_words} coded words appear most often in the text above?\nAnswer:',
            f' The {self.top_words} coded words that appear most often are')
        vocab_size = self.vocab_size or (length - self.max_new_tokens) // 50
        # No rank beyond this appears even once.
        last_rank = int((length / _zeta(self.alpha)) ** (1 / self.alpha)) + 1
        num_words = max(min(vocab_size, last_rank), self.top_words + 2)
        words = ['...', *_coded_words(rng, self.word_len, num_words - 1)]
        outputs = words[1:self.top_words + 1]
        budget = material.budget(self, length, frame, ruler_text.enumeration(outputs))
        fragments = [f' {word}' for word in words]
        tokens, end_tokens = counter.count_each(fragments), counter.count_one(END)
        counter.check_additive([*fragments, END])
        room = budget.room(end_tokens)
        shares = np.arange(1, num_words + 1) ** -self.alpha / _zeta(self.alpha)
        counts = _fit_counts(tokens, shares, length, room)
        if counts[self.top_words] <= counts[self.top_words + 1]:
            budget.raise_too_small(room)
        items = [i for i, count in enumerate(counts) for _ in range(count)]
        material.placement.shuffle(rng, items)
        context = ''.join([fragments[i] for i in items]) + END
        return budget.sample(index, context, outputs, int((tokens * counts).sum()) + end_tokens,
                             {'counts': counts[:self.top_words + 2].tolist()})


def _fit_counts(tokens, shares, length, room):
    """int [n]: counts of words of tokens [n] in these shares [n] that fit into room tokens."""
    counts = lambda num_words: (num_words * shares).astype(int)
    fits, over = 0, length
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if int((tokens * counts(middle)).sum()) <= room else (fits, middle)
    return counts(fits)


def _coded_words(rng, word_len, count):
    """[word] distinct."""
    if count > 26 ** word_len // 2:
        raise ValueError(f'words of {word_len} letters are too few for a vocabulary of {count}; '
                         'use longer ones')
    words = {}
    while len(words) < count:
        words[''.join(rng.choices(string.ascii_lowercase, k=word_len))] = None
    return list(words)


def _zeta(alpha):
    """Riemann's zeta for alpha > 1 by the Euler-Maclaurin formula, to 1e-10."""
    if alpha <= 1:
        raise ValueError(f'alpha {alpha} must be above 1, or the shares of the words have no sum; '
                         'use 1.1 or more')
    n = np.arange(1, 100)
    return float((n ** -alpha).sum() + 100 ** (1 - alpha) / (alpha - 1) + 100 ** -alpha / 2
                 + alpha * 100 ** (-alpha - 1) / 12)
