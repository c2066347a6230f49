"""Strict reading and writing of safetensors files, memory-mapped and without PyTorch.

Format: 8 bytes of little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
data. Other readers accept files with holes, overlaps or repeated names; here the tensors must cover the data
exactly once.
"""

import json
import math
import os
import re

import numpy as np

from lct import files
from lct.json_files import MAX_BYTES, parse_object, read_json, short_repr
from lct.weights import manifest
from lct.weights.tensors import FLOATS, Tensor

ITEMSIZES = {
    'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'F8_E4M3': 1, 'I16': 2, 'U16': 2, 'F16': 2, 'BF16': 2,
    'I32': 4, 'U32': 4, 'F32': 4, 'F64': 8, 'I64': 8, 'U64': 8,
}
ARRAYS = FLOATS | {'I8': np.dtype(np.int8), 'U8': np.dtype(np.uint8), 'U16': np.dtype(np.uint16),
                   'I32': np.dtype(np.int32)}
MAX_RANK = 8
SHARD_NAME = re.compile(r'[\w-][\w.-]{0,200}\.safetensors')


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def read_header(path: str | os.PathLike) -> dict[str, Tensor]:
    """{name: Tensor} of one file.

    Raises:
      ValueError: unless the file is exactly a header and the tensors that it names.
    """
    length, header = _read_json_header(path)
    metadata = header.pop('__metadata__', {})
    if not isinstance(metadata, dict):
        raise ValueError(f'{path} has a __metadata__ that is not a JSON object; copy it again')
    spans, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _parse_entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = Tensor(path, dtype, shape, 8 + length + begin)
    end = _check_contiguous(path, spans)
    size = os.path.getsize(path)
    if 8 + length + end != size:
        raise ValueError(
            f'{path} has {size} bytes but its header describes {short_repr(8 + length + end)}; it is '
            'truncated or has bytes appended, copy it again')
    return tensors


def _read_json_header(path):
    """(length in bytes, JSON object) of the header."""
    if not os.path.isfile(path):
        raise ValueError(f'{path} is missing; the folder is incomplete, copy it again')
    files.refuse_lfs_pointer(path)
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 10 or not 0 < length <= min(MAX_BYTES, size - 8):
            raise ValueError(
                f'{path} has {size} bytes and a header length of {length}, so it is not a safetensors file '
                'of a model; it is truncated or of another format')
        try:
            text = file.read(length).decode('utf-8')
        except UnicodeDecodeError:
            raise ValueError(f'{path} has a header that is not UTF-8; copy it again') from None
    return length, parse_object(text, path)


def _check_contiguous(path, spans):
    """Refuse [(begin, end, name)] that leave holes or overlap. Returns the end of the last one."""
    expected = 0
    for begin, end, name in sorted(spans):
        if begin != expected:
            raise ValueError(
                f'{path} has a hole or an overlap before tensor {short_repr(name)} (byte '
                f'{short_repr(begin)}, expected {short_repr(expected)}); copy it again')
        expected = end
    return expected


def _parse_entry(path, name, entry):
    """(dtype, shape, begin, end) of one entry of a header."""
    def is_count(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    name = short_repr(name)
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(
            f'{path} must give dtype, shape and data_offsets of {name} and nothing else; copy it again')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(
            f'{path} gives {name} the unknown dtype {short_repr(dtype)}; known are {", ".join(ITEMSIZES)}')
    if not isinstance(shape, list) or not all(map(is_count, shape)) or 0 in shape or len(shape) > MAX_RANK:
        raise ValueError(
            f'{path} gives {name} the shape {short_repr(shape)}; it must be a list of at most {MAX_RANK} '
            'positive integers')
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(
            f'{path} gives {name} data_offsets {short_repr(offsets)}; they must be two integers >= 0')
    needed = math.prod(shape) * ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f'{path} gives {name} the data_offsets {short_repr(offsets)} but {dtype} {short_repr(shape)} '
            f'takes {short_repr(needed)} bytes; copy it again')
    return dtype, tuple(shape), *offsets


def read_folder(folder: str | os.PathLike) -> dict[str, Tensor]:
    """{name: Tensor} of the model in a folder: model.safetensors, or the shards of its index.

    Raises:
      ValueError: if neither is there, or both, or index and shards disagree, or the files are not as the
        manifest of the folder says.
    """
    return manifest.verified(folder, _read_headers(folder))


def _read_headers(folder):
    single = os.path.join(folder, 'model.safetensors')
    index_path = single + '.index.json'
    if os.path.exists(index_path):
        shards = set(_read_weight_map(index_path).values())
        if os.path.exists(single) and shards != {'model.safetensors'}:  # as mlx-lm writes for one file
            raise ValueError(f'{folder} holds both model.safetensors and model.safetensors.index.json of '
                             'other files; keep the right one')
        return _read_shards(folder, index_path)
    if not os.path.exists(single):
        raise ValueError(
            f'{folder} holds neither model.safetensors nor model.safetensors.index.json; other formats '
            'must first be saved as safetensors')
    return read_header(single)


def _read_shards(folder, index_path):
    weight_map = _read_weight_map(index_path)
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = os.path.join(folder, shard)
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != shard:
                raise ValueError(
                    f'{path} holds {short_repr(name)}, which {index_path} places in '
                    f'{weight_map.get(name)!r}; the folder mixes two models or two ways of sharding')
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(
                f'{index_path} places {short_repr(name)} in {shard}, which does not hold it; '
                'copy the folder again')
    return tensors


def _read_weight_map(index_path):
    """{tensor name: file name} of an index; no name leaves the folder."""
    weight_map = read_json(index_path).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index_path} has no weight_map from tensor names to file names; copy it again')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f'{index_path} places {short_repr(name)} in {short_repr(shard)}; weight_map must name '
                '.safetensors files of the same folder, without a path')
    return weight_map


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def plan_shards(
        shapes: dict[str, tuple[int, ...]], dtype: str, max_shard_bytes: int) -> list[tuple[str, list[str]]]:
    """[(file name, tensor names)]: {name: shape} grouped in order into files of at most max_shard_bytes
    bytes; a larger tensor gets a file of its own."""
    groups, room = [], 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * ITEMSIZES[dtype]
        if not groups or nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= nbytes
    if len(groups) == 1:
        return [('model.safetensors', groups[0])]
    return [
        (f'model-{i:05d}-of-{len(groups):05d}.safetensors', names) for i, names in enumerate(groups, 1)
    ]


def create_file(path: str | os.PathLike, shapes: dict[str, tuple[int, ...]],
                dtype: str | dict[str, str]) -> dict[str, np.memmap]:
    """Create a file for {name: shape}, of one dtype or of {name: dtype} -> {name: writable memory map}."""
    dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, str) else dtype
    header, offset = {'__metadata__': {'format': 'pt'}}, 0  # readers refuse files that name no framework
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * ITEMSIZES[dtypes[name]]
        header[name] = {'dtype': dtypes[name], 'shape': list(shape), 'data_offsets': [offset, end]}
        offset = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.flush()
        files.allocate(file, 8 + len(text) + offset)
    return {
        name: np.memmap(path, ARRAYS[dtypes[name]], 'r+', 8 + len(text) + header[name]['data_offsets'][0],
                        shape)
        for name, shape in shapes.items()
    }
