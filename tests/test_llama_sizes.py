"""The published sizes have the published number of parameters."""

import pytest

from lct.models import llama, llama_sizes
from lct.models.llama_sizes import SIZES

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


def test_every_size_is_counted():
    assert set(SIZES) == set(PARAMETERS) == set(MLP)


def test_the_printed_table_is_right():
    rows = [line.split() for line in llama_sizes.__doc__.splitlines() if line.strip().startswith('llama3')]
    assert {row[0] for row in rows} == set(SIZES)
    for name, *numbers in rows:
        size = SIZES[name]
        expected = (size.num_layers, size.embed_dim, size.mlp_dim, size.num_heads, llama.num_params(size))
        assert tuple(int(x.replace(',', '')) for x in numbers) == expected
