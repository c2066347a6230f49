"""Adversarial needles: readers that go by position get the rates that follow from the design, readers of the
question are right."""

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.corpus.documents import Document
from lct.eval import scoring
from lct.eval.tasks import adversarial_needles as adversarial
from lct.eval.tasks import adversarial_outcomes, reference_readers, ruler
from lct.eval.tasks.material import Material

TEXT = [
    Document('a', '\n'.join(f'Line {i} of the text holds {i * 7} words, or so it says.' for i in range(500)))
]
CONFLICTS = [
    adversarial.Conflict(f'{rule}_{wrong}', rule, wrong) for rule in adversarial.RULES for wrong in (0, 1, 4)
]
LENGTH = 4096


@pytest.fixture(scope='module')
def material():
    return Material(tokenizers.load('bytes'), TEXT)


def rates(material, config, read, count):
    made = [material.sample(config, LENGTH, i) for i in range(count)]
    return adversarial_outcomes.rates((sample, read(sample.text)) for sample in made)


@pytest.mark.parametrize(
    'config',
    [
        *CONFLICTS,
        adversarial.NearNames('near'),
        adversarial.Straddling('cut', 8),
        adversarial.Absent('absent'),
        adversarial.Absent('present', True),
    ],
    ids=lambda config: config.task,
)
def test_readers_by_position_get_the_rates_of_the_design(material, config):
    for name, read in (('first', reference_readers.first_value), ('last', reference_readers.last_value)):
        got = rates(material, config, read, 20)
        assert got['target'] == pytest.approx(config.expected_rate(name))
        assert got['target'] + got['stale'] == 1 and got['none'] == got['mixed'] == 0
    assert rates(material, config, reference_readers.silent, 20)['none'] == 1
    assert rates(material, config, reference_readers.rule_reader, 20)['target'] == 1


def test_a_missing_name_differs_from_its_control_in_one_needle(material):
    for i in range(10):
        absent, present = (
            material.sample(adversarial.DEFAULTS[name], LENGTH, i) for name in ('absent', 'present')
        )
        name = reference_readers.NEEDLE_QUESTION.search(absent.prompt)[1]
        assert name == reference_readers.NEEDLE_QUESTION.search(present.prompt)[1]
        few, all_needles = (reference_readers.NEEDLE.findall(one.prompt) for one in (absent, present))
        assert len(few) == 4 and [pair for pair in all_needles if pair[0] != name] == few
        assert all_needles[i % 5] == (name, present.outputs[0]) and absent.outputs == ['unknown']
        assert (
            adversarial_outcomes.outcome(present, 'unknown')
            == adversarial_outcomes.outcome(absent, few[0][1])
            == 'stale'
        )
        assert len(present.meta['depths']) == 1 and absent.meta['depths'] == []
        first = [one.prompt.split('\n')[2] for one in (absent, present)]
        assert first[0] == first[1]  # they begin with the same line
    with pytest.raises(ValueError, match='0 other names'):
        material.sample(adversarial.Absent('x', others=0), LENGTH, 0)


def test_questions_about_one_text_count_less_than_alone(material):
    config = adversarial.DEFAULTS['several']
    made = [material.sample(config, LENGTH, i) for i in range(40)]
    # All questions about a text are right or wrong together: ten texts count as ten needles.
    got = adversarial_outcomes.rates((one, one.outputs[0] if one.meta['group'] % 2 else '') for one in made)
    low, high = scoring.wilson(0.5, 10)
    assert got['interval'][0] == pytest.approx(low, abs=0.02)
    assert got['interval'][1] == pytest.approx(high, abs=0.02)
    for count in (1, 4):
        assert adversarial_outcomes.rates((one, '') for one in made[:count])['interval'] is None


def test_position_bias_tells_habit_from_reading(material):
    config = adversarial.Conflict('trusted', 'trusted', 2)
    assert rates(material, config, reference_readers.first_value, 20)['position_bias'] == 1
    assert rates(material, config, reference_readers.last_value, 20)['position_bias'] == -1
    assert rates(material, config, reference_readers.rule_reader, 20)['position_bias'] == 0
    assert (
        rates(material, adversarial.DEFAULTS['latest'], reference_readers.last_value, 20)['position_bias']
        is None
    )


def test_an_answer_with_every_value_is_mixed(material):
    def everything(prompt):
        return ' '.join(value for _, value in reference_readers.NEEDLE.findall(prompt))

    got = rates(material, adversarial.DEFAULTS['latest'], everything, 6)
    assert (got['mixed'], got['target'], got['count']) == (1, 0, 6)


@pytest.mark.parametrize('config', [*adversarial.DEFAULTS.values(), CONFLICTS[-1],
                                    adversarial.Conflict('many', 'latest', 8, distractors=5),
                                    adversarial.Several('uuids', 6, 3, 'uuids', 'uuids')],
                         ids=lambda config: config.task)
def test_prompts_keep_their_budget(material, config):
    for i in range(8):
        sample = material.sample(config, LENGTH, i)
        used = material.counter.bos + material.counter.count(sample.text) + sample.max_new_tokens
        assert 0.95 * LENGTH < used <= LENGTH
        assert sample.prompt.count(sample.outputs[0]) == 1
        assert sample == material.sample(config, LENGTH, i)


