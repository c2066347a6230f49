"""Weights of a Llama, or of a family like it, from a GGUF file: config and dequantized tensors.

llama.cpp's converter stores the rows of wq and wk of some families in the interleaved order, as Meta does;
they are permuted to the half-split order on load. Needs the extra 'gguf'.
"""

import dataclasses
import os
import tempfile
from typing import Any, NamedTuple

import numpy as np

from lct import json_files
from lct.models.llama import LlamaConfig, Params
from lct.ops import rope
from lct.weights import gguf_files, gguf_tokenizer, llama_hf, mapping, streaming
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
    'layers.q_norm': 'blk.{}.attn_q_norm.weight',
    'layers.k_norm': 'blk.{}.attn_k_norm.weight',
    'layers.q_bias': 'blk.{}.attn_q.bias',
    'layers.k_bias': 'blk.{}.attn_k.bias',
    'layers.v_bias': 'blk.{}.attn_v.bias',
    'layers.out_bias': 'blk.{}.attn_output.bias',
    'layers.gate_bias': 'blk.{}.ffn_gate.bias',
    'layers.up_bias': 'blk.{}.ffn_up.bias',
    'layers.down_bias': 'blk.{}.ffn_down.bias',
    'final_norm': 'output_norm.weight',
    'lm_head': 'output.weight',
}
# llama.cpp's architectures, named as the families are (a Mistral is a 'llama'), and whether their rows of wq
# and wk are interleaved: 2i and 2i + 1 of a head are rotated together.
ARCHITECTURES = {'llama': True, 'smollm3': True, 'qwen2': False, 'qwen3': False, 'phi3': False}
INTERLEAVED = ('layers.wq', 'layers.wk', 'layers.q_bias', 'layers.k_bias')
FREQUENCIES = 'rope_freqs.weight'  # [H/2], the divisor of each frequency in Llama-3.1's scaling
LONG, SHORT = 'rope_factors_long.weight', 'rope_factors_short.weight'  # [H/2], those of longrope
COUNTS = {  # metadata key after the architecture -> LlamaConfig field
    'embedding_length': 'embed_dim',
    'feed_forward_length': 'mlp_dim',
    'block_count': 'num_layers',
    'attention.head_count': 'num_heads',
    'context_length': 'max_position_embeddings',
}
OPTIONAL = {
    'vocab_size', 'attention.head_count_kv', 'attention.key_length', 'attention.value_length',
    'attention.layer_norm_rms_epsilon', 'rope.dimension_count', 'rope.freq_base', 'rope.scaling.type',
    'rope.scaling.factor', 'rope.scaling.original_context_length', 'rope.scale_linear',
}
PHI3 = {'attention.sliding_window', 'rope.scaling.attn_factor'}
HARMLESS = {'rope.scaling.finetuned', 'tensor_data_layout'}
NO_ROPE_INTERVAL = 4  # of SmolLM3; llama.cpp has the number in its code


