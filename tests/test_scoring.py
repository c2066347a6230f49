"""Scores against RULER's published rows and effective lengths, statistics against their definitions."""

import json
import math

import pytest

from lct.eval import samples, scoring
from lct.eval.suites import SUITES
from lct.eval.tasks import ruler

# Means from 4K to 128K and wAvg (inc), wAvg (dec) as RULER's README prints them.
PUBLISHED = {
    'Gemini-1.5-pro': ((96.7, 95.8, 96.0, 95.9, 95.9, 94.4), 95.5, 96.1, 131072),
    'GPT-4-1106': ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 89.0, 94.1, 65536),
    'Llama3.1-8B': ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 85.4, 91.3, 32768),
    'Mixtral-8x22B': ((95.6, 94.9, 93.4, 90.9, 84.7, 31.7), 73.5, 90.3, 32768),
    'DBRX': ((95.1, 93.8, 83.6, 63.1, 2.4, 0.0), 38.0, 74.7, 8192),
    'LWM-7B': ((82.3, 78.4, 73.7, 69.1, 68.1, 65.0), 69.9, 75.7, None),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_averages_and_lengths(name):
    means, increasing, decreasing, effective = PUBLISHED[name]
    assert scoring.weighted_average(means) == pytest.approx(increasing, abs=0.06)
    assert scoring.weighted_average(means, increasing=False) == pytest.approx(decreasing, abs=0.06)
    assert scoring.effective_length(dict(zip(ruler.LENGTHS, means, strict=True))) == effective


def test_effective_length_needs_every_length_before_it():
    assert scoring.effective_length({8192: 80, 4096: 90, 16384: 95}) == 4096
    assert scoring.effective_length({4096: 85.6}) is None  # above, not at
    assert scoring.effective_length({4096: 90, 8192: 90}) == 8192
    means = {1024: 40.0, 2048: 36.0, 4096: 34.1, 8192: 33.9}
    assert scoring.own_threshold(means) == pytest.approx(34.0)
    assert scoring.effective_length(means, scoring.own_threshold(means)) == 4096
    assert scoring.own_threshold({512: 10, 1024: 50, 2048: 60}, base_length=1024) == pytest.approx(42.5)
    with pytest.raises(ValueError, match='no tested length is up to base_length 512; use 1024'):
        scoring.own_threshold(means, base_length=512)
    assert [scoring.effective_length_label(x, means) for x in (None, 4096, 8192)] == ['<1K', '4K', '>8K']


@pytest.mark.parametrize(('task', 'text', 'outputs', 'expected'), [
    ('vt', 'abc, DEF', ['ABC', 'def', 'ghi', 'x'], 0.5),
    ('niah_single_1', 'it is 1234', ['123'], 1.0),  # a substring is enough
    ('niah_single_1', '', ['123'], 0.0),
    ('qa_1', 'in Paris', ['London', 'paris'], 1.0),
    ('qa_2', 'in Rome', ['London', 'paris'], 0.0),
    ('cwe', 'a\tb', ['a\nb'], 1.0),  # control characters are line ends
    ('cwe', '\x00 a \n', ['a'], 1.0),
])
def test_rulers_metrics(task, text, outputs, expected):
    assert scoring.score(task, text, outputs) == expected


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for right, count, low, high in ((81, 263, .2553, .3662), (15, 148, .0624, .1605), (0, 20, 0, .1611),
                                    (1, 29, .0061, .1718)):
        assert scoring.wilson(right / count, count) == pytest.approx((low, high), abs=5e-5)
    assert scoring.wilson(1.0, 500)[1] == 1.0


