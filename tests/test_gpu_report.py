"""The report of a GPU, on a CPU: it runs, it says what cannot, and a wrong number fails it."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
from gpu_numerics import compare

SCRIPT = pathlib.Path(__file__).parents[1] / 'experiments' / 'checks' / 'gpu_report.py'


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return lambda name: runpy.run_path(str(SCRIPT), run_name=name)


def test_attention_is_timed_and_what_cannot_run_has_its_reason(script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, 'argv', ['gpu', '--quick', '--parts', 'attention', '--output',
                                      str(tmp_path / 'r.json')])
    script('__main__')
    rows = json.loads((tmp_path / 'r.json').read_text())['attention']
    timed = {(row['what'], row['direction']) for row in rows if 'seconds' in row}
    assert ('lct xla 256', 'forward') in timed and ('lct xla 256', 'forward+backward') in timed
    assert any('cuDNN' in row.get('error', '') for row in rows if row['what'].startswith('cudnn'))


def test_a_wrong_number_fails(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, 'argv', ['gpu', '--output', str(tmp_path / 'r.json')])
    module = script('gpu_report')
    report = module['Report'](module['flags']())
    right = np.ones((4, 4))
    compare(report, 'right', ('out',), [right + 1e-6], [right], 'float32')
    assert report.failed == 0
    compare(report, 'wrong', ('out',), [right + 1e-4], [right], 'float32')
    assert report.failed == 1 and 'FAIL  wrong' in capsys.readouterr().out
