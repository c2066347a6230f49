"""GGUF files through the gguf library: metadata and dequantized tensors.

The header is checked first, and refused if its counts would make the library loop or allocate without bound.

The format: github.com/ggml-org/ggml, docs/gguf.md. Needs the extra 'gguf'.
"""

import math
import os
import struct
from typing import Any, NamedTuple

import numpy as np

from lct import files
from lct.weights.tensors import ALL

# Bytes of a value of each type, by its number in the file.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
MAX_DIMS = 4
DTYPES = {'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}  # of the types that are not quantized


class Tensor(NamedTuple):
    """One tensor of a file; shape is [out, in], as in a Linear of PyTorch (the file stores it reversed)."""

    path: str
    shape: tuple[int, ...]
    kind: str  # of GGML: 'Q4_1', 'F32', ...
    data: np.ndarray  # packed row by row, memory-mapped

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle, dequantized to float32."""
        import gguf
        values = gguf.quants.dequantize(self.data[rows], gguf.GGMLQuantizationType[self.kind])
        return values if values.ndim == 1 else values[:, cols]


class File(NamedTuple):
    """The header of a GGUF file."""

    path: str
    metadata: dict[str, Any]  # {key: number, string, bool or a list of them}
    tensors: dict[str, Tensor]


def read(path: str | os.PathLike) -> File:
    """The header of a file; its tensors are read when they are used.

    Raises:
      ValueError: if the file is not a GGUF of this machine's byte order, is damaged or truncated, is one file
        of several, or holds tensors of a type that the library cannot dequantize.
    """
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{path} is read with the gguf library; pip install '.[gguf]'") from None
    path = os.fspath(path)
    files.refuse_lfs_pointer(path)
    with open(path, 'rb') as file:
        _HeaderCheck(file, path).run()
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
        raise ValueError(
            f"{path} is one of {metadata['split.count']} files of a model; join them with llama-gguf-split")
    for name, tensor in tensors.items():
        if tensor.kind not in ('F32', 'F16') and not hasattr(gguf.quants, tensor.kind):
            raise ValueError(f'{path}: tensor {name!r} has type {tensor.kind}, which the gguf library '
                             'cannot dequantize; use a file with another quantization')
    return File(path, metadata, tensors)


class _HeaderCheck:
    """Walks the header of a file and refuses counts and lengths that the rest of the file cannot hold."""

    def __init__(self, file, path):
        self.file, self.path, self.size = file, path, os.path.getsize(path)

    def run(self):
        if self.file.read(4) != b'GGUF':
            raise ValueError(f'{self.path} does not begin with GGUF; give a GGUF file')
        version, num_tensors, num_fields = self._take('<IQQ')
        if version not in (2, 3):
            raise ValueError(
                f'{self.path} has version {version} (or is big-endian); versions 2 and 3 are supported')
        for i in range(self._check_count(num_fields, 13, 'the metadata')):
            self._skip_string(f'the name of field {i}')
            self._skip_value(*self._take('<I'), f'the value of field {i}')
        for i in range(self._check_count(num_tensors, 32, 'the list of tensors')):
            self._skip_tensor(i)

    def _take(self, form):
        """The next values, in a form of struct."""
        data = self.file.read(struct.calcsize(form))
        if len(data) < struct.calcsize(form):
            raise ValueError(f'{self.path} ends inside its header; fetch it again')
        return struct.unpack(form, data)

    def _check_count(self, count, nbytes, name):
        """Returns count, if that many items of at least nbytes each fit into the rest of the file."""
        if count * nbytes > self.size - self.file.tell():
            raise ValueError(
                f'{self.path}: {name} claims {count} entries, more than the file holds; fetch it again')
        return count

    def _skip(self, count, nbytes, name):
        self.file.seek(self._check_count(count, nbytes, name) * nbytes, os.SEEK_CUR)

    def _skip_string(self, name):
        self._skip(*self._take('<Q'), 1, name)

    def _skip_value(self, kind, name):
        if kind == STRING:
            self._skip_string(name)
        elif kind == ARRAY:
            self._skip_array(name)
        elif kind in SIZES:
            self._skip(1, SIZES[kind], name)
        else:
            raise ValueError(f'{self.path}: {name} has the unknown type {kind}; fetch it again')

    def _skip_array(self, name):
        kind, count = self._take('<IQ')
        if kind == STRING:
            for _ in range(self._check_count(count, 8, name)):
                self._skip_string(name)
        elif kind in SIZES:
            self._skip(count, SIZES[kind], name)
        else:
            raise ValueError(
                f'{self.path}: {name} is an array of the unsupported type {kind}; fetch it again')

    def _skip_tensor(self, i):
        self._skip_string(f'the name of tensor {i}')
        dims = self._take('<I')[0]
        if not 1 <= dims <= MAX_DIMS:
            raise ValueError(
                f'{self.path}: tensor {i} has {dims} dims instead of 1 to {MAX_DIMS}; fetch it again')
        shape = self._take(f'<{dims}Q')
        self._take('<IQ')
        if math.prod(shape) > 64 * self.size:  # no type packs more than a few weights into a byte
            raise ValueError(
                f'{self.path}: tensor {i} has shape {list(shape)}, more than the file holds; fetch it again')