def test_clustered_interval():
    # Clusters that are all right or all wrong count as one score each, clusters as mixed as the total as all
    # their scores.
    assert scoring.clustered_interval([[1.0] * 4, [0.0] * 4] * 50) == pytest.approx(
        scoring.wilson(0.5, 100), abs=0.002
    )
    assert scoring.clustered_interval([[1.0, 0.0]] * 100) == pytest.approx(scoring.wilson(0.5, 200))
    one_each = [[float(i % 3 > 0)] for i in range(60)]
    assert scoring.clustered_interval(one_each) == pytest.approx(scoring.wilson(2 / 3, 60), abs=0.002)
    assert scoring.clustered_interval([[1.0] * 4, [1.0]]) == scoring.wilson(1.0, 2)
    assert scoring.clustered_interval([[1.0, 0.0, 1.0]]) is None


def test_clusters_vary_about_the_mean_of_their_stratum():
    # Two excerpts of each of two lengths, eleven needles each: 11 and 9 found, 2 and 0 found.
    columns = [[1.0] * found + [0.0] * (11 - found) for found in (11, 9, 2, 0)]
    # Variance of the mean over columns: (2 (1 + 1) + 2 (1 + 1)) / 44^2; of columns as one score each: 1/16.
    variance = (2 * 8 / 44**2 + 2 * 1 / 16) / 4
    expected = scoring.wilson(0.5, 0.25 / variance)
    assert scoring.clustered_interval(columns, [1, 1, 8, 8]) == pytest.approx(expected)
    low, high = scoring.clustered_interval(columns)
    assert low < expected[0] and expected[1] < high  # the lengths do differ
    # With one excerpt of each length nothing is known of others: each counts as one score.
    assert scoring.clustered_interval(columns[::2], [1, 8]) == scoring.wilson(13 / 22, 2)
    assert scoring.clustered_interval(columns * 20, [0] * 80) == scoring.clustered_interval(columns * 20)


def test_task_score_and_its_error():
    score = scoring.task_score([1.0] * 425 + [0.0] * 75, ['x'] * 499 + [' \n'])
    assert (score.mean, score.count, score.nulls) == (85.0, 500, 1)
    assert score.stderr == pytest.approx(1.6, abs=0.01)  # the known noise of 500 samples near 85%
    assert score.interval[0] < 85 < score.interval[1]
    # The deviation of the sample, not of the population.
    assert scoring.task_score([1.0, 0.0]).stderr == pytest.approx(50)
    assert math.isnan(scoring.task_score([1.0]).stderr)
    with pytest.raises(ValueError, match='no scores'):
        scoring.task_score([])


def test_length_score_is_the_mean_over_tasks():
    task = scoring.task_score([1.0] * 425 + [0.0] * 75)
    mean = scoring.length_score({name: task for name in ruler.TASKS})
    assert mean.mean == 85.0 and mean.stderr == pytest.approx(1.6 / math.sqrt(len(ruler.TASKS)), abs=0.01)
    assert 84 < mean.interval[0] < 85 < mean.interval[1] < 86
    unequal = scoring.length_score({'a': scoring.task_score([1.0] * 100), 'b': scoring.task_score([0.0] * 2)})
    assert unequal.mean == 50.0


def made(task, length, index, output='7'):
    return samples.Sample(task, length, index, 'text', ' It is', [output], 8, {'tokens': 10})


def ruler_rows(tasks, lengths):
    """Rows of the suite 'ruler', of which `right` of 10 are right at each length."""
    return [{'task': task, 'length': length, 'index': i, 'text': '7' if i < right else 'no', 'outputs': ['7'],
             'meta': {}} for task in tasks for length, right in lengths for i in range(10)]


