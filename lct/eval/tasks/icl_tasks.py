"""Tasks of in-context learning: hidden rules with reference learners, which show what the shots determine.

A new task is one class here, or one file, and one row of icl.TASKS.
"""

import dataclasses
import random
from typing import Any

import numpy as np

from lct.data.synthetic import recall
from lct.eval import samples
from lct.eval.tasks import icl_learners, ruler_text

GOOD = ('bold brilliant charming cheerful clean delightful excellent fresh friendly funny generous graceful '
        'helpful honest kind lovely neat perfect pleasant polite smart splendid superb sweet tasty warm wise '
        'witty').split()
BAD = ('awful boring broken careless cold cruel dirty dull empty faulty filthy foul greedy grim harsh '
       'horrible lazy mean nasty poor rotten rude sad silly stale terrible ugly useless').split()
THINGS = ('book concert dinner film garden guide hotel journey lecture meal play room service song story '
          'view').split()


@dataclasses.dataclass(frozen=True)
class Example:
    """A shot or a query.

    text, label: input and output in a prompt. x: the input of a learner. answers: all right labels, if there
    are more than one.
    """

    text: str
    label: str
    x: Any
    answers: tuple = ()


class Task:
    """The interface of a task. Tasks of one class draw the same rules and words.

    task: its name. learners: {name: reference learner} of icl_learners.
    """

    task: str
    learners: dict

    def rule(self, rng: random.Random) -> Any:
        """The hidden rule of an episode."""
        raise NotImplementedError

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        """A shot or a query. number: of the shot, or for a query of some shot of the prompt."""
        raise NotImplementedError

    def choices(self, rule: Any) -> list[str]:
        """The labels to choose from; empty where answers are not chosen from a few."""
        return []


@dataclasses.dataclass(frozen=True)
class Linear(Task):
    """The side of a hidden plane through the middle of the cube on which a vector of integers 0..99 lies."""

    task: str = 'linear'
    dims: int = 16
    learners = {'logistic regression': icl_learners.logistic, '5 nearest': icl_learners.nearest}

    def rule(self, rng: random.Random) -> Any:
        return np.random.default_rng(rng.getrandbits(64)).normal(size=self.dims), labels(rng, 2)

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        plane, names = rule
        x = np.array([rng.randrange(100) for _ in range(self.dims)])
        return Example(' '.join(map(str, x)), names[int(plane @ (x - 49.5) > 0)], x)

    def choices(self, rule: Any) -> list[str]:
        return rule[1]


@dataclasses.dataclass(frozen=True)
class Topics(Task):
    """The topic of some words.

    Topics are random sets of words with invented labels, so only the shots tell which label is whose.
    order: one of icl.ORDERS.
    """

    task: str = 'topics'
    classes: int = 8
    words: int = 12
    order: str = 'drawn'
    learners = {'naive Bayes': icl_learners.naive_bayes}

    def rule(self, rng: random.Random) -> Any:
        pool = list(recall.ADJECTIVES + recall.NOUNS)
        rng.shuffle(pool)
        if not 2 <= self.classes <= len(pool) // 8:
            raise ValueError(f'{self.classes} classes must be 2 to {len(pool) // 8}, '
                             'for topics of 8 words or more')
        return [pool[i::self.classes] for i in range(self.classes)], labels(rng, self.classes)

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        topics, names = rule
        i = rng.randrange(self.classes)
        words = rng.choices(topics[i], k=self.words)
        return Example(' '.join(words), names[i], words)

    def choices(self, rule: Any) -> list[str]:
        return rule[1]


@dataclasses.dataclass(frozen=True)
class Sentiment(Task):
    """Positive or negative. With flipped labels the shots contradict what a model learned in pretraining."""

    task: str = 'sentiment_flipped'
    flipped: bool = True
    learners = {'naive Bayes': icl_learners.naive_bayes}

    def rule(self, rng: random.Random) -> Any:
        return ('positive', 'negative') if self.flipped else ('negative', 'positive')

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        good = rng.random() < 0.5
        words = rng.sample(GOOD if good else BAD, 2)
        text = f'The {rng.choice(THINGS)} was {words[0]} and {words[1]}.'
        return Example(text, rule[good], words)

    def choices(self, rule: Any) -> list[str]:
        return list(rule)


