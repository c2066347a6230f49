"""Every family against transformers, in and out; experiments/golden/check_families.py runs all of it."""

import dataclasses
import json

import check_families as checks
import jax
import numpy as np
import pytest
import tiny_families
from tiny import leaves_equal

from lct import sharding
from lct.models import llama
from lct.models.lora import Adapter, partition
from lct.train import optimizer
from lct.weights import families, llama_hf

MESH = (1, 2, 2, 2)


@pytest.mark.parametrize('name', ['mistral_1', 'qwen2_2', 'qwen3_1', 'phi3_1'])
def test_gradients_match_transformers(name):
    assert checks.gradient_error(name, checks.TRAINED[MESH]) <= checks.GRADIENTS


def test_gradients_of_all_biases_and_of_layers_without_rope_match_on_a_mesh():
    with jax.set_mesh(sharding.make_mesh(MESH)):
        assert checks.gradient_error('smollm3_1', checks.TRAINED[MESH]) <= checks.GRADIENTS


@pytest.mark.parametrize('name', ['qwen3_1', 'smollm3_1'])
def test_greedy_decoding_gives_the_tokens_of_transformers(name):
    assert checks.greedy_differences(name) == 0


def test_adapters_come_before_the_norms_of_queries_and_keys():
    assert checks.adapter_error('qwen3_1', checks.TRAINED[MESH]) <= 1e-5


@pytest.mark.parametrize('name', tiny_families.CASES)
def test_a_folder_of_every_family_is_written_as_it_was_read(name, tmp_path):
    from safetensors import safe_open

    config, params = checks.load(name)
    llama_hf.save(tmp_path / 'saved', config, params, dtype='float32', max_shard_bytes=10**6)
    again, saved = llama_hf.load(tmp_path / 'saved')
    assert again == config and leaves_equal(saved, params)
    values, source = json.loads((tmp_path / 'saved' / 'config.json').read_text()), tiny_families.CASES[name]
    assert values['model_type'] == config.family == source['model_type']
    assert values['architectures'] == source['architectures']
    with safe_open(tmp_path / 'saved' / 'model.safetensors', 'numpy') as file:
        expected = tiny_families.tensors(name)
        assert set(file.keys()) == set(expected)
        assert all(np.array_equal(file.get_tensor(key), value) for key, value in expected.items())


def test_biases_and_norms_are_neither_decayed_nor_frozen_by_accident():
    config = checks.load_config('smollm3_1')
    config = dataclasses.replace(config, qk_norm=True)
    decayed = optimizer.decayed(llama.abstract(config)).layers
    names = {name for name in vars(decayed) if getattr(decayed, name)}
    assert names == {'wq', 'wk', 'wv', 'wo', 'w_gate', 'w_up', 'w_down'}
    trained, _ = partition(llama.abstract(config), Adapter())
    assert trained.layers.q_norm is not None and trained.layers.q_bias is None


def read(name, **changes):
    values = {**tiny_families.CASES[name], **changes}
    return llama_hf.config_from_json({key: x for key, x in values.items() if x is not KeyError})


def test_absent_fields_mean_what_transformers_means():
    assert read('mistral_0', sliding_window=KeyError).window == 4096
    assert read('mistral_0', num_key_value_heads=KeyError, num_attention_heads=8).num_kv_heads == 8
    assert read('qwen3_0', head_dim=KeyError).head_dim == 128
    smollm3 = read('smollm3_0', no_rope_layers=KeyError, rope_theta=KeyError, num_hidden_layers=8,
                   tie_word_embeddings=KeyError)
    assert smollm3.rope_layers == (True, True, True, False) * 2
    assert smollm3.rope_theta == 2e6 and smollm3.tie_embeddings
    assert read('smollm3_0', rope_theta=KeyError, rope_parameters={
        'rope_type': 'default', 'rope_theta': 5e6}).rope_theta == 5e6
    assert read('phi3_0', rms_norm_eps=KeyError).norm_eps == 1e-5


def test_longrope_of_phi3_is_read_as_transformers_reads_it():
    config = read('phi3_1')
    assert config.rope.type == 'longrope'
    assert (config.rope.original_max_position, config.rope.factor) == (8, 8.0)
    scaling = {**tiny_families.CASES['phi3_1']['rope_scaling'], 'type': 'su'}
    assert read('phi3_1', rope_scaling=scaling) == config


@pytest.mark.parametrize('name, changes, message', [
    ('qwen2_2', dict(max_window_layers=1), '1 of 2 layers have a sliding window'),
    ('qwen3_0', dict(layer_types=['full_attention', 'sliding_attention'], use_sliding_window=True,
                     sliding_window=8), '1 of 2 layers have a sliding window'),
    ('qwen3_0', dict(layer_types=['full_attention', 'chunked_attention']), 'layer_types'),
    ('qwen2_0', dict(layer_types=['sliding_attention'] * 2), 'no sliding_window is in use'),
    ('mistral_1', dict(layer_types=['full_attention'] * 3), 'disagree'),
    ('mistral_0', dict(attention_bias=True), 'attention_bias'),
    ('mistral_0', dict(sliding_window=0), 'window 0'),
    ('smollm3_0', dict(no_rope_layers=[1]), 'no_rope_layers'),
    ('smollm3_0', dict(no_rope_layers=None, no_rope_layer_interval=0), 'no_rope_layer_interval'),
    ('phi3_0', dict(resid_pdrop=0.1), 'resid_pdrop'),
    ('phi3_0', dict(partial_rotary_factor=0.75), 'partial_rotary_factor'),
    ('llama_0', dict(no_rope_layers=[1, 0]), 'no_rope_layers'),
])
def test_what_no_program_computes_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        read(name, **changes)


@pytest.mark.parametrize('name, changes, message', [
    ('llama_0', dict(window=8), 'no sliding window'),
    ('llama_0', dict(qk_norm=True), "qk_norm true cannot be written: .* 'llama'"),
    ('qwen2_0', dict(qkv_bias=False), 'qkv_bias'),
    ('qwen3_0', dict(qkv_bias=True), 'out_bias'),
    ('mistral_0', dict(rope_layers=(True, False)), 'rope_layers'),
    ('phi3_1', dict(max_position_embeddings=128), 'rope'),
])
def test_a_config_that_its_family_cannot_hold_is_not_written(name, changes, message):
    config = dataclasses.replace(checks.load_config(name), **changes)
    with pytest.raises(ValueError, match=f'(?i){message}'):
        llama_hf.config_to_json(config)


def test_a_window_of_all_layers_is_written_where_the_family_has_one():
    for name in ('mistral_0', 'qwen2_0', 'qwen3_0', 'smollm3_0', 'phi3_0'):
        config = dataclasses.replace(checks.load_config(name), window=7)
        assert llama_hf.config_from_json(llama_hf.config_to_json(config)) == config


def test_fused_tensors_of_a_wrong_shape_are_refused(tmp_path):
    tensors = tiny_families.tensors('phi3_0')
    name = 'model.layers.1.self_attn.qkv_proj.weight'
    tensors[name] = tensors[name][:-1]
    tiny_families.tiny_hf.write_folder(tmp_path, tiny_families.CASES['phi3_0'], tensors)
    with pytest.raises(ValueError, match='qkv_proj.weight.* has shape'):
        llama_hf.load(tmp_path)


def test_every_family_is_checked():
    assert {case['model_type'] for case in tiny_families.CASES.values()} == set(families.FAMILIES)
