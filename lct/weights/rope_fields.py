"""The RoPE fields of a config.json, in the layout of transformers 4 or of 5."""

from typing import Any

from lct.json_files import short_repr
from lct.ops.rope import NEED_ORIGINAL, TYPES, RopeConfig
from lct.weights.config_checks import check_sizes, is_number

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


def scaled_positions(rope: RopeConfig, positions: int) -> float:
    """The length of a model whose config.json states the positions before a linear factor, as transformers 4
    asked for."""
    return rope.factor * positions if rope.type == 'linear' else positions


def read_rope(values: dict[str, Any], max_position: int, head_dim: int, path: str) -> RopeConfig:
    """RopeConfig of a config.json in one of the two layouts, or in both if they agree."""
    old, new = values.get('rope_scaling'), values.get('rope_parameters')
    if values.get('original_max_position_embeddings') is not None:
        old, new = _with_original(old, values, path), _with_original(new, values, path)
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


def _with_original(scaling, values, path):
    """A rope dict, or None, with the original_max_position_embeddings of longrope at the top level."""
    original = values['original_max_position_embeddings']
    dicts = [x for x in (values.get('rope_scaling'), values.get('rope_parameters')) if isinstance(x, dict)]
    for one in dicts or [{}]:
        inside = one.get('original_max_position_embeddings', original)
        if 'longrope' not in (one.get('type'), one.get('rope_type')) or inside != original:
            raise ValueError(f'{path}: original_max_position_embeddings {short_repr(original)} is not the '
                             'one of a rope type longrope; remove it, or give it in rope_scaling')
    if not isinstance(scaling, dict):
        return scaling
    return {**scaling, 'original_max_position_embeddings': original}


def _read_rope_dict(values, theta, max_position, head_dim, location):
    """RopeConfig of one dict. theta: the value outside of it, or None. location: for error messages."""
    if not isinstance(values, dict):
        raise ValueError(f'{location} is {short_repr(values)}; it must be a JSON object')
    values = {key: value for key, value in values.items() if value is not None}
    kind = _pop_rope_type(values, location)
    theta = _pop_theta(values, theta, location)
    values.pop('finetuned', None)  # of the training
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