@dataclasses.dataclass(frozen=True)
class Cipher(Task):
    """Translation of a word letter by letter with a hidden alphabet."""

    task: str = 'cipher'
    learners = {'table of letters': icl_learners.letters}

    def rule(self, rng: random.Random) -> Any:
        letters = list('abcdefghijklmnopqrstuvwxyz')
        rng.shuffle(letters)
        return dict(zip('abcdefghijklmnopqrstuvwxyz', letters, strict=True)), ruler_text.InventedWords(0)

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        alphabet, invented = rule
        word = invented[rng.randrange(invented.count)]
        return Example(word, ''.join(alphabet[letter] for letter in word), word)


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """The parity of `hidden` secret positions of a bit string.

    With hidden 0 it is the running parities of all positions, which are one rule for all episodes.
    """

    task: str = 'parity'
    bits: int = 20
    hidden: int = 3
    learners = {'elimination': icl_learners.parity}

    def rule(self, rng: random.Random) -> Any:
        if not 0 <= self.hidden <= self.bits:
            raise ValueError(f'{self.hidden} hidden positions of {self.bits} bits; use 0 to {self.bits}')
        return sorted(rng.sample(range(self.bits), self.hidden))

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        x = np.array([rng.randrange(2) for _ in range(self.bits)])
        y = x[rule].sum(keepdims=True) % 2 if self.hidden else np.cumsum(x) % 2
        return Example(' '.join(map(str, x)), ' '.join(map(str, y)), x)

    def choices(self, rule: Any) -> list[str]:
        return ['0', '1'] if self.hidden else []


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """The value of a name: pure retrieval, since each query is one of the shots."""

    task: str = 'lookup'
    learners = {'table': icl_learners.table}

    def rule(self, rng: random.Random) -> Any:
        return ruler_text.InventedWords(0), rng.randrange(75 ** 3)

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        invented, start = rule
        name = invented[(start + number * 7919) % invented.count]
        value = str(samples.rng('lookup', start, number).randint(1000, 9999))
        return Example(name, value, name)


@dataclasses.dataclass(frozen=True)
class Chain(Task):
    """A possible next symbol of a random walk; each step follows one of two random rings of all symbols."""

    task: str = 'chain'
    symbols: int = 12
    walk: int = 10
    learners = {'pairs seen': icl_learners.bigrams}

    def rule(self, rng: random.Random) -> Any:
        names = labels(rng, self.symbols)
        # Two rings through all symbols, so that walks visit each of them equally often.
        one, other = rng.sample(names, len(names)), rng.sample(names, len(names))
        rings = [dict(zip(ring, ring[1:] + ring[:1], strict=True)) for ring in (one, other)]
        return {name: tuple(ring[name] for ring in rings) for name in names}

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        walk = [rng.choice(sorted(rule))]
        while len(walk) < self.walk:
            walk.append(rng.choice(rule[walk[-1]]))
        return Example(' '.join(walk[:-1]), walk[-1], walk, rule[walk[-2]])

    def choices(self, rule: Any) -> list[str]:
        return sorted(rule)


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """The integer value of a hidden linear function, which least squares determines from `dims` shots on."""

    task: str = 'regression'
    dims: int = 6
    learners = {'least squares': icl_learners.least_squares}

    def rule(self, rng: random.Random) -> Any:
        return np.array([rng.randint(-9, 9) for _ in range(self.dims)])

    def example(self, rule: Any, rng: random.Random, number: int) -> Example:
        x = np.array([rng.randint(-9, 9) for _ in range(self.dims)])
        return Example(' '.join(map(str, x)), str(int(rule @ x)), x)


def labels(rng: random.Random, count: int) -> list[str]:
    """Distinct invented words."""
    invented = ruler_text.InventedWords(0)
    return [invented[i] for i in rng.sample(range(invented.count), count)]
