"""Text that can only be predicted by reading far back: facts stated once and stated again, and copies.

A fact is the line 'The secret code: amber falcon 482913.'; it is queried by that line up to the value. One
key in eight and one value in eight are never trained on (chosen by the crc32 of their text), so an evaluation
with those measures reading, not memory.
"""

import zlib
from collections.abc import Container, Sequence
from typing import NamedTuple

import numpy as np

from lct.data.tokenizer import Tokenizer

ADJECTIVES = tuple("""
amber ancient azure bitter bright broken calm clever copper cosmic crimson curious dusty eager electric faded
fierce frozen gentle golden hidden hollow humble icy indigo jolly keen lively lonely lucky mellow misty modest
narrow nimble noble olive orange pale patient polar proud purple quiet rapid rusty sacred scarlet secret
silent silver sleepy solar solid stormy subtle sunny swift tender tiny velvet violet wild young
""".split())
NOUNS = tuple("""
anchor antelope badger barrel beacon beetle bishop bottle bridge candle canyon castle cedar comet compass
coyote cradle crystal dagger desert dolphin dragon eagle ember engine falcon feather ferret forest fountain
galaxy garden glacier hammer harbor hedgehog island jaguar kettle lantern lemon lizard magnet maple meadow
mirror monkey mountain needle orchard otter oyster panther pebble penguin piano pirate planet rabbit river
rocket saddle sailor tiger
""".split())
BEFORE_KEY, AFTER_VALUE = '\nThe secret code:', '.\n'

# Loss weights of predicting a token.
TEXT_WEIGHT = 1.0
NEW_FACT_WEIGHT = 0.2  # of a new fact, but 0 for its value, since nothing predicts it
REPEATED_VALUE_WEIGHT = 4.0
NOVEL_SPAN_WEIGHT = 0.02  # a span that is copied later

REPEAT_PROBABILITY = 0.6  # of a statement to repeat an earlier fact
MAX_STATEMENTS = 200  # of a row: a longer row has wider gaps, not more facts
MAX_QUERIED_FACTS = 64
MAX_SPANS = 200

# ids int32 [n] and weights float32 [n]: weights[i] is the loss weight of predicting ids[i]
Row = tuple[np.ndarray, np.ndarray]


def is_held_out(text: str) -> bool:
    """Whether a key ('amber falcon') or a value ('482913') is kept out of training: one in eight."""
    return zlib.crc32(text.encode()) % 8 == 0


class Fact(NamedTuple):
    key: str
    value: str
    key_ids: list[int]
    value_ids: list[int]


