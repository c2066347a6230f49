"""Meta's original folders of Llama weights: params.json and one consolidated.NN.pth for each rank of Meta's
model parallelism, read straight onto the mesh and written back. Both ways are strict.

The files have the rows of wq and wk in the interleaved order (2i and 2i + 1 of a head are rotated together);
they are permuted to the half-split order on load and back on save. Letters: V vocab, D embed_dim, L layers, N
query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import contextlib
import dataclasses
import math
import os
import re
from typing import Any

from lct import bucket_cache, json_files, storage
from lct.json_files import short_repr
from lct.models.llama import LlamaConfig, Params
from lct.weights import companions, folders, manifest, streaming, torch_files
from lct.weights.llama_config import config_from_json, config_to_json
from lct.weights.llama_meta_config import config_from_params, params_from_config
from lct.weights.mapping import checkpoint_shapes, tensor_names
from lct.weights.tensors import DTYPES, FLOATS, Matrix, Tensor, check_dtype, equal

__all__ = ['config_from_params', 'load', 'params_from_config', 'read_config', 'read_folder', 'save']

NAMES = {  # parameter name -> tensor name; {} is the layer
    'embed': 'tok_embeddings.weight',
    'layers.attn_norm': 'layers.{}.attention_norm.weight',
    'layers.wq': 'layers.{}.attention.wq.weight',
    'layers.wk': 'layers.{}.attention.wk.weight',
    'layers.wv': 'layers.{}.attention.wv.weight',
    'layers.wo': 'layers.{}.attention.wo.weight',
    'layers.mlp_norm': 'layers.{}.ffn_norm.weight',
    'layers.w_gate': 'layers.{}.feed_forward.w1.weight',
    'layers.w_up': 'layers.{}.feed_forward.w3.weight',
    'layers.w_down': 'layers.{}.feed_forward.w2.weight',
    'final_norm': 'norm.weight',
    'lm_head': 'output.weight',
}
INTERLEAVED = ('layers.wq', 'layers.wk')
ROW_PARALLEL = ('layers.wo', 'layers.w_down')  # sharded over their input dim, the others over their output
IGNORED = ('rope.freqs',)  # a buffer of some files
FILE_NAME = re.compile(r'consolidated\.(\d\d)\.pth')


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def read_config(
        folder: str | os.PathLike, *, rope_factor: float | None = None,
        max_position_embeddings: int | None = None) -> LlamaConfig:
    """LlamaConfig of a folder, its embedding untied. A config.json beside params.json, as save writes it, has
    the positions, which params.json does not say.

    Args:
      rope_factor, max_position_embeddings: as in config_from_params.
    Raises:
      ValueError: if the two files disagree.
    """
    path, beside = (os.path.join(os.fspath(folder), name) for name in ('params.json', 'config.json'))
    config = config_from_params(json_files.read_json(path), path, rope_factor=rope_factor,
                                max_position_embeddings=max_position_embeddings)
    if not os.path.isfile(beside):
        return config
    known = config_from_json(json_files.read_json(beside), beside)
    config = dataclasses.replace(config, family=known.family)
    if max_position_embeddings is None:
        config = dataclasses.replace(config, max_position_embeddings=known.max_position_embeddings)
    same = dataclasses.replace(known, max_position_embeddings=config.max_position_embeddings,
                               tie_embeddings=False)
    if config != same and rope_factor is None:
        raise ValueError(f'{path} and the config.json beside it describe different models; delete the wrong '
                         'one of the two')
    return config


def load(
        folder: str | os.PathLike, dtype: Any = None, *, rope_factor: float | None = None,
        max_position_embeddings: int | None = None) -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a folder in Meta's format, sharded on the current mesh.

    Each device's shard is read from the memory-mapped members of the archives, so that no process holds more
    than it keeps. A head that is equal to the embedding is tied to it, as in Llama 3.2.

    Args:
      dtype: of the parameters; None keeps the dtype of the files.
      rope_factor, max_position_embeddings: as in config_from_params.
    Raises:
      ValueError: naming file and field or tensor, for anything missing, unexpected, of a wrong shape or
        dtype, not finite or not understood; a pickle that calls anything but tensors is refused without
        running it.
    """
    folder = os.fspath(bucket_cache.local(folder))
    config = read_config(folder, rope_factor=rope_factor, max_position_embeddings=max_position_embeddings)
    streaming.check_mesh(config)
    matrices = _matrices(config, read_folder(folder))
    if equal(matrices['lm_head', None], matrices['embed', None]):
        config = dataclasses.replace(config, tie_embeddings=True)
        del matrices['lm_head', None]
    return config, streaming.load(config, streaming.resolve_dtype(dtype, matrices, folder), matrices)


