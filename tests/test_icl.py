"""In-context learning: nested episodes, reference learners at their known levels, curves."""

import pathlib

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.eval import scoring
from lct.eval.report import figures
from lct.eval.tasks import icl, icl_learners, icl_tasks

BYTES = tokenizers.load('bytes')
BASE = tokenizers.load(pathlib.Path(__file__).parents[1] / 'experiments' / 'base')


@pytest.mark.parametrize('config', icl.TASKS.values(), ids=lambda config: config.task)
def test_episodes_are_nested_and_samples_pure(config):
    few, many = (icl.sample(config, shots, 3, 0, BYTES) for shots in (4, 64))
    shown = few.prompt.rpartition('Input: ')[0]
    assert shown.count('\n') == 8
    if config.task == 'topics_grouped':  # new shots stand between the old ones
        assert set(shown.split('Input: ')) <= set(many.prompt.split('Input: '))
    else:
        assert many.prompt.startswith(shown)
    if config.task != 'lookup':  # its queries are among the shots
        assert few.outputs == many.outputs and few.prompt.splitlines()[-1] == many.prompt.splitlines()[-1]
    assert icl.sample(config, 4, 3, 0, BYTES) == few
    assert icl.sample(config, 4, 3, 1, BYTES).prompt != few.prompt
    assert icl.sample(config, 4, 3 + icl.QUERIES, 0, BYTES).prompt != few.prompt
    assert max(len(BYTES.encode(f' {x}')) for x in few.outputs) < few.max_new_tokens
    assert {icl.score(f' {output}\nInput: 3', few.outputs) for output in few.outputs} == {1.0}
    assert icl.score('', few.outputs) == icl.score('x', few.outputs) == 0.0
    labels = {example.label for number in (0, 3) for example in icl.episode(config, 0, number, 64)[0]}
    choices = {
        choice for number in (0, 3) for choice in icl.sample(config, 4, 4 * number, 0, BYTES).meta['choices']
    }
    assert choices == (
        set() if config.task in ('cipher', 'lookup', 'regression', 'parity_running') else labels
    )


# Measured independently with other code, 12 rules x 300 queries each.
@pytest.mark.parametrize(('dims', 'shots', 'logistic', 'nearest'), [
    (16, 16, .73, .64), (16, 64, .88, .74), (16, 256, .96, .78), (64, 64, .72, .60)])
def test_linear_learners_reach_their_known_levels(dims, shots, logistic, nearest):
    got = icl.reference_accuracy(icl_tasks.Linear(dims=dims), 0, shots, range(384 * icl.QUERIES))
    assert got == pytest.approx({'logistic regression': logistic, '5 nearest': nearest}, abs=0.05)


@pytest.mark.parametrize(('task', 'shots', 'low', 'high'), [
    ('topics', 1, .05, .3), ('topics', 256, .99, 1), ('topics_16', 512, .99, 1),
    ('sentiment_flipped', 1, .4, .75), ('sentiment_flipped', 256, 1, 1), ('sentiment', 256, 1, 1),
    ('cipher', 1, 0, .1), ('cipher', 128, 1, 1), ('parity', 8, .4, .7), ('parity', 64, 1, 1),
    ('parity_running', 1, 1, 1), ('lookup', 1, 1, 1), ('lookup', 2048, 1, 1), ('chain', 1, 0, .7),
    ('chain', 128, 1, 1), ('regression', 2, 0, .4), ('regression', 8, 1, 1)])
def test_learners_go_from_ignorance_to_certainty(task, shots, low, high):
    (accuracy,) = icl.reference_accuracy(icl.task(task), 0, shots, range(24 * icl.QUERIES)).values()
    assert low <= accuracy <= high


def test_labels_alone_do_not_tell_the_class():
    labels = [
        [example.label for example in icl.episode(icl.task('topics'), 0, number, 64)[0]] for number in (0, 1)
    ]
    assert not set(labels[0]) & set(labels[1])
    shots, _ = icl.episode(icl.task('sentiment_flipped'), 0, 0, 64)
    assert {example.label for example in shots if 'awful' in example.text} == {'positive'}


