"""Hugging Face config.json of a Llama or of a family like it (families.py), read and written strictly: a
field that would change the result is either understood or refused.

Two layouts are in use: rope_theta and rope_scaling (transformers 4), and rope_parameters (transformers 5).
Both are read, and both are written.
"""

import dataclasses
from typing import Any

from lct.json_files import short_repr
from lct.models.llama import LlamaConfig
from lct.ops.rope import NEED_ORIGINAL, TYPES, RopeConfig
from lct.weights import families, quantized

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # larger sizes are mistakes, found before any work is done with them

REQUIRED = {  # config.json field -> LlamaConfig field
    'vocab_size': 'vocab_size',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'max_position_embeddings': 'max_position_embeddings',
}
OPTIONAL = {'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings',
            'rope_theta', 'rope_scaling', 'rope_parameters', 'layer_types'}
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
    'forced_eos_token_id', 'id2label', 'initializer_range', 'is_llama_config', 'label2id',
    'length_penalty', 'max_length', 'min_length', 'model_type', 'no_repeat_ngram_size',
    'num_beam_groups', 'num_beams', 'num_return_sequences', 'output_attentions',
    'output_hidden_states', 'output_scores', 'pad_token_id', 'prefix', 'pretraining_tp',
    'problem_type', 'remove_invalid_values', 'repetition_penalty', 'return_dict',
    'return_dict_in_generate', 'sep_token_id', 'suppress_tokens', 'task_specific_params',
    'temperature', 'tf_legacy_loss', 'tie_encoder_decoder', 'tokenizer_class', 'top_k', 'top_p',
    'torch_dtype', 'torchscript', 'transformers.js_config', 'transformers_version', 'typical_p',
    'quantization_config', 'unsloth_fixed', 'unsloth_version', 'use_bfloat16', 'use_cache',
}
ROPE_FIELDS = {  # rope_scaling field -> RopeConfig field, by type
    'default': {},
    'linear': {'factor': 'factor'},
    'dynamic': {'factor': 'factor'},
    'yarn': {
        'factor': 'factor', 'original_max_position_embeddings': 'original_max_position',
        'attention_factor': 'attention_factor', 'beta_fast': 'beta_fast', 'beta_slow': 'beta_slow',
        'mscale': 'mscale', 'mscale_all_dim': 'mscale_all_dim', 'truncate': 'truncate',
    },
    'longrope': {
        'factor': 'factor', 'original_max_position_embeddings': 'original_max_position',
        'attention_factor': 'attention_factor', 'long_factor': 'long_factor',
        'short_factor': 'short_factor',
    },
    'llama3': {
        'factor': 'factor', 'original_max_position_embeddings': 'original_max_position',
        'low_freq_factor': 'low_freq_factor', 'high_freq_factor': 'high_freq_factor',
    },
}
ROPE_REQUIRED = {
    'linear': ('factor',), 'dynamic': ('factor',), 'longrope': ('long_factor', 'short_factor'),
    'llama3': ('factor', 'low_freq_factor', 'high_freq_factor'),
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
        return LlamaConfig(
            **fields, **sizes, norm_eps=float(eps), tie_embeddings=tied,
            rope=_read_rope(values, fields['max_position_embeddings'], sizes['head_dim'], path),
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


# ---------------------------------------------------------------------------------------------------
# Checks that Meta's params.json shares
# ---------------------------------------------------------------------------------------------------


def refuse_unknown(values: dict[str, Any], known: set[str], path: str) -> None:
    """Refuse fields outside of known, unless they are null."""
    for field, value in values.items():
        if field not in known and value is not None:
            raise ValueError(
                f'{path}: field {short_repr(field)} is not known and might change the result; '
                'remove it if it does not')


def read_required(values: dict[str, Any], names: dict[str, str], path: str) -> dict[str, Any]:
    """{LlamaConfig field: value} of names {field of the file: LlamaConfig field}; none may be missing."""
    for field in names:
        if values.get(field) is None:
            raise ValueError(f'{path}: {field} is missing; add it')
    return {name: values[field] for field, name in names.items()}


def check_sizes(sizes: dict[str, Any], path: str) -> None:
    """Refuse {field: value} unless all are positive integers of a sane size."""
    for field, value in sizes.items():
        limit = MAX_LAYERS if field in ('n_layers', 'num_hidden_layers') else MAX_SIZE
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not 0 < value <= limit:
            raise ValueError(
                f'{path}: {field} is {short_repr(value)}; it must be a positive integer up to {limit}')


def is_number(x: Any) -> bool:
    """Whether float() takes a JSON value: integers may be too large for it."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300


def _get(values, field, default):
    """values[field], or the default if it is absent or null."""
    value = values.get(field)
    return default if value is None else value


# ---------------------------------------------------------------------------------------------------
# RoPE
# ---------------------------------------------------------------------------------------------------


def _read_rope(values, max_position, head_dim, path):
    """RopeConfig of a config.json in one of the two layouts, or in both if they agree."""
    old, new = values.get('rope_scaling'), values.get('rope_parameters')
    theta = values.get('rope_theta')
    candidates = []
    if new is not None:
        candidates.append(_read_rope_dict(new, theta, max_position, head_dim, f'{path}: rope_parameters'))
    if old is not None:
        inherited = new.get('rope_theta') if theta is None and new else theta
        candidates.append(_read_rope_dict(old, inherited, max_position, head_dim, f'{path}: rope_scaling'))
    if not candidates:
        candidates.append(_read_rope_dict({}, theta, max_position, head_dim, f'{path}: rope_theta'))
    if len(set(candidates)) > 1:
        raise ValueError(f'{path}: rope_scaling {old} and rope_parameters {new} disagree; keep the right one')
    return candidates[0]


def _read_rope_dict(values, theta, max_position, head_dim, location):
    """RopeConfig of one dict. theta: the value outside of it, or None. location: for error messages."""
    if not isinstance(values, dict):
        raise ValueError(f'{location} is {short_repr(values)}; it must be a JSON object')
    values = {key: value for key, value in values.items() if value is not None}
    kind = _pop_rope_type(values, location)
    theta = _pop_theta(values, theta, location)
    if values.pop('partial_rotary_factor', 1) != 1:
        raise ValueError(f'{location} has a partial_rotary_factor; only 1.0 is supported')
    for key in ROPE_REQUIRED.get(kind, ()):
        if key not in values:
            raise ValueError(f'{location} of type {kind!r} lacks {key}; add it')
    fields = {}
    for key, value in values.items():
        if key not in ROPE_FIELDS[kind]:
            raise ValueError(
                f'{location} has {short_repr(key)}, which type {kind!r} does not use; it takes '
                f'{sorted(ROPE_FIELDS[kind])}')
        fields[ROPE_FIELDS[kind][key]] = _read_rope_value(key, value, head_dim, location)
    if kind in NEED_ORIGINAL:
        original = fields.setdefault('original_max_position', max_position)
        fields.setdefault('factor', max_position / original)
    if kind == 'dynamic':
        fields['max_position'] = max_position
    return RopeConfig(theta=theta, type=kind, **fields)


def _pop_rope_type(values, location):
    """Remove rope_type and its old name type from a dict; returns the type."""
    names = {values.pop(key) for key in ('rope_type', 'type') if isinstance(values.get(key), str)}
    if len(names) > 1:
        raise ValueError(f'{location} gives both rope_type and type, and they disagree; keep one')
    kind = names.pop() if names else 'default'
    if kind not in TYPES:
        raise ValueError(f'{location} has rope_type {short_repr(kind)}; known are {", ".join(TYPES)}')
    return kind


def _pop_theta(values, outer, location):
    """Remove rope_theta from a dict; returns it, or the outer one, or transformers' default."""
    inner = values.pop('rope_theta', None)
    if None not in (inner, outer) and inner != outer:
        raise ValueError(f'{location} has rope_theta {inner} but the top level has {outer}; keep one')
    theta = next((x for x in (inner, outer) if x is not None), 10000.0)
    if not is_number(theta):
        raise ValueError(f'{location}: rope_theta is {short_repr(theta)}; it must be a number')
    return float(theta)


def _read_rope_value(key, value, head_dim, location):
    """The RopeConfig value of one field of a rope dict."""
    if key in ('long_factor', 'short_factor'):
        if not isinstance(value, list) or len(value) * 2 != head_dim:
            raise ValueError(
                f'{location} has {key} {short_repr(value)}; it must be a list of head_dim/2 numbers')
        return tuple(value)
    if key == 'truncate':
        if not isinstance(value, bool):
            raise ValueError(f'{location} has truncate {short_repr(value)}; it must be true or false')
        return value
    if key == 'original_max_position_embeddings':
        check_sizes({key: value}, location)
        return value
    if not is_number(value):
        raise ValueError(f'{location} has {key} {short_repr(value)}; it must be a number')
    return float(value)


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
