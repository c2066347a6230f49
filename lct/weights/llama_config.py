"""Hugging Face config.json of a Llama or of a family like it (families.py), read and written strictly: a
field that would change the result is either understood or refused.

Two layouts are in use: rope_theta and rope_scaling (transformers 4), and rope_parameters (transformers 5).
Both are read, and both are written.
"""

import dataclasses
from typing import Any

from lct.json_files import short_repr
from lct.models.llama import LlamaConfig
from lct.weights import families, quantized
from lct.weights.config_checks import check_sizes, is_number, read_required, refuse_unknown
from lct.weights.rope_fields import ROPE_FIELDS, read_rope, scaled_positions

REQUIRED = {  # config.json field -> LlamaConfig field
    'vocab_size': 'vocab_size',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'max_position_embeddings': 'max_position_embeddings',
}
OPTIONAL = {'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings',
            'rope_theta', 'rope_scaling', 'rope_parameters', 'layer_types',
            'original_max_position_embeddings', 'max_sequence_length'}
FIXED = {  # the only value of each field that this model computes, in families that do not read it
    'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0,
    'partial_rotary_factor': 1, 'is_encoder_decoder': False, 'is_decoder': False,
    'add_cross_attention': False, 'cross_attention_hidden_size': None, 'chunk_size_feed_forward': 0,
    'pruned_heads': {}, 'rope_interleaved': False, 'sliding_window': None,
    'use_sliding_window': False, 'embd_pdrop': 0, 'resid_pdrop': 0,
}
HARMLESS = {  # names, ids, training history and generation: the forward pass uses none of them
    '_name_or_path', '_attn_implementation', '_attn_implementation_autoset', 'architectures', 'auto_map',
    'bad_words_ids', 'begin_suppress_tokens', 'bos_token_id', 'decoder_start_token_id',
    'diversity_penalty', 'do_sample', 'dtype', 'early_stopping', 'encoder_no_repeat_ngram_size',
    'eos_token_id', 'exponential_decay_length_penalty', 'finetuning_task', 'forced_bos_token_id',
    'forced_eos_token_id', 'gradient_checkpointing', 'id2label', 'initializer_range', 'is_llama_config',
    'label2id', 'length_penalty', 'max_length', 'min_length', 'model_type', 'no_repeat_ngram_size',
    'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_attentions',
    'output_hidden_states', 'output_scores', 'pad_token_id', 'prefix', 'pretraining_tp',
    'problem_type', 'remove_invalid_values', 'repetition_penalty', 'return_dict',
    'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
    'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tokenizer_class', 'top_k', 'top_p',
    'torch_dtype', 'torchscript', 'transformers.js_config', 'transformers_version', 'typical_p',
    'quantization_config', 'unsloth_fixed', 'unsloth_version', 'use_bfloat16', 'use_cache',
}


def config_from_json(values: dict[str, Any], path: str = 'config.json') -> LlamaConfig:
    """LlamaConfig of the dict in a config.json. Absent optional fields have the defaults of transformers: for
    a Llama head_dim hidden_size / heads, norm eps 1e-6, theta 10000, untied embeddings.

    Args:
      path: the file, for error messages.
    Raises:
      ValueError: naming path and field, for anything that this model would not compute as described.
    """
    family = families.family_of(values, path)
    _check_fixed(values, family, path)
    quantized.check_config(values, path)
    refuse_unknown(values, HARMLESS | OPTIONAL | set(REQUIRED) | set(FIXED) | family.reads, path)
    values = families.with_defaults(values, family)
    fields = read_required(values, REQUIRED, path)
    sizes = _read_sizes(values, fields, path)
    eps = _get(values, 'rms_norm_eps', 1e-6)
    tied = _get(values, 'tie_word_embeddings', False)
    if not isinstance(tied, bool):
        raise ValueError(f'{path}: tie_word_embeddings is {short_repr(tied)}; it must be true or false')
    if not is_number(eps) or not 0 < eps < 1:
        raise ValueError(f'{path}: rms_norm_eps is {short_repr(eps)}; it must be a number between 0 and 1')
    try:
        rope = read_rope(values, fields['max_position_embeddings'], sizes['head_dim'], path)
        fields['max_position_embeddings'] = _read_positions(values, rope, path)
        return LlamaConfig(
            **fields, **sizes, norm_eps=float(eps), tie_embeddings=tied, rope=rope,
            **families.read_options(values, family, fields['num_layers'], path),
        )
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f'{path}: {error}') from None


