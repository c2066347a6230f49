"""The check of a conversion reads source and target by other code, so that it finds planted faults of every
reader and writer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf

from lct.cli import convert
from lct.weights import companions, llama_hf, llama_meta, tensors, verify

# num_heads * head_dim is embed_dim: a transposed projection has the right shape.
CONFIG = tiny_hf.BASE | {'rope_theta': 500000.0, 'torch_dtype': 'float32'}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """{format: a source of it}, all of one model; the folder in Meta's format has two files."""
    root = tmp_path_factory.mktemp('sources')
    tiny_hf.write_folder(root / 'hf', CONFIG, tiny_hf.tensors(CONFIG))
    convert.convert(root / 'hf', root / 'meta', 'meta', num_files=2)
    convert.convert(root / 'hf', root / 'orbax', 'orbax')
    return {name: root / name for name in ('hf', 'meta', 'orbax')}


def report(sources, source, to, folder, dtype=None):
    """The report of a conversion."""
    target = folder / 'target'
    convert.convert(sources[source], target, to, dtype=dtype)
    return convert.check(sources[source], target, to)


@pytest.mark.parametrize('to', ['hf', 'meta', 'orbax'])
@pytest.mark.parametrize('source', ['hf', 'meta', 'orbax'])
def test_every_pair_of_formats_is_verified(source, to, sources, tmp_path):
    assert report(sources, source, to, tmp_path) == verify.Report(21, 26784, {})


def test_the_difference_of_a_cast_is_reported_apart(sources, tmp_path):
    result = report(sources, 'hf', 'meta', tmp_path, 'bfloat16')
    (count, difference), = result.casts.values()
    largest = max(np.abs(x).max() for x in tiny_hf.tensors(CONFIG).values())
    assert count == 21 and 0 < difference <= largest * 2**-8
    assert 'cast from float32 to bfloat16, which changes them by at most' in str(result)


# ---------------------------------------------------------------------------------------------------
# Planted faults: function(monkeypatch), with the source and the target that have it
# ---------------------------------------------------------------------------------------------------


def edit_loaded(change, module=llama_hf):
    """A reader that changes the params it returns."""
    def plant(monkeypatch):
        load = module.load

        def faulty(*args, **options):
            config, params = load(*args, **options)
            return config, change(params)
        monkeypatch.setattr(module, 'load', faulty)
    return plant


def replace(module, name, function):
    return lambda monkeypatch: monkeypatch.setattr(module, name, function(getattr(module, name)))


def edit_layers(**changes):
    return edit_loaded(lambda params: params.replace(layers=params.layers.replace(
        **{name: change(getattr(params.layers, name)) for name, change in changes.items()})))


def exchange(a, b):
    """Two names of a table exchanged."""
    return lambda names: {**names, a: names[b], b: names[a]}


def swap_layers(tensor_names):
    def swapped(config, names):
        return {name: (parameter, layer if layer is None else 1 - layer)
                for name, (parameter, layer) in tensor_names(config, names).items()}
    return swapped


def first_shard_twice(overlaps):
    def faulty(self, rows, cols):
        return ((0, outer, inner) for _, outer, inner in overlaps(self, rows, cols))
    return faulty


def truncate(load):
    """A reader whose cast to bfloat16 cuts bits off instead of rounding."""
    def cut(x):
        bits = np.asarray(x).view(np.uint32) & np.uint32(0xFFFF0000)
        return jnp.asarray(bits.view(np.float32), 'bfloat16')

    def faulty(folder, dtype):
        config, params = load(folder, 'float32')
        return config, jax.tree.map(cut, params)
    return faulty


def reversed_tied_head(save):
    def faulty(folder, config, params, **options):
        save(folder, config, params.replace(lm_head=params.embed.T[:, ::-1]), **options)
    return faulty


def other_field(field, value):
    def wrap(config_to_json):
        return lambda *args: {**config_to_json(*args), field: value}
    return wrap


FAULTS = {
    'embedding rows reversed': ('hf', 'meta', edit_loaded(lambda p: p.replace(embed=p.embed[::-1]))),
    'projection transposed': ('hf', 'orbax', edit_layers(
        wo=lambda wo: jnp.reshape(wo.reshape(2, 32, 32).swapaxes(1, 2), wo.shape))),
    'rotary rows not permuted on load': ('meta', 'hf', replace(tensors, 'half_split',
                                                               lambda _: lambda rows, head_dim: rows)),
    'rotary rows not permuted on save': ('hf', 'meta', replace(tensors, 'interleaved',
                                                               lambda _: lambda rows, head_dim: rows)),
    'a shard missing': ('meta', 'hf', replace(tensors.Matrix, '_overlaps', first_shard_twice)),
    'layers swapped': ('meta', 'hf', replace(llama_meta, 'tensor_names', swap_layers)),
    'wrong cast': ('hf', 'hf', replace(llama_hf, 'load', truncate)),
    'a cast on the way': ('hf', 'hf', edit_loaded(
        lambda p: p.replace(lm_head=p.lm_head.astype('bfloat16').astype('float32')))),
    'head instead of the tied one': ('hf', 'meta', replace(llama_meta, 'save', reversed_tied_head)),
    'gate and up exchanged': ('meta', 'orbax', replace(llama_meta, 'NAMES', exchange(
        'layers.w_up', 'layers.w_gate'))),
    'a norm lost': ('orbax', 'hf', edit_loaded(
        lambda p: p.replace(final_norm=jnp.ones_like(p.final_norm)), convert.orbax_folder)),
    'heads of k and v exchanged': ('hf', 'hf', edit_layers(wk=lambda w: w[:, :, ::-1])),
    'another theta': ('hf', 'hf', replace(llama_hf, 'config_to_json', other_field('rope_theta', 10000.0))),
    'another epsilon': ('meta', 'hf', replace(llama_hf, 'config_to_json',
                                              other_field('rms_norm_eps', 1e-6))),
    'fewer positions': ('hf', 'orbax', replace(llama_hf, 'config_to_json',
                                               other_field('max_position_embeddings', 32))),
    'token ids lost': ('hf', 'hf', replace(companions, 'token_ids', lambda _: lambda folder: {})),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_planted_fault_is_found(name, sources, tmp_path, monkeypatch):
    source, to, plant = FAULTS[name]
    plant(monkeypatch)
    with pytest.raises(ValueError, match=r'differs from the one of the source|in the source'):
        report(sources, source, to, tmp_path, 'bfloat16' if name == 'wrong cast' else None)


def test_a_tied_head_is_the_embedding_in_every_format(tmp_path):
    tied = CONFIG | {'tie_word_embeddings': True}
    tiny_hf.write_folder(tmp_path / 'hf', tied, tiny_hf.tensors(tied))
    convert.convert(tmp_path / 'hf', tmp_path / 'meta', 'meta')
    assert convert.check(tmp_path / 'hf', tmp_path / 'meta', 'meta').num_tensors == 21
    convert.convert(tmp_path / 'meta', tmp_path / 'again', 'hf')
    convert.check(tmp_path / 'meta', tmp_path / 'again', 'hf')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['tie_word_embeddings'] is True
