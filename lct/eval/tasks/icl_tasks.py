"""The hidden rules of learning in context, each with the learners that know how far its shots go."""

import dataclasses

import numpy as np

from lct.data.synthetic import recall
from lct.eval import samples
from lct.eval.tasks import icl_learners, ruler_text

GOOD = ('bold brilliant charming cheerful clean delightful excellent fresh friendly funny generous graceful helpful '
        'honest kind lovely neat perfect pleasant polite smart splendid superb sweet tasty warm wise witty').split()
BAD = ('awful boring broken careless cold cruel dirty dull empty faulty filthy foul greedy grim harsh horrible lazy '
       'mean nasty poor rotten rude sad silly stale terrible ugly useless').split()
THINGS = 'book concert dinner film garden guide hotel journey lecture meal play room service song story view'.split()


@dataclasses.dataclass(frozen=True)
class Example:
    """text and label are what a prompt says; x is what a learner sees; answers: every right label, if there is
    more than the one shown."""

    text: str
    label: str
    x: object
    answers: tuple = ()


class Task:
    """A task has rule(rng) -> what is hidden, and example(rule, rng, number) -> Example, where number is that of the
    shot, or for a query of a shot that is shown. Tasks of one class draw the same rules and words."""

    def choices(self, rule):
        """[label] that an answer can be; none where answers are not chosen out of a few."""
        return []


@dataclasses.dataclass(frozen=True)
class Linear(Task):
    """On which side of a hidden plane through the middle of the cube is a vector of integers 0..99?"""

    task: str = 'linear'
    dims: int = 16
    learners = {'logistic regression': icl_learners.logistic, '5 nearest': icl_learners.nearest}

    def rule(self, rng):
        return np.random.default_rng(rng.getrandbits(64)).normal(size=self.dims), labels(rng, 2)

    def example(self, rule, rng, number):
        plane, names = rule
        x = np.array([rng.randrange(100) for _ in range(self.dims)])
        return Example(' '.join(map(str, x)), names[int(plane @ (x - 49.5) > 0)], x)

    def choices(self, rule):
        return rule[1]


@dataclasses.dataclass(frozen=True)
class Topics(Task):
    """Which topic are the words from? The topics are random sets of words and their labels are inventions, so
    nothing but the shots says which is which. order: one of icl.ORDERS."""

    task: str = 'topics'
    classes: int = 8
    words: int = 12
    order: str = 'drawn'
    learners = {'naive Bayes': icl_learners.naive_bayes}

    def rule(self, rng):
        pool = list(recall.ADJECTIVES + recall.NOUNS)
        rng.shuffle(pool)
        if not 2 <= self.classes <= len(pool) // 8:
            raise ValueError(f'{self.classes} classes must be 2 to {len(pool) // 8}, for topics of 8 words or more')
        return [pool[i::self.classes] for i in range(self.classes)], labels(rng, self.classes)

    def example(self, rule, rng, number):
        topics, names = rule
        i = rng.randrange(self.classes)
        words = rng.choices(topics[i], k=self.words)
        return Example(' '.join(words), names[i], words)

    def choices(self, rule):
        return rule[1]


@dataclasses.dataclass(frozen=True)
class Sentiment(Task):
    """Good or bad? With flipped labels a model must let the shots overrule what it knows."""

    task: str = 'sentiment_flipped'
    flipped: bool = True
    learners = {'naive Bayes': icl_learners.naive_bayes}

    def rule(self, rng):
        return ('positive', 'negative') if self.flipped else ('negative', 'positive')

    def example(self, rule, rng, number):
        good = rng.random() < 0.5
        words = rng.sample(GOOD if good else BAD, 2)
        text = f'The {rng.choice(THINGS)} was {words[0]} and {words[1]}.'
        return Example(text, rule[good], words)

    def choices(self, rule):
        return list(rule)


