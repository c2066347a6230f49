"""The numeric check passes for a correct model, and fails for one that is broken on purpose."""

import dataclasses
import json
import pathlib
import runpy
import sys

import jax
import numpy as np
import pytest
import tiny

from lct.eval import numerics
from lct.eval.numerics import Setting
from lct.models import llama
from lct.ops import all_to_all_attention, ring_attention

SCRIPT = pathlib.Path(__file__).parents[1] / 'experiments' / 'check_numerics.py'


BATCH = numerics.make_batch(tiny.CONFIG.vocab_size, 64, packed=True)


@pytest.fixture(scope='module')
def params():
    return jax.device_get(llama.init(tiny.CONFIG, jax.random.key(0)))


@pytest.fixture(scope='module')
def reference(params):
    return numerics.run(params, tiny.CONFIG, BATCH, 'float32')


@pytest.fixture
def forget():
    """Programs compiled from broken functions must not outlive their test."""
    yield
    jax.clear_caches()


def found(params, reference, setting):
    ours = numerics.errors(numerics.run(params, tiny.CONFIG, BATCH, 'float32', setting), reference)
    return ours, numerics.limits('float32', ours)


def test_a_correct_split_is_within_its_limits(params, reference):
    ours, allowed = found(params, reference, Setting(4, 2, 'zigzag', 'ring', 1, 'xla'))
    assert numerics.within(ours, allowed)
    assert {'logits', 'loss', 'gradient norm', 'gradient', 'embed', 'layers.wq', 'final_norm'} <= set(ours)
    flat = lambda grads: np.concatenate([np.ravel(x) for x in grads.values()])
    doubled = reference._replace(grads={kind: 2 * x for kind, x in reference.grads.items()})
    wrong = numerics.errors(doubled, reference)
    assert wrong['gradient'] == pytest.approx(
        numerics.relative_error(flat(doubled.grads), flat(reference.grads))
    )
    assert wrong['gradient norm'] == pytest.approx(1) and wrong['logits'] == wrong['loss'] == 0


def test_bf16_limits_follow_the_error_of_one_device():
    one = {'logits': 0.01, 'loss': 1e-7, 'gradient norm': 0.0, 'gradient': 0.02, 'embed': 0.03}
    assert numerics.limits('bfloat16', one) == pytest.approx(
        {'logits': 0.011, 'loss': 2**-8, 'gradient norm': 2**-8, 'gradient': 0.022, 'embed': 0.045})


def test_a_wrong_backward_alone_is_found_and_named(params, reference, monkeypatch, forget):
    own = all_to_all_attention._own_grad
    monkeypatch.setattr(all_to_all_attention, '_own_grad', lambda x, *rest: own(x, *rest) / 2)
    ours, allowed = found(params, reference, Setting(4, 1, 'contiguous', 'all_to_all', 1, 'xla'))
    assert {name for name in ours if ours[name] > allowed[name]} >= {'layers.wk', 'layers.wv'}
    assert ours['logits'] <= allowed['logits'] and ours['loss'] <= allowed['loss']


def test_nan_never_passes():
    assert not numerics.within({'loss': np.nan}, {'loss': 1.0})
    assert not numerics.within({'loss': 0.0}, {'loss': np.nan})


def test_settings_that_cannot_run_have_a_reason():
    reason = lambda *x, kernel='xla': numerics.refusal(tiny.CONFIG, 64, 'float32', Setting(*x, kernel))
    assert reason(4, 1, 'zigzag', 'ring', 1) == '' == reason(1, 1, 'contiguous', 'ring', 1)
    assert 'every strategy is ring' in reason(1, 1, 'contiguous', 'all_gather', 1)
    assert '= 16 devices but this process has 8' in reason(16, 1, 'striped', 'ring', 1)
    assert 'an equal share of heads' in reason(8, 1, 'striped', 'all_to_all', 1)
    assert 'needs node_size > 1' in reason(2, 1, 'striped', 'double_ring', 1)
    assert 'num_kv_heads 2 is not a multiple of the mesh degree tensor = 4' in reason(
        2, 4, 'striped', 'ring', 1
    )
    assert 'triton' in reason(2, 1, 'striped', 'ring', 1, kernel='triton')
    assert '64 is not a multiple of 2 * ring_size = 12' in numerics.refusal(
        dataclasses.replace(tiny.CONFIG, embed_dim=48), 64, 'float32',
        Setting(6, 1, 'zigzag', 'ring', 1, 'xla'))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_attention_on_one_device_matches_the_oracle(params, dtype):
    ours, allowed = numerics.attention_errors(params, tiny.CONFIG, BATCH, dtype, 'xla')
    assert list(ours) == ['out', 'dq', 'dk', 'dv'] and numerics.within(ours, allowed)
    assert max(ours.values()) < (1e-6 if dtype == 'float32' else 8e-3)


def script(monkeypatch, path, *flags):
    """The exit status of the script, and its JSON."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(
        sys, 'argv', ['check', '--length', '64', '--layouts', 'zigzag', '--output', str(path), *flags]
    )
    try:
        runpy.run_path(str(SCRIPT), run_name='__main__')
        status = 0
    except SystemExit as end:
        status = end.code
    return status, json.loads(path.read_text()) if path.exists() else None


def test_the_script_passes_then_fails_when_strategies_break(monkeypatch, tmp_path, capsys, forget):
    status, written = script(
        monkeypatch, tmp_path / 'good.json', '--ring-sizes', '2', '--strategies', 'all_gather'
    )
    assert status == 0 and [x['passed'] for x in written['settings']] == [True]
    assert [x['kernel'] for x in written['not_run']] == ['triton', 'mosaic']
    assert '1 settings and 1 attention ops: 0 failed; 2 not run' in capsys.readouterr().out

    ring_pass = ring_attention.ring_pass  # without its last step
    monkeypatch.setattr(ring_attention, 'ring_pass', lambda *x: ring_pass(*x[:-1], max(x[-1] - 1, 1)))
    monkeypatch.setattr(all_to_all_attention, '_to_heads', lambda *x: 1 / 0)  # as a compiler that gives up
    status, written = script(
        monkeypatch, tmp_path / 'bad.json', '--ring-sizes', '4', '--strategies', 'ring', 'all_to_all'
    )
    assert status == 1 and [x['passed'] for x in written['settings']] == [False, False]
    assert written['settings'][0]['errors']['logits'] > 100 * written['limits']['logits']
    text = capsys.readouterr().out
    assert 'FAIL' in text and 'ZeroDivisionError' in text and '2 failed' in text


def test_the_script_refuses_flags_that_contradict_each_other(monkeypatch, tmp_path, capsys):
    assert script(monkeypatch, tmp_path / 'no.json', '--layers', '2') == (1, None)
    assert '--layers cuts random weights only' in capsys.readouterr().err