def load_weights(path: str | os.PathLike, dtype: Any = 'float32') -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a GGUF file, whatever its tokenizer; otherwise as load."""
    file = gguf_files.read(path)
    config = read_config(file)
    streaming.check_mesh(config)
    matrices = read_matrices(file, config)
    dtype = streaming.resolve_dtype(dtype or stored_dtype(matrices), {}, path)
    return config, streaming.load(config, dtype, matrices)


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
    companions = gguf_tokenizer.read_companions(file, read_config(file))  # refused before any work
    return *load_weights(path, dtype), companions


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
    tensors = _split(file, config) if config.family == 'phi3' else file.tensors
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(
            f'{file.path} lacks tensor {missing[0]!r} ({len(missing)} missing in total); fetch it again')
    extra = [name for name in tensors if name not in names and name not in (FREQUENCIES, LONG, SHORT)]
    if extra:
        raise ValueError(
            f'{file.path}: tensor {extra[0]!r} does not belong to a model of architecture {config.family!r} '
            f'({len(extra)} unexpected in total); experts and adapters are not supported')
    result = {}
    for name, (parameter, layer) in names.items():
        tensor = tensors[name]
        if tensor.shape != shapes[name]:
            raise ValueError(f'{file.path}: tensor {name!r} has shape {list(tensor.shape)}; the metadata '
                             f'requires {list(shapes[name])}')
        interleaved = parameter in INTERLEAVED and ARCHITECTURES[config.family]
        result[parameter, layer] = Matrix(name, (tensor,), head_dim=config.head_dim if interleaved else None)
    return result


def _split(file, config):
    """The tensors of a Phi-3, with those that hold the rows of several as one for each."""
    q, kv = (count * config.head_dim for count in (config.num_heads, config.num_kv_heads))
    parts = {'attn_qkv': (('attn_q', q), ('attn_k', kv), ('attn_v', kv)),
             'ffn_up': (('ffn_gate', config.mlp_dim), ('ffn_up', config.mlp_dim))}
    result = {}
    for name, tensor in file.tensors.items():
        module, start = name.split('.')[-2], 0
        if tensor.shape[0] != sum(rows for _, rows in parts.get(module, ())):
            result[name] = tensor
            continue
        for part, rows in parts[module]:
            data = tensor.data[start:start + rows]
            result[name.replace(module, part)] = tensor._replace(shape=(rows, *tensor.shape[1:]), data=data)
            start += rows
    return result


# ---------------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------------


def read_config(file: gguf_files.File) -> LlamaConfig:
    """LlamaConfig of a file; a key that would change the result is understood or refused."""
    path, family = file.path, file.metadata.get('general.architecture')
    if family not in ARCHITECTURES:
        raise ValueError(f"{path} has general.architecture {family!r}; only {', '.join(ARCHITECTURES)} are "
                         'supported')
    values = _Metadata(file, family)
    values.refuse_unknown(OPTIONAL | HARMLESS | set(COUNTS) | (PHI3 if family == 'phi3' else set()))
    fields = {field: values.count(key) for key, field in COUNTS.items()}
    heads = fields['num_heads']
    if fields['embed_dim'] % heads:
        raise ValueError(f"{path}: {family}.embedding_length {fields['embed_dim']} is not a multiple of "
                         f'{family}.attention.head_count {heads}; fetch it again')
    head_dim = values.count('attention.key_length', fields['embed_dim'] // heads)
    for key in ('attention.value_length', 'rope.dimension_count'):
        if values.count(key, head_dim) != head_dim:
            raise ValueError(
                f'{path}: {family}.{key} is {values.get(key)} but the keys have {head_dim} dims; only heads '
                'that are fully rotated, with keys and values of one size, are supported')
    embed = file.tensors.get(NAMES['embed'])
    if embed is None or len(embed.shape) != 2:
        raise ValueError(f"{path} lacks the matrix {NAMES['embed']!r}; fetch it again")
    try:
        return LlamaConfig(
            **fields, head_dim=head_dim,
            vocab_size=values.count('vocab_size', embed.shape[0]),
            num_kv_heads=values.count('attention.head_count_kv', heads),
            norm_eps=values.decimal('attention.layer_norm_rms_epsilon'),
            tie_embeddings=NAMES['lm_head'] not in file.tensors,
            rope=_rope(values, head_dim, fields['max_position_embeddings']),
            **_options(values, fields['num_layers']),
        )
    except ValueError as error:
        raise error if str(error).startswith(path) else ValueError(f'{path}: {error}') from None


def _options(values, num_layers):
    """The LlamaConfig fields in which families differ."""
    biases = {field: f'blk.0.{name}.bias' in values.file.tensors for field, name in (
        ('qkv_bias', 'attn_q'), ('out_bias', 'attn_output'), ('mlp_bias', 'ffn_gate'))}
    options = {'family': values.family, 'qk_norm': values.family == 'qwen3', **biases}
    if values.family == 'smollm3' and num_layers < len(values.file.tensors):
        options['rope_layers'] = tuple((i + 1) % NO_ROPE_INTERVAL != 0 for i in range(num_layers))
    return options | {'window': values.get('attention.sliding_window') or None}


def _rope(values, head_dim, max_position):
    """RopeConfig of a file."""
    path, tensors = values.file.path, values.file.tensors
    theta = values.decimal('rope.freq_base', 10000.0)
    kind = values.get('rope.scaling.type', 'none')
    scaling = {}
    if kind == 'none' and values.get('rope.scale_linear', 1) != 1:  # the key of files of 2023
        scaling = {'type': 'linear', 'factor': values.decimal('rope.scale_linear')}
    elif kind in ('linear', 'yarn'):
        scaling = {'type': kind, 'factor': values.decimal('rope.scaling.factor')}
    elif kind != 'none' and LONG not in tensors:
        raise ValueError(
            f"{path}: {values.family}.rope.scaling.type is {kind!r}; known are 'none', 'linear', 'yarn'")
    if kind == 'yarn':
        original = values.count('rope.scaling.original_context_length', max_position)
        scaling['original_max_position'] = original
    found = [name for name in (FREQUENCIES, LONG) if name in tensors]
    if found and scaling or len(found) > 1:
        raise ValueError(f'{path} has both {" and ".join(found)} and '
                         f'{values.family}.rope.scaling.type {kind!r}; it must have one')
    if LONG in tensors:
        return _longrope(values, theta, max_position)
    return _llama3_rope(values.file, theta, head_dim) if found else rope.RopeConfig(theta=theta, **scaling)


def _longrope(values, theta, max_position):
    """RopeConfig of a Phi-3: the divisors of the frequencies are tensors."""
    if SHORT not in values.file.tensors:
        raise ValueError(f'{values.file.path} has {LONG} without {SHORT}; fetch it again')
    factors = {field: tuple(float(str(x)) for x in values.file.tensors[name].read().ravel())
               for field, name in (('long_factor', LONG), ('short_factor', SHORT))}
    original = values.count('rope.scaling.original_context_length', max_position)
    result = rope.RopeConfig(theta=theta, type='longrope', factor=max_position / original,
                             original_max_position=original, **factors)
    attention = values.decimal('rope.scaling.attn_factor', 1.0)
    implied = rope.frequencies(result, 2 * len(factors['long_factor']), max_position)[1]
    if abs(attention - implied) < 1e-5 * implied:
        return result
    return dataclasses.replace(result, attention_factor=attention)


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


class _Metadata(NamedTuple):
    """The metadata of a file whose keys begin with its architecture."""

    file: gguf_files.File
    family: str

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f'{self.family}.{key}', default)

    def refuse_unknown(self, known: set[str]) -> None:
        """Refuse keys of the architecture outside of known, unless they are 0 or false."""
        for name, value in self.file.metadata.items():
            prefix, _, key = name.partition('.')
            if prefix == self.family and key not in known and value not in (0, False):
                raise ValueError(f'{self.file.path}: {name} is {value!r}, which this model does not compute; '
                                 'use the Hugging Face folder of the model')

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f'{self.file.path}: {self.family}.{key} is {value!r}; it must be a positive integer')
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A float32 as the shortest decimal that rounds to it: 1e-5, not 9.99999974e-06."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f'{self.file.path}: {self.family}.{key} is {value!r}; it must be a number')
        return float(str(np.float32(value)))
