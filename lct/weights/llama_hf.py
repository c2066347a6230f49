"""Hugging Face folders of Llama weights, read straight onto the mesh and written back. Both ways are strict.

Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax

from lct import bucket_cache, json_files, storage
from lct.json_files import short_repr
from lct.models.llama import LlamaConfig, Params
from lct.weights import companions, families, folders, hf_tensors, mapping, safetensors_files, streaming
from lct.weights.folders import check_writable
from lct.weights.llama_config import config_from_json, config_to_json
from lct.weights.rope_fields import scaled_positions
from lct.weights.tensors import DTYPES, FLOATS, Matrix, Tensor, check_dtype, equal

__all__ = ['check', 'check_writable', 'checkpoint_shapes', 'config_from_json', 'config_to_json', 'load',
           'read_config', 'save', 'tensor_names']

NAMES = {  # parameter name -> tensor name; {} is the layer
    'embed': 'model.embed_tokens.weight',
    'layers.attn_norm': 'model.layers.{}.input_layernorm.weight',
    'layers.wq': 'model.layers.{}.self_attn.q_proj.weight',
    'layers.wk': 'model.layers.{}.self_attn.k_proj.weight',
    'layers.wv': 'model.layers.{}.self_attn.v_proj.weight',
    'layers.wo': 'model.layers.{}.self_attn.o_proj.weight',
    'layers.mlp_norm': 'model.layers.{}.post_attention_layernorm.weight',
    'layers.w_gate': 'model.layers.{}.mlp.gate_proj.weight',
    'layers.w_up': 'model.layers.{}.mlp.up_proj.weight',
    'layers.w_down': 'model.layers.{}.mlp.down_proj.weight',
    'layers.q_norm': 'model.layers.{}.self_attn.q_norm.weight',
    'layers.k_norm': 'model.layers.{}.self_attn.k_norm.weight',
    'layers.q_bias': 'model.layers.{}.self_attn.q_proj.bias',
    'layers.k_bias': 'model.layers.{}.self_attn.k_proj.bias',
    'layers.v_bias': 'model.layers.{}.self_attn.v_proj.bias',
    'layers.out_bias': 'model.layers.{}.self_attn.o_proj.bias',
    'layers.gate_bias': 'model.layers.{}.mlp.gate_proj.bias',
    'layers.up_bias': 'model.layers.{}.mlp.up_proj.bias',
    'layers.down_bias': 'model.layers.{}.mlp.down_proj.bias',
    'final_norm': 'model.norm.weight',
    'lm_head': 'lm_head.weight',
}
LM_HEAD = NAMES['lm_head']
IGNORED = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')  # buffers of old exports

tensor_names = functools.partial(mapping.tensor_names, names=NAMES)  # before any are fused


def checkpoint_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of the files of a config."""
    return families.fused_shapes(mapping.checkpoint_shapes(config, NAMES), config.family)


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def read_config(folder: str | os.PathLike) -> LlamaConfig:
    """LlamaConfig of a folder, from its config.json. Where that has a linear factor on the positions before
    it, their product is the model's length if the tokenizer_config.json says so."""
    hf_tensors.refuse_adapter(folder)
    path = os.path.join(os.fspath(folder), 'config.json')
    config = config_from_json(json_files.read_json(path), path)
    scaled = scaled_positions(config.rope, config.max_position_embeddings)
    if scaled != config.max_position_embeddings and companions.model_max_length(folder) == scaled:
        config = dataclasses.replace(config, max_position_embeddings=int(scaled))
    return config


def check(folder: str | os.PathLike) -> None:
    """Refuse a folder that load would refuse, from its config and the headers of its files. Of the weights
    only a head stored beside a tied embedding is read: the two must be equal."""
    config = read_config(folder)
    _select_tensors(hf_tensors.read(folder), config, folder)


