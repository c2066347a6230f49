"""Llama weights from a GGUF file: config, dequantized tensors, and the tokenizer in the metadata.

llama.cpp's converter stores the rows of wq and wk in the interleaved order (2i and 2i + 1 of a head are
rotated together), as Meta does; they are permuted to the half-split order on load. Needs the extra 'gguf'.
"""

import os
import tempfile
from typing import Any

import numpy as np

from lct import json_files
from lct.data import tokenizer_json
from lct.models.llama import LlamaConfig, Params
from lct.ops import rope
from lct.weights import gguf_files, llama_hf, mapping, streaming
from lct.weights.tensors import Matrix

NAMES = {  # parameter name -> tensor name; {} is the layer
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
INTERLEAVED = ('layers.wq', 'layers.wk')
FREQUENCIES = 'rope_freqs.weight'  # [H/2], the divisor of each frequency in Llama-3.1's scaling
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


def load(path: str | os.PathLike, dtype: Any = 'float32') -> tuple[LlamaConfig, Params, dict[str, Any]]:
    """(LlamaConfig, Params, companions) of a GGUF file of a Llama, sharded on the current mesh.

    companions is {file name: JSON object} of the Hugging Face files that the metadata is equivalent to:
    tokenizer.json, tokenizer_config.json with the chat template, generation_config.json, and the token ids of
    a config.json. Each device's shard is dequantized layer by layer from the memory-mapped file.

    dtype: of the parameters; None takes that of a file of F32, F16 or BF16 and bfloat16 for a quantized one.
    Raises:
      ValueError: naming file and key or tensor, for anything missing, unexpected, of a wrong shape, not
        finite, or not understood.
    """
    file = gguf_files.read(path)
    config = read_config(file)
    streaming.check_mesh(config)
    matrices, companions = read_matrices(file, config), read_companions(file, config)
    dtype = streaming.resolve_dtype(dtype or stored_dtype(matrices), {}, path)
    return config, streaming.load(config, dtype, matrices), companions


def stored_dtype(matrices: streaming.Matrices) -> str:
    """The narrowest dtype that holds the values of all matrices; bfloat16 if one is quantized, since no wider
    dtype makes its blocks of 4 to 8 bits more precise. Vectors are stored in float32 in every file."""
    shards = [shard for matrix in matrices.values() for shard in matrix.shards]
    names = {gguf_files.DTYPES.get(shard.kind) for shard in shards if len(shard.shape) > 1}
    if None in names:
        return 'bfloat16'
    name = names.pop() if len(names) == 1 else 'float32'
    vectors = [shard.read() for shard in shards if len(shard.shape) == 1]
    exact = all((vector.astype(name).astype(np.float32) == vector).all() for vector in vectors)
    return name if exact else 'float32'


def to_hf(
        path: str | os.PathLike, folder: str | os.PathLike, dtype: str | None = None, **options: Any) -> None:
    """Write the Hugging Face folder of a GGUF file; options are those of llama_hf.save."""
    config, params, companions = load(path, dtype)
    with tempfile.TemporaryDirectory() as temporary:
        for name, value in companions.items():
            json_files.write_json(os.path.join(temporary, name), value, sort_keys=False)
        llama_hf.save(folder, config, params, dtype=params.embed.dtype.name, tokenizer_from=temporary,
                      **options)


def read_matrices(file: gguf_files.File, config: LlamaConfig) -> streaming.Matrices:
    """{(parameter name, layer or None): Matrix} of a file, which must hold just the tensors of the config."""
    if config.num_layers > len(file.tensors):  # before a name is made for each
        raise ValueError(
            f'{file.path} claims {config.num_layers} layers but holds {len(file.tensors)} tensors; '
            'fetch it again')
    names, shapes = mapping.tensor_names(config, NAMES), mapping.checkpoint_shapes(config, NAMES)
    missing = [name for name in names if name not in file.tensors]
    if missing:
        raise ValueError(
            f'{file.path} lacks tensor {missing[0]!r} ({len(missing)} missing in total); fetch it again')
    extra = [name for name in file.tensors if name not in names and name != FREQUENCIES]
    if extra:
        raise ValueError(
            f'{file.path}: tensor {extra[0]!r} does not belong to a Llama ({len(extra)} unexpected in '
            'total); biases, experts and adapters are not supported')
    result = {}
    for name, (parameter, layer) in names.items():
        tensor = file.tensors[name]
        if tensor.shape != shapes[name]:
            raise ValueError(f'{file.path}: tensor {name!r} has shape {list(tensor.shape)}; the metadata '
                             f'requires {list(shapes[name])}')
        head_dim = config.head_dim if parameter in INTERLEAVED else None
        result[parameter, layer] = Matrix(name, (tensor,), head_dim=head_dim)
    return result


# ---------------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------------


def read_config(file: gguf_files.File) -> LlamaConfig:
    """LlamaConfig of a file; a key that would change the result is understood or refused."""
    path, values = file.path, file.metadata
    if values.get('general.architecture') != 'llama':
        raise ValueError(f"{path} has general.architecture {values.get('general.architecture')!r}; only "
                         "'llama' is supported")
    known = {*COUNTS, *OPTIONAL, *HARMLESS}
    for key, value in values.items():
        if key.startswith('llama.') and key not in known and value not in (0, False):
            raise ValueError(
                f'{path}: {key} is {value!r}, which this model does not compute; '
                'only plain Llamas are supported')
    fields = {field: _count(values, key, path) for key, field in COUNTS.items()}
    heads = fields['num_heads']
    if fields['embed_dim'] % heads:
        raise ValueError(f"{path}: llama.embedding_length {fields['embed_dim']} is not a multiple of "
                         f'llama.attention.head_count {heads}; fetch it again')
    head_dim = _count(values, 'llama.attention.key_length', path, fields['embed_dim'] // heads)
    for key in ('llama.attention.value_length', 'llama.rope.dimension_count'):
        if _count(values, key, path, head_dim) != head_dim:
            raise ValueError(
                f'{path}: {key} is {values[key]} but the keys have {head_dim} dims; only heads that are '
                'fully rotated, with keys and values of one size, are supported')
    embed = file.tensors.get(NAMES['embed'])
    if embed is None or len(embed.shape) != 2:
        raise ValueError(f"{path} lacks the matrix {NAMES['embed']!r}; fetch it again")
    try:
        return LlamaConfig(
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
    """RopeConfig of a file."""
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
        raise ValueError(
            f'{path} has both {FREQUENCIES} and llama.rope.scaling.type {kind!r}; it must have one')
    return _llama3_rope(file, theta, head_dim)


def _llama3_rope(file, theta, head_dim):
    """RopeConfig of Llama-3.1 and later: the file has the divisors of the frequencies instead of the numbers
    that they are computed from."""
    divisors = file.tensors[FREQUENCIES].read().ravel()
    result = rope.RopeConfig(theta=theta, type='llama3', factor=float(divisors.max()), low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position=8192)
    plain, scaled = (rope.frequencies(x, head_dim)[0] for x in (rope.RopeConfig(theta=theta), result))
    if divisors.shape != plain.shape or not np.allclose(divisors, plain / scaled, rtol=1e-5):
        raise ValueError(
            f'{file.path}: {FREQUENCIES} is not the scaling of Llama-3.1 (low and high frequency factors 1 '
            'and 4, trained on 8192); use the Hugging Face folder of the model')
    return result


def _count(values, key, path, default=None):
    """A positive integer of the metadata."""
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{path}: {key} is {value!r}; it must be a positive integer')
    return value


def _decimal(values, key, path, default=None):
    """A float32 of the metadata as the shortest decimal that rounds to it: 1e-5, not 9.99999974e-06."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f'{path}: {key} is {value!r}; it must be a number')
    return float(str(np.float32(value)))


# ---------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------


def read_companions(file: gguf_files.File, config: LlamaConfig) -> dict[str, Any]:
    """{file name: JSON object} of the Hugging Face files that the metadata of a file is equivalent to."""
    values = file.metadata
    tokens, types, merges = _read_vocabulary(file, config.vocab_size)
    ids = _read_special_ids(file, len(tokens))
    bos = ids['bos'] if values.get('tokenizer.ggml.add_bos_token') else None
    try:
        definition = tokenizer_json.from_gguf(tokens, types, merges, values.get('tokenizer.ggml.pre'), bos)
    except ValueError as error:
        raise ValueError(f'{file.path}: {error}') from None
    special = {'bos_token': ids['bos'], 'eos_token': ids['eos'], 'unk_token': ids['unknown'],
               'pad_token': ids['padding']}
    settings = {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False,
        'model_max_length': config.max_position_embeddings,
        **{key: tokens[i] for key, i in special.items() if i is not None},
    }
    if 'tokenizer.chat_template' in values:
        settings['chat_template'] = values['tokenizer.chat_template']
    config_ids = _config_ids(ids)
    return {'tokenizer.json': definition, 'tokenizer_config.json': settings,
            'generation_config.json': config_ids, 'config.json': config_ids}


def _read_vocabulary(file, vocab_size):
    """(tokens, their types, merges) of a byte-level BPE of at most vocab_size tokens."""
    path, values = file.path, file.metadata
    kind = values.get('tokenizer.ggml.model')
    if kind != 'gpt2':
        raise ValueError(f"{path}: tokenizer.ggml.model is {kind!r} and only 'gpt2' (byte-level BPE) is "
                         'supported; use the Hugging Face folder of the model')
    tokens, types, merges = (
        values.get(f'tokenizer.ggml.{key}') for key in ('tokens', 'token_type', 'merges'))
    if not all(isinstance(x, list) for x in (tokens, types, merges)) or len(tokens) != len(types):
        raise ValueError(f'{path}: tokenizer.ggml.tokens, .token_type and .merges must be lists, the first '
                         'two of one length; use the Hugging Face folder of the model')
    if len(tokens) > vocab_size:
        raise ValueError(f'{path}: tokenizer.ggml.tokens has {len(tokens)} tokens but the embedding has '
                         f'{vocab_size} rows; use the Hugging Face folder of the model')
    return tokens, types, merges


def _read_special_ids(file, num_tokens):
    """{'bos', 'eos', ...: id or None}."""
    ids = {}
    for name in ('bos', 'eos', 'eot', 'eom', 'unknown', 'padding'):
        ids[name] = file.metadata.get(f'tokenizer.ggml.{name}_token_id')
        if ids[name] is not None and not 0 <= ids[name] < num_tokens:
            raise ValueError(
                f'{file.path}: tokenizer.ggml.{name}_token_id {ids[name]} is not in 0..{num_tokens - 1}; use '
                'the Hugging Face folder of the model')
    return ids


def _config_ids(ids):
    """The token ids of a config.json; a model that stops at several tokens has a list of them."""
    stops = [ids[name] for name in ('eos', 'eot', 'eom') if ids[name] is not None]
    result = {'bos_token_id': ids['bos'], 'pad_token_id': ids['padding'],
              'eos_token_id': list(dict.fromkeys(stops)) if len(set(stops)) > 1 else ids['eos']}
    return {key: value for key, value in result.items() if value is not None}
