"""Limits on the work of a chat template, which is a stranger's code: steps, characters and seconds.

What a template computes is counted in characters: 1 for each of a text, SMALL for the rest of any value. An
operation whose result may be much larger than its operands is counted before it runs.
"""

import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2.runtime import LoopContext

SMALL = 12  # characters that take the memory of a small object
MAX_DEPTH = 100  # of lists in lists; json and repr recurse
MAX_BITS = 4096  # of an integer; products of longer ones take long
# What a template may do, and more for each list or dict of the messages and for each of their characters.
# Those of published models take some dozens of steps a message, and write their text once or twice.
STEPS, STEPS_PER_CONTAINER, STEPS_PER_CHARACTER = 300_000, 10_000, 1
CHARACTERS, CHARACTERS_PER_CHARACTER = 4_000_000, 64
SECONDS, SECONDS_PER_CONTAINER, SECONDS_PER_CHARACTER = 1.0, 0.03, 1e-6

VIEWS = (type({}.keys()), type({}.values()), type({}.items()))
CONTAINERS = (list, tuple, set, frozenset, *VIEWS)


class LimitExceeded(Exception):
    """The work of a template that is more than any template needs."""


def is_iterator(value: Any) -> bool:
    """Whether a value is an iterator that a filter made, such as `map`."""
    return isinstance(value, Iterator) and not isinstance(value, LoopContext)


class Limits:
    """The work that is left to one rendering."""

    def __init__(self, *inputs: Any):
        """inputs: the values that the template may read; more work is granted for more of them."""
        # {id: (container, size, depth)}; templates cannot change containers.
        self._known: dict[int, tuple[Any, int, int]] = {}
        self.steps = self.characters = self.most_characters = 10**18
        characters = sum(map(self.size, inputs))
        containers = len(self._known)
        self.most_steps = self.steps = (
            STEPS + STEPS_PER_CONTAINER * containers + STEPS_PER_CHARACTER * characters)
        self.most_characters = self.characters = CHARACTERS + CHARACTERS_PER_CHARACTER * characters
        self.most_seconds = SECONDS + SECONDS_PER_CONTAINER * containers + SECONDS_PER_CHARACTER * characters
        # Of this thread's own work, so that a busy machine changes nothing.
        self.end = time.thread_time() + self.most_seconds

    def step(self) -> None:
        """Count a step."""
        self.steps -= 1
        if self.steps < 0:
            raise LimitExceeded(f'takes more than {self.most_steps:,} steps')
        if time.thread_time() > self.end:
            raise LimitExceeded(f'takes more than {self.most_seconds:.1f} s')

    def spend(self, characters: int) -> None:
        """Count the characters of a value, or those that an operation is about to make."""
        self.characters -= characters
        if self.characters < 0:
            raise self._too_large()

    def _too_large(self):
        return LimitExceeded(f'makes values of more than {self.most_characters:,} characters')

    def measure(self, value: Any) -> Any:
        """Count a step and the new characters of a value, and return it.

        An iterator is counted as it is read. The elements of a list have been counted when they were made.
        """
        self.step()
        if is_iterator(value):
            return map(self.measure, value)
        size = self.size(value)
        if id(value) not in self._known:
            self.spend(SMALL if isinstance(value, range) else size)  # a range has no elements yet
        return value

    def measured_list(self, value: Any) -> Any:
        """The list of an iterator; any other value as it is. Iterators over iterators would recurse."""
        return list(map(self.measure, value)) if is_iterator(value) else value

    def size(self, value: Any) -> int:
        """The characters of a value with everything in it."""
        return self._size_and_depth(value)[0]

    def _size_and_depth(self, value: Any) -> tuple[int, int]:
        if isinstance(value, (str, bytes)):
            return SMALL + len(value), 0
        if isinstance(value, range):
            return SMALL * (1 + len(value)), 1
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise LimitExceeded(f'makes an integer of more than {MAX_BITS} bits')
            return SMALL, 0
        if not isinstance(value, (dict, *CONTAINERS)):
            return SMALL, 0
        if (known := self._known.get(id(value))) is None:
            self.spend(SMALL + len(value))
            if SMALL * len(value) > self.most_characters:
                raise self._too_large()
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            sizes, depths = zip((SMALL, 0), *map(self._size_and_depth, inner), strict=True)
            known = self._known[id(value)] = value, sum(sizes), 1 + max(depths)
            if known[1] > self.most_characters:
                raise self._too_large()
            if known[2] > MAX_DEPTH:
                raise LimitExceeded(f'nests values more than {MAX_DEPTH} deep')
        return known[1:]

    def depth(self, value: Any) -> int:
        """The levels of lists and dicts in a value."""
        return self._size_and_depth(value)[1]

    def before(self, name: str, operands: Sequence, options: Mapping[str, Any]) -> None:
        """Count a step, and what an operation on operands may make.

        name: of a filter, of a method, whose object is the first operand, or an operator.
        """
        self.step()
        if cost := COSTS.get(name):
            self.spend(int(cost(self, *operands, **options)))


