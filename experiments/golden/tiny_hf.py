"""Tiny Hugging Face Llamas from a seed, for golden comparisons.

Needs only numpy, so that make_golden.py, which runs transformers, and the tests, which compare with its
results, write identical folders.
"""

import json
import os

import numpy as np

BASE = {
    'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'vocab_size': 128, 'hidden_size': 32,
    'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
    'hidden_act': 'silu', 'max_position_embeddings': 64, 'rms_norm_eps': 1e-5, 'rope_theta': 10000.0,
    'rope_scaling': None, 'tie_word_embeddings': False, 'attention_bias': False, 'mlp_bias': False,
    'bos_token_id': 1, 'eos_token_id': 2,
}


def _scaled(kind, max_position=64, theta=10000.0, **fields):
    return BASE | {
        'max_position_embeddings': max_position, 'rope_theta': theta,
        'rope_scaling': {'rope_type': kind, **fields},
    }


def _without(config, *fields):
    return {key: value for key, value in config.items() if key not in fields}


# name -> config.json, tokens per row, and the format of the file
CASES = {
    'gqa': dict(config=BASE | {'rope_theta': 500000.0}, length=48, gradients=True),
    'llama3': dict(length=96, config=_scaled(
        'llama3', 128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32)),
    'tied': dict(length=48, gradients=True, config=_scaled(
        'llama3', 128, 500000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32) | {'tie_word_embeddings': True}),
    'linear': dict(length=96, config=_scaled('linear', factor=4.0)),
    'dynamic': dict(length=96, config=_scaled('dynamic', 32, factor=4.0)),
    'dynamic_short': dict(length=24, config=_scaled('dynamic', 32, factor=4.0)),
    'yarn': dict(length=96, config=_scaled(
        'yarn', 128, factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)),
    'longrope': dict(length=96, config=_scaled(
        'longrope', 128, factor=4.0, original_max_position_embeddings=32,
        long_factor=[1.0, 1.5, 2.5, 4.0], short_factor=[1.0, 1.0, 1.25, 1.5])),
    'longrope_short': dict(length=32, config=_scaled(
        'longrope', 128, factor=4.0, original_max_position_embeddings=32,
        long_factor=[1.0, 1.5, 2.5, 4.0], short_factor=[1.0, 1.0, 1.25, 1.5])),
    'head_dim': dict(length=48, config=BASE | {'head_dim': 16}),
    'new_layout': dict(length=48, config=_without(BASE, 'rope_theta', 'rope_scaling') | {
        'rope_parameters': {'rope_type': 'linear', 'rope_theta': 20000.0, 'factor': 2.0}}),
    'sharded': dict(config=BASE, length=48, shards=3),
    'bf16': dict(config=BASE, length=48, dtype='bfloat16'),
}

