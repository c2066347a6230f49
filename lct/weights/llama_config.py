"""Hugging Face config.json of a Llama, both ways and strict: a field that would change the result is
either understood or refused.

Two layouts are in use: rope_theta and rope_scaling (transformers 4), and rope_parameters (5). Both are
read, and both are written.
"""

from lct.models.llama import LlamaConfig
from lct.ops.rope import TYPES, RopeConfig
from lct.weights.json_files import shown

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # sizes beyond these are mistakes, and would be work before they are found

REQUIRED = {  # config.json field -> LlamaConfig field
    'vocab_size': 'vocab_size',
    'hidden_size': 'embed_dim',
    'intermediate_size': 'mlp_dim',
    'num_hidden_layers': 'num_layers',
    'num_attention_heads': 'num_heads',
    'max_position_embeddings': 'max_position_embeddings',
}
OPTIONAL = {'num_key_value_heads', 'head_dim', 'rms_norm_eps', 'tie_word_embeddings',
            'rope_theta', 'rope_scaling', 'rope_parameters'}
FIXED = {  # the only value of each field that this model computes
    'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False, 'attention_dropout': 0,
    'partial_rotary_factor': 1, 'is_encoder_decoder': False, 'is_decoder': False,
    'add_cross_attention': False, 'cross_attention_hidden_size': None, 'chunk_size_feed_forward': 0,
    'pruned_heads': {}, 'rope_interleaved': False, 'quantization_config': None, 'sliding_window': None,
    'use_sliding_window': False,
}
HARMLESS = {  # names, ids, training history and generation: none enters the forward pass
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
    'unsloth_fixed', 'unsloth_version', 'use_bfloat16', 'use_cache',
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


def config_from_json(values, path='config.json'):
    """LlamaConfig of the dict in a config.json; absent optional fields mean what they mean to
    transformers (head_dim hidden_size / heads, norm eps 1e-6, theta 10000, untied).

    Raises:
      ValueError: naming path and field, for whatever this model would not compute as described.
    """
    if values.get('model_type') != 'llama':
        raise ValueError(f"{path}: model_type is {shown(values.get('model_type'))}; only 'llama' is supported")
    architectures = values.get('architectures')
    if architectures not in (None, ['LlamaForCausalLM']):
        raise ValueError(f"{path}: architectures is {shown(architectures)}; it must be ['LlamaForCausalLM']")
    for field, only in FIXED.items():
        if field in values and values[field] not in (only, None):
            raise ValueError(f'{path}: {field} is {shown(values[field])}; only {only!r} is supported')
    known = HARMLESS | OPTIONAL | set(REQUIRED) | set(FIXED)
    for field, value in values.items():
        if field not in known and value is not None:
            raise ValueError(
                f'{path}: field {shown(field)} is not known and might change the result; remove it if it does not')
    fields = {}
    for field, ours in REQUIRED.items():
        if values.get(field) is None:
            raise ValueError(f'{path}: {field} is missing')
        fields[ours] = values[field]
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
    eps = _get(values, 'rms_norm_eps', 1e-6)
    tied = _get(values, 'tie_word_embeddings', False)
    if not isinstance(tied, bool):
        raise ValueError(f'{path}: tie_word_embeddings is {shown(tied)}; it must be true or false')
    if not _is_number(eps) or not 0 < eps < 1:
        raise ValueError(f'{path}: rms_norm_eps is {shown(eps)}; it must be a number between 0 and 1')
    try:
        return LlamaConfig(
            **fields, head_dim=head_dim, norm_eps=float(eps), tie_embeddings=tied,
            num_kv_heads=fields['num_heads'] if kv_heads is None else kv_heads,
            rope=_read_rope(values, fields['max_position_embeddings'], head_dim, path),
        )
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f'{path}: {error}') from None


def check_sizes(sizes, path):
    """Refuse {field: value} that are not positive integers of a sane size, before any work is done with them."""
    for field, value in sizes.items():
        most = MAX_LAYERS if field in ('n_layers', 'num_hidden_layers') else MAX_SIZE
        if not _is_count(value) or value > most:
            raise ValueError(f'{path}: {field} is {shown(value)}; it must be a positive integer up to {most}')