# ---------------------------------------------------------------------------------------------------
# Costs: the characters that an operation may make, from its operands
# ---------------------------------------------------------------------------------------------------

COSTS: dict[str, Callable] = {}


def _cost(*names: str) -> Callable:
    """Register the cost of operations. Operands that an operation itself will refuse may be of any type."""
    def register(function: Callable) -> Callable:
        @functools.wraps(function)
        def tolerant(limits: Limits, *operands: Any, **options: Any) -> float:
            try:
                return function(limits, *operands, **options)
            except TypeError:
                return 0
        COSTS.update(dict.fromkeys(names, tolerant))
        return function
    return register


def _number(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _length(value: Any) -> int:
    return len(value) if hasattr(value, '__len__') else 0


def _numbers(values: Iterable) -> int:
    """The sum of the positive integers among values."""
    return sum(max(_number(value), 0) for value in values)


@_cost('center', 'ljust', 'rjust', 'zfill', 'batch', 'slice', 'to_bytes')
def _width(limits, value, *operands, **options):
    return SMALL * _numbers((*operands, *options.values()))


@_cost('expandtabs')
def _tabs(limits, value, tabsize=8):
    return _length(value) * _number(tabsize)


@_cost('replace')
def _replaced(limits, value, old, new, *count, **options):
    text = value if isinstance(value, (str, bytes)) else str(value)
    return text.count(old) * _length(new)


@_cost('translate')
def _translated(limits, value, table, *more):
    return _length(value) * max(map(_length, table.values()), default=1)


@_cost('join')
def _joined(limits, left, right='', *more, **options):
    """Of the filter (values, separator) and of the method (separator, values)."""
    values, separator = (right, left) if isinstance(left, (str, bytes)) and not isinstance(
        right, (str, bytes)) else (left, options.get('d', right))
    return _length(separator) * _length(values) + limits.size(values)


@_cost('format', 'format_map', '%')
def _formatted(limits, value, *operands, **options):
    if not isinstance(value, (str, bytes)):
        return 0
    text = str(value)
    fields = max(text.count('{'), text.count('%'))
    widths = sum(map(int, re.findall(r'\d{1,1000}', text)))
    if '*' in text or re.search(r'\{[^{}]*\{', text):  # widths among the operands
        flat = [one for x in operands for one in (x if isinstance(x, (list, tuple)) else [x])]
        widths += fields * _numbers((*flat, *options.values()))
    return len(text) + widths + fields * sum(map(limits.size, (*operands, *options.values())))


@_cost('indent')
def _indented(limits, value, width=4, *more, **options):
    return (str(value).count('\n') + 1) * (_number(width) or _length(width))


@_cost('tojson')
def _json(limits, value, *operands, **options):
    indent = operands[1] if len(operands) > 1 else options.get('indent')
    separators = operands[2] if len(operands) > 2 else options.get('separators')
    more = (_number(indent) or _length(indent)) * limits.depth(value) + limits.size(separators or ())
    return limits.size(value) * (1 + more / SMALL)


@_cost('split', 'rsplit')
def _split(limits, value, separator=None, *more, **options):
    separator = options.get('sep', separator)
    pieces = _length(value) / 2 if separator is None else value.count(separator)
    return SMALL * pieces + _length(value) + _compared(limits, value, separator)


@_cost('splitlines', 'partition', 'list', 'sort', 'unique', 'title', 'wordcount', 'min', 'max')
def _taken_apart(limits, value, *operands, **options):
    return SMALL * _length(value) if isinstance(value, (str, bytes, range)) else 0


@_cost('rfind', 'rindex', 'rpartition', 'strip', 'lstrip', 'rstrip', 'trim')
def _compared(limits, value, part='', *more, **options):
    """Of what may compare every character with every other."""
    return _length(value) * (1 + _length(options.get('chars', part)) / 1000)


@_cost('striptags', 'urlize', 'wordwrap', 'pprint', 'encode', 'decode', 'xmlattr')
def _quadratic(limits, value, *operands, **options):
    size = sum(map(limits.size, (value, *operands, *options.values())))
    return size * size / 100


@_cost('round')
def _rounded(limits, value, precision=0, *more, **options):
    return abs(_number(precision)) ** 2


@_cost('sum')
def _summed(limits, value, attribute=None, start=0):
    return 0 if isinstance(start, (int, float)) else limits.size(value) ** 2 / SMALL


@_cost('*')
def _multiplied(limits, left, right):
    if isinstance(left, int) and isinstance(right, int):
        return 0
    size = lambda value: max(value, 0) if isinstance(value, int) else limits.size(value)
    return size(left) * size(right)


@_cost('**')
def _raised(limits, left, right):
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise LimitExceeded(f'makes an integer of more than {MAX_BITS} bits')
    return 0
