"""Counting: which items of a list are the most frequent, and how often one occurs."""

import numpy as np

from lct.data.synthetic.forms import strings, wordings
from lct.data.synthetic.forms.facts import enumeration
from lct.data.synthetic.forms.passages import ANSWER, FRAME, Fragment, Passage, Problem
from lct.data.synthetic.forms.strings import chance, log_uniform, pick
from lct.data.synthetic.forms.wordings import Wording, merge

ITEM_KINDS = ('invented', 'invented', 'plain', 'capitals', 'letters')
ITEM_TOKENS = 5
FILLERS = ('--', '*', '.', '---', 'pass', 'blank', '##', 'nil', '__')
LINES = ('{k}\n', '- {k}\n', '{k}, ', '{k} ', '{k} ', '{k} ', '{k}; ', 'vote: {k}\n', 'saw {k}\n')
TOP = ('Which {n} occur most?', 'What are the {n} most frequent?', 'Which {n} got the most votes?',
       'Top {n}?',
       'Name the {n} that come up most often.', 'Find the {n} winners.',
       'Which {n} were listed again and again?')
TOP_ANSWERS = ('', '', ' The {n} most frequent are', ' The top {n}:', ' Most often:', ' The {n} winners are')
TIMES = ('How many times does {k} occur?', 'How often is {k} there?', 'Count {k}.')
HEADS = ('Votes so far:', 'Log:', 'These came in one after the other.', 'Tally the following.', 'Signals:')
WEIGHT = 0.1  # of an item in the list


def counts(rng: np.random.Generator, size: int) -> Problem:
    """A Problem of about `size` tokens at most."""
    kind, template = pick(rng, ITEM_KINDS), pick(rng, LINES)
    most = max((size - 40) // ITEM_TOKENS, 6)
    total = log_uniform(rng, min(6, most), min(most, 2000))
    top = int(rng.integers(1, 5)) if chance(rng, 0.8) else int(rng.integers(5, 11))
    frequencies = _frequencies(rng, total, top)
    items = _items(rng, kind, len(frequencies))
    frequencies = frequencies[:len(items)]
    top = min(top, len(items))
    filler = pick(rng, FILLERS) if chance(rng, 0.4) else ''
    listed = np.repeat(np.arange(len(items)), frequencies)
    if filler:
        listed = np.concatenate([listed, np.full(int(rng.integers(1, total + 1)), len(items))])
    listed = [[*items, filler][i] for i in rng.permutation(listed)]
    wording = Wording(str(top), '', '', '')
    statements = [[Fragment(template.format(k=item), WEIGHT)] for item in listed]
    if not template.endswith('\n'):
        statements = [[Fragment(''.join(one[0].text for one in statements).rstrip() + '\n', WEIGHT)]]
    head = [[Fragment(pick(rng, HEADS) + (f' Ignore {filler}.' if filler else '') + '\n', FRAME)]]
    tail = [_top(rng, wording, items[:top])]
    if chance(rng, 0.25):
        small = [i for i, n in enumerate(frequencies) if n < 10]
        if small:
            i = pick(rng, small)
            tail.append(_times(rng, wording, items[i], int(frequencies[i])))
    return Problem(head if filler or chance(rng, 0.6) else [], statements, tail, is_scattered=False)


def _items(rng: np.random.Generator, kind: str, count: int) -> list[str]:
    if kind != 'letters':
        return strings.distinct(rng, kind, count)
    length = int(rng.integers(3, 8))
    found = {strings.letters(rng, 'abcdefghijklmnopqrstuvwxyz', length): None for _ in range(count)}
    return list(found)


def _frequencies(rng: np.random.Generator, total: int, top: int) -> np.ndarray:
    """int [n] descending: the first `top` are above all others, and different from each other in most
    lists."""
    if chance(rng, 0.6):  # a power law
        shares = np.arange(1, 4 * top + 4) ** -rng.uniform(0.8, 2.2)
        found = np.maximum((total * shares / shares.sum()).astype(int), 1)
    else:  # some repeat, the others do not
        often = max(total // (2 * top), 2)
        found = np.array([often] * top + [1] * max(total - often * top, 1))
    found = np.sort(found)[::-1]
    found[:top] = np.maximum(found[:top], found[top] + 1)
    return found


def _top(rng: np.random.Generator, wording: Wording, items: list[str]) -> Passage:
    start = wordings.ask(rng, wording, pick(rng, TOP), pick(rng, TOP_ANSWERS), '')
    return merge([*start, *enumeration(rng, items), wordings.end(rng)])


def _times(rng: np.random.Generator, wording: Wording, item: str, count: int) -> Passage:
    start = wordings.ask(rng, wording, pick(rng, TIMES), '', item)
    return merge([*start, Fragment(f' {count}', ANSWER), wordings.end(rng)])


