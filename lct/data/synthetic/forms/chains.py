"""Chains of variables: one is set to a value, the next to it, and so on; other chains stand between."""

import numpy as np

from lct.data.synthetic.forms import strings, wordings
from lct.data.synthetic.forms.facts import enumeration
from lct.data.synthetic.forms.passages import ANSWER, FRAME, NOVEL, QUERY, Fragment, Passage, Problem
from lct.data.synthetic.forms.strings import chance, log_uniform, pick
from lct.data.synthetic.forms.wordings import Wording, merge

NAME_KINDS = ('capitals', 'capitals', 'capitals', 'snake', 'plain', 'invented')
# (the first variable {k} gets the value {v}, the next variable {k} gets the variable {v})
ASSIGNMENTS = (
    *[('{k} = {v}', '{k} = {v}')] * 3, ('let {k} be {v};', 'let {k} be {v};'), ('{k} := {v}', '{k} := {v}'),
    ('{v} -> {k}', '{v} -> {k}'), ('assign {v} to {k}', 'assign {v} to {k}'), ('mov {k}, {v}',
                                                                               'mov {k}, {v}'),
    ('Box {k} holds {v}.', 'Box {k} holds the same as box {v}.'), ('{k} weighs {v} kilos.',
                                                                   '{k} weighs as much as {v}.'),
    ('put {v} into {k}', 'copy {v} into {k}'), ('{k} is worth {v}.', '{k} is worth what {v} is worth.'),
    ('{k} lives at {v}.', '{k} lives with {v}.'), ('var {k} = {v};', 'var {k} = {v};'), ('(define {k} {v})',
                                                                                         '(define {k} {v})'),
    ('Give {k} the number {v}.', 'Give {k} the number of {v}.'), ('{k} takes {v}.', '{k} takes {v}.'),
    ('DEF {k} AS {v}.', 'DEF {k} AS {v}.'), ('STORE {k} WITH {v}.', 'STORE {k} WITH {v}.'), ('{k} <- {v}',
                                                                                             '{k} <- {v}'),
)
ALL_OF = ('Which ones equal {k}?', 'Which {n} names end up as {k}?', 'List every name that comes to {k}.',
          'All names with {k}?', 'Which {n} names have {k}, at once or through others?',
          'Where do we find {k}?',
          'Name the {n} that are {k} in the end.')
ALL_ANSWERS = ('', '', ' The {n} names with {k} are', ' The names are', ' {k}:', ' These come to {k}:')
VALUE_OF = ('What is {k}?', 'What does {k} come to?', 'Print {k}.', 'Which number is {k} in the end?', '{k}?')
VALUE_ANSWERS = ('', '', ' {k} is', ' {k} =', ' It is')


def chains(rng: np.random.Generator, size: int) -> Problem:
    """A Problem of about `size` tokens at most: one chain is asked for, or single variables are."""
    most = max((size - 40) // 14, 2)
    length = int(rng.integers(2, min(7, most + 1))) if most > 2 else 2
    count = log_uniform(rng, 1, max(min(most // length, 12), 1))
    kind, total = pick(rng, NAME_KINDS), length * count
    names = strings.distinct(rng, kind, total)
    length, count = (length, len(names) // length) if len(names) >= length else (len(names), 1)
    values = strings.distinct(rng, 'number', count)
    own = [names[i * length:(i + 1) * length] for i in range(count)]
    first, following = pick(rng, ASSIGNMENTS)
    wording = Wording(str(length), '', '', '')
    made = [[wording.fill(first + '\n', one[0], value, weights=(FRAME, NOVEL, NOVEL))]
            + [wording.fill(following + '\n', name, before, weights=(FRAME, NOVEL, QUERY))
               for before, name in zip(one, one[1:], strict=False)]
            for one, value in zip(own, values, strict=True)]
    tail = []
    for _ in range(int(rng.integers(1, 3))):
        i = int(rng.integers(count))
        if chance(rng, 0.7):
            tail.append(_names_with(rng, wording, values[i], own[i]))
        else:
            tail.append(_value_of(rng, wording, pick(rng, own[i]), values[i]))
    return Problem([], interleave(rng, made), tail)


def interleave(rng: np.random.Generator, lists: list[list[Passage]]) -> list[Passage]:
    """The items of lists mixed at random; those of one list stay in their order."""
    turns = rng.permutation(np.repeat(np.arange(len(lists)), [len(one) for one in lists]))
    left = [iter(one) for one in lists]
    return [next(left[turn]) for turn in turns]


def _names_with(rng: np.random.Generator, wording: Wording, value: str, names: list[str]) -> Passage:
    start = wordings.ask(rng, wording, pick(rng, ALL_OF), pick(rng, ALL_ANSWERS), value)
    return merge([*start, *enumeration(rng, names), wordings.end(rng)])


def _value_of(rng: np.random.Generator, wording: Wording, name: str, value: str) -> Passage:
    start = wordings.ask(rng, wording, pick(rng, VALUE_OF), pick(rng, VALUE_ANSWERS), name)
    return merge([*start, Fragment(f' {value}', ANSWER), wordings.end(rng)])


