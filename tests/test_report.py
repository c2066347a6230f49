"""Figures are written, tables hold the numbers, and the model card states what was done."""

import subprocess
import sys

import numpy as np
import pytest

from lct.eval.loss.by_position import LossBins
from lct.eval.recall_probe import RecallResult
from lct.eval.report import figures as report_figures
from lct.eval.report.model_card import Extension, model_card
from lct.eval.report.text import recall_table
from lct.text import short_length

LENGTHS, DEPTHS = (128, 256, 512, 1024, 2048, 4096, 8192), (0.0, 0.25, 0.5, 0.75, 1.0)


def result_of(scores):
    records = tuple({'correct': True} for _ in range(scores.size * 4))
    return RecallResult(LENGTHS, DEPTHS, scores, records)


@pytest.fixture
def results():
    before = np.zeros((5, 7))
    before[:, :3] = 1
    after = np.ones((5, 7))
    after[1, 6] = 0.75
    return result_of(before), result_of(after)


@pytest.fixture
def curves():
    edges = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    before = np.array([4.1, 3.8, 3.6, 3.5, 5.5, 7.0, 7.8, 8.1])
    after = np.array([4.1, 3.8, 3.6, 3.5, 3.42, 3.38, 3.35, 3.33])
    return {name: LossBins(edges, losses, np.full(8, 0.1), 16, 4)
            for name, losses in (('base', before), ('extended', after))}


def test_figures_are_written(results, curves, tmp_path):
    tasks = RecallResult((512, 2048), ('vt', 'cwe'), np.eye(2), ({},) * 4)
    report_figures.recall_figure({'recall probe': results, 'needle': results, 'RULER': (tasks, tasks)}, 512,
                                 tmp_path / 'needle.png')
    report_figures.recall_figure({'of one model': results[1:]}, 512, tmp_path / 'after.png', ['after'])
    report_figures.loss_figure(curves, 512, tmp_path / 'loss.png')
    for name in ('needle.png', 'after.png', 'loss.png'):
        assert (tmp_path / name).read_bytes()[:4] == b'\x89PNG'
        assert (tmp_path / name).stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) == 3


def test_the_backend_of_a_notebook_is_left_alone():
    code = ('import sys; from lct.eval.report import figures, svg; '
            'assert "matplotlib.pyplot" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], check=True)


def test_the_terminal_table_holds_the_scores(results):
    lines = recall_table(results[1]).splitlines()
    assert lines[0].split() == ['depth', '128', '256', '512', '1K', '2K', '4K', '8K']
    assert lines[3].split() == ['25%', '100', '100', '100', '100', '100', '100', '75']
    assert lines[-2].split()[0] == 'mean' and lines[-2].split()[-1] == '95'
    assert lines[-1] == '99.3% of 140 numbers recalled'
    assert len({len(line) for line in lines[:-1]}) == 1


def test_the_card_states_what_was_done(results, curves):
    stages = [
        {'length': 2048, 'theta': 4e6, 'rule': 'dynamic NTK', 'steps': 200, 'tokens': 6_553_600},
        {'length': 8192, 'theta': 32e6, 'rule': 'dynamic NTK', 'steps': 100, 'tokens': 6_553_600},
    ]
    extension = Extension(
        name='small-8K', base_model='some/small', native=512, stages=stages, data='Speeches until 1990.',
        command='python -m lct something', license='llama3',
    )
    tasks = RecallResult((512, 2048), ('vt', 'cwe'), np.array([[1, 0], [0, 0.5]]), ({},) * 4)
    card = model_card(extension, dict(zip(('base', 'extended'), results, strict=True)), curves,
                      [('needle.png', 'needle')], ruler={'base': tasks, 'extended': tasks})
    assert '| base | vt | 100 | 0 |\n| base | cwe | 0 | 50 |' in card
    assert card.startswith('---\nbase_model: some/small\n')
    assert 'license: llama3' in card and '13,107,200 tokens' in card and '**8K tokens**' in card
    assert '| 8,192 | 32,000,000 | dynamic NTK | 100 | 6,553,600 |' in card
    assert '| extended | 100 | 100 | 100 | 100 | 100 | 100 | 95 |' in card
    assert 'over 16 windows (documents: 4), by position' in card
    assert '| base | 4.100 |' in card and '4K to 8K' in card and '![needle](needle.png)' in card
    assert 'tokenizer' not in card and 'held-out' not in card  # which the facts do not mention


def test_lengths_are_written_short():
    assert [short_length(x) for x in (128, 1024, 1536, 8192, 1047552, 2**20)] == [
        '128', '1K', '1.5K', '8K', '1023K', '1M']
