"""The recipes in experiments/configs against what was published: thetas, tokens, devices."""

import dataclasses
import math
import pathlib

import pytest

from lct.cli.config import load_config, make_run
from lct.models.family_sizes import ALL
from lct.models.llama import LlamaConfig
from lct.models.llama_sizes import LLAMA3_8B, LLAMA3_70B, LLAMA31_8B
from lct.ops.rope import RopeConfig
from lct.train import stages as plans
from lct.train.loop import Run

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'

LLAMA2_7B = LlamaConfig(  # meta-llama/Llama-2-7b-hf
    vocab_size=32000, embed_dim=4096, mlp_dim=11008, num_layers=32, num_heads=32, num_kv_heads=32,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=4096, rope=RopeConfig(theta=10000.0),
)
BASES = {
    'gradient_llama3_8b': LLAMA3_8B,
    'gradient_llama3_70b': LLAMA3_70B,
    'lwm_text_7b': LLAMA2_7B,
    'easycontext_llama2_7b': LLAMA2_7B,
    'longrope2_llama3_8b': LLAMA3_8B,
    'prolong_llama3_8b': LLAMA3_8B,
    'qwen25_1m_7b': ALL['qwen2.5-7b'],
    'selflong_llama31_8b': LLAMA31_8B,
    'ultralong_llama31_8b': LLAMA31_8B,
    'ultralong_llama31_8b_1m': LLAMA31_8B,
    'ultralong_llama31_8b_2m': LLAMA31_8B,
}
NO_DEVICES = ('qwen25_1m_7b', 'selflong_llama31_8b', 'ultralong_llama31_8b', 'ultralong_llama31_8b_1m',
              'ultralong_llama31_8b_2m')
OWN = {  # nothing published to compare with
    'base', 'base_grown', 'base_longer', 'ladder', 'laptop', 'laptop_128k', 'laptop_gated', 'laptop_lora',
    'laptop_one_shot', 'mostly_short', 'one_stage', 'over_store', 'smoke', 'smollm2_16k', 'theta_4k',
    'theta_4k_chosen', 'two_stages'}
CONFIGS = sorted(path.stem for path in (EXPERIMENTS / 'configs').rglob('*.py'))

# (seq_len, theta) of every stage. Integers: the 70B card, and what the 8B card rounds to 15.3M .. 45.2B.
THETAS = {
    'gradient_llama3_8b': [
        (65536, 15_296_098), (262144, 207_112_184), (524288, 1_062_356_830), (1048576, 2_804_339_835),
        (4194304, 45_218_125_209),
    ],
    'gradient_llama3_70b': [
        (65536, 15_296_098), (262144, 207_112_184), (524288, 1_062_356_830), (1048576, 3_580_165_449),
    ],
    'lwm_text_7b': [(32768, 1e6), (131072, 1e7), (262144, 1e7), (524288, 25e6), (1048576, 50e6)],
    'easycontext_llama2_7b': [
        (32768, 1e6), (65536, 5e6), (256000, 10e6), (256000, 25e6), (256000, 50e6), (512000, 100e6),
        (512000, 250e6),
    ],
    'longrope2_llama3_8b': [(131072, 500000.0)],
    'prolong_llama3_8b': [(65536, 8e6), (524288, 128e6)],
    'qwen25_1m_7b': [(65536, 1e6), (131072, 5e6), (262144, 10e6)],
    'selflong_llama31_8b': [(262144, 2e6), (524288, 8e6), (1048576, 32e6)],
    'ultralong_llama31_8b': [(4194304, 500000.0)],
    'ultralong_llama31_8b_1m': [(1048576, 500000.0)],
    'ultralong_llama31_8b_2m': [(2097152, 500000.0)],
}
# The cards' own digits, for the thetas that a rule explains.
RULES = {
    ('gradient_llama3_8b', '65K'): ('dynamic_ntk', '15.3M'),
    ('gradient_llama3_8b', '262K'): ('dynamic_ntk', '207.1M'),
    ('gradient_llama3_8b', '524K'): ('dynamic_ntk', '1.06B'),
    ('gradient_llama3_8b', '4194K'): ('critical_base', '45.2B'),
    ('gradient_llama3_70b', '65K'): ('dynamic_ntk', '15,296,098'),
    ('gradient_llama3_70b', '262K'): ('dynamic_ntk', '207,112,184'),
    ('gradient_llama3_70b', '524K'): ('dynamic_ntk', '1,062,356,830'),
    ('gradient_llama3_70b', '1048K'): ('critical_base', '3,580,165,449'),
}
# Totals that contradict their products: Gradient's is the product with batch 16, which was corrected to 8;
# UltraLong prints 1B beside 150 iterations of 2 rows of 4M.
PRINTED_TOTAL = {('gradient_llama3_8b', '1048K'): (419_430_400, 838_860_800),
                 ('ultralong_llama31_8b', '4M'): (1_258_291_200, 1_000_000_000)}