def read_folder(folder: str | os.PathLike) -> list[dict[str, Tensor]]:
    """[{tensor name: Tensor}] of the files of a folder, in the order of their ranks."""
    try:
        found = sorted(name for name in os.listdir(folder) if FILE_NAME.fullmatch(name))
    except OSError as error:
        raise ValueError(f'{folder} cannot be read ({error.strerror}); name another folder') from None
    if not found:
        raise ValueError(f'{folder} holds no consolidated.00.pth; a folder in Meta\'s format must')
    for rank, name in enumerate(found):
        if name != f'consolidated.{rank:02d}.pth':
            raise ValueError(f'{folder} lacks consolidated.{rank:02d}.pth but holds {name}; copy it again')
    return [manifest.verified(folder, torch_files.read_header(os.path.join(folder, name))) for name in found]


def _matrices(config, files):
    """{(parameter name, layer or None): Matrix} of [{tensor name: Tensor}] by rank.

    Raises:
      ValueError: unless each file holds exactly its shards of the tensors of the config.
    """
    shapes, matrices = checkpoint_shapes(config, NAMES), {}
    for tensors in files:
        _check_names(tensors, shapes)
    for name, (parameter, layer) in tensor_names(config, NAMES).items():
        shards = tuple(tensors[name] for tensors in files)
        dim = _check_shards(name, parameter, shards, shapes[name])
        if len(shapes[name]) == 1:  # norms are replicated in every file
            _check_replicas(name, shards)
            shards = shards[:1]
        head_dim = config.head_dim if parameter in INTERLEAVED else None
        matrices[parameter, layer] = Matrix(name, shards, dim, head_dim)
    return matrices


def _check_names(tensors, shapes):
    """Refuse the tensors of one file unless their names are those of {tensor name: shape}."""
    path = next(iter(tensors.values())).path
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise ValueError(
            f'{path} lacks tensor {missing[0]!r} ({len(missing)} missing in total); copy it again')
    extra = [name for name in tensors if name not in shapes and name not in IGNORED]
    if extra:
        raise ValueError(
            f'{path}: tensor {short_repr(extra[0])} is not in the model that params.json describes '
            f'({len(extra)} unexpected in total); use the params.json of these weights')


def _check_shards(name, parameter, shards, shape):
    """The dim along which the shards make a tensor of a shape; their dtypes must be equal too."""
    count = len(shards)
    dim = _shard_dim(parameter, shards[0].shape, shape, count)
    for shard in shards:
        if dim is None or dim != _shard_dim(parameter, shard.shape, shape, count):
            raise ValueError(
                f'{shard.path}: tensor {name!r} has shape {list(shard.shape)}; params.json requires one of '
                f'{count} equal shards of {list(shape)}')
        if shard.dtype != shards[0].dtype:
            raise ValueError(
                f'{shard.path}: tensor {name!r} is {shard.dtype} but {shards[0].dtype} in {shards[0].path}; '
                'the folder mixes models')
    return dim


def _check_replicas(name, tensors):
    for tensor in tensors[1:]:
        if not equal(Matrix(name, (tensor,)), Matrix(name, tensors[:1])):
            raise ValueError(
                f'{tensor.path}: tensor {name!r} differs from the one in the file of rank 0; '
                'the folder mixes models')


def _shard_dim(parameter, shard_shape, shape, count):
    """The dim along which `count` tensors of shard_shape make one of a shape; None if there is none.

    Llama-3 shards the embedding over its rows, Llama-2 over its columns.
    """
    if len(shape) == 1:
        return 0 if shard_shape == shape else None
    for dim in (0, 1) if parameter == 'embed' else (_saved_dim(parameter),):
        if shape[dim] % count == 0 and shard_shape == _shard_shape(shape, dim, count):
            return dim
    return None