def test_means_of_ruler_are_of_the_tasks_that_every_length_has():
    suite, tasks = SUITES['ruler'], list(ruler.TASKS)
    got = suite.scores(None, ruler_rows(tasks, ((4096, 10), (8192, 8))))
    assert got['means'] == [100.0, 80.0] and got['average'] == 90.0
    assert got['weighted_increasing'] == pytest.approx(260 / 3)
    assert got['weighted_decreasing'] == pytest.approx(280 / 3)
    assert (got['effective_length'], got['effective_length_of_own']) == (4096, 4096)
    assert got['averaged'] == tasks and 'average of 13 of 13 tasks 90.0' in suite.sentences(got)[0]
    assert 'effective length by 85.6 points: 4K' in suite.sentences(got)[1]
    some = suite.scores(None, ruler_rows(['vt', 'fwe'], [(4096, 10)]) + ruler_rows(['vt'], [(8192, 0)]))
    some = json.loads(json.dumps(some))
    assert some['averaged'] == ['vt'] and some['means'] == [100.0, 0.0]
    assert 'average of 1 of 13 tasks' in suite.sentences(some)[0]
    assert 'no effective length' in suite.sentences(some)[1]
    (table,) = suite.tables(some)
    assert table.rows[1] == ['fwe', '100.0', ''] and table.rows[3][0] == 'samples per task'
    assert table.rows[2][:2] == ['mean of 1, 95% interval', '100.0 (72.2 to 100.0)']
    none = suite.scores(None, ruler_rows(['vt'], [(4096, 10)]) + ruler_rows(['fwe'], [(8192, 0)]))
    assert suite.sentences(none) == ['no mean: no task has answers at every length']
    assert len(list(suite.figures(json.loads(json.dumps(none)), 512))) == 1


def test_prediction_files_are_as_rulers_evaluation_reads_them(tmp_path):
    path = tmp_path / 'vt.jsonl'
    rows = [samples.prediction(made('vt', 4096, i), f'é {i}\n') for i in range(3)]
    samples.write(path, rows)
    path.write_text(path.read_text() + '{"pred": 3, "outputs": ["x"]}\nnot json\n')
    # evaluate.py raises KeyError without any of these, others and index even where the id is given.
    assert set(rows[0]) >= {'index', 'input', 'pred', 'outputs', 'others'} and rows[1]['others'] == {'id': 1}
    got, problems = scoring.read_predictions(path)
    assert got == [('vt', f'é {i}\n', ['7']) for i in range(3)]
    assert 'line 5' in problems[0] and 'line 4' in problems[1] and len(problems) == 2
    assert path.read_bytes().isascii()
    chunk = tmp_path / 'qa_1-3.jsonl'  # RULER writes in chunks
    chunk.write_text('{"pred": "a", "outputs": ["a", "b"]}\n{"pred": "a"}\n')
    got, problems = scoring.read_predictions(chunk)
    assert got == [('qa_1', 'a', ['a', 'b'])] and 'line 2' in problems[0]


def test_metrics_of_ones_own_tasks():
    f1, exact = scoring.METRICS['f1'], scoring.METRICS['exact']
    assert exact('The Owl.', ['no', 'owl']) == 1 and exact('an owl too', ['owl']) == 0
    assert f1('the brown owl', ['a brown cat', 'owl']) == pytest.approx(2 / 3)  # best: 1 of 2 words, 1 of 1
    assert f1('cat', ['owl']) == 0 and f1('', ['owl']) == 0
    assert scoring.METRICS['any']('an owl', ['cat', 'owl']) == 1
    assert scoring.METRICS['all']('an owl', ['cat', 'owl']) == 0.5


def test_a_value_within_a_longer_one_does_not_count():
    assert (scoring.contains_value('It is 1234567.', '1234567')
            and scoring.contains_value('BRAVE-OWL', 'brave-owl'))
    for text in ('91234567', '12345678', '', 'no'):
        assert not scoring.contains_value(text, '1234567')
    for text in ('答案是1234567号', '_1234567_', 'x1234567y', '91234567, 1234567', '№1234567'):
        assert scoring.contains_value(text, '1234567')
    assert scoring.contains_value('答案是owl。', 'owl') and scoring.contains_value('an_owl', 'owl')
    for text in ('owls', 'bowl', 'ÉOWL'):
        assert not scoring.contains_value(text, 'owl')
