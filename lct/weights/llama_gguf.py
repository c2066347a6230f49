"""Llama weights from a GGUF file: names, dequantised tensors, the tokenizer that travels in the metadata.

llama.cpp's converter stores q and k with the pairs of a rotation side by side (2i, 2i + 1), as Meta does;
they are put back into the half-split order at the door. Needs the extra 'gguf'.
"""

import json
import os
import tempfile

import numpy as np

from lct.data import tokenizer_json
from lct.models import llama
from lct.ops import rope
from lct.weights import gguf_files, llama_hf, streaming
from lct.weights.tensors import Matrix

NAMES = {  # ours -> theirs; {} is the layer
    'embed': 'token_embd.weight',
    'layers.attn_norm': 'blk.{}.attn_norm.weight',
    'layers.wq': 'blk.{}.attn_q.weight',
    'layers.wk': 'blk.{}.attn_k.weight',
    'layers.wv': 'blk.{}.attn_v.weight',
    'layers.wo': 'blk.{}.attn_output.weight',
    'layers.mlp_norm': 'blk.{}.ffn_norm.weight',
    'layers.w_gate': 'blk.{}.ffn_gate.weight',
    'layers.w_up': 'blk.{}.ffn_up.weight',
    'layers.w_down': 'blk.{}.ffn_down.weight',
    'final_norm': 'output_norm.weight',
    'lm_head': 'output.weight',
}
ROTATED = ('layers.wq', 'layers.wk')  # in the order of pairs
FREQUENCIES = 'rope_freqs.weight'  # [H/2], by what Llama-3.1's scaling divides each frequency
COUNTS = {  # metadata key -> LlamaConfig field
    'llama.embedding_length': 'embed_dim',
    'llama.feed_forward_length': 'mlp_dim',
    'llama.block_count': 'num_layers',
    'llama.attention.head_count': 'num_heads',
    'llama.context_length': 'max_position_embeddings',
}
OPTIONAL = {
    'llama.vocab_size', 'llama.attention.head_count_kv', 'llama.attention.key_length',
    'llama.attention.value_length', 'llama.attention.layer_norm_rms_epsilon', 'llama.rope.dimension_count',
    'llama.rope.freq_base', 'llama.rope.scaling.type', 'llama.rope.scaling.factor',
    'llama.rope.scaling.original_context_length',
}
HARMLESS = {'llama.rope.scaling.finetuned', 'llama.tensor_data_layout'}


def load(path, dtype='float32'):
    """(LlamaConfig, Params, companions) of a GGUF file of a Llama, sharded on the current mesh.

    companions is {file name: JSON object} of the Hugging Face files that the metadata amounts to:
    tokenizer.json, tokenizer_config.json with the chat template, generation_config.json, and the token ids of
    a config.json. Each device's part is dequantised layer by layer from the memory-mapped file.

    Raises:
      ValueError: naming file and key or tensor, for anything missing, left over, of a wrong shape, not
        finite, or not understood.
    """
    file = gguf_files.read(path)
    config = config_of(file)
    streaming.check_mesh(config)
    pieces, companions = matrices(file, config), companions_of(file, config)
    return config, streaming.load(config, streaming.wanted_dtype(dtype, {}, path), pieces), companions


