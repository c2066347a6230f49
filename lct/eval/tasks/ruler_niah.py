"""RULER's needle-in-a-haystack tasks (Hsieh et al. 2024, section 3)."""

import dataclasses
import random

import numpy as np

from lct.eval import samples
from lct.eval.tasks import prompt_fitting, ruler_text
from lct.eval.tasks.material import Budget, Material, PromptFrame


@dataclasses.dataclass(frozen=True)
class Niah:
    """Needles in a haystack.

    haystack: noise (one filler repeated), text, or needles (of other names).
    keys: names in the context, each with `values` values. queries: names whose values are asked for.
    """

    task: str
    haystack: str
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_new_tokens: int = 128

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng = material.rng(self, length, index)
        type_name = ruler_text.type_name(self.value_kind)
        distractors = _Distractors()
        if self.haystack == 'needles':
            distractors = _Distractors(*material.needle_pool(self.name_kind, self.value_kind, length))
        keys = max(self.keys, self.queries)
        names = material.lexicon.distinct(rng, self.name_kind, keys, distractors.taken)
        values = material.lexicon.distinct(rng, self.value_kind, keys * self.values, distractors.taken)
        queried = rng.sample(range(keys), self.queries)
        outputs = [values[i * self.values + j] for i in queried for j in range(self.values)]
        needles = [ruler_text.needle(type_name, names[i // self.values], value)
                   for i, value in enumerate(values)]
        is_target = [i // self.values in queried for i in range(len(values))]

        frame = _frame(type_name, [names[i] for i in queried], len(outputs))
        budget = material.budget(self, length, frame, ruler_text.enumeration(outputs))
        sizes = material.counter.count_each(needles)
        lines, tokens = self._haystack(material, rng, budget, budget.room(int(sizes.sum())), distractors)
        depths = material.placement.needle_depths(
            rng, material.first_depth(self, length, index), is_target, self.haystack == 'text')
        context, depths = prompt_fitting.insert_lines(
            lines, tokens, list(zip(depths, needles, strict=True)), material.counter)
        meta = {'depths': [depth for depth, target in zip(depths, is_target, strict=True) if target],
                'haystack': self.haystack if self.haystack != 'text' else material.text_source}
        return budget.sample(index, context, outputs, int(tokens.sum() + sizes.sum()), meta)

    def _haystack(self, material, rng, budget, room, distractors):
        """(lines, tokens) that fit into room tokens."""
        if self.haystack == 'text':
            return material.excerpt(rng, room)
        if self.haystack == 'noise':
            return material.noise(room)
        if self.haystack == 'needles':
            return distractors.draw(material, rng, budget, room)
        raise ValueError(f"unknown haystack {self.haystack!r}; use 'noise', 'text' or 'needles'")


@dataclasses.dataclass(frozen=True)
class _Distractors:
    """Needles of other names, their tokens [n], and the names and values that they take."""

    needles: list = dataclasses.field(default_factory=list)
    tokens: np.ndarray | tuple = ()
    taken: set | tuple = ()

    def draw(self, material: Material, rng: random.Random, budget: Budget, room: int):
        """(lines, tokens) in random order that fit into room tokens."""
        order = rng.sample(range(len(self.needles)), len(self.needles))
        tokens = self.tokens[order]
        count = prompt_fitting.count_fitting(tokens, room)
        budget.check_filled(count < len(self.needles),
                            f'{material.lexicon.source} words give only {len(self.needles)} needles')
        return prompt_fitting.append_partial_line(
            material.counter, [self.needles[i] for i in order[:count]], tokens[:count],
            self.needles[order[count]], room)


def _frame(type_name, names, num_answers):
    """PromptFrame that asks for the values of names."""
    plural, verb = ('s', 'are') if num_answers > 1 else ('', 'is')
    listing = ruler_text.enumeration(names)
    head = (f'Some {type_name}s are stored under names in the text below. '
            'A question about them follows it.\n\n')
    tail = (f'Question: Which {type_name}{plural} {verb} stored under {listing}? Read the text '
            'above for the answer.\nAnswer:')
    return PromptFrame(head, tail, f' The {type_name}{plural} stored under {listing} {verb}')
