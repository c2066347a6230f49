"""Hugging Face folders of Llama weights: load sharded, save whole, strict both ways.

Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import itertools
import math
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from lct import sharding
from lct.models import llama
from lct.weights import safetensors_files
from lct.weights.llama_config import config_from_json, config_to_json
from lct.weights.safetensors_files import check_writable

__all__ = ['check_writable', 'config_from_json', 'config_to_json', 'load', 'save']

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
DTYPES = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16'}
COMPANIONS = (  # what a folder needs beside the weights to be used elsewhere
    'tokenizer.json', 'tokenizer.model', 'tokenizer_config.json', 'special_tokens_map.json',
    'added_tokens.json', 'vocab.json', 'merges.txt', 'chat_template.jinja', 'chat_template.json',
    'generation_config.json', 'LICENSE', 'LICENSE.txt', 'USE_POLICY.md', 'NOTICE',
)
TOKENIZERS = ('tokenizer.json', 'tokenizer.model', 'vocab.json')
TOKEN_IDS = ('bos_token_id', 'eos_token_id', 'pad_token_id')


def named_entries(config):
    """{our name: table entry} of the parameters that a config has, in the order of the table."""
    rows = jax.tree_util.tree_leaves_with_path(
        llama.table(config), is_leaf=lambda x: isinstance(x, llama.Entry))
    return {'.'.join(key.name for key in path): entry for path, entry in rows}


def their_letters(letters):
    """Our letters without L -> (letters of their output dims, of their input dims): 'DNH' -> ('NH', 'D').

    A Linear is stored [out, in], ours [in..., out...]; D is one side of every matrix. The embedding is
    a lookup, stored alike in both.
    """
    if letters in ('D', 'VD'):
        return letters, ''
    return (letters[1:], 'D') if letters[0] == 'D' else ('D', letters[:-1])


def their_shape(config, letters):
    """Shape of their tensor of one entry, without the layer."""
    size = llama.dims(config)
    out, inner = their_letters(letters.replace('L', ''))
    if not inner:
        return tuple(size[x] for x in out)
    return math.prod(size[x] for x in out), math.prod(size[x] for x in inner)


def as_ours(tensor, config, letters):
    """A view of their tensor [out, in] in our dims, e.g. [N * H, D] -> [D, N, H]; letters without L."""
    size = llama.dims(config)
    out, inner = their_letters(letters)
    theirs = out + inner
    return tensor.reshape([size[x] for x in theirs]).transpose([theirs.index(x) for x in letters])


def tensor_names(config):
    """{their name: (our name, layer or None)} of every tensor of a config, in the order of a file."""
    result = {}
    for name, entry in named_entries(config).items():
        if not entry.letters.startswith('L'):
            result[NAMES[name]] = (name, None)
    for layer, (name, entry) in itertools.product(range(config.num_layers), named_entries(config).items()):
        if entry.letters.startswith('L'):
            result[NAMES[name].format(layer)] = (name, layer)
    return result


def their_shapes(config):
    """{their name: shape} of every tensor of a config."""
    entries = named_entries(config)
    return {
        theirs: their_shape(config, entries[name].letters)
        for theirs, (name, _) in tensor_names(config).items()
    }


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def read_config(folder):
    """LlamaConfig of a folder, without a look at its weights."""
    path = os.path.join(os.fspath(folder), 'config.json')
    return config_from_json(safetensors_files.read_json(path), path)


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
    mesh = jax.sharding.get_mesh()
    if not mesh.empty:
        llama.check_mesh(config, [mesh.shape[name] for name in sharding.AXES])
    tensors = check_tensors(safetensors_files.read_folder(folder), config, folder)
    stored = sorted({tensor.dtype for tensor in tensors.values()})
    if dtype is None:
        if len(stored) > 1:
            raise ValueError(f'{folder} mixes the dtypes {", ".join(stored)}; pass the dtype that is wanted')
        dtype = safetensors_files.FLOATS[stored[0]]
    dtype = np.dtype(jnp.dtype(dtype))
    if dtype.name not in DTYPES:
        raise ValueError(f'dtype {dtype.name} is no dtype of weights; use one of {", ".join(DTYPES)}')

    def place(name, entry, target):
        def read(index):
            return _read_part(tensors, config, name, entry.letters, index, dtype)

        if target.sharding is None:
            return jnp.asarray(read((slice(None),) * len(target.shape)))
        parts = {}  # devices that hold the same part share one read

        def once(index):
            key = tuple((part.start, part.stop) for part in index)
            if key not in parts:
                parts[key] = read(index)
            return parts[key]

        return jax.make_array_from_callback(target.shape, target.sharding, once)

    targets = llama.abstract(config, dtype)
    leaves, tree = jax.tree.flatten(targets)
    rows = named_entries(config).items()
    return config, jax.tree.unflatten(
        tree, [place(name, entry, leaf) for (name, entry), leaf in zip(rows, leaves, strict=True)])


def _read_part(tensors, config, name, letters, index, dtype):
    """One device's part of one parameter: index is a tuple of slices over its dims."""

    def read(theirs, index):
        tensor = tensors[theirs]
        view = as_ours(tensor.read(), config, letters.replace('L', ''))[index]
        with np.errstate(over='ignore'):  # reported below
            part = view.astype(dtype, order='C')  # a copy: no array may hang on a file that can change
        if not np.isfinite(part).all():
            raise ValueError(
                f'{tensor.path}: tensor {theirs!r} has values that are not finite in {dtype.name}; '
                + ('load it in a wider dtype' if np.isfinite(view).all() else 'the weights are damaged'))
        return part

    if not letters.startswith('L'):
        return read(NAMES[name], index)
    layers = range(config.num_layers)[index[0]]
    result = None
    for i, layer in enumerate(layers):
        part = read(NAMES[name].format(layer), index[1:])
        if result is None:
            result = np.empty((len(layers), *part.shape), dtype)
        result[i] = part
    return result