def _check_fixed(values, family, path):
    for field, only in FIXED.items():
        if field not in family.reads and values.get(field) not in (only, None):
            raise ValueError(f'{path}: {field} is {short_repr(values[field])}; only {only!r} is supported')


def _read_sizes(values, fields, path):
    """{'num_kv_heads', 'head_dim'}, with their defaults; all sizes are checked."""
    kv_heads, head_dim = values.get('num_key_value_heads'), values.get('head_dim')
    optional = {'num_key_value_heads': kv_heads, 'head_dim': head_dim}
    check_sizes({field: values[field] for field in REQUIRED}, path)
    check_sizes({field: value for field, value in optional.items() if value is not None}, path)
    if head_dim is None:
        if fields['embed_dim'] % fields['num_heads']:
            raise ValueError(
                f"{path}: hidden_size {fields['embed_dim']} is not a multiple of num_attention_heads "
                f"{fields['num_heads']}; give head_dim")
        head_dim = fields['embed_dim'] // fields['num_heads']
    return {'num_kv_heads': fields['num_heads'] if kv_heads is None else kv_heads, 'head_dim': head_dim}


def _read_positions(values, rope, path):
    """max_position_embeddings, or with a linear factor on the positions before it, as max_sequence_length may
    state, their product."""
    positions, stated = values['max_position_embeddings'], values.get('max_sequence_length')
    if stated is None or stated == positions:
        return positions
    if stated != scaled_positions(rope, positions):
        raise ValueError(f'{path}: max_sequence_length {short_repr(stated)} and max_position_embeddings '
                         f'{positions} disagree; remove the one that the model was not trained for')
    return stated


def _get(values, field, default):
    """values[field], or the default if it is absent or null."""
    value = values.get(field)
    return default if value is None else value


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def config_to_json(config: LlamaConfig, dtype: str = 'bfloat16') -> dict[str, Any]:
    """The dict of a config.json, with the rope fields in the old and in the new layout.

    Raises:
      ValueError: for a config that its family cannot compute in transformers.
    """
    if config.window is not None and config.family == 'llama':
        raise ValueError(
            f'window {config.window}: config.json of a Llama has no sliding window, and its readers would '
            "compute full attention; export a model with window None, or as family 'mistral'")
    rope = config.rope
    if rope.type == 'dynamic' and rope.max_position != config.max_position_embeddings:
        raise ValueError(
            f"rope type 'dynamic' has max_position {rope.max_position} but max_position_embeddings is "
            f'{config.max_position_embeddings}; config.json has only one field for both: make them equal')
    values = {
        'architectures': [families.FAMILIES[config.family].architecture],
        'model_type': config.family,
        **{field: getattr(config, name) for field, name in REQUIRED.items()},
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'rms_norm_eps': config.norm_eps,
        'tie_word_embeddings': config.tie_embeddings,
        'hidden_act': 'silu',
        'attention_dropout': 0.0,
        **families.write_options(config),
        **_write_rope(config),
        'torch_dtype': dtype,
        'dtype': dtype,
        'use_cache': True,
    }
    _check_complete(values, config)
    return values


def _write_rope(config):
    rope = config.rope
    if config.family == 'phi3':
        return families.write_phi3_rope(rope)
    scaling = {'rope_type': rope.type}
    for key, field in ROPE_FIELDS[rope.type].items():
        value = getattr(rope, field)
        if value is not None:
            scaling[key] = list(value) if isinstance(value, tuple) else value
    return {
        'rope_theta': rope.theta,
        'rope_scaling': None if rope.type == 'default' else scaling,
        'rope_parameters': {'rope_theta': rope.theta, **scaling},
    }


def _check_complete(values, config):
    """Refuse values that do not describe the config: its family has no field for something in it."""
    written = config_from_json(values)
    for field in dataclasses.fields(config):
        value, found = getattr(config, field.name), getattr(written, field.name)
        if value != found and not (field.name == 'rope' and _same_rope(value, found)):
            raise ValueError(
                f'{field.name} {short_repr(value)} cannot be written: a config.json of model_type '
                f"{config.family!r} says {short_repr(found)}; export a family that has it, or change it")


def _same_rope(a, b):
    """Whether two RopeConfigs are equal but for fields that their type does not use."""
    used = {'theta', 'type', *ROPE_FIELDS[a.type].values()}
    return all(getattr(a, field) == getattr(b, field) for field in used)
