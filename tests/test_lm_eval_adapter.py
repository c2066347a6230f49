"""Log-likelihoods and texts equal those of the lm-evaluation-harness over transformers with the same weights
in float64.

The golden file is made by experiments/checks/check_lm_eval.py --golden; what needs the harness itself is
skipped without it.
"""

import contextlib
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from lct import sharding
from lct.data import tokenizer
from lct.eval import loglikelihood, runner
from lct.models import llama
from lct.weights import llama_hf

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = json.loads((ROOT / 'tests' / 'golden' / 'lm_eval.json').read_text())
BASE = ROOT / 'experiments' / 'base'
BAR = 1e-4
OF_A_PAGE = 1e-6  # of its nats: a sum over hundreds of tokens


def on(degrees):
    return contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees))


def base():
    config, params = llama_hf.load(BASE, 'float32')
    return runner.Model(params, config, tokenizer.load(BASE), batch_tokens=1024,
                        memory=llama.Memory(remat='none', loss_chunk=64))


@pytest.mark.parametrize('degrees', [None, (1, 2, 2, 2)])
def test_likelihoods_equal_those_of_transformers(degrees):
    with on(degrees):
        pairs = [(one['context'], one['continuation']) for one in GOLDEN['pairs']]
        progress = []
        got = loglikelihood.score(base(), pairs, lambda *at: progress.append(at))
    np.testing.assert_allclose(
        [value for value, _ in got], [one['value'] for one in GOLDEN['pairs']], atol=BAR
    )
    assert [greedy for _, greedy in got] == [one['greedy'] for one in GOLDEN['pairs']]
    assert progress[-1] == (len(pairs), len(pairs))


def test_texts_equal_those_of_transformers():
    prompts = [one['prompt'] for one in GOLDEN['written']]
    got = loglikelihood.generate(base(), prompts, GOLDEN['new'], [GOLDEN['stop']])
    assert got == [one['text'] for one in GOLDEN['written']]


def test_windows_of_a_page_add_up_to_its_likelihood():
    """Windows of the harness's rolling likelihood, written down again: max_length targets a window, the last
    one with as much context as fits."""
    model, size = base(), GOLDEN['max_length']
    for one in GOLDEN['rolling']:
        ids, pairs = [model.tokenizer.bos_id, *model.tokenizer.encode(one['text'])], []
        for start in range(1, len(ids), size):
            stop = min(start + size, len(ids))
            pairs.append((ids[max(stop - size - 1, 0):start], ids[start:stop]))
        assert sum(value for value, _ in loglikelihood.score(model, pairs)) == pytest.approx(
            one['value'], abs=BAR, rel=OF_A_PAGE)


def test_likelihoods_agree_with_generation():
    model = base()
    ids = model.tokenizer.encode('def main():\n    parser = ')
    text = loglikelihood.generate(model, [ids], 6)[0]
    new = model.tokenizer.encode(text)
    (value, greedy), (other, wrong) = loglikelihood.score(
        model, [(ids, new), (ids, [*new[:-1], (new[-1] + 1) % 1000])]
    )
    assert greedy and not wrong and other < value < 0


def test_bad_input():
    model = base()
    with pytest.raises(
        ValueError, match='1 of 2 pairs have an empty context or continuation; begin with the BOS'
    ):
        loglikelihood.score(model, [([1], [2]), ([], [3])])
    with pytest.raises(ValueError, match='token id 1392 in row 1'):
        loglikelihood.score(model, [([1], [1392])])


def test_settings_that_change_answers_are_honoured_or_refused():
    loglikelihood.check_settings({'max_gen_toks': 8, 'until': ['.'], 'do_sample': True, 'temperature': 0.5,
                                  'top_k': 0, 'repetition_penalty': 1.0, 'use_cache': True})
    for name, value in (('repetition_penalty', 1.1), ('top_k', 50), ('min_p', 0.05), ('typical_p', 0.9)):
        with pytest.raises(ValueError, match=f'generation_kwargs {name} = {value} cannot be honoured'):
            loglikelihood.check_settings({'do_sample': True, name: value})


# ---------------------------------------------------------------------------------------------------
# With the harness
# ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter():
    pytest.importorskip('lm_eval')
    from lct.eval import lm_eval_adapter
    return lm_eval_adapter


def request(*args):
    return types.SimpleNamespace(args=args)


def test_the_harness_gets_what_transformers_would_give_it(adapter):
    lm = adapter.ShardedLM(base(), GOLDEN['max_length'])
    rolling = lm.loglikelihood_rolling([request(one['text']) for one in GOLDEN['rolling']])
    np.testing.assert_allclose(rolling, [one['value'] for one in GOLDEN['rolling']], atol=BAR, rtol=OF_A_PAGE)
    settings = {'until': [GOLDEN['stop']], 'max_gen_toks': GOLDEN['new'], 'do_sample': False}
    prompts = [lm.model.tokenizer.decode(one['prompt']) for one in GOLDEN['written']]
    assert lm.generate_until([request(prompt, settings) for prompt in prompts]) == [
        one['text'] for one in GOLDEN['written']]
    assert lm.tok_encode('<|begin_of_text|>a') == [0, *lm.tok_encode('a')]
    assert adapter.ShardedLM(lm.model, bos=True).tok_encode('a') == [0, *lm.tok_encode('a')]
    with pytest.raises(ValueError, match='max_length 4096 is not within the 512 positions'):
        adapter.ShardedLM(lm.model, 4096)


def test_our_tasks_under_the_harness(adapter):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from lct.data.corpus.documents import Document
    from lct.eval import suites
    from lct.eval.tasks import reference_readers
    from lct.eval.tasks.material import Material
    model = base()
    material = Material(
        model.tokenizer, [Document('page', (ROOT / 'tests' / 'golden' / 'page.txt').read_text())]
    )
    plan = suites.Plan(material, (512,), {512: 2}, ('niah_single_1', 'vt'))

    class Oracle(adapter.ShardedLM):
        def generate_until(self, requests, disable_tqdm=False):
            return [reference_readers.oracle(one.args[0]) for one in requests]

    found = simple_evaluate(
        model=Oracle(model),
        tasks=adapter.tasks(suites.SUITES['ruler'].items(plan)),
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    assert {name: one['score,none'] for name, one in found['results'].items()} == {
        'lct_niah_single_1_512': 1.0, 'lct_vt_512': 1.0}