def check_tensors(tensors, config, folder):
    """The tensors that a config needs, out of {name: Tensor}; ValueError if they are not just these."""
    tensors = {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}
    shapes = their_shapes(config)
    for name, tensor in tensors.items():
        if tensor.dtype not in safetensors_files.FLOATS:
            raise ValueError(
                f'{tensor.path}: tensor {name!r} has dtype {tensor.dtype}; weights must be '
                f'{", ".join(safetensors_files.FLOATS)}')
    missing = [name for name in shapes if name not in tensors]
    if missing:
        hint = '; set tie_word_embeddings if the head is tied' if missing[0] == LM_HEAD else ''
        raise ValueError(f'{folder} lacks tensor {missing[0]!r} ({len(missing)} missing in all){hint}')
    if config.tie_embeddings and LM_HEAD in tensors:
        _check_tied(tensors.pop(LM_HEAD), tensors[NAMES['embed']])
    extra = [name for name in tensors if name not in shapes]
    if extra:
        raise ValueError(
            f'{tensors[extra[0]].path}: tensor {extra[0]!r} is no part of the model that config.json '
            f'describes ({len(extra)} left over in all)')
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f'{tensor.path}: tensor {name!r} has shape {list(tensor.shape)}; config.json asks for '
                f'{list(shapes[name])}')
    return tensors


def _check_tied(head, embed):
    same = head.shape == embed.shape and head.dtype == embed.dtype
    if not same or not np.array_equal(head.read(), embed.read()):
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
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is no dtype to save; use one of {", ".join(DTYPES)}')
    if max_shard_bytes < 1:
        raise ValueError(f'max_shard_bytes {max_shard_bytes} must be positive, for example 5_000_000_000')
    leaves = _check_params(config, params)
    values = config_to_json(config, dtype) | _token_ids(tokenizer_from)
    shapes, kind = their_shapes(config), DTYPES[dtype]
    nbytes = sum(math.prod(shape) for shape in shapes.values()) * safetensors_files.ITEMSIZES[kind]
    check_writable(folder, nbytes + 2**20, overwrite)
    with safetensors_files.whole_folder(folder, overwrite) as temporary:
        plan = safetensors_files.plan_shards(shapes, kind, max_shard_bytes)
        tensors = {}
        for file_name, names in plan:
            path = os.path.join(temporary, file_name)
            tensors |= safetensors_files.create_file(path, {name: shapes[name] for name in names}, kind)
        for name, entry in named_entries(config).items():
            _write_leaf(tensors, config, name, entry.letters, leaves[name])
        for tensor in tensors.values():
            tensor.flush()
        if len(plan) > 1:
            weight_map = {name: file_name for file_name, names in plan for name in names}
            index = {'metadata': {'total_size': nbytes}, 'weight_map': weight_map}
            safetensors_files.write_json(os.path.join(temporary, 'model.safetensors.index.json'), index)
        safetensors_files.write_json(os.path.join(temporary, 'config.json'), values)
        for name in _companions(tokenizer_from):
            shutil.copyfile(os.path.join(tokenizer_from, name), os.path.join(temporary, name))
        if card is not None:
            with open(os.path.join(temporary, 'README.md'), 'w', encoding='utf-8') as file:
                file.write(card)


def _check_params(config, params):
    """{our name: array} of params, checked against the table."""
    leaves = {
        '.'.join(key.name for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    size, entries = llama.dims(config), named_entries(config)
    if set(leaves) != set(entries):
        odd = sorted(set(leaves) ^ set(entries))
        raise ValueError(f'params and config disagree about {", ".join(odd)}; pass the params\' own config')
    for name, entry in entries.items():
        shape = tuple(size[x] for x in entry.letters)
        if leaves[name].shape != shape:
            raise ValueError(f'params.{name} has shape {leaves[name].shape}; the config asks for {shape}')
        if isinstance(leaves[name], jax.Array) and not leaves[name].is_fully_addressable:
            raise ValueError(
                f'params.{name} is spread over several processes; gather it or restore the checkpoint in one '
                'process to save it')
    return leaves


def _write_leaf(tensors, config, name, letters, leaf):
    """Write one parameter, device by device, into the memory maps {their name: tensor}."""
    shards = leaf.addressable_shards if isinstance(leaf, jax.Array) else None
    if shards is None:
        parts = [((slice(None),) * leaf.ndim, leaf)]
    else:
        parts = [(shard.index, shard.data) for shard in shards if shard.replica_id == 0]
    for index, data in parts:
        data = np.asarray(data)
        if not letters.startswith('L'):
            _write_part(tensors[NAMES[name]], config, letters, index, data, name)
            continue
        for i, layer in enumerate(range(config.num_layers)[index[0]]):
            theirs = tensors[NAMES[name].format(layer)]
            _write_part(theirs, config, letters[1:], index[1:], data[i], f'{name}[{layer}]')


def _write_part(tensor, config, letters, index, data, name):
    with np.errstate(over='ignore'):  # reported below
        converted = data.astype(tensor.dtype)
    if not np.isfinite(converted).all():
        raise ValueError(
            f'params.{name} has values that are not finite in {tensor.dtype.name}; nothing was saved')
    as_ours(tensor, config, letters)[index] = converted


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
    values = safetensors_files.read_json(path)
    return {key: values[key] for key in TOKEN_IDS if key in values}
