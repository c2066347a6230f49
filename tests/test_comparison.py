"""Finished evaluations side by side: pairs, intervals, and what remains after many comparisons."""

import itertools
import json
import math

import evaluate
import numpy as np
import pytest
from scipy import stats
from test_suites import check_html

from lct.eval import answers, comparison, provenance

ABOUT = {'weights_sha256': 'a', 'seed': 1}


def write(folder, right, about=ABOUT, meta=None, task='vt', lengths=(512, 1024)):
    """A finished evaluation in which the samples of `right` are right at every length."""
    folder.mkdir()
    (folder / 'about.json').write_text(json.dumps(about))
    rows = {}
    for length, i in itertools.product(lengths, range(20)):
        row = {'task': task, 'length': length, 'index': i, 'outputs': ['7'],
               'text': '7' if i in right else '', 'meta': meta(i) if meta else {'tokens': length}}
        rows[answers.key_of(row)] = row
    answers.write(folder / 'ruler.jsonl', rows, provenance.identity_of(about))
    return comparison.read(folder)


def test_pairs_of_equal_samples(tmp_path):
    first, second = write(tmp_path / 'a', range(4)), write(tmp_path / 'b', range(16))
    short, long = comparison.differences(first, second)
    assert (short.suite, short.task, short.length, long.length) == ('ruler', 'vt', 512, 1024)
    assert short.paired and short.count == 20 and short.value == pytest.approx(0.6)
    assert short.p == pytest.approx(stats.binomtest(0, 12).pvalue, abs=3e-3)  # McNemar's exact test
    assert short.adjusted == pytest.approx(2 * short.p) and comparison.verdict(short).startswith('different')
    assert 0.3 < short.low < 0.6 < short.high < 0.9
    text = ' '.join(comparison.sentences([short, long]))
    assert 'of 2 comparisons 2 are better and 0 worse' in text and 'changes by +60.0 points' in text
    (same, _) = comparison.differences(first, first)
    assert same.p == 1 and same.low < 0 < same.high and 'no difference shown' in comparison.verdict(same)


def test_samples_that_differ_are_not_paired(tmp_path):
    first = write(tmp_path / 'a', range(4))
    second = write(tmp_path / 'b', range(16), meta=lambda i: {'tokens': 9})
    found = comparison.differences(first, second)
    assert not found[0].paired and found[0].value == pytest.approx(0.6)
    assert '2 comparisons are of different samples' in ' '.join(comparison.sentences(found))


def test_questions_about_one_text_count_as_one(tmp_path):
    meta = lambda i: {'group': i // 5}
    first = write(tmp_path / 'a', (), meta=meta)
    second = write(tmp_path / 'b', range(20), meta=meta)
    found = comparison.differences(first, second)[0]
    assert found.count == 4 and 'too few samples: 6 or more' in comparison.verdict(found)


def test_intervals_cover_what_they_should():
    rng, inside, trials = np.random.default_rng(0), [0, 0], 400
    for _ in range(trials):
        a, noise = rng.random(20) < 0.5, rng.random(20) < 0.3
        b = np.where(noise, rng.random(20) < 0.8, a)  # the true difference is 0.3 * (0.8 - 0.5)
        low, high = comparison.paired_interval(b.astype(float) - a)
        inside[0] += low <= 0.09 <= high
        low, high = comparison.unpaired_interval(a.astype(float), rng.random(20) < 0.59)
        inside[1] += low <= 0.09 <= high
    assert all(0.92 < count / trials < 0.995 for count in inside)


def test_holm():
    assert comparison.holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert comparison.holm([]) == []


def test_the_script_writes_a_report(tmp_path, capsys):
    for name, right in (('a', range(4)), ('b', range(16)), ('c', range(5))):
        write(tmp_path / name, right)
    evaluate.compare([tmp_path / name for name in 'abc'], tmp_path / 'out')
    assert 'no difference shown' in capsys.readouterr().out
    check_html((tmp_path / 'out' / 'comparison.html').read_text())
    others = json.loads((tmp_path / 'out' / 'comparison.json').read_text())['others']
    assert len(others) == 2 and all(math.isfinite(one['p']) for rows in others.values() for one in rows)
    with pytest.raises(ValueError, match='names one folder; name two or more'):
        evaluate.compare([tmp_path / 'a'], None)
    with pytest.raises(ValueError, match='is no --workdir of evaluate.py'):
        evaluate.compare([tmp_path / 'a', tmp_path], None)
