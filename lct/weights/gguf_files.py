"""GGUF files through the gguf library: metadata and dequantised tensors, after a look at the header that
refuses what the library would loop or allocate over.

The format: github.com/ggml-org/ggml, docs/gguf.md. Needs the extra 'gguf'.
"""

import math
import os
import struct
from typing import NamedTuple

import numpy as np

from lct.weights.tensors import ALL

# Bytes of a value of each type, by its number in the file.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMS = 4


class Tensor(NamedTuple):
    """One tensor of a file; shape is [out, in], as in a Linear of PyTorch (the file stores it reversed)."""

    path: str
    shape: tuple[int, ...]
    kind: str  # 'Q4_1', 'F32', ...
    data: np.ndarray  # packed row by row, memory-mapped

    def read(self, rows=ALL, cols=ALL):
        """A rectangle, dequantised to float32."""
        import gguf
        part = gguf.quants.dequantize(self.data[rows], gguf.GGMLQuantizationType[self.kind])
        return part if part.ndim == 1 else part[:, cols]


class File(NamedTuple):
    path: str
    metadata: dict  # {key: number, string, bool or a list of them}
    tensors: dict  # {name: Tensor}


def read(path):
    """File of a path: its header now, its tensors when they are read.

    Raises:
      ValueError: the file is not a GGUF of this machine's byte order, is damaged or truncated, is one part
        of several, or holds tensors of a type that the library cannot dequantise.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} is read with the gguf library; pip install '.[gguf]'") from None
    path = os.fspath(path)
    with open(path, 'rb') as file:
        _check_header(file, os.path.getsize(path), path)
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for one in reader.tensors:
            shape = tuple(int(n) for n in reversed(one.shape))
            tensors[one.name] = Tensor(path, shape, one.tensor_type.name, one.data)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f'{path} is damaged or truncated ({error}); fetch it again') from None
    if metadata.get('split.count', 1) != 1:
        raise ValueError(f"{path} is one of {metadata['split.count']} parts; join them with llama-gguf-split")
    for name, tensor in tensors.items():
        if tensor.kind not in ('F32', 'F16') and not hasattr(gguf.quants, tensor.kind):
            raise ValueError(f'{path}: tensor {name!r} has type {tensor.kind}, which the gguf library '
                             'cannot dequantise; use a file of another quantisation')
    return File(path, metadata, tensors)


def _check_header(file, size, path):
    """Walk the header and refuse counts and lengths that the rest of the file cannot hold."""

    def take(form):
        data = file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError(f'{path} ends inside its header; fetch it again')
        return struct.unpack(form, data)

    def claim(count, nbytes, what):
        """count things of at least nbytes each must fit into what is left."""
        if count * nbytes > size - file.tell():
            raise ValueError(f'{path}: {what} claims {count} entries, more than the file holds')
        return count

    def skip_string(what):
        file.seek(claim(*take('<Q'), 1, what), os.SEEK_CUR)

    def skip_value(kind, what):
        if kind == STRING:
            skip_string(what)
        elif kind == ARRAY:
            inner, count = take('<IQ')
            if inner == STRING:
                for _ in range(claim(count, 8, what)):
                    skip_string(what)
            elif inner in SIZES:
                file.seek(claim(count, SIZES[inner], what) * SIZES[inner], os.SEEK_CUR)
            else:
                raise ValueError(f'{path}: {what} is an array of type {inner}, which is not supported')
        elif kind in SIZES:
            file.seek(claim(1, SIZES[kind], what) * SIZES[kind], os.SEEK_CUR)
        else:
            raise ValueError(f'{path}: {what} has the unknown type {kind}; fetch it again')

    if file.read(4) != b'GGUF':
        raise ValueError(f'{path} does not begin with GGUF; give a GGUF file')
    version, num_tensors, num_fields = take('<IQQ')
    if version not in (2, 3):
        raise ValueError(f'{path} has version {version} (or is big-endian); versions 2 and 3 are read')
    for i in range(claim(num_fields, 13, 'the metadata')):
        skip_string(f'the name of field {i}')
        skip_value(*take('<I'), f'the value of field {i}')
    for i in range(claim(num_tensors, 32, 'the list of tensors')):
        skip_string(f'the name of tensor {i}')
        dims = take('<I')[0]
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(f'{path}: tensor {i} has {dims} dims; 1 to {MAX_DIMS} are possible')
        shape = take(f'<{dims}Q')
        take('<IQ')
        if math.prod(shape) > 64 * size:  # no type packs more than a few weights into a byte
            raise ValueError(f'{path}: tensor {i} has shape {list(shape)}, more than the file holds')
