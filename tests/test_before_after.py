"""What extend.py measures before and after: kept in files once done, with a needle of another wording."""

import json
import types

import numpy as np
import pytest
from test_recall_probe import HAYSTACK, TOKENIZER

from lct import sharding
from lct.data.synthetic import recall
from lct.eval import before_after, quick_ruler
from lct.eval.loss.by_position import EvaluationWindows, LossBins
from lct.eval.recall_probe import RecallGrid, RecallResult

NEEDLE = {'lengths': [512], 'depths': [0.0, 1.0], 'scores': [[0.5], [0.0]], 'mean': 0.25,
          'records': [{'length': 512, 'depth': depth, 'sample': i, 'correct': depth + i == 0}
                      for depth in (0.0, 1.0) for i in range(2)]}

RULER = {'lengths': [512], 'tasks': {'vt': {'512': {'mean': 50.0}}, 'cwe': {'512': {'mean': 100.0}}}}


def test_measurements_are_computed_once_and_weights_loaded_only_if_needed(tmp_path):
    calls, lines, seeds = [], [], {'needle': 0, 'loss': 0, 'needle_suite': 0,
                               'ruler_suite': 0}

    def once(kind, result):
        return lambda name, config, params: (calls.append((kind, name, params)), result)[1]

    recall_result = RecallResult((128,), (0.5,), np.ones((1, 1)), ({'correct': True},))
    bins = LossBins((0, 64), np.array([2.0]), np.array([0.1]), 4, 2)
    evaluation = types.SimpleNamespace(recall=once('recall', recall_result), loss=once('loss', bins),
                                       needle=once('needle', NEEDLE), short_windows=None, needle_plan='some',
                                       ruler_plan='some', ruler=once('ruler', RULER),
                                       grid='some', windows='some',
                                       settings=lambda kind: {'seed': seeds[kind]}, log=lines.append)
    mesh = sharding.make_mesh((1, 1, 1, 1))
    first = before_after.measure(evaluation, 'base', None, lambda: 'weights', tmp_path, mesh)
    assert calls == [(kind, 'base', 'weights') for kind in ('recall', 'loss', 'needle', 'ruler')]
    assert first.short_loss is None and first.needle == NEEDLE
    (tmp_path / 'loss_base.json').unlink()
    again = before_after.measure(evaluation, 'base', None, lambda: 'again', tmp_path, mesh)
    assert calls[4:] == [('loss', 'base', 'again')]  # a stopped run continues behind what is done
    before_after.measure(evaluation, 'base', None, pytest.fail, tmp_path, mesh)
    assert lines == []
    seeds['needle'] = 1
    before_after.measure(evaluation, 'base', None, lambda: 'other', tmp_path, mesh)
    path, text = tmp_path / 'loss_base.json', (tmp_path / 'loss_base.json').read_text()
    for damaged in ('', text.replace('2.0', '1.0')):
        path.write_text(damaged)
        before_after.measure(evaluation, 'base', None, lambda: 'repaired', tmp_path, mesh)
        assert path.read_text() == text
    before_after.measure(evaluation, 'base', None, lambda: 'trained on', tmp_path, mesh, {'training': 7})
    assert [(kind, params) for kind, _, params in calls[5:]] == [
        ('recall', 'other'), ('loss', 'repaired'), ('loss', 'repaired'), ('recall', 'trained on'),
        ('loss', 'trained on'), ('needle', 'trained on'), ('ruler', 'trained on')]
    assert lines[0].endswith('needle_base.json was measured with other settings (seed); it is measured again')
    assert f'WARNING: {path} was edited or damaged' in lines[1] and len(lines) == 7
    assert again.recall.scores == 1 and again.needle_grid.samples == 2
    assert again.needle_grid.scores.tolist() == NEEDLE['scores']
    assert again.ruler_grid.scores.tolist() == [[0.5], [1.0]] and again.ruler_grid.depths == ('vt', 'cwe')


def test_needle_prompts_fit_the_trained_length_and_share_no_wording_with_the_training_rows():
    plan = before_after.make_needle_plan(TOKENIZER, HAYSTACK, 2048, seed=1)
    assert plan.lengths == (512, 2048) and set(plan.counts.values()) == {before_after.NEEDLE_SAMPLES}
    items = before_after.QuickNeedles().items(plan)
    assert len(items) == 2 * len(before_after.NEEDLE_DEPTHS) * before_after.NEEDLE_SAMPLES
    assert not any(item.teacher_forced for item in items)
    assert recall.BEFORE_KEY.strip() not in items[0].make().text
    assert before_after.make_needle_plan(TOKENIZER, HAYSTACK, 256, seed=1) is None
    assert plan.depths == (0.0, 0.5, 1.0)


def test_prompts_of_ruler_fit_and_their_answers_are_short():
    plan = quick_ruler.make_plan(TOKENIZER, HAYSTACK, 2048, seed=1)
    assert plan.lengths == (2048,) and plan.tasks == quick_ruler.TASKS  # a byte is a token here
    made = [item.make() for item in quick_ruler.QuickRuler().items(plan)]
    assert len(made) == len(quick_ruler.TASKS) * quick_ruler.SAMPLES
    assert all(sample.meta['tokens'] <= 2048 for sample in made)
    assert quick_ruler.make_plan(TOKENIZER, HAYSTACK, 256, seed=1) is None
    result = {'lengths': [512, 2048], 'tasks': {'vt': {512: {'mean': 50.0}, 2048: {'mean': 0.0}}}}
    assert quick_ruler.describe(result) == 'mean of tasks 50 at 512, 0 at 2,048'


def test_settings_are_those_of_the_prompts_and_windows():
    def settings(seed=1, lengths=(128,), haystack=HAYSTACK):
        windows = EvaluationWindows(np.full((2, 9), seed, np.int32), np.zeros(2, int))
        evaluation = before_after.Evaluation(
            TOKENIZER, haystack, RecallGrid(lengths, (0.5,), 1, seed), windows,
            needle_plan=before_after.make_needle_plan(TOKENIZER, haystack, 512, seed))
        return [json.dumps(evaluation.settings(kind)) for kind in ('needle', 'loss', 'needle_suite')]

    same = settings()
    assert settings() == same
    changes = [settings(seed=2), settings(lengths=(128, 256)), settings(haystack=HAYSTACK[::-1])]
    differ = [[one != other for one, other in zip(same, changed)] for changed in changes]
    assert differ == [[True, True, True], [True, False, False], [True, False, True]]
