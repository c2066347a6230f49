"""Families of models that compute what lct.models.llama computes: what their config.json says differently.

A family is a row of FAMILIES, found by the model_type of its config.json. Its tensors have the names of a
Llama's, except for those that are stored as one (fused).
"""

from typing import Any, NamedTuple

import numpy as np

from lct.json_files import short_repr
from lct.models.config import LlamaConfig
from lct.ops.rope import RopeConfig
from lct.weights import other_families
from lct.weights.tensors import Rows


class Family(NamedTuple):
    """One model_type of transformers.

    architecture: its class. reads: fields of config.json beyond those of every family. absent: what an absent
    field means, where it is not what it means for a Llama. sets: LlamaConfig fields that are always the same.
    fused: {part of the name of a Llama's tensor: part of the name of the tensor that holds its rows}.
    """

    architecture: str
    reads: frozenset[str] = frozenset()
    absent: dict[str, Any] = {}
    sets: dict[str, bool] = {}
    fused: dict[str, str] = {}


WINDOWS = frozenset({'use_sliding_window', 'sliding_window', 'max_window_layers'})
FAMILIES = {
    'llama': Family('LlamaForCausalLM', frozenset({'attention_bias', 'mlp_bias'})),
    'mistral': Family('MistralForCausalLM', frozenset({'sliding_window'}),
                      {'num_key_value_heads': 8, 'sliding_window': 4096}),
    'qwen2': Family('Qwen2ForCausalLM', WINDOWS,
                    {'num_key_value_heads': 32, 'sliding_window': 4096, 'max_window_layers': 28},
                    {'qkv_bias': True}),
    'qwen3': Family('Qwen3ForCausalLM', WINDOWS | {'attention_bias'},
                    {'num_key_value_heads': 32, 'head_dim': 128, 'sliding_window': 4096,
                     'max_window_layers': 28},
                    {'qk_norm': True}),
    'smollm3': Family('SmolLM3ForCausalLM', WINDOWS | {'attention_bias', 'mlp_bias', 'no_rope_layers',
                                                       'no_rope_layer_interval'},
                      {'num_key_value_heads': 4, 'rope_theta': 2e6, 'tie_word_embeddings': True}),
    'phi3': Family('Phi3ForCausalLM', frozenset({'sliding_window', 'original_max_position_embeddings'}),
                   {'rms_norm_eps': 1e-5, 'original_max_position_embeddings': 4096},
                   fused={'q_proj': 'qkv_proj', 'k_proj': 'qkv_proj', 'v_proj': 'qkv_proj',
                          'gate_proj': 'gate_up_proj', 'up_proj': 'gate_up_proj'}),
}


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def family_of(values: dict[str, Any], path: str) -> Family:
    """The Family of the dict in a config.json.

    Raises:
      ValueError: for a model_type that is not in FAMILIES, or an architecture that is not its own.
    """
    kind = values.get('model_type')
    if not isinstance(kind, str) or kind not in FAMILIES:
        other_families.refuse(kind, list(FAMILIES), path)
    architectures, family = values.get('architectures'), FAMILIES[kind]
    if architectures not in (None, [family.architecture]):
        raise ValueError(
            f"{path}: architectures is {short_repr(architectures)}; it must be ['{family.architecture}']")
    other_families.check(values, family.architecture, path)
    return family


def with_defaults(values: dict[str, Any], family: Family) -> dict[str, Any]:
    """The values with what absent fields mean in this family, and with RoPE as every family has it."""
    values = {**family.absent, **values}
    scalings = [field for field in ('rope_scaling', 'rope_parameters') if isinstance(values.get(field), dict)]
    if any('rope_theta' in values[field] for field in scalings):
        values = {key: value for key, value in values.items()
                  if key != 'rope_theta' or value != family.absent.get('rope_theta')}
    if 'original_max_position_embeddings' not in family.reads:
        return values
    original = values.pop('original_max_position_embeddings')
    for field in scalings:
        values[field] = _phi3_scaling(values[field], original)
    return values


def _phi3_scaling(scaling, original):
    """'su' was the first name of longrope. The trained length stands outside of the dict, and counts."""
    scaling = {key: 'longrope' if value == 'su' else value for key, value in scaling.items()}
    if 'longrope' not in (scaling.get('type'), scaling.get('rope_type')):
        return {key: value for key, value in scaling.items() if key != 'original_max_position_embeddings'}
    return scaling | {'original_max_position_embeddings': original}


def read_options(values: dict[str, Any], family: Family, num_layers: int, path: str) -> dict[str, Any]:
    """The LlamaConfig fields in which families differ, of values with defaults.

    Raises:
      ValueError: for layers that differ in more than whether they rotate.
    """
    biases = {}
    for field in ('attention_bias', 'mlp_bias', 'use_sliding_window'):
        if not isinstance(values.get(field) or False, bool):
            raise ValueError(f'{path}: {field} is {short_repr(values[field])}; it must be true or false')
    if 'attention_bias' in family.reads:
        biases = dict.fromkeys(('qkv_bias', 'out_bias'), bool(values.get('attention_bias')))
    rope_layers = _read_rope_layers(values, family, num_layers, path)
    window = _read_window(values, family, rope_layers or (True,) * num_layers, path)
    return {'family': values['model_type'], 'mlp_bias': bool(values.get('mlp_bias')), **biases,
            'rope_layers': rope_layers, 'window': window, **family.sets}


