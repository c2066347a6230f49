"""Strict reading and whole-or-nothing writing of safetensors files, without copying through torch.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then
the data. Readers in use accept files with holes, overlaps or repeated names; here the tensors must
cover the data exactly, once.
"""

import contextlib
import fcntl
import json
import math
import os
import re
import secrets
import shutil
from typing import NamedTuple

import ml_dtypes
import numpy as np

ITEMSIZES = {
    'BOOL': 1, 'U8': 1, 'I8': 1, 'F8_E5M2': 1, 'F8_E4M3': 1, 'I16': 2, 'U16': 2, 'F16': 2, 'BF16': 2,
    'I32': 4, 'U32': 4, 'F32': 4, 'F64': 8, 'I64': 8, 'U64': 8,
}
FLOATS = {
    'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER = 100_000_000  # the reference reader's limit
SHARD_NAME = re.compile(r'[\w-][\w.-]*\.safetensors')


class Tensor(NamedTuple):
    """Where one tensor lies."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def read(self):
        """A read-only memory map of the tensor; nothing is read until it is sliced."""
        return np.memmap(self.path, FLOATS[self.dtype], 'r', self.offset, self.shape)


def read_json(path):
    """A JSON object as a dict; repeated keys are refused."""
    try:
        with open(path, encoding='utf-8') as file:
            return parse_object(file.read(), path)
    except FileNotFoundError:
        raise ValueError(f'{path} is missing; a Hugging Face folder must hold it') from None
    except UnicodeDecodeError:
        raise ValueError(f'{path} is not UTF-8 text; copy it again') from None


def parse_object(text, path):
    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f'{path} names {twice!r} twice; a JSON key must be unique')
        return result

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path} must hold a JSON object, got {type(value).__name__}')
    return value


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
        if size < 10 or not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(
                f'{path} has {size} bytes and a header length of {length}, which is no safetensors file; '
                'it is truncated or of another format')
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
                f'{path} has a hole or an overlap before tensor {name!r} (byte {begin}, expected {at}); '
                'copy it again')
        at = end
    if 8 + length + at != size:
        raise ValueError(
            f'{path} has {size} bytes but its header describes {8 + length + at}; it is truncated or has '
            'bytes appended, copy it again')
    return tensors


def _entry(path, name, entry):
    def is_count(x):
        return isinstance(x, int) and not isinstance(x, bool) and x >= 0

    if not isinstance(entry, dict) or set(entry) != {'dtype', 'shape', 'data_offsets'}:
        raise ValueError(f'{path} must give dtype, shape and data_offsets of {name!r} and nothing else')
    dtype, shape, offsets = entry['dtype'], entry['shape'], entry['data_offsets']
    if dtype not in ITEMSIZES:
        raise ValueError(f'{path} gives {name!r} the unknown dtype {dtype!r}')
    if not isinstance(shape, list) or not all(map(is_count, shape)) or 0 in shape:
        raise ValueError(f'{path} gives {name!r} the shape {shape!r}; it must be a list of positive integers')
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f'{path} gives {name!r} data_offsets {offsets!r}; they must be two integers >= 0')
    needed = math.prod(shape) * ITEMSIZES[dtype]
    if offsets[1] - offsets[0] != needed:
        raise ValueError(
            f'{path} gives {name!r} {offsets[1] - offsets[0]} bytes but {dtype} {shape} takes {needed}')
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
                f'{index_path} places {name!r} in {shard!r}; weight_map must name .safetensors files of the '
                'same folder, without a path')
    tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = os.path.join(folder, shard)
        for name, tensor in read_header(path).items():
            if weight_map.get(name) != shard:
                raise ValueError(
                    f'{path} holds {name!r}, which {index_path} places in {weight_map.get(name)!r}; '
                    'the folder mixes two models or two ways of sharding')
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ValueError(f'{index_path} places {name!r} in {shard}, which does not hold it')
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
        _allocate(file, 8 + len(text) + at)
    return {
        name: np.memmap(path, FLOATS[dtype], 'r+', 8 + len(text) + header[name]['data_offsets'][0], shape)
        for name, shape in shapes.items()
    }


def _allocate(file, size):
    """Blocks on disk for size bytes, of which those before the file's position are written."""
    if hasattr(os, 'posix_fallocate'):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    zeros = bytes(2**20)  # macOS lacks the call
    while (left := size - file.tell()) > 0:
        file.write(zeros[:left])
    file.flush()


def write_json(path, value):
    with open(path, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write('\n')


def check_writable(folder, nbytes, overwrite=False):
    """Raise ValueError, before any work is done, if folder cannot be created with nbytes in it."""
    folder = os.path.abspath(folder)
    parent = os.path.dirname(folder)
    if os.path.lexists(folder):
        if not os.path.isdir(folder) or os.path.islink(folder):
            raise ValueError(f'{folder} is not a folder; choose another target')
        if os.listdir(folder) and not overwrite:
            raise ValueError(f'{folder} is not empty; choose another target or pass overwrite=True')
    if not os.path.isdir(parent):
        raise ValueError(f'{parent} does not exist; create it first')
    probe = _sibling(folder, 'probe')
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as error:
        raise ValueError(f'{parent} is not writable ({error.strerror}); choose another target') from None
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise ValueError(
            f'{parent} has {free / 1e9:.2f} GB free but {folder} needs {nbytes / 1e9:.2f} GB; free some '
            'space or choose another disk')


@contextlib.contextmanager
def whole_folder(folder, overwrite=False):
    """A temporary sibling folder to write in, which becomes folder at the end or vanishes on an error.

    Everything is on disk before the rename, so a folder under its final name is a complete one. An
    overwritten folder is first moved aside and only then removed. What a killed process left of this is
    cleared by the next one.
    """
    folder = os.path.abspath(folder)
    _clear_leftovers(folder)
    check_writable(folder, 0, overwrite)
    temporary, aside = _sibling(folder, 'writing'), _sibling(folder, 'replaced')
    os.mkdir(temporary)
    lock = os.open(temporary, os.O_RDONLY)  # held while this process lives: no other takes it for a leftover
    try:
        with contextlib.suppress(OSError):  # a network disk without locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
        for name in os.listdir(temporary):
            _sync(os.path.join(temporary, name))
        _sync(temporary)
        check_writable(folder, 0, overwrite)  # someone may have written there meanwhile
        moved = os.path.isdir(folder) and bool(os.listdir(folder))
        if moved:
            os.rename(folder, aside)
        try:
            os.rename(temporary, folder)
        except OSError:
            if moved:
                os.rename(aside, folder)
            raise
        _sync(os.path.dirname(folder))
        if moved:
            # Half removed it must not look like a folder to restore.
            rubbish = _sibling(folder, 'writing')
            os.rename(aside, rubbish)
            shutil.rmtree(rubbish, ignore_errors=True)
    finally:
        os.close(lock)
        shutil.rmtree(temporary, ignore_errors=True)


def _clear_leftovers(folder):
    """Remove what a killed writer of this folder left behind, and put the folder that it had moved aside back
    if nothing has taken its place. While another process writes, nothing is touched."""
    parent, name = os.path.split(folder)
    if not os.path.isdir(parent):
        return
    ours = re.compile(rf'\.{re.escape(name)}\.(writing|replaced)-[0-9a-f]{{8}}')
    found = [match for match in map(ours.fullmatch, sorted(os.listdir(parent))) if match]
    writing, replaced = (
        [os.path.join(parent, match[0]) for match in found if match[1] == purpose]
        for purpose in ('writing', 'replaced')
    )
    if any(map(_in_use, writing)):
        return
    for path in replaced:
        if not os.path.lexists(folder) or os.path.isdir(folder) and not os.listdir(folder):
            os.rename(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in writing:
        shutil.rmtree(path, ignore_errors=True)


def _in_use(folder):
    """Whether a living process holds the lock of a folder, or may do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sibling(folder, purpose):
    parent, name = os.path.split(folder)
    return os.path.join(parent, f'.{name}.{purpose}-{secrets.token_hex(4)}')


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
