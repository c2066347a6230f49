import re
from collections import Counter

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.synthetic.recall import (
    ADJECTIVES,
    NOUNS,
    RecallVocabulary,
    copy_row,
    is_held_out,
    recall_at_end_row,
    recall_prompt,
    recall_row,
)

STATEMENT = re.compile(r'The secret code: (\w+ \w+) (\d{6})\.')


@pytest.fixture(scope='module')
def vocabulary():
    return RecallVocabulary(tokenizers.load('bytes'))


@pytest.fixture(scope='module')
def haystack(vocabulary):
    text = 'Call me Ishmael. Some years ago, never mind how long. ' * 400
    return np.array(vocabulary.tokenizer.encode(text), np.int32)


def test_words_and_statement(vocabulary):
    assert len(set(ADJECTIVES)) == len(set(NOUNS)) == 64
    fact = vocabulary.fact(np.random.default_rng(0), True)
    text = f'\nThe secret code: {fact.key} {fact.value}.\n'
    assert vocabulary.statement(fact) == vocabulary.tokenizer.encode(text)


def test_components_join_to_the_text_in_a_trained_vocabulary(tmp_path):
    tok = tokenizers.train(['some text\n'] * 9, 1200, tmp_path / 'tokenizer.json', ADJECTIVES + NOUNS)
    vocabulary = RecallVocabulary(tok)
    for seed in range(20):
        fact = vocabulary.fact(np.random.default_rng(seed), False)
        ids = vocabulary.statement(fact)
        assert ids == tok.encode(tok.decode(ids)) and STATEMENT.search(tok.decode(ids)).groups() == fact[:2]
        assert len(fact.key_ids) == 2 and len(fact.value_ids) == 3


def test_keys_and_values_are_held_out(vocabulary):
    rng = np.random.default_rng(0)
    training = [vocabulary.fact(rng, True) for _ in range(2000)]
    held = [vocabulary.fact(rng, False) for _ in range(2000)]
    assert not any(is_held_out(text) for fact in training for text in (fact.key, fact.value))
    assert all(is_held_out(text) for fact in held for text in (fact.key, fact.value))
    keys = [f'{a} {n}' for a in ADJECTIVES for n in NOUNS]
    assert 0.1 < np.mean([is_held_out(key) for key in keys]) < 0.15


@pytest.mark.parametrize('length', [0, 10, 64, 65, 300, 1000, 5000, 60_000])
def test_recall_rows_fit_exactly_and_weigh_only_predictable_tokens(vocabulary, haystack, length):
    for seed in range(8):
        ids, weights = recall_row(np.random.default_rng(seed), vocabulary, haystack, length)
        assert ids.shape == weights.shape == (length,)
        assert ids.dtype == np.int32 and weights.dtype == np.float32
        text, stated_values = vocabulary.tokenizer.decode(ids), {}
        matches = list(STATEMENT.finditer(text))
        assert len(matches) <= 200
        for match in matches:
            key, value = match.groups()
            assert stated_values.setdefault(key, value) == value
            first = [m for m in matches if m[1] == key][0] is match
            np.testing.assert_array_equal(weights[match.start(2):match.end(2)], 0 if first else 4)
            assert not is_held_out(key) and not is_held_out(value)
        outside = np.ones(length, bool)
        for match in matches:
            outside[match.start() - 1:match.end() + 1] = False
        assert (weights[outside] == 1).all()


def test_same_seed_same_row(vocabulary, haystack):
    rows = [recall_row(np.random.default_rng(7), vocabulary, haystack, 3000) for _ in range(2)]
    np.testing.assert_array_equal(rows[0][0], rows[1][0])
    np.testing.assert_array_equal(rows[0][1], rows[1][1])


def test_long_rows_reach_far_back(vocabulary, haystack):
    length, distances = 200_000, []
    for seed in range(20):
        ids, _ = recall_row(np.random.default_rng(seed), vocabulary, haystack, length)
        last = {}
        for match in STATEMENT.finditer(vocabulary.tokenizer.decode(ids)):
            if match[1] in last:
                distances.append(match.start() - last[match[1]])
            last[match[1]] = match.start()
    quantiles = np.quantile(distances, [0.1, 0.5, 0.9]) / length
    assert quantiles[0] < 0.03 and quantiles[1] > 0.03 and quantiles[2] > 0.35, quantiles
    assert len(recall_row(np.random.default_rng(0), vocabulary, haystack, 2**20)[0]) == 2**20


