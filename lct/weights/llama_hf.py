"""Hugging Face folders of Llama weights: load sharded, save whole, strict both ways.

Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import functools
import math
import os
import re
import shutil

from lct.weights import folders, json_files, safetensors_files, streaming
from lct.weights.folders import check_writable
from lct.weights.json_files import shown
from lct.weights.llama_config import config_from_json, config_to_json
from lct.weights.streaming import as_ours, named_entries
from lct.weights.tensors import DTYPES, FLOATS, Matrix, check_dtype, equal

__all__ = ['as_ours', 'check', 'check_writable', 'config_from_json', 'config_to_json', 'load', 'named_entries',
           'read_config', 'save', 'tensor_names']

NAMES = {  # ours -> theirs; {} is the layer
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
    'final_norm': 'model.norm.weight',
    'lm_head': 'lm_head.weight',
}
LM_HEAD = NAMES['lm_head']
IGNORED = re.compile(r'model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq')  # buffers of old exports
COMPANIONS = (  # what a folder needs beside the weights to be used elsewhere
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json',
    'generation_config.json', 'LICENSE', 'LICENSE.txt', 'USE_POLICY.md', 'NOTICE',
)
TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


tensor_names = functools.partial(streaming.tensor_names, names=NAMES)
their_shapes = functools.partial(streaming.their_shapes, names=NAMES)


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def read_config(folder):
    """LlamaConfig of a folder, without a look at its weights."""
    path = os.path.join(os.fspath(folder), 'config.json')
    return config_from_json(json_files.read_json(path), path)


def check(folder):
    """Refuse a folder that load would refuse, from its config and the headers of its files. Of the weights
    only a stored head beside a tied embedding is read: it must be equal."""
    check_tensors(safetensors_files.read_folder(os.fspath(folder)), read_config(folder), folder)


def load(folder, dtype=None):
    """(LlamaConfig, Params) of a Hugging Face folder, sharded on the current mesh.

    Each device's part is read from memory-mapped files, so that no process holds more than it keeps.
    dtype None keeps the dtype of the files.

    Raises:
      ValueError: naming file and field or tensor, for anything missing, left over, of a wrong shape or
        dtype, not finite or not understood.
    """
    folder = os.fspath(folder)
    config = read_config(folder)
    streaming.check_mesh(config)
    tensors = check_tensors(safetensors_files.read_folder(folder), config, folder)
    matrices = {
        ours: Matrix(theirs, (tensors[theirs],)) for theirs, ours in tensor_names(config).items()}
    return config, streaming.load(config, streaming.wanted_dtype(dtype, matrices, folder), matrices)


def check_tensors(tensors, config, folder):
    """The tensors that a config needs, out of {name: Tensor}; ValueError if they are not just these."""
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    shapes = their_shapes(config)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(
                f'{tensor.path}: tensor {shown(name)} has dtype {tensor.dtype}; weights must be '
                f'{", ".join(FLOATS)}')
    for name, tensor in tensors.items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(
                f'{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}; config.json asks for '
                f'{list(shapes[name])}')
    missing = [name for name in shapes if name not in tensors]
    if missing:
        hint = '; set tie_word_embeddings if the head is tied' if missing[0] == LM_HEAD else ''
        raise ValueError(f'{folder} lacks tensor {missing[0]!r} ({len(missing)} missing in all){hint}')
    if config.tie_embeddings and LM_HEAD in tensors:
        _check_tied(tensors.pop(LM_HEAD), tensors[NAMES['embed']])
    extra = [name for name in tensors if name not in shapes]
    if extra:
        raise ValueError(
            f'{tensors[extra[0]].path}: tensor {shown(extra[0])} is no part of the model that config.json '
            f'describes ({len(extra)} left over in all)')
    return tensors


def _check_tied(head, embed):
    if not equal(Matrix(LM_HEAD, (head,)), Matrix(NAMES['embed'], (embed,))):
        raise ValueError(
            f'{head.path}: config.json says tie_word_embeddings but {LM_HEAD!r} differs from the embedding; '
            'set tie_word_embeddings to false to keep both')


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def save(folder, config, params, *, dtype='bfloat16', max_shard_bytes=5_000_000_000, tokenizer_from=None,
         card=None, overwrite=False):
    """Write a Hugging Face folder: config.json, safetensors (with an index when sharded), and if given the
    tokenizer and generation files of the folder tokenizer_from and the text of its README.md.

    The folder appears whole or not at all.
    """
    folder = os.path.abspath(os.fspath(folder))
    check_dtype(dtype, 'to save')
    if max_shard_bytes < 1:
        raise ValueError(f'max_shard_bytes {max_shard_bytes} must be positive, for example 5_000_000_000')
    streaming.check_params(config, params)
    values = config_to_json(config, dtype) | _token_ids(tokenizer_from)
    shapes, kind = their_shapes(config), DTYPES[dtype]
    nbytes = sum(math.prod(shape) for shape in shapes.values()) * safetensors_files.ITEMSIZES[kind]
    check_writable(folder, nbytes + 2**20, overwrite)
    with folders.whole_folder(folder, overwrite) as temporary:
        plan = safetensors_files.plan_shards(shapes, kind, max_shard_bytes)
        tensors = {}
        for file_name, names in plan:
            path = os.path.join(temporary, file_name)
            tensors |= safetensors_files.create_file(path, {name: shapes[name] for name in names}, kind)
        matrices = {
            ours: Matrix(theirs, (tensors[theirs],)) for theirs, ours in tensor_names(config).items()}
        streaming.save(config, params, matrices)
        for tensor in tensors.values():
            tensor.flush()
        if len(plan) > 1:
            weight_map = {name: file_name for file_name, names in plan for name in names}
            index = {'metadata': {'total_size': nbytes}, 'weight_map': weight_map}
            json_files.write_json(os.path.join(temporary, 'model.safetensors.index.json'), index)
        json_files.write_json(os.path.join(temporary, 'config.json'), values)
        copy_companions(tokenizer_from, temporary)
        if card is not None:
            with open(os.path.join(temporary, 'README.md'), 'w', encoding='utf-8') as file:
                file.write(card)


def copy_companions(source, target):
    """Copy the tokenizer, generation and licence files of one folder to another; source None has none."""
    for name in _companions(source):
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def _companions(folder):
    if folder is None:
        return []
    names = [name for name in COMPANIONS if os.path.isfile(os.path.join(folder, name))]
    if not set(names) & set(TOKENIZERS):
        raise ValueError(f'tokenizer_from {folder} holds none of {", ".join(TOKENIZERS)}; choose another')
    return names


def _token_ids(folder):
    """The special token ids of the config.json that a tokenizer came with."""
    _companions(folder)  # an unusable folder is an error before any work
    path = os.path.join(folder, 'config.json') if folder is not None else None
    if path is None or not os.path.isfile(path):
        return {}
    values = json_files.read_json(path)
    return {key: values[key] for key in TOKEN_IDS if key in values}