def test_orders_show_the_same_examples_in_another_order():
    balanced, queries = icl.episode(icl.task('topics_balanced'), 0, 0, 64)
    for start in range(0, 64, 8):
        assert len({example.label for example in balanced[start:start + 8]}) == 8
    assert balanced[:24] == icl.episode(icl.task('topics_balanced'), 0, 0, 24)[0]
    grouped, same = icl.episode(icl.task('topics_grouped'), 0, 0, 64)
    drawn, _ = icl.episode(icl.task('topics'), 0, 0, 64)
    assert [e.label for e in grouped] == sorted(e.label for e in drawn)
    assert sorted(e.text for e in grouped) == sorted(e.text for e in drawn)
    assert [q.text for q in queries] == [q.text for q in same]


def test_every_lookup_can_be_found():
    for index in range(40):
        sample = icl.sample(icl.task('lookup'), 300, index, 0, BYTES)
        query = sample.prompt.splitlines()[-1]
        assert sample.prompt.count(f'{query}\nOutput: {sample.outputs[0]}\n') == 1
        assert sample.prompt.count(f'{query}\n') == 2


def test_curves():
    pairs = []
    for shots in (1, 4):
        for index in range(64):
            sample = icl.sample(icl.task('sentiment'), shots, index, 0, BYTES)
            pairs.append((sample, sample.answer if shots == 4 or sample.outputs[0] == 'positive' else 'no'))
    got = icl.curve(pairs)
    assert list(got) == [1, 4]
    assert got[4]['accuracy'] == got[4]['macro'] == 1.0 and got[4]['count'] == 64
    labels = {(one.meta['set'], one.meta['label']) for one, _ in pairs}
    assert (
        got[1]['macro'] == np.mean([label == 'positive' for _, label in labels])
        and 0.3 < got[1]['accuracy'] < 0.7
    )
    assert got[1]['interval'][0] < got[1]['accuracy'] < got[1]['interval'][1]
    assert got[4]['interval'] == list(scoring.wilson(1.0, 16)) and got[4]['sets'] == 16
    assert got[4]['tokens'] > 3 * got[1]['tokens'] / 2
    assert icl.curve(pairs[:icl.QUERIES])[1]['interval'] is None  # one rule tells nothing about others


def test_gains_begin_where_the_shots_have_every_label():
    answers = {2: 'none', 8: 'none', 16: 'some', 32: 'all'}
    made = [
        (shots, icl.sample(icl.task('topics'), shots, i, 0, BYTES)) for shots in answers for i in range(16)
    ]
    right = {'none': lambda i: False, 'some': lambda i: i % 4 == 0, 'all': lambda i: True}
    got = icl.curve((one, one.answer if right[answers[shots]](one.index) else '') for shots, one in made)
    assert [cell['gain'] for cell in got.values()] == [None, None, 0.25, 1]
    lookups = [icl.sample(icl.task('lookup'), 2, i, 0, BYTES) for i in range(4)]
    assert icl.curve((one, one.answer) for one in lookups)[2]['gain'] is None


