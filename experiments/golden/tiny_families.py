"""Tiny models of every family from a seed: three random configurations each.

Needs only numpy, as tiny_hf.
"""

import numpy as np
import tiny_hf

LENGTH = 32  # tokens of a row: divides over a ring of eight devices in the zigzag layout
PROMPTS, NEW_TOKENS = (11, 9), 10  # tokens of the prompts, and greedy tokens after each
WINDOW = 9

SIZES = (  # two of each letter at least for every mesh of eight devices
    dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
         num_key_value_heads=2, rms_norm_eps=1e-6),
    dict(hidden_size=24, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
         num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5),
    dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
         num_key_value_heads=4, head_dim=4, rms_norm_eps=1e-4),
)
YARN = {'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 16}


def _case(kind, architecture, size, **fields):
    return {'architectures': [architecture], 'model_type': kind, 'vocab_size': 40, 'hidden_act': 'silu',
            'max_position_embeddings': 64, 'rope_theta': 10000.0, 'tie_word_embeddings': False,
            'attention_dropout': 0.0, 'bos_token_id': 1, 'eos_token_id': None, 'pad_token_id': None,
            **SIZES[size], **fields}


def _longrope(half, trained, **fields):
    """Fields of a Phi-3 of 64 positions, with a rope_scaling as Microsoft's files have it.

    trained: positions; where a text becomes longer in decoding, transformers would change the scaling.
    """
    return {'original_max_position_embeddings': trained, **fields, 'rope_scaling': {
        'type': 'longrope', 'long_factor': [1.0 + i for i in range(half)],
        'short_factor': [1.0 + i / 8 for i in range(half)]}}


CASES = {  # name -> config.json
    'mistral_0': _case('mistral', 'MistralForCausalLM', 0, sliding_window=None),
    'mistral_1': _case('mistral', 'MistralForCausalLM', 1, sliding_window=WINDOW),
    'mistral_2': _case('mistral', 'MistralForCausalLM', 2, sliding_window=WINDOW, tie_word_embeddings=True),
    'qwen2_0': _case('qwen2', 'Qwen2ForCausalLM', 0, use_sliding_window=False, sliding_window=32,
                     max_window_layers=2),
    'qwen2_1': _case('qwen2', 'Qwen2ForCausalLM', 1, tie_word_embeddings=True, rope_scaling=YARN),
    'qwen2_2': _case('qwen2', 'Qwen2ForCausalLM', 2, use_sliding_window=True, sliding_window=WINDOW,
                     max_window_layers=0),
    'qwen3_0': _case('qwen3', 'Qwen3ForCausalLM', 0, head_dim=8, attention_bias=False),
    'qwen3_1': _case('qwen3', 'Qwen3ForCausalLM', 1, attention_bias=True, tie_word_embeddings=True),
    'qwen3_2': _case('qwen3', 'Qwen3ForCausalLM', 2, rope_scaling=YARN, rope_theta=1e6,
                     layer_types=['full_attention'] * 2),
    'smollm3_0': _case('smollm3', 'SmolLM3ForCausalLM', 0, no_rope_layers=[1, 0], tie_word_embeddings=True,
                       attention_bias=False, mlp_bias=False),
    'smollm3_1': _case('smollm3', 'SmolLM3ForCausalLM', 1, no_rope_layer_interval=2, attention_bias=True,
                       mlp_bias=True, rope_scaling=YARN),
    'smollm3_2': _case('smollm3', 'SmolLM3ForCausalLM', 2, no_rope_layers=[0, 1], use_sliding_window=True,
                       sliding_window=WINDOW, layer_types=['sliding_attention'] * 2),
    'phi3_0': _case('phi3', 'Phi3ForCausalLM', 0, sliding_window=None),
    'phi3_1': _case('phi3', 'Phi3ForCausalLM', 1, **_longrope(6, 8, head_dim=12)),
    'phi3_2': _case('phi3', 'Phi3ForCausalLM', 2, sliding_window=WINDOW,
                    **_longrope(1, 24, head_dim=2)),
    'llama_0': _case('llama', 'LlamaForCausalLM', 0, attention_bias=True, mlp_bias=False),
    'llama_1': _case('llama', 'LlamaForCausalLM', 1, attention_bias=True, mlp_bias=True),
    'llama_2': _case('llama', 'LlamaForCausalLM', 2, mlp_bias=True, tie_word_embeddings=True),
}


def shapes(config):
    """{name: shape} of the tensors of a case, written independently of the package."""
    kind = config['model_type']
    attention_bias = kind == 'qwen2' or config.get('attention_bias')
    result = {}
    for name, shape in tiny_hf.shapes(config).items():
        result[name] = shape
        stem = name.removesuffix('.weight')
        attention = name.split('.')[-2] in ('q_proj', 'k_proj', 'v_proj') or (
            'o_proj' in name and kind != 'qwen2')
        if attention and attention_bias or '.mlp.' in name and config.get('mlp_bias'):
            result[f'{stem}.bias'] = shape[:1]
        if kind == 'qwen3' and name.split('.')[-2] in ('q_proj', 'k_proj'):
            head_dim = config['head_dim']
            result[stem.replace('_proj', '_norm') + '.weight'] = (head_dim,)
    if kind == 'phi3':
        result = _fused(result)
    return result


def _fused(separate):
    """The shapes of a Phi-3 of those of a Llama."""
    result = {}
    for name, shape in separate.items():
        for part, whole in (('q_proj', 'qkv_proj'), ('k_proj', 'qkv_proj'), ('v_proj', 'qkv_proj'),
                            ('gate_proj', 'gate_up_proj'), ('up_proj', 'gate_up_proj')):
            name = name.replace(f'.{part}.', f'.{whole}.')
        rows = result[name][0] if name in result else 0
        result[name] = (rows + shape[0], *shape[1:])
    return result


def tensors(name):
    """{tensor name: float32} random weights, with attention scores of a few units."""
    config = CASES[name]
    draw = np.random.RandomState(list(CASES).index(name))
    result = {}
    for tensor, shape in shapes(config).items():
        values = draw.standard_normal(shape)
        if tensor.endswith('.bias'):
            values *= 0.5
        elif len(shape) == 1:
            values = 1 + 0.2 * values
        elif 'embed' not in tensor:
            values *= (2.0 if any(x in tensor for x in ('q_proj', 'k_proj', 'qkv')) else 1.0) / shape[1]**0.5
        result[tensor] = values.astype(np.float32)
    return result


def tokens(name):
    """(tokens, targets) [2, LENGTH] int32 of a case."""
    draw = np.random.RandomState(100 + list(CASES).index(name))
    return draw.randint(0, CASES[name]['vocab_size'], (2, 2, LENGTH)).astype(np.int32)


def prompts(name):
    """Prompts of PROMPTS tokens."""
    return [row[:length].tolist() for row, length in zip(tokens(name)[0], PROMPTS, strict=True)]


def write_case(name, folder):
    """Write the folder of one of CASES."""
    tiny_hf.write_folder(folder, CASES[name], tensors(name))