@dataclasses.dataclass(frozen=True)
class Cipher(Task):
    """Translate a word letter by letter by a hidden alphabet."""

    task: str = 'cipher'
    learners = {'table of letters': icl_learners.letters}

    def rule(self, rng):
        letters = list('abcdefghijklmnopqrstuvwxyz')
        rng.shuffle(letters)
        return dict(zip('abcdefghijklmnopqrstuvwxyz', letters, strict=True)), ruler_text.InventedWords(0)

    def example(self, rule, rng, number):
        alphabet, invented = rule
        word = invented[rng.randrange(invented.count)]
        return Example(word, ''.join(alphabet[letter] for letter in word), word)


@dataclasses.dataclass(frozen=True)
class Parity(Task):
    """The parity of hidden positions of a bit string: of `hidden` of them, or with hidden 0 of all positions up
    to each, which is one rule for all sets."""

    task: str = 'parity'
    bits: int = 20
    hidden: int = 3
    learners = {'elimination': icl_learners.parity}

    def rule(self, rng):
        if not 0 <= self.hidden <= self.bits:
            raise ValueError(f'{self.hidden} hidden positions of {self.bits} bits; use 0 to {self.bits}')
        return sorted(rng.sample(range(self.bits), self.hidden))

    def example(self, rule, rng, number):
        x = np.array([rng.randrange(2) for _ in range(self.bits)])
        y = x[rule].sum(keepdims=True) % 2 if self.hidden else np.cumsum(x) % 2
        return Example(' '.join(map(str, x)), ' '.join(map(str, y)), x)

    def choices(self, rule):
        return ['0', '1'] if self.hidden else []


@dataclasses.dataclass(frozen=True)
class Lookup(Task):
    """What was the value of this name? Retrieval and nothing more: each query is one of the shots."""

    task: str = 'lookup'
    learners = {'table': icl_learners.table}

    def rule(self, rng):
        return ruler_text.InventedWords(0), rng.randrange(75 ** 3)

    def example(self, rule, rng, number):
        invented, start = rule
        name = invented[(start + number * 7919) % invented.count]
        value = str(samples.rng('lookup', start, number).randint(1000, 9999))
        return Example(name, value, name)


@dataclasses.dataclass(frozen=True)
class Chain(Task):
    """What may come next? Walks over two random rings of the same symbols, at each step along either."""

    task: str = 'chain'
    symbols: int = 12
    walk: int = 10
    learners = {'pairs seen': icl_learners.pairs}

    def rule(self, rng):
        names = labels(rng, self.symbols)
        # Two rings through all symbols, so that walks visit each of them equally often.
        one, other = rng.sample(names, len(names)), rng.sample(names, len(names))
        rings = [dict(zip(ring, ring[1:] + ring[:1], strict=True)) for ring in (one, other)]
        return {name: tuple(ring[name] for ring in rings) for name in names}

    def example(self, rule, rng, number):
        walk = [rng.choice(sorted(rule))]
        while len(walk) < self.walk:
            walk.append(rng.choice(rule[walk[-1]]))
        return Example(' '.join(walk[:-1]), walk[-1], walk, rule[walk[-2]])

    def choices(self, rule):
        return sorted(rule)


@dataclasses.dataclass(frozen=True)
class Regression(Task):
    """The integer value of a hidden linear function; least squares knows it from `dims` shots on."""

    task: str = 'regression'
    dims: int = 6
    learners = {'least squares': icl_learners.least_squares}

    def rule(self, rng):
        return np.array([rng.randint(-9, 9) for _ in range(self.dims)])

    def example(self, rule, rng, number):
        x = np.array([rng.randint(-9, 9) for _ in range(self.dims)])
        return Example(' '.join(map(str, x)), str(int(rule @ x)), x)


def labels(rng, count):
    """[word] invented and distinct."""
    invented = ruler_text.InventedWords(0)
    return [invented[i] for i in rng.sample(range(invented.count), count)]