def load(folder: str | os.PathLike, dtype: Any = None, *, adapter: str | os.PathLike | None = None,
         vocab_size: int | None = None, convert: Callable[[str, jax.Array], Any] | None = None,
         ) -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a Hugging Face folder, local or in a bucket, sharded on the current mesh.

    Each device's shard is read from memory-mapped files, so that no process holds more than it keeps.

    Args:
      dtype: of the parameters; None keeps the dtype of the files.
      adapter, vocab_size: a PEFT adapter to merge, and the size to enlarge the vocabulary to; see
        hf_tensors.read.
      convert: (name, parameter) -> what takes its place, as in streaming.load.
    Raises:
      ValueError: naming file and field or tensor, for anything missing, unexpected, of a wrong shape or
        dtype, not finite or not understood.
    """
    folder = os.fspath(bucket_cache.local(folder))
    config = read_config(folder)
    if vocab_size is not None:
        config = dataclasses.replace(config, vocab_size=vocab_size)
    streaming.check_mesh(config)
    tensors = hf_tensors.read(folder, adapter, vocab_size)
    matrices = _matrices(config, _select_tensors(tensors, config, folder))
    return config, streaming.load(config, streaming.resolve_dtype(dtype, matrices, folder), matrices, convert)


def _matrices(config, tensors):
    """{(parameter name, layer or None): Matrix} of {tensor name: Tensor, or array to write}."""
    tensors = families.split(tensors, mapping.checkpoint_shapes(config, NAMES), config.family)
    return {parameter: Matrix(name, (tensors[name],)) for name, parameter in tensor_names(config).items()}


def _select_tensors(tensors: dict[str, Tensor], config, folder) -> dict[str, Tensor]:
    """The tensors that a config needs, out of {name: Tensor}.

    Raises:
      ValueError: if one is missing, unexpected, or of a wrong shape or dtype.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    shapes = checkpoint_shapes(config)
    _check_dtypes_and_shapes(tensors, shapes)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        tied = missing[0] == LM_HEAD
        remedy = 'set tie_word_embeddings if the head is tied' if tied else 'copy the folder again'
        raise ValueError(f'{folder} lacks tensor {missing[0]!r} ({len(missing)} missing in total); {remedy}')
    if config.tie_embeddings and LM_HEAD in tensors:
        _check_tied(tensors.pop(LM_HEAD), tensors[NAMES['embed']])
    extra = [name for name in tensors if name not in shapes]
    if extra:
        raise ValueError(
            f'{tensors[extra[0]].path}: tensor {short_repr(extra[0])} is not in the model that config.json '
            f'describes ({len(extra)} unexpected in total); use the config.json of these weights')
    return tensors


def _check_dtypes_and_shapes(tensors, shapes):
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f'{tensor.path}: tensor {short_repr(name)} has dtype {tensor.dtype}; weights must be '
                f'{", ".join(FLOATS)}')
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(
                f'{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}; config.json requires '
                f'{list(shapes[name])}')


def _check_tied(head, embed):
    if not equal(Matrix(LM_HEAD, (head,)), Matrix(NAMES['embed'], (embed,))):
        raise ValueError(
            f'{head.path}: config.json says tie_word_embeddings but {LM_HEAD!r} differs from the embedding; '
            'set tie_word_embeddings to false to keep both')


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def save(
        folder: str | os.PathLike, config: LlamaConfig, params: Params, *, dtype: str = 'bfloat16',
        max_shard_bytes: int = 5_000_000_000, tokenizer_from: str | os.PathLike | None = None,
        card: str | None = None, overwrite: bool = False) -> None:
    """Write a Hugging Face folder atomically: config.json and safetensors files, with an index of several.

    Args:
      dtype: of the files: float32, float16 or bfloat16.
      max_shard_bytes: most bytes of one safetensors file.
      tokenizer_from: a folder whose tokenizer, templates, generation and licence files are copied, with
        their lengths raised to the positions of the config.
      card: text of the README.md.
      overwrite: whether a folder that is not empty may be replaced.
    Raises:
      ValueError: if params do not belong to the config or are not finite in dtype, or folder is not writable.
    """
    storage.refuse_remote(folder)
    folder = os.path.abspath(os.fspath(folder))
    check_dtype(dtype)
    if max_shard_bytes < 1:
        raise ValueError(f'max_shard_bytes {max_shard_bytes} must be positive, for example 5_000_000_000')
    streaming.check_params(config, params)
    values = config_to_json(config, dtype) | companions.token_ids(tokenizer_from)
    shapes, kind = checkpoint_shapes(config), DTYPES[dtype]
    nbytes = sum(math.prod(shape) for shape in shapes.values()) * safetensors_files.ITEMSIZES[kind]
    check_writable(folder, nbytes + 2**20, overwrite)
    with folders.atomic_folder(folder, overwrite) as temporary:
        plan = safetensors_files.plan_shards(shapes, kind, max_shard_bytes)
        _write_tensors(temporary, config, params, plan, kind)
        if len(plan) > 1:
            weight_map = {name: file_name for file_name, names in plan for name in names}
            index = {'metadata': {'total_size': nbytes}, 'weight_map': weight_map}
            json_files.write_json(os.path.join(temporary, 'model.safetensors.index.json'), index)
        json_files.write_json(os.path.join(temporary, 'config.json'), values)
        companions.copy(tokenizer_from, temporary, config.max_position_embeddings)
        if card is not None:
            with open(os.path.join(temporary, 'README.md'), 'w', encoding='utf-8') as file:
                file.write(card)


def _write_tensors(folder, config, params, plan, kind):
    """Write the safetensors files of a plan [(file name, tensor names)]."""
    shapes, tensors = checkpoint_shapes(config), {}
    for file_name, names in plan:
        path = os.path.join(folder, file_name)
        tensors |= safetensors_files.create_file(path, {name: shapes[name] for name in names}, kind)
    streaming.save(config, params, _matrices(config, tensors))
    for tensor in tensors.values():
        tensor.flush()