def load(name):
    return load_config(next((EXPERIMENTS / 'configs').rglob(f'{name}.py')))


def stages_of(name):
    """(Stage, its published figures) of every stage of a recipe."""
    config = load(name)
    published = [fields.published.to_dict() for fields in config.stages]
    return list(zip(make_run(config).stages, published, strict=True))


def planned(name):
    return plans.configs([stage for stage, _ in stages_of(name)], BASES[name])


def number(text):
    """15,296,098 from '15,296,098'; 15.3e6 from '15.3M'."""
    scale = {'M': 1e6, 'B': 1e9}.get(text[-1], 1)
    return scale * float(text.rstrip('MB').replace(',', ''))


def decimals(text):
    return len(text.rstrip('MB').partition('.')[2])


EVERY_STAGE = [(name, i) for name in BASES for i in range(len(THETAS[name]))]


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_a_valid_run(name):
    run = make_run(load(name))
    assert isinstance(run, Run)
    assert run.stages


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_is_either_ours_or_compared_with_its_source(name):
    recipe = any('published' in stage for stage in load(name).stages)
    assert (name in BASES) == recipe
    assert (name in OWN) != recipe, f'{name} is neither in OWN nor in BASES: say what to compare it with'


def test_every_recipe_has_its_config():
    assert set(BASES) == set(THETAS) <= set(CONFIGS)


@pytest.mark.parametrize('name', BASES)
def test_base_of_the_recipe(name):
    base, config = load(name).base, BASES[name]
    assert {**ALL, 'llama2-7b': LLAMA2_7B}[base.model] == config
    assert base.rope_theta == config.rope_theta
    assert base.max_position_embeddings == config.max_position_embeddings


@pytest.mark.parametrize('name', BASES)
def test_lengths_and_thetas(name):
    got = [(stage.seq_len, config.rope_theta) for (stage, _), config in zip(stages_of(name), planned(name))]
    assert got == THETAS[name]


@pytest.mark.parametrize(('name', 'stage_name'), RULES)
def test_thetas_come_from_their_rules(name, stage_name):
    rule, printed = RULES[name, stage_name]
    names = [stage.name for stage, _ in stages_of(name)]
    stage, published = stages_of(name)[names.index(stage_name)]
    assert stage.theta == rule
    assert published['rope_theta'] == printed
    theta = planned(name)[names.index(stage_name)].rope_theta
    scale = number('1' + printed[-1]) if printed[-1] in 'MB' else 1
    assert round(theta / scale, decimals(printed)) * scale == pytest.approx(number(printed), rel=1e-12)


def test_8b_1048k_follows_from_262k_by_dynamic_ntk():
    """Its number is the same rule as before, once over two doublings instead of from stage to stage."""
    first, second, _, million, _ = [stage for stage, _ in stages_of('gradient_llama3_8b')]
    by_rule = dataclasses.replace(million, theta='dynamic_ntk')
    assert plans.configs([first, second, by_rule], LLAMA3_8B)[-1].rope_theta == 2_804_339_835 == million.theta
    assert round(million.theta / 1e9, 2) == 2.80