# name -> (config.json rope fields, max_position_embeddings, head_dim, seq_len or None)
ROPE_CASES = {
    'default_llama3': ({'rope_type': 'default', 'rope_theta': 500000.0}, 8192, 128, None),
    'default_gradient': ({'rope_type': 'default', 'rope_theta': 3580165449.0}, 1048576, 128, None),
    'linear_4': ({'rope_type': 'linear', 'rope_theta': 10000.0, 'factor': 4.0}, 16384, 128, None),
    'linear_2p5': ({'rope_type': 'linear', 'rope_theta': 100000.0, 'factor': 2.5}, 8192, 64, None),
    'dynamic_init': ({'rope_type': 'dynamic', 'rope_theta': 500000.0, 'factor': 4.0}, 8192, 128, None),
    'dynamic_short': ({'rope_type': 'dynamic', 'rope_theta': 500000.0, 'factor': 4.0}, 8192, 128, 5000),
    'dynamic_65k': ({'rope_type': 'dynamic', 'rope_theta': 500000.0, 'factor': 4.0}, 8192, 128, 65536),
    'dynamic_2': ({'rope_type': 'dynamic', 'rope_theta': 10000.0, 'factor': 2.0}, 4096, 64, 10001),
    'yarn_llama2_64k': ({
        'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 16.0,
        'original_max_position_embeddings': 4096}, 65536, 128, None),
    'yarn_qwen': ({
        'rope_type': 'yarn', 'rope_theta': 1000000.0, 'factor': 4.0, 'attention_factor': 1.25,
        'original_max_position_embeddings': 32768, 'beta_fast': 16.0, 'beta_slow': 2.0}, 131072, 64, None),
    'yarn_mscale': ({
        'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': 40.0, 'mscale': 0.707, 'mscale_all_dim': 1.0,
        'original_max_position_embeddings': 4096, 'truncate': False}, 163840, 64, None),
    'yarn_implied': ({
        'rope_type': 'yarn', 'rope_theta': 10000.0, 'factor': None,
        'original_max_position_embeddings': 2048}, 16384, 32, None),
    'longrope_short': ({
        'rope_type': 'longrope', 'rope_theta': 10000.0, 'factor': 32.0,
        'original_max_position_embeddings': 4096, 'long_factor': [1.0 + 0.5 * i for i in range(16)],
        'short_factor': [1.0 + 0.01 * i for i in range(16)]}, 131072, 32, 4096),
    'longrope_long': ({
        'rope_type': 'longrope', 'rope_theta': 10000.0, 'factor': 32.0,
        'original_max_position_embeddings': 4096, 'long_factor': [1.0 + 0.5 * i for i in range(16)],
        'short_factor': [1.0 + 0.01 * i for i in range(16)]}, 131072, 32, 4097),
    'longrope_implied': ({
        'rope_type': 'longrope', 'rope_theta': 500000.0, 'original_max_position_embeddings': 8192,
        'long_factor': [2.0] * 32, 'short_factor': [1.5] * 32}, 65536, 64, 60000),
    'llama31': ({
        'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}, 131072, 128, None),
    'llama32': ({
        'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 32.0, 'low_freq_factor': 1.0,
        'high_freq_factor': 4.0, 'original_max_position_embeddings': 8192}, 131072, 64, None),
}


def rope_config_json(name):
    """config.json of one of ROPE_CASES."""
    fields, max_position, head_dim, _ = ROPE_CASES[name]
    config = _without(BASE, 'rope_theta', 'rope_scaling')
    return config | {
        'rope_parameters': dict(fields), 'max_position_embeddings': max_position, 'head_dim': head_dim}


def shapes(config):
    """{name: shape} of the tensors of a Llama, written independently of the package."""
    hidden, ffn, heads = config['hidden_size'], config['intermediate_size'], config['num_attention_heads']
    head_dim = config.get('head_dim', hidden // heads)
    queries, keys = heads * head_dim, config['num_key_value_heads'] * head_dim
    result = {'model.embed_tokens.weight': (config['vocab_size'], hidden)}
    for i in range(config['num_hidden_layers']):
        at = f'model.layers.{i}.'
        result |= {
            at + 'input_layernorm.weight': (hidden,),
            at + 'self_attn.q_proj.weight': (queries, hidden),
            at + 'self_attn.k_proj.weight': (keys, hidden),
            at + 'self_attn.v_proj.weight': (keys, hidden),
            at + 'self_attn.o_proj.weight': (hidden, queries),
            at + 'post_attention_layernorm.weight': (hidden,),
            at + 'mlp.gate_proj.weight': (ffn, hidden),
            at + 'mlp.up_proj.weight': (ffn, hidden),
            at + 'mlp.down_proj.weight': (hidden, ffn),
        }
    result['model.norm.weight'] = (hidden,)
    if not config['tie_word_embeddings']:
        result['lm_head.weight'] = (config['vocab_size'], hidden)
    return result


def tensors(config, seed=0):
    """{name: float32} random weights, with attention scores of a few units and norms different from one."""
    draw = np.random.RandomState(seed)  # the same stream in every numpy version, unlike default_rng's
    result = {}
    for name, shape in shapes(config).items():
        values = draw.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + 0.2 * values
        elif 'embed' not in name:
            scale = 2.0 if 'q_proj' in name or 'k_proj' in name else 1.0
            values *= scale / np.sqrt(shape[1])
        result[name] = values.astype(np.float32)
    return result


def tokens(name):
    """(tokens, targets) [2, length] int32 of a case."""
    case = CASES[name]
    draw = np.random.RandomState(1)
    shape = (2, 2, case['length'])
    return draw.randint(0, case['config']['vocab_size'], shape).astype(np.int32)


def write_safetensors(path, values, dtype='float32'):
    """Write a safetensors file, independently of the package; bf16 is rounded to nearest even."""
    header, data = {'__metadata__': {'format': 'pt'}}, b''
    for name, value in values.items():
        array = np.ascontiguousarray(value, np.float32)
        if dtype == 'bfloat16':
            bits = array.view(np.uint32).astype(np.uint64)
            array = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        header[name] = {
            'dtype': {'float32': 'F32', 'bfloat16': 'BF16'}[dtype], 'shape': list(value.shape),
            'data_offsets': [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    write_raw(path, json.dumps(header), data)


def write_raw(path, header, data):
    """Write a file of a header text and data bytes, valid or not."""
    text = header.encode()
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text + data)


def write_folder(folder, config, values, dtype='float32', shards=1):
    """Write a Hugging Face folder of a config and {name: array}."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as file:
        json.dump(config, file)
    if shards == 1:
        write_safetensors(os.path.join(folder, 'model.safetensors'), values, dtype)
        return
    weight_map = {}
    for i in range(shards):
        file_name = f'model-{i + 1:05d}-of-{shards:05d}.safetensors'
        shard = dict(list(values.items())[i::shards])
        write_safetensors(os.path.join(folder, file_name), shard, dtype)
        weight_map |= {name: file_name for name in shard}
    with open(os.path.join(folder, 'model.safetensors.index.json'), 'w', encoding='utf-8') as file:
        json.dump({'metadata': {'total_size': 0}, 'weight_map': weight_map}, file)


def write_case(name, folder):
    """Write the folder of one of CASES."""
    case = CASES[name]
    values = tensors(case['config'])
    write_folder(folder, case['config'], values, case.get('dtype', 'float32'), case.get('shards', 1))