def _read_rope_layers(values, family, num_layers, path):
    """Whether each layer rotates, or None if all do."""
    if 'no_rope_layers' not in family.reads:
        return None
    flags, interval = values.get('no_rope_layers'), values.get('no_rope_layer_interval', 4)
    if flags is None:
        if type(interval) is not int or interval < 1:
            raise ValueError(
                f'{path}: no_rope_layer_interval is {short_repr(interval)}; it must be a positive integer')
        flags = [int((i + 1) % interval != 0) for i in range(num_layers)]
    if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
        raise ValueError(f'{path}: no_rope_layers is {short_repr(flags)}; it must be a list with 0 or 1 for '
                         f'each of the {num_layers} layers')
    flags = tuple(map(bool, flags[:num_layers]))
    return None if all(flags) else flags


def _read_window(values, family, rotates, path):
    """The sliding window of all layers, or None."""
    window = values.get('sliding_window')
    if 'use_sliding_window' in family.reads and not values.get('use_sliding_window'):
        window = None
    if window is None or 'use_sliding_window' not in family.reads:
        sliding = [window is not None] * len(rotates)
    elif 'max_window_layers' in family.absent:
        sliding = [i >= values['max_window_layers'] for i in range(len(rotates))]
    else:
        sliding = [not flag for flag in rotates]
    if (kinds := values.get('layer_types')) is not None:
        stated = _read_layer_types(kinds, len(rotates), window, path)
        if stated != sliding and 'use_sliding_window' not in family.reads:
            raise ValueError(f'{path}: layer_types and sliding_window {window} disagree; keep one')
        sliding = stated
    if any(sliding) and not all(sliding):
        raise ValueError(f'{path}: {sum(sliding)} of {len(sliding)} layers have a sliding window; only a '
                         'window of all layers, or of none, is supported')
    return window if all(sliding) else None


def _read_layer_types(kinds, num_layers, window, path):
    """Whether each layer has a sliding window."""
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(
            kind not in ('full_attention', 'sliding_attention') for kind in kinds):
        raise ValueError(f"{path}: layer_types is {short_repr(kinds)}; it must be 'full_attention' or "
                         f"'sliding_attention' for each of the {num_layers} layers")
    sliding = [kind == 'sliding_attention' for kind in kinds]
    if any(sliding) and window is None:
        raise ValueError(f"{path}: layer_types has 'sliding_attention' but no sliding_window is in use; give "
                         "it, or make all layers 'full_attention'")
    return sliding


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def write_options(config: LlamaConfig) -> dict[str, Any]:
    """The fields of config.json in which the family of a config differs from others."""
    family, window = FAMILIES[config.family], config.window
    written = {
        'attention_bias': config.qkv_bias, 'mlp_bias': config.mlp_bias, 'sliding_window': window,
        'use_sliding_window': window is not None,
        'max_window_layers': config.num_layers if window is None else 0,
        'no_rope_layers': [int(flag) for flag in config.rope_layers or (True,) * config.num_layers],
        'original_max_position_embeddings':
            config.rope.original_max_position or config.max_position_embeddings,
    }
    values = {field: value for field, value in written.items() if field in family.reads}
    if config.family in ('smollm3', 'phi3'):  # their default id is in the published vocabularies alone
        values['pad_token_id'] = None
    if 'use_sliding_window' in family.reads:
        kind = 'full_attention' if window is None else 'sliding_attention'
        values['layer_types'] = [kind] * config.num_layers
    return values


def write_phi3_rope(rope: RopeConfig) -> dict[str, Any]:
    """The rope fields of a Phi-3: transformers 4 takes a rope_scaling of exactly three fields, and 5 prefers
    it to rope_parameters, so that the attention factor must follow from the lengths.

    Raises:
      ValueError: for a scaling that transformers refuses in a Phi-3.
    """
    if rope.type not in ('default', 'longrope'):
        raise ValueError(f"rope type {rope.type!r} is not possible in a config.json of model_type 'phi3'; "
                         "use 'default' or 'longrope', or export as family 'llama', which computes the same")
    scaling = None
    if rope.type == 'longrope':
        scaling = {'type': 'longrope', 'short_factor': list(rope.short_factor),
                   'long_factor': list(rope.long_factor)}
    return {'rope_theta': rope.theta, 'rope_scaling': scaling, 'partial_rotary_factor': 1.0}


# ---------------------------------------------------------------------------------------------------
# Fused tensors
# ---------------------------------------------------------------------------------------------------


def fused_names(names: list[str], family: str) -> dict[str, list[str]]:
    """{tensor of the file: the tensors of a Llama whose rows it holds, in their order}; one each, unless the
    family stores several as one. names: of a Llama's tensors, in the order of its parameters."""
    parts, result = FAMILIES[family].fused, {}
    for name in names:
        stored = '.'.join(parts.get(part, part) for part in name.split('.'))
        result.setdefault(stored, []).append(name)
    return result


def fused_shapes(shapes: dict[str, tuple[int, ...]], family: str) -> dict[str, tuple[int, ...]]:
    """{tensor of the file: shape} of {tensor of a Llama: shape}."""
    return {stored: (sum(shapes[name][0] for name in names), *shapes[names[0]][1:])
            for stored, names in fused_names(list(shapes), family).items()}


def split(tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], family: str) -> dict[str, Any]:
    """{tensor of a Llama: Tensor, or array to write} of {tensor of the file: Tensor, or array to write}."""
    result = {}
    for stored, names in fused_names(list(shapes), family).items():
        start = 0
        for name in names:
            stop = start + shapes[name][0]
            result[name] = tensors[stored] if len(names) == 1 else _rows(tensors[stored], start, stop)
            start = stop
    return result


def _rows(tensor, start, stop):
    """Rows of a Tensor, or a view of the rows of an array to write."""
    return tensor[start:stop] if isinstance(tensor, np.ndarray) else Rows(tensor, start, stop)
