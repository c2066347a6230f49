"""Keys and values of many kinds, and other random choices.

As in recall.py, one string in eight is never drawn, so that an evaluation may use those.
"""

import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from lct.data.synthetic.recall import ADJECTIVES, NOUNS, is_held_out

T = TypeVar('T')

COMMON = tuple("""
apple arrow autumn basket bread brick butter button cabin camera carpet chair cheese cherry circle cloud
coffee corner cotton curtain dinner doctor driver farmer finger flower glass grain grass honey horse house
jacket kitchen ladder leather letter market metal milk morning mother music napkin ocean office onion paper
pepper pillow plate pocket potato powder queen river sail salt school season shadow shirt shoulder sister
spoon spring station stone street sugar summer table teacher thread ticket tower train tree uncle valley
village wagon wall water weather wheel window winter wood wool
""".split())
ALL_WORDS = ADJECTIVES + NOUNS + COMMON
MONTHS = tuple('January February March April May June July August September October November '
               'December'.split())
CONSONANTS, VOWELS = 'bcdfghjklmnprstvwz', 'aeiou'
HEX, CAPITALS = '0123456789abcdef', 'ABCDEFGHIJKLMNOPQRSTUVWXYZ'

# What a value of each kind may be called in a question.
GENERAL = ('value', 'entry', 'item', 'label', 'record', 'tag', 'mark', 'sign', 'answer', 'detail', 'note')
NAMES_OF_VALUES = {
    'number': ('number', 'pin', 'count', 'total', 'amount', 'reading', 'score', 'figure', 'sum', 'price'),
    'uuid': ('identifier', 'token', 'checksum', 'serial', 'key', 'code', 'id', 'digest', 'fingerprint'),
    'text': ('word', 'name', 'password', 'title', 'term', 'phrase', 'nickname', 'motto', 'call sign'),
    'time': ('time', 'date', 'start', 'deadline', 'end', 'slot', 'moment'),
}


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of items."""
    return items[int(rng.integers(len(items)))]


def chance(rng: np.random.Generator, probability: float) -> bool:
    return rng.random() < probability


def log_uniform(rng: np.random.Generator, least: int, most: int) -> int:
    """An integer from least to most, log-uniform; least where most is below it."""
    if most <= least:
        return least
    return min(int(np.exp(rng.uniform(np.log(least), np.log(most + 1)))), most)


def letters(rng: np.random.Generator, alphabet: str, count: int) -> str:
    return ''.join(alphabet[i] for i in rng.integers(len(alphabet), size=count))


def invented(rng: np.random.Generator) -> str:
    """A word of two to four syllables."""
    word = ''.join(pick(rng, CONSONANTS) + pick(rng, VOWELS) for _ in range(int(rng.integers(2, 5))))
    return word + (pick(rng, CONSONANTS) if chance(rng, 0.3) else '')


def number(rng: np.random.Generator) -> str:
    """Three to nine digits."""
    digits = int(rng.integers(3, 10))
    return str(rng.integers(10 ** (digits - 1), 10 ** digits))


def joined(rng: np.random.Generator, mark: str) -> str:
    """Two or three words joined by a mark."""
    chosen = [pick(rng, ADJECTIVES) for _ in range(int(rng.integers(1, 3)))]
    return mark.join([*chosen, pick(rng, NOUNS if chance(rng, 0.8) else COMMON)])


def identifier(rng: np.random.Generator) -> str:
    """A UUID."""
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def moment(rng: np.random.Generator) -> str:
    """A time or a date."""
    style = int(rng.integers(3))
    if style == 0:
        return f'{rng.integers(24):02d}:{rng.integers(60):02d}'
    day, year = int(rng.integers(1, 29)), int(rng.integers(1500, 2100))
    if style == 1:
        return f'{year}-{rng.integers(1, 13):02d}-{day:02d}'
    return f'{day} {pick(rng, MONTHS)} {year}'


# kind: (how to draw one, its class in NAMES_OF_VALUES, about how many tokens it takes)
KINDS: dict[str, tuple[Callable[[np.random.Generator], str], str, int]] = {
    'number': (number, 'number', 4),
    'hyphened': (lambda rng: joined(rng, '-'), 'text', 7),
    'snake': (lambda rng: joined(rng, '_'), 'text', 7),
    'spaced': (lambda rng: joined(rng, ' '), 'text', 3),
    'plain': (lambda rng: pick(rng, ALL_WORDS), 'text', 1),
    'invented': (invented, 'text', 4),
    'title': (lambda rng: ' '.join(invented(rng).title() for _ in range(int(rng.integers(1, 3)))), 'text', 8),
    'hex': (lambda rng: letters(rng, HEX, int(rng.integers(6, 17))), 'uuid', 9),
    'uuid': (identifier, 'uuid', 31),
    'code': (lambda rng: letters(rng, CAPITALS, 2) + '-' + str(rng.integers(100, 10000)), 'uuid', 5),
    'capitals': (lambda rng: letters(rng, CAPITALS, int(rng.integers(3, 7))), 'text', 5),
    'moment': (moment, 'time', 6),
}
KEY_KINDS = (*['hyphened'] * 6, 'snake', *['spaced'] * 2, 'plain', 'invented', *['title'] * 2, 'code',
             'capitals',
             'number', *['uuid'] * 3, 'hex')
VALUE_KINDS = (*['number'] * 6, *['hyphened'] * 2, 'spaced', 'snake', 'plain', 'invented', 'title',
               *['uuid'] * 4,
               'hex', 'code', 'capitals', 'moment')


def draw(rng: np.random.Generator, kind: str) -> str:
    """A string of a kind of KINDS."""
    while is_held_out(text := KINDS[kind][0](rng)) and kind != 'plain':
        pass
    return text


def distinct(rng: np.random.Generator, kind: str, count: int, taken: Sequence[str] = ()) -> list[str]:
    """At most count different strings of a kind; fewer where there are no more."""
    found = dict.fromkeys(taken)
    for _ in range(20 * count):
        if len(found) == count + len(taken):
            break
        found[draw(rng, kind)] = None
    return list(found)[len(taken):]


def name_of_value(rng: np.random.Generator, kind: str) -> str:
    """What a question calls a value of a kind."""
    return pick(rng, GENERAL if chance(rng, 0.3) else NAMES_OF_VALUES[KINDS[kind][1]])
