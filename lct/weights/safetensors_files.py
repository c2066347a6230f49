"""Strict reading and writing of safetensors files, without copying through torch.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the data. Readers in use accept files with holes, overlaps or repeated names; here the tensors must
cover the data exactly, once.
"""

import json
import math
import os
import re

import numpy as np

from lct.weights import folders
from lct.weights.json_files import MAX_BYTES, parse_object, read_json, shown
from lct.weights.tensors import FLOATS, Tensor

ITEMSIZES = {
    'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'F8_E4M3': 1, 'I16': 2, 'U16': 2, 'F16': 2, 'BF16': 2,
    'I32': 4, 'U32': 4, 'F32': 4, 'F64': 8, 'I64': 8, 'U64': 8,
}
MAX_RANK = 8
SHARD_NAME = re.compile(r'[\w-][\w.-]{0,200}\.safetensors')


def read_header(path):
    """{name: Tensor} of one file.

    Raises:
      ValueError: if the file is not exactly a header and the tensors that it names.
    """
    if not os.path.isfile(path):
        raise ValueError(f'{path} is missing; the folder is incomplete, copy it again')
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 10 or not 0 < length <= min(MAX_BYTES, size - 8):
            raise ValueError(
                f'{path} has {size} bytes and a header length of {length}, which is no safetensors file of a '
                'model; it is truncated or of another format')
        try:
            text = file.read(length).decode('utf-8')
        except UnicodeDecodeError:
            raise ValueError(f'{path} has a header that is not UTF-8; copy it again') from None
    header = parse_object(text, path)
    metadata = header.pop('__metadata__', {})
    if not isinstance(metadata, dict):
        raise ValueError(f'{path} has a __metadata__ that is no JSON object; copy it again')
    spans, tensors = [], {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = Tensor(path, dtype, shape, 8 + length + begin)
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise ValueError(
                f'{path} has a hole or an overlap before tensor {shown(name)} (byte {shown(begin)}, expected {shown(at)}); '
                'copy it again')
        at = end
    if 8 + length + at != size:
        raise ValueError(
            f'{path} has {size} bytes but its header describes {shown(8 + length + at)}; it is truncated or has '
            'bytes appended, copy it again')
    return tensors


def _entry(path, name, entry):
    def is_count(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    name = shown(name)
    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{path} must give dtype, shape and data_offsets of {name} and nothing else')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ValueError(f'{path} gives {name} the unknown dtype {shown(dtype)}')
    if not isinstance(shape, list) or not all(map(is_count, shape)) or 0 in shape or len(shape) > MAX_RANK:
        raise ValueError(
            f'{path} gives {name} the shape {shown(shape)}; it must be a list of at most {MAX_RANK} positive '
            'integers')
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f'{path} gives {name} data_offsets {shown(offsets)}; they must be two integers >= 0')
    needed = math.prod(shape) * ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f'{path} gives {name} the data_offsets {shown(offsets)} but {dtype} {shown(shape)} takes '
            f'{shown(needed)} bytes')
    return dtype, tuple(shape), *offsets


def read_folder(folder):
    """{name: Tensor} of the model in a folder: model.safetensors, or the shards of its index."""
    single = os.path.join(folder, 'model.safetensors')
    index_path = single + '.index.json'
    if os.path.exists(single) and os.path.exists(index_path):
        raise ValueError(
            f'{folder} holds both model.safetensors and model.safetensors.index.json; keep the right one')
    if not os.path.exists(index_path):
        if not os.path.exists(single):
            raise ValueError(
                f'{folder} holds neither model.safetensors nor model.safetensors.index.json; other formats '
                'must first be saved as safetensors')
        return read_header(single)
    weight_map = read_json(index_path).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{index_path} has no weight_map from tensor names to file names')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise ValueError(
                f'{index_path} places {shown(name)} in {shown(shard)}; weight_map must name .safetensors files of the '
                'same folder, without a path')
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = os.path.join(folder, shard)
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != shard:
                raise ValueError(
                    f'{path} holds {shown(name)}, which {index_path} places in {weight_map.get(name)!r}; '
                    'the folder mixes two models or two ways of sharding')
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(f'{index_path} places {shown(name)} in {shard}, which does not hold it')
    return tensors


# ---------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------


def plan_shards(shapes, dtype, max_shard_bytes):
    """Group {name: shape} in order into lists of names of at most max_shard_bytes each (a larger single
    tensor gets its own), with the file name of each: [(file_name, names)]."""
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


def create_file(path, shapes, dtype):
    """Create a file for {name: shape}, all of one dtype, and return {name: writable memory map}."""
    header, at = {'__metadata__': {'format': 'pt'}}, 0  # readers refuse files that name no framework
    for name, shape in shapes.items():
        end = at + math.prod(shape) * ITEMSIZES[dtype]
        header[name] = {'dtype': dtype, 'shape': list(shape), 'data_offsets': [at, end]}
        at = end
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.flush()
        # Real blocks, not a sparse file: a full disk must be an error here, not a signal at a later write.
        folders.allocate(file, 8 + len(text) + at)
    return {
        name: np.memmap(path, FLOATS[dtype], 'r+', 8 + len(text) + header[name]['data_offsets'][0], shape)
        for name, shape in shapes.items()
    }