class RecallVocabulary:
    """The token ids of which facts are composed, encoded once per tokenizer.

    bos: [id] or []. statement_len: tokens of a statement of average length. after_value: ids after the value.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # A letter before each component: some tokenizers put a space before whatever comes first.
        self._anchor = tokenizer.encode('a')
        self._before_key = self._encode(BEFORE_KEY)
        self.after_value = self._encode(AFTER_VALUE)
        self._word_ids = {word: self._encode(f' {word}') for word in ADJECTIVES + NOUNS}
        lengths = [len(ids) for ids in self._word_ids.values()]
        self.statement_len = (len(self._before_key) + len(self._encode(' 482913')) + len(self.after_value)
                              + round(2 * sum(lengths) / len(lengths)))

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode('a' + text)
        if ids[:len(self._anchor)] != self._anchor or len(ids) == len(self._anchor):
            raise ValueError(f'the tokenizer merges {text!r} with the text before it, so facts have no '
                             'tokens of their own; use a tokenizer that splits at spaces')
        return ids[len(self._anchor):]

    def fact(self, rng: np.random.Generator, training: bool, taken: Container[str] = ()) -> Fact:
        """A Fact whose key is not in taken. Training facts and held-out facts share no key and no value."""
        while True:
            adjective, noun = ADJECTIVES[rng.integers(len(ADJECTIVES))], NOUNS[rng.integers(len(NOUNS))]
            key = f'{adjective} {noun}'
            if is_held_out(key) != training and key not in taken:
                break
        while is_held_out(value := str(rng.integers(100_000, 1_000_000))) == training:
            pass
        return Fact(key, value, self._word_ids[adjective] + self._word_ids[noun], self._encode(f' {value}'))

    def facts(self, rng: np.random.Generator, count: int) -> list[Fact]:
        """Training Facts with different keys."""
        facts = []
        for _ in range(count):
            facts.append(self.fact(rng, True, {fact.key for fact in facts}))
        return facts

    def query(self, fact: Fact) -> list[int]:
        """The ids of a statement up to its value."""
        return self._before_key + fact.key_ids

    def statement(self, fact: Fact) -> list[int]:
        """The ids of a statement."""
        return self.query(fact) + fact.value_ids + self.after_value


def recall_row(rng: np.random.Generator, vocabulary: RecallVocabulary, haystack: np.ndarray,
               length: int) -> Row:
    """A row of `length` tokens: text, interrupted by statements of new and of earlier facts.

    haystack int [n]: tokens of text. The share of gaps with text in them and the mean length of such a gap
    are drawn, so that rows are dense and sparse. A new value weighs 0, since nothing predicts it.
    """
    statement_len = vocabulary.statement_len
    text_fraction = rng.uniform(0, 1)
    mean_gap = np.exp(rng.uniform(np.log(2), np.log(max(5, length / 4))))
    spaced = round(length / (statement_len + text_fraction * mean_gap))
    count = min(max(spaced, 2), MAX_STATEMENTS, length // statement_len)
    gaps = rng.exponential(size=count + 1) * (rng.random(count + 1) < text_fraction)
    if not gaps.any():
        gaps[rng.integers(count + 1)] = 1
    gaps = np.cumsum(gaps / gaps.sum())
    # Approximate places, since statements vary in length: good enough to choose a distance to reach back.
    places = gaps * (length - count * statement_len) + np.arange(count + 1) * statement_len
    statements, text_len = _statements(rng, vocabulary, places[:count], length)
    return _insert(_text(rng, haystack, text_len), gaps[:len(statements)], statements)


def _statements(rng: np.random.Generator, vocabulary: RecallVocabulary, places: np.ndarray,
                length: int) -> tuple[list[tuple], int]:
    """([(ids, weights)] of statements at about these places, tokens of the row that are left for text)."""
    facts, last_place, statements, left = [], [], [], length
    for i, place in enumerate(places):
        if facts and (rng.random() < REPEAT_PROBABILITY or i == len(places) - 1):
            chosen = _reach_back(rng, place - np.array(last_place))
            statement = _repeated_statement(vocabulary, facts[chosen])
        else:
            chosen = len(facts)
            fact = vocabulary.fact(rng, True, {fact.key for fact in facts})
            statement = _new_statement(vocabulary, fact)
        if len(statement[0]) > left:
            break
        left -= len(statement[0])
        statements.append(statement)
        if chosen == len(facts):
            facts.append(fact)
            last_place.append(place)
        last_place[chosen] = place
    return statements, left


def recall_at_end_row(rng: np.random.Generator, vocabulary: RecallVocabulary, haystack: np.ndarray,
                      length: int) -> Row:
    """A row of `length` tokens: facts scattered over text, all of them repeated at the end, in another order.

    The number of facts is log-uniform up to MAX_QUERIED_FACTS, or as many as fit, so that a single fact and
    many of them both occur, at any distance. Weights are as in recall_row.
    """
    most = max(1, min(MAX_QUERIED_FACTS, length // (2 * vocabulary.statement_len) - 1))
    count = int(np.exp(rng.uniform(0, np.log(most + 1))))
    facts = vocabulary.facts(rng, count)
    # The count is right for facts of average length; keys of several tokens a word may be longer.
    while 2 * sum(len(vocabulary.statement(fact)) for fact in facts) > length:
        facts.pop()
    count = len(facts)
    statements = [_new_statement(vocabulary, fact) for fact in facts]
    statements += [_repeated_statement(vocabulary, facts[i]) for i in rng.permutation(count)]
    gaps = rng.exponential(size=count + 1)
    # In some rows the first fact is at the very beginning, and the last one right before the queries.
    gaps[[0, -1]] *= rng.random(2) < 0.8
    gaps = np.cumsum(gaps / max(gaps.sum(), 1e-9))
    text_len = length - sum(len(ids) for ids, _ in statements)
    cuts = np.concatenate([gaps, np.ones(count)])[:len(statements)]
    return _insert(_text(rng, haystack, text_len), cuts, statements)


def recall_documents(rng: np.random.Generator, vocabulary: RecallVocabulary, haystack: np.ndarray,
                     seq_len: int) -> list[Row]:
    """Documents that fill a row of seq_len tokens, with a bos before each.

    Half of the rows are one document, half hold many of log-uniform lengths; half of the documents repeat
    their facts at the end, half throughout.
    """
    shortest = 4 * vocabulary.statement_len
    single = rng.random() < 0.5 or seq_len <= shortest
    rows, left = [], seq_len
    while left:
        n = left if single else min(left, int(np.exp(rng.uniform(np.log(shortest), np.log(seq_len)))))
        make = recall_at_end_row if n >= shortest and rng.random() < 0.5 else recall_row
        rows.append(make(rng, vocabulary, haystack, n - len(vocabulary.bos)))
        left -= n
    return rows


def copy_row(rng: np.random.Generator, haystack: np.ndarray, length: int, *,
             vocab_ids: np.ndarray | None = None) -> Row:
    """A row of `length` tokens: spans of text or of random tokens, each followed by its copy.

    vocab_ids int [m]: the ids of random tokens; by default those of the haystack, which has no special
    tokens. The length of a span is log-uniform up to length / 4.
    """
    vocab_ids = np.unique(haystack) if vocab_ids is None else vocab_ids
    shortest = max(4, length // (2 * MAX_SPANS))
    ids, weights, left = [], [], length
    while left > 0:
        n = int(np.exp(rng.uniform(np.log(shortest), np.log(max(shortest + 1, length / 4)))))
        if rng.random() < 0.5:
            span = vocab_ids[rng.integers(len(vocab_ids), size=n)]
        else:
            span = _text(rng, haystack, n)
        ids += [span, span]
        weights += [np.full(n, NOVEL_SPAN_WEIGHT), np.ones(n)]
        left -= 2 * n
    ids, weights = np.concatenate(ids)[:length], np.concatenate(weights)[:length]
    return ids.astype(np.int32), weights.astype(np.float32)


class RecallPrompt(NamedTuple):
    """ids int32 [length - len(answer_ids)], which answer_ids continue. depth 0..1: of the queried fact."""
    ids: np.ndarray
    answer: str
    answer_ids: np.ndarray
    depth: float


def recall_prompt(rng: np.random.Generator, vocabulary: RecallVocabulary, haystack: np.ndarray, length: int,
                  depth: float, training: bool = False, num_distractors: int = 0) -> RecallPrompt:
    """A prompt of bos, haystack with a fact in it, and query; prompt and answer are exactly `length` tokens.

    depth 0..1: the fraction of the haystack before the fact. Distractors are facts with other keys and
    values, anywhere in the haystack. training=False uses keys and values that no training row has.

    Raises:
      ValueError: if depth is not a fraction, or length does not hold the facts.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f'depth {depth} is not in [0, 1]; 0 is the beginning of the text, 1 its end')
    facts = []
    while len(facts) < num_distractors + 1:
        fact = vocabulary.fact(rng, training, {f.key for f in facts})
        if all(fact.value != f.value for f in facts):
            facts.append(fact)
    target, query = facts[0], vocabulary.query(facts[0])
    statements = [np.array(vocabulary.statement(fact), np.int32) for fact in facts]
    fixed = len(vocabulary.bos) + sum(map(len, statements)) + len(query) + len(target.value_ids)
    if length < fixed:
        raise ValueError(f'length {length} does not hold the fact, {num_distractors} distractors, the '
                         f'query and the answer, which are {fixed} tokens; use {fixed} or more')
    text = _text(rng, haystack, length - fixed)
    place = round(depth * len(text))
    order = sorted([(place, 0)] + [(int(rng.integers(len(text) + 1)), i) for i in range(1, len(facts))])
    ids, last = [np.array(vocabulary.bos, np.int32)], 0
    for at, i in order:
        ids += [text[last:at], statements[i]]
        last = at
    ids += [text[last:], np.array(query, np.int32)]
    ids, answer_ids = np.concatenate(ids).astype(np.int32), np.array(target.value_ids, np.int32)
    return RecallPrompt(ids, target.value, answer_ids, place / max(len(text), 1))