def to_hf(path, folder, dtype='bfloat16', **options):
    """Write the Hugging Face folder of a GGUF file; options are those of llama_hf.save."""
    config, params, companions = load(path, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in companions.items():
            with open(os.path.join(temporary, name), 'w', encoding='utf-8') as file:
                json.dump(value, file, ensure_ascii=False, indent=1)
        llama_hf.save(folder, config, params, dtype=dtype, tokenizer_from=temporary, **options)


def matrices(file, config):
    """{(our name, layer or None): Matrix} of a File, which must hold just the tensors of the config."""
    if config.num_layers > len(file.tensors):  # before a name is made for each
        raise ValueError(
            f'{file.path} claims {config.num_layers} layers but holds {len(file.tensors)} tensors')
    names, shapes = (f(config, NAMES) for f in (streaming.tensor_names, streaming.their_shapes))
    missing = [name for name in names if name not in file.tensors]
    if missing:
        raise ValueError(f'{file.path} lacks tensor {missing[0]!r} ({len(missing)} missing in all)')
    extra = [name for name in file.tensors if name not in names and name != FREQUENCIES]
    if extra:
        raise ValueError(f'{file.path}: tensor {extra[0]!r} is no part of a Llama ({len(extra)} left over in '
                         'all); biases, experts and adapters are not supported')
    result = {}
    for name, ours in names.items():
        tensor = file.tensors[name]
        if tensor.shape != shapes[name]:
            raise ValueError(f'{file.path}: tensor {name!r} has shape {list(tensor.shape)}; the metadata '
                             f'asks for {list(shapes[name])}')
        result[ours] = Matrix(name, (tensor,), head_dim=config.head_dim if ours[0] in ROTATED else None)
    return result


# ---------------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------------


def config_of(file):
    """LlamaConfig of a gguf_files.File; a key that would change the result is understood or refused."""
    path, values = file.path, file.metadata
    if values.get('general.architecture') != 'llama':
        raise ValueError(f"{path} has general.architecture {values.get('general.architecture')!r}; only "
                         "'llama' is supported")
    known = {*COUNTS, *OPTIONAL, *HARMLESS}
    for key, value in values.items():
        if key.startswith('llama.') and key not in known and value not in (0, False):
            raise ValueError(f'{path}: {key} is {value!r}, which this model does not compute')
    fields = {ours: _count(values, key, path) for key, ours in COUNTS.items()}
    heads = fields['num_heads']
    if fields['embed_dim'] % heads:
        raise ValueError(f"{path}: llama.embedding_length {fields['embed_dim']} is not a multiple of "
                         f'llama.attention.head_count {heads}')
    head_dim = _count(values, 'llama.attention.key_length', path, fields['embed_dim'] // heads)
    for key in ('llama.attention.value_length', 'llama.rope.dimension_count'):
        if _count(values, key, path, head_dim) != head_dim:
            raise ValueError(f'{path}: {key} is {values[key]} but the keys have {head_dim} dims; a head is '
                             'rotated whole, and keys and values are of one size')
    embed = file.tensors.get(NAMES['embed'])
    if embed is None or len(embed.shape) != 2:
        raise ValueError(f"{path} lacks the matrix {NAMES['embed']!r}")
    try:
        return llama.LlamaConfig(
            **fields, head_dim=head_dim,
            vocab_size=_count(values, 'llama.vocab_size', path, embed.shape[0]),
            num_kv_heads=_count(values, 'llama.attention.head_count_kv', path, heads),
            norm_eps=_decimal(values, 'llama.attention.layer_norm_rms_epsilon', path),
            tie_embeddings=NAMES['lm_head'] not in file.tensors,
            rope=_rope(file, head_dim, fields['max_position_embeddings']),
        )
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f'{path}: {error}') from None


def _rope(file, head_dim, max_position):
    path, values = file.path, file.metadata
    theta = _decimal(values, 'llama.rope.freq_base', path, 10000.0)
    kind = values.get('llama.rope.scaling.type', 'none')
    scaling = {}
    if kind in ('linear', 'yarn'):
        scaling = {'type': kind, 'factor': _decimal(values, 'llama.rope.scaling.factor', path)}
    elif kind != 'none':
        raise ValueError(f"{path}: llama.rope.scaling.type is {kind!r}; known are 'none', 'linear', 'yarn'")
    if kind == 'yarn':
        original = _count(values, 'llama.rope.scaling.original_context_length', path, max_position)
        scaling['original_max_position'] = original
    if FREQUENCIES not in file.tensors:
        return rope.RopeConfig(theta=theta, **scaling)
    if scaling:
        raise ValueError(f'{path} has both {FREQUENCIES} and llama.rope.scaling.type {kind!r}')
    # Llama-3.1 and later: the file carries the scaled frequencies and not the numbers that they come from.
    divisors = file.tensors[FREQUENCIES].read().ravel()
    found = rope.RopeConfig(theta=theta, type='llama3', factor=float(divisors.max()), low_freq_factor=1.0,
                            high_freq_factor=4.0, original_max_position=8192)
    plain, scaled = (rope.frequencies(x, head_dim)[0] for x in (rope.RopeConfig(theta=theta), found))
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-5):
        raise ValueError(f'{path}: {FREQUENCIES} is not the scaling of Llama-3.1 (low and high frequency '
                         'factors 1 and 4, trained on 8192); use the Hugging Face folder of the model')
    return found


def _count(values, key, path, default=None):
    """A positive integer of the metadata."""
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{path}: {key} is {value!r}; it must be a positive integer')
    return value


def _decimal(values, key, path, default=None):
    """A float32 of the metadata as the decimal number that it was: 1e-5, not 9.99999974e-06."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'{path}: {key} is {value!r}; it must be a number')
    return float(str(np.float32(value)))


def companions_of(file, config):
    """{file name: JSON object} of the Hugging Face files that the metadata of a File amounts to."""
    path, values = file.path, file.metadata
    kind, pre = values.get('tokenizer.ggml.model'), values.get('tokenizer.ggml.pre')
    if kind != 'gpt2':
        raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r} and only 'gpt2' (byte-level BPE) is "
                         'read; use the Hugging Face folder of the model')
    tokens, merges = (values.get(f'tokenizer.ggml.{x}') for x in ('tokens', 'merges'))
    types = values.get('tokenizer.ggml.token_type')
    if not all(isinstance(x, list) for x in (tokens, merges, types)) or len(tokens) != len(types):
        raise ValueError(f'{path}: tokenizer.ggml.tokens, .token_type and .merges must be lists, the first '
                         'two of one length')
    if len(tokens) > config.vocab_size:
        raise ValueError(f'{path}: tokenizer.ggml.tokens has {len(tokens)} tokens but the embedding has '
                         f'{config.vocab_size} rows')
    ids = {}
    for word in ('bos', 'eos', 'eot', 'eom', 'unknown', 'padding'):
        ids[word] = values.get(f'tokenizer.ggml.{word}_token_id')
        if ids[word] is not None and not 0 <= ids[word] < len(tokens):
            raise ValueError(
                f'{path}: tokenizer.ggml.{word}_token_id {ids[word]} is not in 0..{len(tokens) - 1}')
    bos = ids['bos'] if values.get('tokenizer.ggml.add_bos_token') else None
    try:
        definition = tokenizer_json.from_gguf(tokens, types, merges, pre, bos)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    stops = [ids[word] for word in ('eos', 'eot', 'eom') if ids[word] is not None]
    stated = {'bos_token_id': ids['bos'], 'pad_token_id': ids['padding'],
              'eos_token_id': list(dict.fromkeys(stops)) if len(set(stops)) > 1 else ids['eos']}
    stated = {key: value for key, value in stated.items() if value is not None}
    words = {'bos_token': ids['bos'], 'eos_token': ids['eos'], 'unk_token': ids['unknown'],
             'pad_token': ids['padding']}
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'model_max_length': config.max_position_embeddings,
        **{key: tokens[i] for key, i in words.items() if i is not None},
    }
    if 'tokenizer.chat_template' in values:
        settings['chat_template'] = values['tokenizer.chat_template']
    return {'tokenizer.json': definition, 'tokenizer_config.json': settings,
            'generation_config.json': stated, 'config.json': stated}