def test_right_first_and_right_last_walk_the_same_depths(material):
    config = adversarial.Conflict('dated', 'dated', 1, spread=0.4)
    made = [material.sample(config, LENGTH, i) for i in range(20)]
    first, last = (
        [s.meta['depths'][0] for s in made if s.meta['right_is'] == side] for side in ('first', 'last')
    )
    np.testing.assert_allclose(np.array(last) - first, 0.4, atol=0.05)
    assert max(first) - min(first) > 0.4


def test_near_names_differ_in_one_word(material):
    sample = material.sample(adversarial.NearNames('near', 6), LENGTH, 2)
    name_words = reference_readers.NEEDLE_QUESTION.search(sample.prompt)[1].split('-')
    assert len(set(sample.meta['names'])) == 6 and '-'.join(name_words) not in sample.meta['names']
    for name in sample.meta['names']:
        assert sum(a != b for a, b in zip(name_words, name.split('-'), strict=True)) == 1
    by_digit = material.sample(adversarial.NearNames('near', 5, name_kind='numbers'), LENGTH, 0)
    target = reference_readers.NEEDLE_QUESTION.search(by_digit.prompt)[1]
    assert {sum(a != b for a, b in zip(target, name, strict=True)) for name in by_digit.meta['names']} == {1}


def test_needles_of_a_group_share_their_text_and_are_checked_alone(material):
    config = adversarial.Several('several', needles=6, queries=3)
    made = [material.sample(config, LENGTH, i) for i in range(9)]
    for group in (made[:3], made[3:6]):
        assert len({sample.prompt[:sample.meta['shared']] for sample in group}) == 1
        assert len({sample.outputs[0] for sample in group}) == 3
        assert len(set(name for name, _ in reference_readers.NEEDLE.findall(group[0].prompt))) == 6
    assert made[0].prompt[:2000] != made[3].prompt[:2000]
    assert {adversarial_outcomes.outcome(s, reference_readers.oracle(s.text)) for s in made} == {'target'}
    # The value of another needle is wrong, although it is in the text.
    assert adversarial_outcomes.outcome(made[0], made[1].outputs[0]) == 'stale'
    with pytest.raises(ValueError, match='queries 9 must be 1 to 6'):
        material.sample(adversarial.Several('x', 6, 9), LENGTH, 0)


def test_the_boundary_runs_through_the_needle_among_long_words():
    text = [Document('a', '\n'.join('w' * (60 + i * 7 % 31) for i in range(50)))]
    material = Material(tokenizers.load('bytes'), text)
    offsets = []
    for i in range(30):
        meta = material.sample(adversarial.Straddling('cut', 4), LENGTH, i).meta
        assert meta['span'][0] < meta['boundary'] < meta['span'][1]
        offsets.append(meta['boundary'] - meta['span'][0])
    assert max(offsets) - min(offsets) > 20


def test_the_boundary_runs_through_the_needle(material):
    for shards, seq_len in ((8, None), (4, 8192), (2, None)):
        config = adversarial.Straddling('cut', shards, seq_len)
        shard_len = (seq_len or LENGTH) // shards
        boundaries = set()
        for i in range(12):
            sample = material.sample(config, LENGTH, i)
            boundary, (begin, end) = sample.meta['boundary'], sample.meta['span']
            assert begin < boundary < end and boundary % shard_len == 0
            ids = [256, *material.counter.tokenizer.encode(sample.text)]
            line = material.counter.tokenizer.decode(ids[begin:end])
            assert line.endswith(f'is {sample.outputs[0]}.\n') and line.startswith('One number')
            boundaries.add(boundary)
        assert len(boundaries) >= min(shards - 1, 3) or shards == 4
    with pytest.raises(ValueError, match='no boundary of 1 shards'):
        material.sample(adversarial.Straddling('cut', 1), LENGTH, 0)


def test_unknown_rules_and_empty_results_are_named(material):
    with pytest.raises(ValueError, match="unknown rule 'oldest'; use one of latest, first"):
        material.sample(adversarial.Conflict('x', 'oldest'), LENGTH, 0)
    with pytest.raises(ValueError, match='no predictions'):
        adversarial_outcomes.rates([])
    with pytest.raises(ValueError, match='length 200 is too small for latest'):
        material.sample(adversarial.DEFAULTS['latest'], 200, 0)


@pytest.mark.parametrize('config', [ruler.task('niah_multivalue'), adversarial.DEFAULTS['trusted']],
                         ids=lambda config: config.task)
def test_scores_are_stable_under_the_seed(config):
    means = []
    for seed in (1, 2):
        material = Material(tokenizers.load('bytes'), TEXT, seed=seed)
        made = [material.sample(config, 2048, i) for i in range(60)]
        assert scoring.task_score([scoring.score(s.task, s.answer, s.outputs) for s in made]).mean == 100
        means.append(scoring.task_score([scoring.score(
            s.task, reference_readers.coin_flip_oracle(s.text), s.outputs) for s in made]))
    halves = [(mean.interval[1] - mean.interval[0]) / 2 for mean in means]
    assert 0 < abs(means[0].mean - means[1].mean) <= sum(halves)
