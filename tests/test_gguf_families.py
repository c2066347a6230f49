"""GGUF files of every family, with the names and keys of llama.cpp's converter: the model is the one of the
Hugging Face folder."""

import dataclasses
import json
import math

import numpy as np
import pytest
import tiny_families
import tiny_hf
from tiny import leaves_equal

from lct.cli import convert
from lct.weights import llama_gguf, llama_hf, llama_meta

gguf = pytest.importorskip('gguf', reason="the extra 'gguf' is not installed")

ARCHITECTURES = {'mistral': 'llama'}  # where llama.cpp has another name
PERMUTED = ('llama', 'mistral', 'smollm3')  # of which the converter interleaves the rows of q and k
SMOLLM3 = tiny_families.CASES['smollm3_0'] | {'num_hidden_layers': 5, 'no_rope_layers': [1, 1, 1, 0, 1]}
CASES = {name: tiny_families.CASES[name] for name in
         ('mistral_0', 'qwen2_0', 'qwen3_0', 'qwen3_1', 'phi3_0', 'phi3_1', 'phi3_2', 'llama_1')} | {
             'smollm3_5': SMOLLM3}


def tensors(config):
    draw = np.random.RandomState(0)
    return {name: draw.standard_normal(shape).astype(np.float32)
            for name, shape in tiny_families.shapes(config).items()}


def interleaved(rows, heads):
    """As LlamaModel.permute of the converter."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write(path, config, values):
    """The GGUF file of a config.json and its tensors."""
    kind = config['model_type']
    architecture = ARCHITECTURES.get(kind, kind)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config['num_hidden_layers'])
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config['num_attention_heads'], config['num_key_value_heads']
    head_dim = config.get('head_dim') or config['hidden_size'] // heads
    writer.add_context_length(config['max_position_embeddings'])
    writer.add_embedding_length(config['hidden_size'])
    writer.add_feed_forward_length(config['intermediate_size'])
    writer.add_block_count(config['num_hidden_layers'])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config['rope_theta'])
    writer.add_layer_norm_rms_eps(config['rms_norm_eps'])
    if kind == 'phi3':
        writer.add_sliding_window(config.get('sliding_window') or 0)
    if config.get('rope_scaling'):
        original = config['original_max_position_embeddings']
        writer.add_rope_scaling_orig_ctx_len(original)
        scale = config['max_position_embeddings'] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)))
        for length in ('long', 'short'):
            factors = np.array(config['rope_scaling'][f'{length}_factor'], np.float32)
            writer.add_tensor(f'rope_factors_{length}.weight', factors)
    for name, value in values.items():
        module = name.split('.')[-2]
        if kind in PERMUTED and module in ('q_proj', 'k_proj'):
            value = np.ascontiguousarray(interleaved(value, heads if module == 'q_proj' else kv_heads))
        writer.add_tensor(names.get_name(name, try_suffixes=('.weight', '.bias')), value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize('name', CASES)
def test_a_file_of_every_family_is_the_folder(name, tmp_path):
    config, values = CASES[name], tensors(CASES[name])
    tiny_hf.write_folder(tmp_path / 'hf', config, values)
    expected_config, expected = llama_hf.load(tmp_path / 'hf')
    path = write(tmp_path / 'x.gguf', config, values)
    found, params = llama_gguf.load_weights(path)
    family = {'mistral': 'llama'}.get(expected_config.family, expected_config.family)
    assert found == dataclasses.replace(expected_config, family=family)
    assert leaves_equal(params, expected)
    convert.convert(path, tmp_path / 'again', 'hf', tokenizer_from=tmp_path / 'hf')
    head = values['model.embed_tokens.weight'].size if config['tie_word_embeddings'] else 0
    compared = convert.check(path, tmp_path / 'again', 'hf').num_values
    assert compared == sum(x.size for x in values.values()) + head
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['model_type'] == family


@pytest.mark.parametrize('name', ['qwen3_1', 'llama_1'])
def test_orbax_keeps_every_family(name, tmp_path):
    tiny_hf.write_folder(tmp_path / 'hf', CASES[name], tensors(CASES[name]))
    convert.convert(tmp_path / 'hf', tmp_path / 'orbax', 'orbax')
    convert.check(tmp_path / 'hf', tmp_path / 'orbax', 'orbax')
    convert.convert(tmp_path / 'orbax', tmp_path / 'again', 'hf')
    convert.check(tmp_path / 'orbax', tmp_path / 'again', 'hf')
    assert llama_hf.read_config(tmp_path / 'again') == llama_hf.read_config(tmp_path / 'hf')


@pytest.mark.parametrize(('name', 'field'), [
    ('qwen2_0', 'qkv_bias'), ('qwen3_0', 'qk_norm'), ('smollm3_5', 'rope_layers'), ('llama_1', 'qkv_bias'),
    ('phi3_2', 'window'), ('phi3_1', 'RoPE scaling')])
def test_metas_format_refuses_what_it_cannot_hold(name, field, tmp_path):
    tiny_hf.write_folder(tmp_path / 'hf', CASES[name], tensors(CASES[name]))
    with pytest.raises(ValueError, match=field):
        convert.convert(tmp_path / 'hf', tmp_path / 'meta', 'meta')


def test_metas_format_keeps_the_family_of_a_mistral(tmp_path):
    tiny_hf.write_folder(tmp_path / 'hf', CASES['mistral_0'], tensors(CASES['mistral_0']))
    convert.convert(tmp_path / 'hf', tmp_path / 'meta', 'meta')
    assert llama_meta.read_config(tmp_path / 'meta') == llama_hf.read_config(tmp_path / 'hf')