def _saved_dim(parameter):
    """The dim along which a matrix is sharded when it is saved."""
    return 1 if parameter in ROW_PARALLEL else 0


def _shard_shape(shape, dim, count):
    return tuple(n // count if i == dim else n for i, n in enumerate(shape))


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def save(
        folder: str | os.PathLike, config: LlamaConfig, params: Params, *, dtype: str = 'bfloat16',
        num_files: int = 1, tokenizer_from: str | os.PathLike | None = None, overwrite: bool = False) -> None:
    """Write a folder in Meta's format atomically: params.json, consolidated.NN.pth, and for what params.json
    does not say (positions, token ids, whether the head is tied) a config.json. A tied head is written out,
    as Meta does.

    Args:
      dtype: of the files: float32, float16 or bfloat16.
      num_files: ranks of Meta's model parallelism, one file each.
      tokenizer_from: as in llama_hf.save. Meta's programs need its tokenizer.model; others are kept for the
        way back.
      overwrite: whether a folder that is not empty may be replaced.
    Raises:
      ValueError: if params.json cannot express the config, params do not belong to it or are not finite in
        dtype, a tensor does not divide into num_files, or folder cannot be written.
    """
    storage.refuse_remote(folder)
    folder = os.path.abspath(os.fspath(folder))
    check_dtype(dtype)
    streaming.check_params(config, params)
    values = params_from_config(config)
    beside = config_to_json(config, dtype) | companions.token_ids(tokenizer_from)
    if config.tie_embeddings:
        config = dataclasses.replace(config, tie_embeddings=False)
        params = params.replace(lm_head=params.embed.T)
    if num_files not in range(1, 101):
        raise ValueError(f'num_files {num_files} must be 1 to 100; the published models have 1, 2, 4 or 8')
    shapes = _saved_shapes(config, num_files)
    nbytes = num_files * sum(map(math.prod, shapes.values())) * FLOATS[DTYPES[dtype]].itemsize
    folders.check_writable(folder, nbytes + 2**20, overwrite)
    with folders.atomic_folder(folder, overwrite) as temporary:
        _write_tensors(temporary, config, params, shapes, DTYPES[dtype], num_files)
        json_files.write_json(os.path.join(temporary, 'params.json'), values)
        json_files.write_json(os.path.join(temporary, 'config.json'), beside)
        companions.copy(tokenizer_from, temporary, config.max_position_embeddings)


def _saved_shapes(config, num_files):
    """{tensor name: shape in each file}."""
    shapes = checkpoint_shapes(config, NAMES)
    for name, (parameter, _) in tensor_names(config, NAMES).items():
        shape, dim = shapes[name], _saved_dim(parameter)
        if len(shape) == 2:
            if shape[dim] % num_files:
                raise ValueError(
                    f'tensor {name!r} of shape {list(shape)} does not divide into num_files {num_files}; '
                    f'choose a divisor of {shape[dim]}')
            shapes[name] = _shard_shape(shape, dim, num_files)
    return shapes


def _write_tensors(folder, config, params, shapes, kind, num_files):
    """Write consolidated.NN.pth; shapes are those of one file."""
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(torch_files.create(
                os.path.join(folder, f'consolidated.{rank:02d}.pth'), shapes, kind))
            for rank in range(num_files)
        ]
        matrices = {}
        for name, (parameter, layer) in tensor_names(config, NAMES).items():
            vector = len(shapes[name]) == 1  # replicated: written to the first file and copied below
            shards = tuple(file[name] for file in (files[:1] if vector else files))
            head_dim = config.head_dim if parameter in INTERLEAVED else None
            matrices[parameter, layer] = Matrix(name, shards, _saved_dim(parameter), head_dim)
        streaming.save(config, params, matrices)
        for name, shape in shapes.items():
            for file in files[1:] if len(shape) == 1 else []:
                file[name][...] = files[0][name]
