"""The study of recipes: equal tokens, paired differences, and the search for divisors of RoPE."""

import json
import math
import pathlib

import numpy as np
import pytest
import recipe_report
import recipe_study
import rope_factors
from scipy import stats

from lct.weights import llama_hf

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
BASE = llama_hf.read_config(EXPERIMENTS / 'base')


def shifted(result, loss=0.0, recall=0.0):
    """A result whose loss beyond the native length and recall probe there differ by so much."""
    copy = json.loads(json.dumps(result))
    bins, grid = copy['loss_by_position']['extended'], copy['needle']['extended']
    bins['mean'] = [mean + loss * (low >= copy['native'])
                    for mean, low in zip(bins['mean'], bins['edges'], strict=False)]
    grid['scores'] = [[score + recall * (length > copy['native'])
                       for score, length in zip(row, grid['lengths'], strict=True)] for row in grid['scores']]
    return copy


@pytest.fixture(scope='module')
def result():
    return json.loads((EXPERIMENTS / 'results' / 'laptop.json').read_text())


def test_all_arms_train_on_equally_many_tokens_and_another_number_is_refused():
    known = recipe_study.arms()
    assert recipe_study.check_tokens(known) == 491_520
    assert {arm.control for arm in known.values()} <= set(known)
    longer = known['yarn']._replace(settings=(*known['yarn'].settings, 'stages.0.num_steps=61'))
    with pytest.raises(ValueError, match='yarn 499,712'):
        recipe_study.check_tokens({**known, 'yarn': longer})


def test_measures_are_means_over_positions_and_cells_beyond_the_native_length(result):
    found = recipe_report.measures_of(result)
    bins = result['loss_by_position']['extended']
    sizes = np.diff(bins['edges'])
    assert found['loss beyond'] == pytest.approx(np.average(bins['mean'][4:], weights=sizes[4:]))
    assert found['loss inside'] == pytest.approx(np.average(bins['mean'][:4], weights=sizes[:4]))
    for model, name in (('extended', 'recall'), ('base', 'recall'), ('extended', 'needle')):
        grid = result['needle' if name == 'recall' else 'needle_suite'][model]
        right = [score for row in grid['scores'] for score, length in zip(row, grid['lengths'], strict=True)
                 if length > result['native']]
        assert recipe_report.measures_of(result, model)[name] == pytest.approx(100 * sum(right) / len(right))
    assert found['ruler'] == pytest.approx(np.mean(result['ruler_suite']['extended']['means'][1:]))


def test_differences_are_paired_by_seed(result):
    changes = {1: 0.3, 2: 0.1, 3: 0.5}  # of the control, far more than the arms differ
    results = {('control', seed): shifted(result, change) for seed, change in changes.items()}
    results |= {('arm', seed): shifted(result, change - 0.01 - 0.001 * seed)
                for seed, change in changes.items()}
    summary = recipe_report.summarise(results, {'control': 'control', 'arm': 'control', 'later': 'control'})
    assert [row['arm'] for row in summary['rows']] == ['control', 'arm']
    mean, half = summary['rows'][1]['differences']['loss beyond']
    assert mean == pytest.approx(-0.012)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * 0.001 / math.sqrt(3))
    text = recipe_report.summary_table(summary)
    assert '(-0.012 ± 0.002)*' in text and '(+0 ± 0)' in text


def test_a_figure_is_written(result, tmp_path):
    result = shifted(result)
    result['needle']['extended']['scores'][0][-1] = 0.7  # a mean of three that rounds beyond them
    summary = recipe_report.summarise({('a', seed): result for seed in (1, 2, 3)}, {'a': 'a'})
    recipe_report.figure(summary, tmp_path / 'study.png')
    assert (tmp_path / 'study.png').read_bytes()[:4] == b'\x89PNG'


def test_the_first_divisors_are_those_of_published_scalings_and_children_grow_with_the_wavelength():
    yarn, ntk, linear = rope_factors.first_population(BASE, 16)
    assert linear == pytest.approx(np.full(16, 16.0))
    assert ntk[0] == pytest.approx(1) and ntk[-1] == pytest.approx(16)
    assert yarn[0] == 1 and yarn[-1] == pytest.approx(16)
    rng = np.random.default_rng(0)
    for _ in range(50):
        child = rope_factors.changed(rng, yarn, 16)
        assert (np.diff(child) >= 0).all() and child.min() >= 1 and child.max() <= 32


def test_only_the_answer_at_the_end_is_scored():
    from lct.data import tokenizer as tokenizers

    tokenizer = tokenizers.load(EXPERIMENTS / 'base')
    windows, answers = rope_factors.prompts(tokenizer, 512, seed=0)
    assert windows.shape == (5, 513) and answers.shape == (5, 512)
    for window, targets in zip(windows, answers, strict=True):
        answer = tokenizer.decode(window[1:][targets].tolist()).strip()
        assert answer.isdigit() and len(answer) == 6
        assert answer in tokenizer.decode(window[:1 + np.flatnonzero(targets)[0]].tolist())
