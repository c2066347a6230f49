"""Text that is only predicted by reading far back: facts stated once and stated again, copies, needles.

A fact is a line 'The secret code: amber falcon 482913.', asked for by that line up to its key. One key in
eight and one value in eight are never trained on (by the crc32 of their text): an evaluation with them
measures reading, not memory.
"""
import zlib
from typing import NamedTuple

import numpy as np

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


def is_held_out(text):
    """Whether a key ('amber falcon') or a value ('482913') is kept away from training: one in eight."""
    return zlib.crc32(text.encode()) % 8 == 0


class Fact(NamedTuple):
    key: str
    value: str
    key_ids: list
    value_ids: list


class RecallVocabulary:
    """The parts of the statement as token ids, encoded once per tokenizer."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        # A letter before each part: some tokenizers put a space before whatever comes first.
        self._anchor = tokenizer.encode('a')
        self._before_key = self._encode(BEFORE_KEY)
        self.after_value = self._encode(AFTER_VALUE)
        self._words = {word: self._encode(f' {word}') for word in ADJECTIVES + NOUNS}
        lengths = [len(ids) for ids in self._words.values()]
        self.statement_len = (len(self._before_key) + len(self._encode(' 482913')) + len(self.after_value)
                              + round(2 * sum(lengths) / len(lengths)))

    def _encode(self, part):
        ids = self.tokenizer.encode('a' + part)
        if ids[:len(self._anchor)] != self._anchor or len(ids) == len(self._anchor):
            raise ValueError(f'the tokenizer merges {part!r} with the text before it, so facts have no '
                             'tokens of their own; use a tokenizer that splits at spaces')
        return ids[len(self._anchor):]

    def fact(self, rng, training, taken=()):
        """-> a Fact whose key is not in taken; training facts and the others share no key and no value."""
        while True:
            adjective, noun = ADJECTIVES[rng.integers(len(ADJECTIVES))], NOUNS[rng.integers(len(NOUNS))]
            key = f'{adjective} {noun}'
            if is_held_out(key) != training and key not in taken:
                break
        while is_held_out(value := str(rng.integers(100_000, 1_000_000))) == training:
            pass
        return Fact(key, value, self._words[adjective] + self._words[noun], self._encode(f' {value}'))

    def question(self, fact):
        """Ids of all that stands before the value."""
        return self._before_key + fact.key_ids

    def statement(self, fact):
        return self.question(fact) + fact.value_ids + self.after_value


def recall_row(rng, words, haystack, length, *, text_fraction=None, mean_gap=None, repeat_probability=0.6,
               max_statements=200, text_weight=1.0, answer_weight=4.0):
    """-> (ids int32 [length], weights float32 [length]): text, cut by statements of new and of earlier facts.

    haystack int [n]: tokens of text. text_fraction: how many of the gaps hold text; mean_gap: tokens in such
    a gap; both are drawn when not given, so that dense and sparse rows occur. At most max_statements are
    made: a longer row has wider gaps, not more facts. weights[i] is that of predicting ids[i]: 0 for a new
    value (nobody can know it), 0.2 for the frame of a new fact, answer_weight for a repeated value.
    """
    text_fraction = rng.uniform(0, 1) if text_fraction is None else text_fraction
    mean_gap = np.exp(rng.uniform(np.log(2), np.log(max(5, length / 4)))) if mean_gap is None else mean_gap
    spaced = round(length / (words.statement_len + text_fraction * mean_gap))
    count = min(max(spaced, 2), max_statements, length // words.statement_len)
    gaps = rng.exponential(size=count + 1) * (rng.random(count + 1) < text_fraction)
    if not gaps.any():
        gaps[rng.integers(count + 1)] = 1
    gaps = np.cumsum(gaps / gaps.sum())
    # Where each statement will lie, up to the variation of lengths: enough to choose how far to reach back.
    places = gaps * (length - count * words.statement_len) + np.arange(count + 1) * words.statement_len

    facts, last_place, statements, left = [], [], [], length
    for i in range(count):
        if facts and (rng.random() < repeat_probability or i == count - 1):
            chosen = _reach_back(rng, places[i] - np.array(last_place))
            fact, frame, value = facts[chosen], 1, answer_weight
        else:
            chosen = len(facts)
            fact, frame, value = words.fact(rng, True, {f.key for f in facts}), 0.2, 0
        statement = _weighed(words, fact, frame, value)
        if len(statement[0]) > left:
            break
        left -= len(statement[0])
        statements.append(statement)
        if chosen == len(facts):
            facts.append(fact)
            last_place.append(places[i])
        last_place[chosen] = places[i]

    return _lay_out(_text(rng, haystack, left), gaps[:len(statements)], statements, text_weight)


def recall_at_end_row(rng, words, haystack, length, *, max_facts=64, text_weight=1.0, answer_weight=4.0):
    """-> (ids int32 [length], weights float32 [length]): facts scattered over text, all asked for at the end.

    The number of facts is log-uniform up to max_facts, so that a lone needle and a crowd of them both occur,
    at any distance; never more than fit. Weights are those of recall_row.
    """
    most = max(1, min(max_facts, length // (2 * words.statement_len) - 1))
    count = int(np.exp(rng.uniform(0, np.log(most + 1))))
    facts = []
    for _ in range(count):
        facts.append(words.fact(rng, True, {fact.key for fact in facts}))
    # The count is right for facts of average length; where words are several tokens they may be longer.
    while 2 * sum(len(words.statement(fact)) for fact in facts) > length:
        facts.pop()
    count = len(facts)
    statements = [_weighed(words, fact, 0.2, 0) for fact in facts]
    statements += [_weighed(words, facts[i], 1, answer_weight) for i in rng.permutation(count)]
    gaps = rng.exponential(size=count + 1)
    # The two ends are worth more than their share: nothing before the first fact, nothing after the last.
    gaps[[0, -1]] *= rng.random(2) < 0.8
    gaps = np.cumsum(gaps / max(gaps.sum(), 1e-9))
    left = length - sum(len(ids) for ids, _ in statements)
    cuts = np.concatenate([gaps, np.ones(count)])[:len(statements)]
    return _lay_out(_text(rng, haystack, left), cuts, statements, text_weight)


def recall_documents(rng, words, haystack, seq_len):
    """-> [(ids, weights)] that fill a row of seq_len tokens, each with a bos before it: half of the rows are one
    document of facts, half hold many, of log-uniform lengths; half of the documents ask at the end, half as they go."""
    shortest = 4 * words.statement_len
    single = rng.random() < 0.5 or seq_len <= shortest
    rows, left = [], seq_len
    while left:
        n = left if single else min(left, int(np.exp(rng.uniform(np.log(shortest), np.log(seq_len)))))
        make = recall_at_end_row if n >= shortest and rng.random() < 0.5 else recall_row
        rows.append(make(rng, words, haystack, n - len(words.bos)))
        left -= n
    return rows


def _weighed(words, fact, frame, value):
    """(ids, weights) of a statement: frame for all but the value."""
    question, end = words.question(fact), words.after_value
    weights = [frame] * len(question) + [value] * len(fact.value_ids) + [1] * len(end)
    return question + fact.value_ids + end, weights


def _lay_out(text, places, statements, text_weight):
    """text with statement i inserted at the fraction places[i] (ascending) of it."""
    cuts = [0, *np.floor(np.minimum(places, 1) * len(text)).astype(int), len(text)]
    ids, weights = [], []
    for i in range(len(cuts) - 1):
        ids.append(text[cuts[i]:cuts[i + 1]])
        weights.append(np.full(cuts[i + 1] - cuts[i], text_weight))
        if i < len(statements):
            ids.append(statements[i][0])
            weights.append(statements[i][1])
    return np.concatenate(ids).astype(np.int32), np.concatenate(weights).astype(np.float32)


def copy_row(rng, haystack, length, *, vocabulary=None, novel_weight=0.02, max_spans=200):
    """-> (ids int32 [length], weights float32 [length]): spans, each followed by its copy.

    A span is text or random tokens. vocabulary int [m]: the ids for the latter (default: those of the
    haystack, which has no special tokens). Spans are log-uniformly long, up to length / 4; the first time
    they weigh novel_weight.
    """
    vocabulary = np.unique(haystack) if vocabulary is None else vocabulary
    shortest = max(4, length // (2 * max_spans))
    ids, weights, left = [], [], length
    while left > 0:
        n = int(np.exp(rng.uniform(np.log(shortest), np.log(max(shortest + 1, length / 4)))))
        if rng.random() < 0.5:
            span = vocabulary[rng.integers(len(vocabulary), size=n)]
        else:
            span = _text(rng, haystack, n)
        ids += [span, span]
        weights += [np.full(n, novel_weight), np.ones(n)]
        left -= 2 * n
    ids, weights = np.concatenate(ids)[:length], np.concatenate(weights)[:length]
    return ids.astype(np.int32), weights.astype(np.float32)


class RecallPrompt(NamedTuple):
    """ids int32 [length - len(answer_ids)]: what comes next is answer_ids. depth 0..1: the needle's."""
    ids: np.ndarray
    answer: str
    answer_ids: np.ndarray
    depth: float