@pytest.mark.parametrize('shots', [14, 16, 18])  # some shots determine their rule, others do not
def test_intervals_have_their_coverage(shots):
    config, sets = icl.task('parity'), []
    for number in range(600):
        chosen, queries = icl.episode(config, 0, number, shots)
        got = icl_learners.parity([e.x for e in chosen], [e.label for e in chosen], [q.x for q in queries])
        sets.append([float(answer == query.label) for answer, query in zip(got, queries, strict=True)])
    truth, rng = np.mean(sets), np.random.default_rng(0)
    of_20_samples = lambda: rng.integers(0, len(sets), 20 // icl.QUERIES)
    runs = [[sets[i] for i in of_20_samples()] for _ in range(1000)]
    covered = [low <= truth <= high for low, high in map(scoring.clustered_interval, runs)]
    assert 0.93 <= np.mean(covered) <= 0.98


def test_learners_answer_the_queries_of_the_model():
    config = icl.task('cipher')
    one_by_one = [icl.reference_accuracy(config, 0, 8, [i])['table of letters'] for i in (1, 2, 9)]
    assert icl.reference_accuracy(config, 0, 8, [9, 1, 2])['table of letters'] == np.mean(one_by_one)
    for i in range(12):
        chosen, _ = icl.episode(config, 0, i // icl.QUERIES, 8)
        sample = icl.sample(config, 8, i, 0, BYTES)
        query = sample.prompt.splitlines()[-1].removeprefix('Input: ')
        (known,) = icl_learners.letters([e.x for e in chosen], [e.label for e in chosen], [query])
        assert icl.reference_accuracy(config, 0, 8, [i])['table of letters'] == (known in sample.outputs)


@pytest.mark.parametrize('config', icl.TASKS.values(), ids=lambda config: config.task)
def test_lengths_hold_every_episode_and_are_known_without_it(config, monkeypatch):
    shots = 64
    # No prompt of a million shots is made.
    known = [icl.length(config, shots, 0, BASE), icl.length(config, 10**6, 0, BASE)]
    for index in range(0, 24 * icl.QUERIES, 3):
        sample = icl.sample(config, shots, index, 0, BASE, overhead=7)
        used = 7 + (BASE.bos_id is not None) + len(BASE.encode(sample.text)) + sample.max_new_tokens
        assert sample.meta['tokens'] == used <= sample.length == known[0] + 7 < 1.45 * used
    assert known[1] / 10**6 < 1.25 * known[0] / shots


def test_the_figure_is_written(tmp_path):
    curve = {shots: {'accuracy': 0.5, 'interval': [0.4, 0.6]} for shots in (1, 2, 1024)}
    figures.shots_figure({'model': curve}, tmp_path / 'shots.png', {'table': {1: 0.2, 1024: 1.0}})
    assert (tmp_path / 'shots.png').read_bytes()[:4] == b'\x89PNG'


def test_shot_counts_fit_the_length():
    config = icl.task('regression')
    counts = icl.shot_counts(config, 0, BYTES, 2048)
    assert counts[:3] == (1, 2, 4)
    assert icl.sample(config, counts[-1], 0, 0, BYTES).length <= 2048
    assert icl.sample(config, 2 * counts[-1], 0, 0, BYTES).length > 2048
    assert icl.shot_counts(config, 0, BYTES, 2048, overhead=1024) == counts[:-1]
    with pytest.raises(ValueError, match='length 20 is too small for one shot of regression'):
        icl.shot_counts(config, 0, BYTES, 20)


def test_elimination_agrees_with_all_rules_tried():
    rng = np.random.default_rng(0)
    xs = rng.integers(0, 2, (7, 6))
    hidden = rng.integers(0, 2, 6)
    labels = [str(x @ hidden % 2) for x in xs]
    queries = rng.integers(0, 2, (30, 6))
    rules = [np.array([i >> j & 1 for j in range(6)]) for i in range(64)]
    agreeing = [
        rule for rule in rules if all(str(x @ rule % 2) == y for x, y in zip(xs, labels, strict=True))
    ]
    got = icl_learners.parity(list(xs), labels, list(queries))
    assert got in [[str(query @ rule % 2) for query in queries] for rule in agreeing]


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown task 'banking'; the tasks in context are linear, "):
        icl.task('banking')
    with pytest.raises(ValueError, match="unknown order 'sorted'"):
        icl.episode(icl_tasks.Topics(order='sorted'), 0, 0, 4)
    with pytest.raises(ValueError, match='0 shots must be at least 1'):
        icl.episode(icl.task('linear'), 0, 0, 0)
    with pytest.raises(ValueError, match='30 hidden positions of 20 bits'):
        icl.episode(icl_tasks.Parity(hidden=30), 0, 0, 4)
    with pytest.raises(ValueError, match='100 classes must be 2 to 16'):
        icl.episode(icl_tasks.Topics(classes=100), 0, 0, 4)
