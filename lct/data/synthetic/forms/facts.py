"""Facts about keys: one of many, several values of a key, the newest, several keys, the key of a value."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lct.data.synthetic.forms import strings, wordings
from lct.data.synthetic.forms.passages import (
    ANSWER,
    END,
    FRAME,
    NOVEL,
    PREFIX,
    QUERY,
    Fragment,
    Passage,
    Problem,
)
from lct.data.synthetic.forms.strings import chance, log_uniform, pick
from lct.data.synthetic.forms.wordings import Wording, merge

MAX_FACTS, MAX_QUESTIONS = 600, 32
STATEMENT_TOKENS, QUESTION_TOKENS = 9, 30  # without keys and values
ALL_OF = ('What are all the {n}s {r} {k}?', 'Which {n}s are {r} {k}?', 'List the {n}s {r} {k}.',
          'Give every {n} {r} {k}.', '{k} has several {n}s. Which?', 'Name all {n}s {r} {k}.',
          'All {n}s of {k}?',
          'Which {n}s did we note {r} {k}?', 'What are the {n}s {r} {k}?')
ALL_ANSWERS = ('', '', ' The {n}s {r} {k} are', ' The {n}s {r} {k} are', ' {k}:', ' All of {k}:', ' They are',
               ' {k} has the {n}s', ' The {n}s are')
NEWEST = ('What is the {n} {r} {k} now?', 'What is the latest {n} {r} {k}?',
          'Which {n} does {k} have in the end?',
          'The current {n} {r} {k}?', 'After all changes, what is the {n} {r} {k}?',
          'Give the newest {n} of {k}.',
          'Last {n} noted for {k}?')
NEWEST_ANSWERS = ('', ' The {n} {r} {k} is now', ' In the end', ' The latest {n} {r} {k} {c}', ' {k}:',
                  ' Now it is')
EACH = ('What are the {n}s {r} {k}?', 'Which {n}s are {r} {k}?', 'Give the {n}s {r} {k}.', 'Look up {k}.',
        'Tell me the {n}s {r} {k}.', 'For {k}, what are the {n}s?', 'I need the {n}s {r} {k}.', '{k}?')
EACH_ANSWERS = ('', '', ' The {n}s {r} {k} are', ' The {n}s {r} {k} are', ' The {n}s are', ' They are')
LABELLED = (('{k}: {v}', ', '), ('{k} {c} {v}', ', '), ('{k} = {v}', '; '), ('{k} ({v})', ', '), ('{k} {v}',
                                                                                                  ', '))
REVERSE = ('Who has {v}?', 'What has the {n} {v}?', 'Which one goes with {v}?', 'Whose {n} is {v}?',
           'Find {v}.')


class Facts(NamedTuple):
    """pairs: (key, value) in the order of the text. templates: of the statements of each."""

    wording: Wording
    pairs: list[tuple[str, str]]
    templates: list[str]

    def statements(self) -> list[Passage]:
        return [self.wording.fill(template, key, value, weights=(FRAME, NOVEL, NOVEL))
                for (key, value), template in zip(self.pairs, self.templates, strict=True)]

    def values(self, key: str) -> list[str]:
        """All values of a key, in the order of the text."""
        return [value for own, value in self.pairs if own == key]


Question = Callable[[np.random.Generator, Facts, list[str]], Passage]


def facts(rng: np.random.Generator, size: int) -> Problem:
    """A Problem of about `size` tokens at most."""
    key_kind = pick(rng, strings.KEY_KINDS)
    value_kind = key_kind if chance(rng, 0.12) else pick(rng, strings.VALUE_KINDS)
    question, repeats = pick(rng, FORMS)
    key_tokens, value_tokens = strings.KINDS[key_kind][2], strings.KINDS[value_kind][2]
    entry = STATEMENT_TOKENS + key_tokens + value_tokens
    asking = QUESTION_TOKENS + 2 * key_tokens + value_tokens * (3 if repeats else 1)
    most = min(MAX_QUESTIONS, size // (2 * asking))
    questions = log_uniform(rng, 1, most) if chance(rng, 0.5) else max(most, 1)
    most = max((size - questions * asking) // entry, 1)
    count = log_uniform(rng, min(2, most), min(most, MAX_FACTS)) if chance(rng, 0.75) else min(most,
                                                                                               MAX_FACTS)
    made = _draw_facts(rng, key_kind, value_kind, count, repeats)
    keys = list(dict.fromkeys(key for key, _ in made.pairs))
    order = [keys[i] for i in rng.permutation(len(keys))]
    tail = []
    for i in range(min(questions, len(keys))):
        tail.append(question(rng, made, order[i:] + order[:i]))
    head = []
    if chance(rng, 0.4):
        head.append(made.wording.fill(pick(rng, wordings.HEADS) + pick(rng, ('\n', '\n\n'))))
    return Problem(head, made.statements(), tail)


def _draw_facts(rng: np.random.Generator, key_kind: str, value_kind: str, count: int, repeats: int) -> Facts:
    """repeats: about how many values a key has; 0 for exactly one."""
    wording = wordings.draw_wording(rng, strings.name_of_value(rng, value_kind))
    num_keys = max(count // int(rng.integers(1, repeats + 1)), 1) if repeats else count
    keys = strings.distinct(rng, key_kind, num_keys)
    values = strings.distinct(rng, value_kind, count, keys)
    if repeats:
        chosen = [keys[i] for i in rng.integers(len(keys), size=len(values))]
    else:
        chosen = keys
    pairs = list(zip(chosen, values, strict=False))
    template = wordings.draw_statement(rng)
    is_uniform = chance(rng, 0.75)
    templates = [template if is_uniform else wordings.draw_statement(rng) for _ in pairs]
    return Facts(wording, pairs, templates)


def _end(rng: np.random.Generator) -> Fragment:
    return wordings.end(rng)


def one_value(rng: np.random.Generator, made: Facts, keys: list[str]) -> Passage:
    """The value of a key, after its statement begun again or after any other words."""
    key, wording = keys[0], made.wording
    value = made.values(key)[-1]
    template = made.templates[[own for own, _ in made.pairs].index(key)]
    prefix = wordings.statement_prefix(template)
    question = pick(rng, wordings.QUESTIONS) + pick(rng, wordings.REMARKS)
    style = rng.random()
    if prefix and style < 0.2:  # the statement again
        passage = wording.fill(template, key, value, weights=(FRAME, QUERY, ANSWER))
        return merge([*passage[:-1], Fragment(passage[-1].text, END)])
    if prefix and style < 0.55:
        answer = ' ' + prefix.strip()
    else:
        answer = pick(rng, wordings.ANSWERS)
    start = wordings.ask(rng, wording, question, answer, key)
    return merge([*start, Fragment(f' {value}', ANSWER), _end(rng)])


def all_values(rng: np.random.Generator, made: Facts, keys: list[str]) -> Passage:
    """Every value of a key, in the order of the text."""
    key = next((key for key in keys if len(made.values(key)) > 1), keys[0])
    start = wordings.ask(rng, made.wording, pick(rng, ALL_OF) + pick(rng, wordings.REMARKS), pick(rng,
                                                                                                  ALL_ANSWERS),
                         key)
    return merge([*start, *enumeration(rng, made.values(key)), _end(rng)])


def newest_value(rng: np.random.Generator, made: Facts, keys: list[str]) -> Passage:
    """The last value of a key."""
    start = wordings.ask(rng, made.wording, pick(rng, NEWEST) + pick(rng, wordings.REMARKS),
                         pick(rng, NEWEST_ANSWERS), keys[0])
    return merge([*start, Fragment(f' {made.values(keys[0])[-1]}', ANSWER), _end(rng)])


def several_keys(rng: np.random.Generator, made: Facts, keys: list[str]) -> Passage:
    """The values of several keys, each after its key."""
    chosen = keys[:int(rng.integers(2, 6))]
    listing = ' and '.join([', '.join(chosen[:-1]), chosen[-1]] if len(chosen) > 1 else chosen)
    start = wordings.ask(rng, made.wording, pick(rng, EACH) + pick(rng, wordings.REMARKS), pick(rng,
                                                                                                EACH_ANSWERS),
                         listing)
    template, mark = pick(rng, LABELLED)
    passage = list(start)
    for i, key in enumerate(chosen):
        value = made.values(key)[-1]
        passage.append(Fragment(mark if i else ' ', END if i else PREFIX))
        passage += made.wording.fill(template, key, value, weights=(PREFIX, END, ANSWER))
    return merge([*passage, _end(rng)])


def key_of_value(rng: np.random.Generator, made: Facts, keys: list[str]) -> Passage:
    """The key that has a value."""
    value = made.values(keys[0])[-1]
    before, after = pick(rng, wordings.EXCHANGES).split('{q}')
    passage = [Fragment(before, FRAME), *made.wording.fill(pick(rng, REVERSE), '', value, weights=(FRAME,
                                                                                                   QUERY,
                                                                                                   QUERY)),
               Fragment(after, FRAME), Fragment(f' {keys[0]}', ANSWER), _end(rng)]
    return merge(passage)


def enumeration(rng: np.random.Generator, items: list[str]) -> list[Fragment]:
    """Fragments of ' a, b and c' as an answer."""
    mark, last = pick(rng, ((', ', ' and '), (', ', ', '), ('; ', '; '), (' ', ' '), (', ', ' and ')))
    fragments = [Fragment(f' {items[0]}', ANSWER)]
    for i, item in enumerate(items[1:], 2):
        fragments += [Fragment((last if i == len(items) else mark).rstrip(), END), Fragment(f' {item}',
                                                                                            ANSWER)]
    return fragments


# (the question, values of a key)
FORMS: tuple[tuple[Question, int], ...] = (
    *[(one_value, 0)] * 7, *[(all_values, 4)] * 5, (newest_value, 3), *[(several_keys, 0)] * 5,
    (key_of_value, 0))
