"""RULER's common words extraction task (Hsieh et al. 2024, section 3)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from lct.eval import samples
from lct.eval.tasks.material import Material, PromptFrame

MAX_DRAWS = 100
TRIAL_DRAWS = 9  # lists that decide whether a level fits a length


class Level(NamedTuple):
    """How often words repeat, from min_length tokens on."""

    min_length: int
    common_repeats: int
    other_repeats: int
    example_words: int
    example_common_repeats: int
    example_other_repeats: int


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in which `common` words repeat more often than the others.

    levels: fields of Level, the longest first; all samples of a length have the first level that fits.
    """

    task: str = 'cwe'
    common: int = 10
    levels: tuple = (Level(4096, 30, 3, 40, 10, 3), Level(0, 6, 1, 20, 3, 1), Level(0, 3, 1, 15, 2, 1))
    example: bool = True
    max_new_tokens: int = 120

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        """Words that are too long for the list are drawn again."""
        level = material.cached(('level', self, length), lambda: self._level(material, length))
        for retry in range(MAX_DRAWS):
            result = self._try_list(material, length, index, f'{index} {retry}' if retry else index, level)
            if not isinstance(result, ValueError):
                return result
        raise result

    def _level(self, material, length):
        """The first level at which most lists fit."""
        for level in (Level(*fields) for fields in self.levels):
            if length >= level.min_length:
                results = [self._try_list(material, length, 0, f'level {i}', level)
                           for i in range(TRIAL_DRAWS)]
                if sum(isinstance(result, ValueError) for result in results) <= TRIAL_DRAWS // 2:
                    return level
        raise results[-1]

    def _try_list(self, material, length, index, draw, level):
        """Sample of the words of a draw, or the ValueError why they do not fit."""
        try:
            return self._list(material, length, index, draw, level)
        except ValueError as error:
            return error

    def _list(self, material, length, index, draw, level):
        rng = material.rng(self, length, draw)
        frame = PromptFrame(
            'The list below names some words more often than others. Keep count of them.\n\n',
            f'Question: Which {self.common} words are the most common in the list above?\nAnswer:',
            f' The {self.common} most common words are:')
        words, word_tokens = material.list_pool(length // level.other_repeats)
        source = f'the list of words ({material.lexicon.source}) holds {len(words)}'
        if len(words) <= level.example_words + 2 * self.common:
            raise ValueError(f'{source}, and {self.task} takes more than '
                             f'{level.example_words + 2 * self.common}; give a longer one')
        order = rng.sample(range(len(words)), len(words))
        if self.example:
            shown = [order.pop() for _ in range(level.example_words)]
            example = self._example(material, rng, words, shown, level, frame)
            frame = frame._replace(head=example + frame.head)
        common = order[:self.common]
        budget = material.budget(self, length, frame, _in_line(words, common))
        sizes, room = self._list_tokens(material, length, word_tokens[order], level), budget.room()
        others = int(np.searchsorted(sizes, room, 'right')) - 1
        if others < self.common:
            budget.raise_too_small(int(sizes[self.common]) - room)
        budget.check_filled(others < len(sizes) - 1, source)
        items = common * level.common_repeats + order[self.common:self.common + others] * level.other_repeats
        material.placement.shuffle(rng, items)
        meta = {'words': self.common + others, 'repeats': [level.common_repeats, level.other_repeats],
                'word_source': material.lexicon.source}
        return budget.sample(index, _numbered(words, items), [words[i].strip() for i in common],
                             int(sizes[others]), meta)

    def _example(self, material, rng, words, shown, level, frame):
        """The text of a short solved list of the words of indices `shown`."""
        common = shown[:self.common]
        items = common * level.example_common_repeats + shown[self.common:] * level.example_other_repeats
        material.placement.shuffle(rng, items)
        return (f'{frame.head}{_numbered(words, items)}{frame.tail}{frame.answer_prefix} '
                f'{_in_line(words, common)}\n\n')

    def _list_tokens(self, material, length, word_tokens, level):
        """int [n + 1]: tokens of lists with 0, 1, ... n words beside the common ones, with their numbers.

        word_tokens: [words], the common ones first.
        """
        sizes = level.other_repeats * np.concatenate([[0], np.cumsum(word_tokens[self.common:])])
        sizes += level.common_repeats * int(word_tokens[:self.common].sum())
        numbers = material.number_tokens(length)
        items = self.common * level.common_repeats + level.other_repeats * np.arange(len(sizes))
        return sizes + np.where(items < len(numbers), numbers[np.minimum(items, len(numbers) - 1)], length)


def _numbered(words, items):
    return ''.join([f'{i}.{words[j]}' for i, j in enumerate(items, 1)])


def _in_line(words, items):
    return _numbered(words, items).rstrip().replace('\n', ' ')
