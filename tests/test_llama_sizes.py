"""The published sizes have the published number of parameters."""

import pytest

from lct.models import family_sizes, llama, llama_sizes
from lct.models.llama_sizes import SIZES
from lct.weights import llama_hf

PARAMETERS = {
    'llama3-8b': 8_030_261_248,
    'llama3-70b': 70_553_706_496,
    'llama3.1-8b': 8_030_261_248,
    'llama3.1-70b': 70_553_706_496,
    'llama3.1-405b': 405_853_388_800,
    'llama3.2-1b': 1_235_814_400,
    'llama3.2-3b': 3_212_749_824,
    'llama3.3-70b': 70_553_706_496,
}
FAMILIES = {  # elements of the published safetensors files, a tied head counted once
    'qwen2.5-0.5b': 494_032_768, 'qwen2.5-1.5b': 1_543_714_304, 'qwen2.5-3b': 3_085_938_688,
    'qwen2.5-7b': 7_615_616_512, 'qwen2.5-14b': 14_770_033_664, 'qwen2.5-32b': 32_763_876_352,
    'qwen2.5-72b': 72_706_203_648,
    'qwen3-0.6b': 596_049_920, 'qwen3-1.7b': 1_720_574_976, 'qwen3-4b': 4_022_468_096,
    'qwen3-8b': 8_190_735_360, 'qwen3-14b': 14_768_307_200, 'qwen3-32b': 32_762_123_264,
    'mistral-7b-v0.1': 7_241_732_096, 'mistral-7b-v0.3': 7_248_023_552,
    'smollm3-3b': 3_075_098_624, 'phi3-mini-4k': 3_821_079_552,
}
MLP = {  # (ffn_dim_multiplier, multiple_of) of Meta's params.json
    'llama3-8b': (1.3, 1024), 'llama3-70b': (1.3, 4096), 'llama3.1-8b': (1.3, 1024),
    'llama3.1-70b': (1.3, 4096), 'llama3.1-405b': (1.2, 4096), 'llama3.2-1b': (1.5, 256),
    'llama3.2-3b': (1.0, 256), 'llama3.3-70b': (1.3, 4096),
}


@pytest.mark.parametrize('name', SIZES)
def test_parameter_count(name):
    assert llama.num_params(SIZES[name]) == PARAMETERS[name]


@pytest.mark.parametrize('name', SIZES)
def test_mlp_width_follows_from_metas_rule(name):
    multiplier, multiple_of = MLP[name]
    width = int(multiplier * int(8 * SIZES[name].embed_dim / 3))
    assert SIZES[name].mlp_dim == -(-width // multiple_of) * multiple_of


@pytest.mark.parametrize('name', family_sizes.SIZES)
def test_a_size_of_another_family_has_the_published_count_and_survives_its_config_json(name):
    size = family_sizes.SIZES[name]
    assert llama.num_params(size) == FAMILIES[name]
    assert llama_hf.config_from_json(llama_hf.config_to_json(size)) == size


def test_every_size_is_counted():
    assert set(SIZES) == set(PARAMETERS) == set(MLP)
    assert set(family_sizes.ALL) == {*PARAMETERS, *FAMILIES}


@pytest.mark.parametrize('module', [llama_sizes, family_sizes])
def test_the_printed_table_is_right(module):
    lines = map(str.split, module.__doc__.splitlines())
    rows = [words for words in lines if words and words[0] in module.SIZES]
    assert {row[0] for row in rows} == set(module.SIZES)
    for name, *numbers in rows:
        size = module.SIZES[name]
        expected = (size.num_layers, size.embed_dim, size.mlp_dim, size.num_heads, llama.num_params(size))
        assert tuple(int(x.replace(',', '')) for x in numbers) == expected