@pytest.mark.parametrize(('name', 'i'), EVERY_STAGE)
def test_total_tokens(name, i):
    stage, published = stages_of(name)[i]
    total = stage.num_steps * stage.tokens_per_step
    if (name, stage.name) in PRINTED_TOTAL:
        assert (total, published['total_tokens']) == PRINTED_TOTAL[name, stage.name]
    elif name == 'lwm_text_7b':  # prints two digits and counts a batch of 2^22 tokens as 4.0M
        assert stage.tokens_per_step == 2**22
        assert math.isclose(stage.num_steps * 4.0e6, published['total_tokens'], rel_tol=0.041)
        assert math.isclose(total, published['total_tokens'], rel_tol=0.05)
    elif name == 'easycontext_llama2_7b':  # prints no totals, but "about 1M tokens a step"
        assert math.isclose(stage.tokens_per_step, 1e6, rel_tol=0.05)
    elif name == 'longrope2_llama3_8b':  # prints 10B, of four sources
        assert math.isclose(total, published['total_tokens'], rel_tol=0.001)
        assert sum(published['tokens'].values()) == published['total_tokens']
    elif name == 'prolong_llama3_8b':  # prints 20B, and batches of 4M and 8M
        assert stage.tokens_per_step == {'64K': 2**22, '512K': 2**23}[stage.name]
        assert math.isclose(total, published['total_tokens'], rel_tol=0.05)
        assert math.isclose(sum(published['mixture'].values()), 1)
    elif name == 'qwen25_1m_7b':  # prints neither tokens nor batches, but shares
        assert published == {'mixture': {'full length': 0.75, 'shorter': 0.25}}
    elif name == 'selflong_llama31_8b':  # prints the total of all stages
        assert math.isclose(3 * total, published['total_tokens'], rel_tol=0.001)
    elif name.startswith('ultralong'):  # prints 1B
        assert math.isclose(total, published['total_tokens'], abs_tol=stage.tokens_per_step)
    else:
        assert total == published['total_tokens']


@pytest.mark.parametrize(('name', 'i'), EVERY_STAGE)
def test_devices(name, i):
    stage, published = stages_of(name)[i]
    devices = math.prod(stage.mesh)
    _, fsdp, ring, tensor = stage.mesh
    if name == 'lwm_text_7b':
        data, minus_one, *rest = map(int, published['mesh_dim'].split(','))
        assert (stage.mesh[0], [tensor, ring], minus_one) == (data, rest, -1)
        assert devices == 256  # the chips of a v4-512
        return
    if name in NO_DEVICES:
        assert 'devices' not in published  # not printed
        return
    assert devices == published['devices']
    if name.startswith('gradient'):
        assert stage.seq_len // ring == (16384 if (name[-2:], stage.name) == ('8b', '1048K') else 8192)
        assert fsdp == published.get('rings', 1)  # 4194K has no such row


@pytest.mark.parametrize('name', [name for name in BASES if name.startswith('ultralong')])
def test_ultralong_replaces_the_scaling_of_its_base(name):
    (config,), ((_, published),) = planned(name), stages_of(name)
    assert LLAMA31_8B.rope.type == 'llama3' and config.rope.type == 'yarn'
    assert config.rope.factor == published['factor'] == config.max_position_embeddings / 8192
    assert (config.rope.beta_slow, config.rope.beta_fast) == (1, 4)


def test_longrope2_starts_at_the_divisors_that_its_authors_print():
    (config,), ((_, published),) = planned('longrope2_llama3_8b'), stages_of('longrope2_llama3_8b')
    factors = config.rope.long_factor
    assert config.rope.factor == published['factor'] == config.max_position_embeddings / 8192
    assert factors[:20] == (1,) * 19 + (pytest.approx(1.882352829),) and len(factors) == 64
    assert factors[34:] == (pytest.approx(15.11764717),) + (16,) * 29
    critical = math.ceil(64 * math.log(8192 / (2 * math.pi)) / math.log(500_000))  # section 3.1
    assert factors.index(16) == critical == 35
    assert config.rope.short_factor == (1,) * 64


def test_selflong_quadruples_theta_in_every_stage_and_keeps_the_scaling_of_its_base():
    stages, configs = stages_of('selflong_llama31_8b'), [LLAMA31_8B, *planned('selflong_llama31_8b')]
    for (_, published), before, after in zip(stages, configs, configs[1:], strict=False):
        assert after.rope_theta == published['theta_factor'] * before.rope_theta
        assert after.rope.type == 'llama3'


@pytest.mark.parametrize('name', BASES)
def test_attention_chunks_fit_and_the_layout_is_zigzag(name):
    for stage, _ in stages_of(name):
        assert stage.layout == 'zigzag'
        assert dict(stage.mixture) == {'text': 1.0}
        chunks = stage.memory.attention.chunks
        assert stage.seq_len // stage.mesh[2] >= chunks.query == chunks.key == 512