def recall_prompt(rng, words, haystack, length, depth, training=False, num_distractors=0):
    """-> RecallPrompt: bos, haystack with a needle, question; prompt + answer are exactly length tokens.

    depth 0..1: the fraction of the haystack before the needle. Distractors are facts with other keys and
    values, anywhere in the haystack. training=False uses the keys and the values that no training row holds.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f'depth {depth} is not in [0, 1]; 0 is the beginning of the text, 1 its end')
    facts = []
    while len(facts) < num_distractors + 1:
        fact = words.fact(rng, training, {f.key for f in facts})
        if all(fact.value != f.value for f in facts):
            facts.append(fact)
    needle, question = facts[0], words.question(facts[0])
    statements = [np.array(words.statement(fact), np.int32) for fact in facts]
    fixed = len(words.bos) + sum(map(len, statements)) + len(question) + len(needle.value_ids)
    if length < fixed:
        raise ValueError(f'length {length} does not hold the needle, {num_distractors} distractors, the '
                         f'question and the answer, which are {fixed} tokens; use {fixed} or more')
    text = _text(rng, haystack, length - fixed)
    at = round(depth * len(text))
    inserted = sorted([(at, 0)] + [(int(rng.integers(len(text) + 1)), i) for i in range(1, len(facts))])
    parts, last = [np.array(words.bos, np.int32)], 0
    for place, i in inserted:
        parts += [text[last:place], statements[i]]
        last = place
    parts += [text[last:], np.array(question, np.int32)]
    ids, answer_ids = np.concatenate(parts).astype(np.int32), np.array(needle.value_ids, np.int32)
    return RecallPrompt(ids, needle.value, answer_ids, at / max(len(text), 1))


def _text(rng, haystack, n):
    """n consecutive tokens from a random place, around the end if need be."""
    start = int(rng.integers(len(haystack)))
    if start + n <= len(haystack):
        return haystack[start:start + n]
    return np.take(haystack, np.arange(start, start + n), mode='wrap')


def _reach_back(rng, distances):
    """-> the index of the fact whose last statement lies nearest to a drawn distance.

    Half of the distances are uniform over the row (long ones are trained as often as their share of it), half
    are log-uniform (so that short ones, which are learnt first, are never rare).
    """
    nearest, farthest = max(distances.min(), 1), max(distances.max(), 2)
    if rng.random() < 0.5:
        wanted = rng.uniform(0, farthest)
    else:
        wanted = np.exp(rng.uniform(np.log(min(nearest, farthest)), np.log(farthest)))
    return int(np.argmin(np.abs(distances - wanted)))
