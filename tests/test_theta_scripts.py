"""The theta experiments: their tables, rankings and errors, and the config that a search writes."""

import copy
import json
import math
import pathlib
import xml.etree.ElementTree

import numpy as np
import pytest
import theta as theta_table
import theta_positions
import theta_search

from lct.cli.config import load_config, make_run, set_field
from lct.models.llama_sizes import LLAMA3_8B, LLAMA31_8B
from lct.ops.rope import RopeConfig
from lct.train.warnings import stage_warnings
from lct.weights import llama_hf

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'


M = 1 << 20


def numbers(lines, choice):
    """The cells of a row of the table."""
    return next(line for line in lines if line.startswith(choice))[len(choice):].split()


# ---------------------------------------------------------------------------------------------------
# The table of choices
# ---------------------------------------------------------------------------------------------------


def test_table_of_llama3_to_64k():
    lines = theta_table.report('llama3-8b', LLAMA3_8B, 8192, 65536)
    assert numbers(lines, 'dynamic NTK, alpha 4')[0] == '15,296,098'
    assert numbers(lines, 'dynamic NTK, alpha 4')[-3:] == ['53,364', '138,113', '81.4%']
    assert numbers(lines, 'critical base')[0] == '22,443,169'
    assert numbers(lines, 'critical base')[-1] == numbers(lines, "law's inverse")[-1] == 'yes'
    assert numbers(lines, 'lower bound')[0] == '2,100,000'
    assert numbers(lines, 'YaRN')[1] == f'{0.1 * math.log(8) + 1:.3f}'
    assert numbers(lines, 'LongRoPE')[1] == f'{math.sqrt(1 + math.log(8) / math.log(8192)):.3f}'
    assert lines[-1].startswith('WARNING: target 65,536 is beyond the 8,219 tokens')
    assert '22,443,169' in lines[-1]


def test_warning_names_the_numbers_and_is_silent_where_the_theta_suffices():
    short = theta_table.warning(RopeConfig(2_804_339_835), 5e5, 8192, M, 128)[-1]
    assert '922,491' in short and '2,804,339,835' in short and '3,544,606,929' in short
    assert theta_table.warning(RopeConfig(3_580_165_449), 5e5, 8192, M, 128) == []
    assert theta_table.warning(RopeConfig(5e5, 'linear', 128.0), 5e5, 8192, M, 128) == []
    assert theta_table.warning(LLAMA31_8B.rope, 5e5, 8192, 65536, 128) == []
    assert theta_table.warning(LLAMA31_8B.rope, 5e5, 8192, 131072, 128) != []


def test_extend_warns_of_a_stage_beyond_its_theta():
    run = make_run(load_config(EXPERIMENTS / 'configs' / 'theta_4k.py'))
    warnings = stage_warnings(run.stages, llama_hf.read_config(EXPERIMENTS / 'base'))
    assert len(warnings) == 1 and '582' in warnings[0] and '4,096' in warnings[0] and '140,66' in warnings[0]


def test_target_within_the_trained_length_is_refused():
    with pytest.raises(ValueError, match='8192 tokens that the model was trained on'):
        theta_table.report('llama3-8b', LLAMA3_8B, 8192, 8192)


# ---------------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def config():
    return load_config(EXPERIMENTS / 'configs' / 'theta_4k.py')


@pytest.fixture(scope='module')
def summary(config):
    base = llama_hf.read_config(EXPERIMENTS / 'base')
    edges = [0, 64, 512, 1024, 2048, 4096, 8192]

    def result(theta, seed, long, needle):
        loss = {'edges': edges, 'mean': [3, 2, 2, 2, long + 0.1 * seed, 4]}
        return {'theta': theta, 'seed': seed, 'loss': loss,
                'needle': [1, needle, needle, needle, 0], 'training_seconds': 60, 'seconds': 80}

    results = [result(*row) for seed in (1, 2) for row in (
        (3134.0, seed, 2.7, 0.1), (28800.0, seed, 1.9, 0.5), (140665.0, seed, 1.91, 0.9),
        (1e6, seed, 2.0, 0.8))]
    return theta_search.summarise(config, base, {**results[0], 'seed': None}, results)


