"""Labels and functions from examples: a rule that only the examples show."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from lct.data.synthetic.forms import strings
from lct.data.synthetic.forms.passages import FRAME, NOVEL, Fragment, Passage, Problem
from lct.data.synthetic.forms.strings import chance, log_uniform, pick
from lct.data.synthetic.forms.wordings import merge

# {x} an example and {y} its label
LAYOUTS = ('{x} => {y}\n', '{x} -> {y}\n', '{x}: {y}\n', 'Q: {x}\nA: {y}\n', 'Text: {x}\nLabel: {y}\n',
           '{x} | {y}\n',
           'Case: {x}\nVerdict: {y}\n', '{x} = {y}\n', 'Left: {x}\nRight: {y}\n', '> {x}\n {y}\n',
           'Given: {x}\nGet: {y}\n',
           'Line: {x}\nClass: {y}\n\n', '* {x} * {y}\n', 'f({x}) is {y}\n', 'Before: {x}\nAfter: {y}\n')
GLAD = ('happy lucky grand golden amazing famous sunny strong healthy elegant joyful fair quick proud rich '
        'peaceful useful safe fun cosy').split()
SAD = ('angry guilty gloomy weak sick bitter painful lost tired late ugly wrong noisy costly dusty slow '
       'bland hopeless scary grey').split()
MOODS = ('It felt {a}.', 'We had a {a} day.', 'A {a}, {b} evening.', 'How {a}!',
         'They looked {a} and {b} to us.',
         'My week: {a}, {b}.', 'So {a}, so {b}')
LEARNT, FIRST = 4.0, 0.5  # loss weights of an answer that the examples determine, or do not yet
MAX_SHOTS = 600


class Rule(NamedTuple):
    """example(rng) -> (x, y). has_labels: y is one of a few labels, each unpredictable at first.

    tokens: about how many an example takes. repeats: examples come again,
    since nothing else can be predicted.
    """

    example: Callable[[np.random.Generator], tuple[str, str]]
    tokens: int
    has_labels: bool = True
    repeats: bool = False


def shots(rng: np.random.Generator, size: int) -> Problem:
    """A Problem of about `size` tokens at most: examples, each of which is a question about those before
    it."""
    rule, layout = pick(rng, RULES)(rng), pick(rng, LAYOUTS)
    most = min(max(size // (rule.tokens + 6), 2), MAX_SHOTS)
    count = most if chance(rng, 0.6) else log_uniform(rng, 2, most)
    passages, known = [], {}
    for i in range(count):
        if rule.repeats and known and chance(rng, 0.5):
            x = pick(rng, list(known))
            y, is_known = known[x], True
        else:
            x, y = rule.example(rng)
            y = known.get(x, y) if rule.repeats else y
            is_known = x in known if rule.repeats else (y in known.values() if rule.has_labels else i > 1)
        known[x] = y
        passages.append(_passage(layout, x, y, LEARNT if is_known else NOVEL if rule.has_labels else FIRST))
    return Problem([], [], passages)


def _passage(layout: str, x: str, y: str, weight: float) -> Passage:
    before, _, after = layout.partition('{x}')
    between, _, end = after.partition('{y}')
    return merge([Fragment(before, FRAME), Fragment(x, NOVEL), Fragment(between, FRAME), Fragment(y, weight),
                  Fragment(end, weight / 2)])


def _draw_labels(rng: np.random.Generator, count: int) -> list[str]:
    """Labels of one kind, all different; fewer than count where there are not so many."""
    kind = pick(rng, ('invented', 'invented', 'invented', 'plain', 'letter', 'digit'))
    if kind == 'letter':
        return list(dict.fromkeys(strings.letters(rng, strings.CAPITALS, count)))
    if kind == 'digit':
        return [str(i) for i in range(count)]
    return strings.distinct(rng, kind, count)


def topics(rng: np.random.Generator) -> Rule:
    """Words of one topic get the label of the topic."""
    names = _draw_labels(rng, int(rng.integers(2, 13)))
    pool = [strings.ALL_WORDS[i] for i in rng.permutation(len(strings.ALL_WORDS))]
    pool = pool[:len(names) * int(rng.integers(4, 17))]
    count = log_uniform(rng, 1, 14)

    def example(rng):
        i = int(rng.integers(len(names)))
        own = pool[i::len(names)]
        return ' '.join(pick(rng, own) for _ in range(count)), names[i]

    return Rule(example, 2 * count + 4)


def moods(rng: np.random.Generator) -> Rule:
    """Sentences about good and bad moods; the labels are usual, swapped or invented."""
    names = pick(rng, (['positive', 'negative'], ['negative', 'positive'], ['good', 'bad'], ['bad', 'good'],
                       _draw_labels(rng, 2)))
    names = names if len(names) == 2 else ['yes', 'no']

    def example(rng):
        i = int(rng.integers(2))
        a, b = (pick(rng, (GLAD, SAD)[i]) for _ in range(2))
        return pick(rng, MOODS).format(a=a, b=b), names[i]

    return Rule(example, 14)


def thresholds(rng: np.random.Generator) -> Rule:
    """Whether a number, or the first or last of some, is above a threshold."""
    names, size = _draw_labels(rng, 2), log_uniform(rng, 1, 16)
    names = names if len(names) == 2 else ['low', 'high']
    limit, place = int(rng.integers(25, 75)), pick(rng, (0, -1))

    def example(rng):
        numbers = rng.integers(100, size=size)
        return ' '.join(map(str, numbers)), names[int(numbers[place] > limit)]

    return Rule(example, size + 4)


def lookups(rng: np.random.Generator) -> Rule:
    """Keys with values, which come again."""
    key_kind, value_kind = pick(rng, strings.KEY_KINDS), pick(rng, strings.VALUE_KINDS)
    tokens = strings.KINDS[key_kind][2] + strings.KINDS[value_kind][2]
    return Rule(lambda rng: (strings.draw(rng, key_kind), strings.draw(rng, value_kind)), tokens,
                repeats=True)


def ciphers(rng: np.random.Generator) -> Rule:
    """Letters are replaced one by one."""
    count = int(rng.integers(3, 19))
    source = [strings.CONSONANTS[i] for i in rng.permutation(len(strings.CONSONANTS))][:count]
    target = [source[i] for i in rng.permutation(count)] if chance(rng, 0.5) else [
        'abcdefghijklmnopqrstuvwxyz'[i] for i in rng.permutation(26)[:count]]
    mark, length = pick(rng, (' ', ' ', '')), int(rng.integers(2, 8))

    def example(rng):
        chosen = rng.integers(count, size=length)
        return mark.join(source[i] for i in chosen), mark.join(target[i] for i in chosen)

    return Rule(example, 3 * length, has_labels=False)


def walks(rng: np.random.Generator) -> Rule:
    """The symbol that follows in a walk around one or two rings."""
    names = _draw_labels(rng, int(rng.integers(4, 15)))
    rings = [rng.permutation(len(names)) for _ in range(int(rng.integers(1, 3)))]
    following = [dict(zip(ring.tolist(), np.roll(ring, -1).tolist(), strict=True)) for ring in rings]
    length = int(rng.integers(2, 11))

    def example(rng):
        walk = [int(rng.integers(len(names)))]
        while len(walk) < length + 1:
            walk.append(pick(rng, following)[walk[-1]])
        return ' '.join(names[i] for i in walk[:-1]), names[walk[-1]]

    return Rule(example, 3 * length, has_labels=False)


FUNCTIONS: tuple[Callable[[list[str]], str], ...] = (
    lambda items: ' '.join(items), lambda items: ' '.join(items[::-1]), lambda items: items[0],
    lambda items: items[-1],
    lambda items: ' '.join(items).upper(), lambda items: items[len(items) // 2],
    lambda items: ' '.join(sorted(items)),
    lambda items: ' '.join([items[0], items[0]]), lambda items: items[0][0], lambda items: str(len(items)),
    lambda items: ' '.join(items[1:] + items[:1]), lambda items: f'{items[-1]}, {items[0]}',
    lambda items: items[-1].title(),
)


def functions(rng: np.random.Generator) -> Rule:
    """A fixed function of some words or numbers."""
    kind = pick(rng, ('plain', 'plain', 'invented', 'number'))
    function, most = pick(rng, FUNCTIONS), int(rng.integers(2, 7))

    def example(rng):
        items = [strings.draw(rng, kind) for _ in range(int(rng.integers(2, most + 1)))]
        return ' '.join(items), function(items)

    return Rule(example, 3 * most + 3, has_labels=False)


RULES: tuple[Callable[[np.random.Generator], Rule], ...] = (
    topics, topics, topics, moods, thresholds, lookups, lookups, ciphers, walks, walks, functions, functions)