def _new_statement(vocabulary: RecallVocabulary, fact: Fact) -> tuple[list, list]:
    return _statement(vocabulary, fact, NEW_FACT_WEIGHT, 0)


def _repeated_statement(vocabulary: RecallVocabulary, fact: Fact) -> tuple[list, list]:
    return _statement(vocabulary, fact, 1, REPEATED_VALUE_WEIGHT)


def _statement(vocabulary: RecallVocabulary, fact: Fact, query_weight: float,
               value_weight: float) -> tuple[list, list]:
    """(ids, weights) of a statement."""
    query, end = vocabulary.query(fact), vocabulary.after_value
    weights = [query_weight] * len(query) + [value_weight] * len(fact.value_ids) + [1] * len(end)
    return query + fact.value_ids + end, weights


def _insert(text: np.ndarray, places: np.ndarray, statements: Sequence[tuple]) -> Row:
    """text with statement i inserted at the fraction places[i] (ascending) of it."""
    cuts = [0, *np.floor(np.minimum(places, 1) * len(text)).astype(int), len(text)]
    ids, weights = [], []
    for i in range(len(cuts) - 1):
        ids.append(text[cuts[i]:cuts[i + 1]])
        weights.append(np.full(cuts[i + 1] - cuts[i], TEXT_WEIGHT))
        if i < len(statements):
            ids.append(statements[i][0])
            weights.append(statements[i][1])
    return np.concatenate(ids).astype(np.int32), np.concatenate(weights).astype(np.float32)


def _text(rng: np.random.Generator, haystack: np.ndarray, n: int) -> np.ndarray:
    """n consecutive tokens from a random place of the haystack, which continues at its beginning."""
    start = int(rng.integers(len(haystack)))
    if start + n <= len(haystack):
        return haystack[start:start + n]
    return np.take(haystack, np.arange(start, start + n), mode='wrap')


def _reach_back(rng: np.random.Generator, distances: np.ndarray) -> int:
    """The index of the fact whose last statement is nearest to a random distance.

    Half of the distances are uniform over the row, so that long ones are trained as often as their share of
    it; half are log-uniform, so that short ones, which are learnt first, are never rare.
    """
    nearest, farthest = max(distances.min(), 1), max(distances.max(), 2)
    if rng.random() < 0.5:
        wanted = rng.uniform(0, farthest)
    else:
        wanted = np.exp(rng.uniform(np.log(min(nearest, farthest)), np.log(farthest)))
    return int(np.argmin(np.abs(distances - wanted)))
