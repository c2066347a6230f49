"""Rows of entries: every answer is what followed its key, value by value."""

import numpy as np
import pytest

from lct.data.synthetic.entries import entries_row

IDS = np.arange(100, 700)


@pytest.mark.parametrize('length', [1, 7, 60, 255, 900])
def test_rows_have_their_length_and_repeat_with_their_seed(length):
    for seed in range(20):
        ids, weights = entries_row(np.random.default_rng(seed), IDS, length)
        assert len(ids) == len(weights) == length and np.isin(ids, IDS).all()
        again = entries_row(np.random.default_rng(seed), IDS, length)
        assert (again[0] == ids).all() and (again[1] == weights).all()


def test_answers_are_the_values_of_their_key_in_order():
    several = 0
    for seed in range(60):
        ids, weights = entries_row(np.random.default_rng(seed), IDS, 400)
        after_key, between, end = np.random.default_rng(seed).permutation(IDS)[:3]
        values, at = {}, 0
        while at < len(ids) and weights[at] < 1:  # the next answer begins with weight 1
            stop = at + int(np.argmax(ids[at:] == after_key)) + 1
            key, tail = tuple(ids[at:stop - 1]), stop + int(np.argmax(ids[stop:] == end))
            if weights[stop] == 1:
                break
            values.setdefault(key, []).append(tuple(ids[stop:tail]))
            at = tail + 1
        asked = 0
        while (found := ids[at:] == end).any():
            line, at = ids[at:at + int(np.argmax(found))], at + int(np.argmax(found)) + 1
            stop = int(np.argmax(line == after_key))
            expected = [token for value in values[tuple(line[:stop])] for token in (between, *value)][1:]
            assert line[stop + 1:].tolist() == expected
            asked, several = asked + 1, several + (between in expected)
        assert asked > 1
    assert several > 20


def test_too_uniform_a_text_is_refused():
    with pytest.raises(ValueError, match='text of 15 different tokens is too uniform for entries, which'):
        entries_row(np.random.default_rng(0), IDS[:15], 100)
