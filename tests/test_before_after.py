"""What extend.py measures before and after: kept in files once done, with a needle of another wording."""

import types

import numpy as np
import pytest
from test_recall_probe import HAYSTACK, TOKENIZER

from lct import sharding
from lct.data.synthetic import recall
from lct.eval import before_after
from lct.eval.loss.by_position import LossBins
from lct.eval.recall_probe import RecallResult

NEEDLE = {'lengths': [512], 'depths': [0.0, 1.0], 'scores': [[0.5], [0.0]], 'mean': 0.25,
          'records': [{'length': 512, 'depth': depth, 'sample': i, 'correct': depth + i == 0}
                      for depth in (0.0, 1.0) for i in range(2)]}


def test_measurements_are_computed_once_and_weights_loaded_only_if_needed(tmp_path):
    calls = []

    def once(kind, result):
        return lambda name, config, params: (calls.append((kind, name, params)), result)[1]

    recall_result = RecallResult((128,), (0.5,), np.ones((1, 1)), ({'correct': True},))
    bins = LossBins((0, 64), np.array([2.0]), np.array([0.1]), 4, 2)
    evaluation = types.SimpleNamespace(recall=once('recall', recall_result), loss=once('loss', bins),
                                       needle=once('needle', NEEDLE), short_windows=None, needle_plan='some')
    mesh = sharding.make_mesh((1, 1, 1, 1))
    first = before_after.measure(evaluation, 'base', None, lambda: 'weights', tmp_path, mesh)
    assert calls == [(kind, 'base', 'weights') for kind in ('recall', 'loss', 'needle')]
    assert first.short_loss is None and first.needle == NEEDLE
    (tmp_path / 'loss_base.json').unlink()
    again = before_after.measure(evaluation, 'base', None, lambda: 'again', tmp_path, mesh)
    assert calls[3:] == [('loss', 'base', 'again')]  # a stopped run continues behind what is done
    before_after.measure(evaluation, 'base', None, pytest.fail, tmp_path, mesh)
    assert again.recall.scores == 1 and again.needle_grid.samples == 2
    assert again.needle_grid.scores.tolist() == NEEDLE['scores']


def test_needle_prompts_fit_the_trained_length_and_share_no_wording_with_the_training_rows():
    plan = before_after.make_needle_plan(TOKENIZER, HAYSTACK, 2048, seed=1)
    assert plan.lengths == (512, 2048) and set(plan.counts.values()) == {before_after.NEEDLE_SAMPLES}
    items = before_after.QuickNeedles().items(plan)
    assert len(items) == 2 * len(before_after.NEEDLE_DEPTHS) * before_after.NEEDLE_SAMPLES
    assert not any(item.teacher_forced for item in items)
    assert recall.BEFORE_KEY.strip() not in items[0].make().text
    assert before_after.make_needle_plan(TOKENIZER, HAYSTACK, 256, seed=1) is None
    assert plan.depths == (0.0, 0.5, 1.0)