@pytest.mark.parametrize('length', [160, 500, 5000])
def test_every_fact_is_queried_at_the_end(vocabulary, haystack, length):
    counts = set()
    for seed in range(20):
        ids, weights = recall_at_end_row(np.random.default_rng(seed), vocabulary, haystack, length)
        assert ids.shape == weights.shape == (length,)
        stated = STATEMENT.findall(vocabulary.tokenizer.decode(ids))
        half = len(stated) // 2
        assert len(stated) == 2 * half and sorted(stated[:half]) == sorted(stated[half:])
        assert not any(is_held_out(text) for fact in stated for text in fact)
        value_len = len(vocabulary.tokenizer.encode(' 123456'))
        assert (weights == 4).sum() == (weights == 0).sum() == half * value_len
        counts.add(half)
    assert max(counts) >= min(8, length // 100) and min(counts) == 1


def test_rows_with_queries_at_the_end_never_overrun(vocabulary, haystack):
    for length in [*range(0, 180, 7), *range(180, 1200, 60)]:
        for seed in range(60):
            ids, weights = recall_at_end_row(np.random.default_rng(seed), vocabulary, haystack, length)
            assert ids.shape == weights.shape == (length,)
            stated = STATEMENT.findall(vocabulary.tokenizer.decode(ids))
            half = len(stated) // 2
            assert sorted(stated[:half]) == sorted(stated[half:])
            assert (weights == 4).sum() == (weights == 0).sum() == half * 7


@pytest.mark.parametrize('length', [1, 64, 1000, 100_000])
def test_copy_rows(haystack, length):
    for seed in range(5):
        ids, weights = copy_row(np.random.default_rng(seed), haystack, length)
        assert ids.shape == weights.shape == (length,) and set(ids.tolist()) <= set(haystack.tolist())
        edges = np.flatnonzero(np.diff(np.concatenate([[0], (weights == 1).astype(int), [0]])))
        assert len(edges) // 2 <= 201
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            n = start - (edges[np.searchsorted(edges, start) - 1] if start != edges[0] else 0)
            np.testing.assert_array_equal(ids[start:end], ids[start - n:end - n])


@pytest.mark.parametrize('length', [120, 121, 500, 5000])
@pytest.mark.parametrize('depth', [0, 0.3, 1])
def test_prompts_fit_to_the_token(vocabulary, haystack, length, depth):
    prompt = recall_prompt(np.random.default_rng(length), vocabulary, haystack, length, depth)
    assert len(prompt.ids) + len(prompt.answer_ids) == length and prompt.ids[0] == vocabulary.tokenizer.bos_id
    text = vocabulary.tokenizer.decode(prompt.ids)
    key, value = STATEMENT.search(text).groups()
    assert len(STATEMENT.findall(text)) == 1 and value == prompt.answer and is_held_out(key)
    assert vocabulary.tokenizer.decode(prompt.answer_ids) == f' {value}'
    assert text.endswith(f'\nThe secret code: {key}')
    filler = text.rindex('\nThe secret') - (STATEMENT.search(text).end() - STATEMENT.search(text).start() + 2)
    assert (STATEMENT.search(text).start() - 1) / max(filler, 1) == pytest.approx(prompt.depth)
    assert abs(prompt.depth - depth) * filler <= 0.5 + 1e-6


def test_distractors_share_nothing_with_the_target(vocabulary, haystack):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        prompt = recall_prompt(rng, vocabulary, haystack, 3000, 0.5, training=True, num_distractors=7)
        found = STATEMENT.findall(vocabulary.tokenizer.decode(prompt.ids))
        assert len(found) == 8 and len(prompt.ids) + len(prompt.answer_ids) == 3000
        assert set(Counter(k for k, _ in found).values()) == set(Counter(v for _, v in found).values()) == {1}
        assert not any(is_held_out(text) for pair in found for text in pair)


def test_errors(vocabulary, haystack):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r'length 20 does not hold .* 2 distractors.*use \d+ or more'):
        recall_prompt(rng, vocabulary, haystack, 20, 0.5, num_distractors=2)
    with pytest.raises(ValueError, match='depth 50 is not in'):
        recall_prompt(rng, vocabulary, haystack, 500, 50)