def _is_count(x):
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _is_number(x):
    """A number that float() takes: JSON may hold integers beyond it."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300


def _get(values, field, default):
    """values[field], or the default where it is absent or null."""
    value = values.get(field)
    return default if value is None else value


def _read_rope(values, max_position, head_dim, path):
    old, new = values.get('rope_scaling'), values.get('rope_parameters')
    theta = values.get('rope_theta')
    found = []
    if new is not None:
        found.append(_read_rope_dict(new, theta, max_position, head_dim, f'{path}: rope_parameters'))
    if old is not None:
        inherited = new.get('rope_theta') if theta is None and new else theta
        found.append(_read_rope_dict(old, inherited, max_position, head_dim, f'{path}: rope_scaling'))
    if not found:
        found.append(_read_rope_dict({}, theta, max_position, head_dim, f'{path}: rope_theta'))
    if len(set(found)) > 1:
        raise ValueError(f'{path}: rope_scaling {old} and rope_parameters {new} disagree; keep the right one')
    return found[0]


def _read_rope_dict(values, theta, max_position, head_dim, where):
    if not isinstance(values, dict):
        raise ValueError(f'{where} is {shown(values)}; it must be a JSON object')
    values = {key: value for key, value in values.items() if value is not None}
    names = {values.pop(key) for key in ('rope_type', 'type') if isinstance(values.get(key), str)}
    if len(names) > 1:
        raise ValueError(f'{where} gives both rope_type and type, and they disagree')
    kind = names.pop() if names else 'default'
    if kind not in TYPES:
        raise ValueError(f'{where} has rope_type {shown(kind)}; known are {", ".join(TYPES)}')
    inner = values.pop('rope_theta', None)
    if None not in (inner, theta) and inner != theta:
        raise ValueError(f'{where} has rope_theta {inner} but the top level says {theta}; keep one')
    theta = inner if inner is not None else 10000.0 if theta is None else theta
    if values.pop('partial_rotary_factor', 1) != 1:
        raise ValueError(f'{where} has a partial_rotary_factor; only 1.0 is supported')
    for key in ROPE_REQUIRED.get(kind, ()):
        if key not in values:
            raise ValueError(f'{where} of type {kind!r} lacks {key}')
    fields = {}
    for key, value in values.items():
        if key not in ROPE_FIELDS[kind]:
            raise ValueError(
                f'{where} has {shown(key)}, which type {kind!r} does not use; it takes '
                f'{sorted(ROPE_FIELDS[kind])}')
        if key in ('long_factor', 'short_factor'):
            if not isinstance(value, list) or len(value) * 2 != head_dim:
                raise ValueError(f'{where} has {key} {shown(value)}; it must be a list of head_dim/2 numbers')
            value = tuple(value)
        elif key == 'truncate' and not isinstance(value, bool):
            raise ValueError(f'{where} has truncate {shown(value)}; it must be true or false')
        elif key not in ('original_max_position_embeddings', 'truncate') and not _is_number(value):
            raise ValueError(f'{where} has {key} {shown(value)}; it must be a number')
        elif key == 'original_max_position_embeddings':
            check_sizes({key: value}, where)
        elif key != 'truncate':
            value = float(value)
        fields[ROPE_FIELDS[kind][key]] = value
    if kind in ('yarn', 'longrope', 'llama3'):
        original = fields.setdefault('original_max_position', max_position)
        if 'factor' not in fields:
            fields['factor'] = max_position / original
    if kind == 'dynamic':
        fields['max_position'] = max_position
    if not _is_number(theta):
        raise ValueError(f'{where}: rope_theta is {shown(theta)}; it must be a number')
    return RopeConfig(theta=float(theta), type=kind, **fields)


def config_to_json(config, dtype='bfloat16'):
    """config.json dict of a LlamaConfig, with the rope fields in the old and in the new layout.

    Raises:
      ValueError: for a config that a Hugging Face Llama cannot compute.
    """
    if config.window is not None:
        raise ValueError(f'window {config.window}: config.json of a Llama has no sliding window, and its readers would '
                         'compute full attention; export a model with window None')
    rope = config.rope
    if rope.type == 'dynamic' and rope.max_position != config.max_position_embeddings:
        raise ValueError(
            f"rope type 'dynamic' has max_position {rope.max_position} but max_position_embeddings is "
            f'{config.max_position_embeddings}; config.json has one field for both, make them equal')
    scaling = {'rope_type': rope.type}
    for key, ours in ROPE_FIELDS[rope.type].items():
        value = getattr(rope, ours)
        if value is not None:
            scaling[key] = list(value) if isinstance(value, tuple) else value
    return {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        **{field: getattr(config, ours) for field, ours in REQUIRED.items()},
        'num_key_value_heads': config.num_kv_heads,
        'head_dim': config.head_dim,
        'rms_norm_eps': config.norm_eps,
        'tie_word_embeddings': config.tie_embeddings,
        'hidden_act': 'silu',
        'attention_bias': False,
        'attention_dropout': 0.0,
        'mlp_bias': False,
        'rope_theta': rope.theta,
        'rope_scaling': None if rope.type == 'default' else scaling,
        'rope_parameters': {'rope_theta': rope.theta, **scaling},
        'torch_dtype': dtype,
        'dtype': dtype,
        'use_cache': True,
    }