def test_thetas_are_ranked_by_long_loss_and_needles_together(summary):
    assert [(row['theta'], row['rank_loss'], row['rank_needle']) for row in summary['rows']] == [
        (140665.0, 2, 1), (28800.0, 1, 3), (1e6, 3, 2), (3134.0, 4, 4)]
    assert summary['chosen'] == 140665.0
    best, control = summary['rows'][0], summary['rows'][-1]
    assert control['control'] and not best['control']
    assert math.isclose(best['long_loss'], 2.06) and math.isclose(best['long_loss_sd'], 0.1 / 2**0.5)
    # at 1,024, 2,048 and 4,096: beyond the trained length, up to the target
    assert math.isclose(best['long_needle'], 0.9)
    assert round(control['law']) == 582 and round(summary['laws']['critical_base']) == 140666
    assert 'control' in theta_search.summary_table(summary).splitlines()[5]


def test_chosen_config_is_one_that_extend_takes(summary, config, tmp_path):
    path = tmp_path / 'chosen.py'
    path.write_text(theta_search.chosen_config(config, 140665.0))
    chosen = load_config(path)
    set_field(chosen, 'stages.0.num_steps=3')
    set_field(chosen, 'stages.0.warmup_steps=1')
    chosen.stages[0].mesh = (1, 1, 2, 1)
    stage, = make_run(chosen).stages
    assert (stage.theta, stage.num_steps, stage.mesh) == (140665.0, 3, (1, 1, 2, 1))
    assert stage.mixture == make_run(config).stages[0].mixture
    assert 'search' not in chosen and chosen.needle.lengths == config.needle.lengths


def test_figure_is_svg_and_the_same_each_time(summary, config, tmp_path):
    for name in ('a.svg', 'b.svg'):
        theta_search.figure(summary, config, tmp_path / name)
    text = (tmp_path / 'a.svg').read_text()
    assert text == (tmp_path / 'b.svg').read_text()
    assert xml.etree.ElementTree.fromstring(text).tag.endswith('svg')
    assert 'theta 3,134, control' in text and 'theta 1,000,000' in text and 'recall probe' in text


@pytest.mark.parametrize(('change', 'message'), [
    (lambda c: c.search.update(thetas=(1e4, 1e5)), 'lacks the control'),
    (lambda c: c.search.update(seeds=(1, 1, 1)), 'at least two seeds'),
    (lambda c: setattr(c, 'stages', c.stages * 2), 'one stage'),
])
def test_a_search_that_proves_nothing_is_refused(config, change, message):
    broken = copy.deepcopy(config)
    change(broken)
    with pytest.raises(ValueError, match=message):
        theta_search.check(broken)


# ---------------------------------------------------------------------------------------------------
# Without training
# ---------------------------------------------------------------------------------------------------


def test_scalings_of_smollm2_and_their_summary(tmp_path):
    class Base:
        rope_theta, head_dim, max_position_embeddings = 1e5, 64, 8192

    scalings = theta_positions.scalings(Base, 16384)
    assert [(one.type, one.factor) for one in scalings.values()] == [
        ('default', 1.0), ('default', 1.0), ('yarn', 2.0), ('dynamic', 2.0), ('linear', 2.0)]
    assert round(scalings['ntk'].theta) == 204522
    losses = {(text, name): np.full(16384, 2.0) for text in ('a', 'b') for name in scalings}
    losses['a', 'default'][12288:] = 4.0
    summary = theta_positions.summarise(Base, ('a', 'b'), losses, 16384)
    assert summary['edges'][4] == 8192 and summary['scalings']['default']['loss']['a'][4:] == [2, 2, 4, 4]
    assert round(summary['scalings']['default']['law']) == 8379
    row = theta_positions.summary_table(summary).splitlines()[2].split()
    assert row[:5] == ['default', '2.000', '2.500', '3.000,', '2.000']
    theta_positions.figure(json.loads(json.dumps(summary)), tmp_path / 'figure.svg')
    assert (tmp_path / 'figure.svg').read_text().count('trained') == 2


def test_a_text_that_is_too_short_is_refused(tmp_path):
    class Bytes:
        bos_id = None

        def encode(self, text):
            return list(text.encode())

    (tmp_path / 'short.txt').write_text('short')
    with pytest.raises(ValueError, match='5 tokens and a window needs 9'):
        theta_positions.window(Bytes(), tmp_path / 'short.txt', 8)
    assert theta_positions.window(Bytes(), tmp_path / 'short.txt', 4).tolist() == list(b'short')
