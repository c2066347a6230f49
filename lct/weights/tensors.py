"""Tensors in files, and the weight matrices that a format stores as one tensor or as several shards."""

import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOATS = {
    'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16),
}
EIGHT_BITS = {  # of quantized checkpoints, whose numbers have scales
    'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn), 'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
    'I8': np.dtype(np.int8),
}
DTYPES = {dtype.name: kind for kind, dtype in FLOATS.items()}
ALL = slice(None)


def check_dtype(dtype: str) -> None:
    """Refuse the name of a dtype in which weights are not stored."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is not supported for weights; use one of {", ".join(DTYPES)}')


class Tensor(NamedTuple):
    """The place of one tensor in a file: offset in bytes, strides in elements (None if it is contiguous).

    check: called with a range of bytes (start, stop) of the file before it is read; see manifest.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None
    check: Callable[[int, int], object] | None = None

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A read-only memory map of a rectangle; the bytes are read when they are used, or verified."""
        dtype = FLOATS.get(self.dtype) or EIGHT_BITS[self.dtype]
        strides = self.strides or contiguous_strides(self.shape)
        ranges = [range(n)[selected] for n, selected in zip(self.shape, (rows, cols))]
        start = sum(one.start * stride for one, stride in zip(ranges, strides))
        extent = 1 + sum((len(one) - 1) * stride for one, stride in zip(ranges, strides))
        begin = self.offset + start * dtype.itemsize
        if self.check is not None:
            self.check(begin, begin + extent * dtype.itemsize)
        flat = np.memmap(self.path, dtype, 'r', begin, (extent,))
        steps = [stride * dtype.itemsize for stride in strides]
        return np.ndarray([len(one) for one in ranges], dtype, flat, strides=steps)


class Rows(NamedTuple):
    """Rows start to stop of a Tensor, or of an object that is read like one."""

    tensor: Any
    start: int
    stop: int

    @property
    def path(self) -> str:
        return self.tensor.path

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop - self.start, *self.tensor.shape[1:]

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle of these rows."""
        start, stop, _ = rows.indices(self.stop - self.start)
        return self.tensor.read(slice(self.start + start, self.start + stop), cols)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a tensor whose last dim is contiguous."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


class Matrix(NamedTuple):
    """A weight [out, in], or a vector [out], as a format stores it: one tensor, or equal shards along a dim.

    shards: Tensors to read, or arrays to write, in their order along shard_dim.
    head_dim: set where the file has the rows of a head in Meta's interleaved order (2i and 2i + 1 are rotated
      together); read and write then take and return rows in the half-split order (i and i + head_dim/2).
    """

    name: str
    shards: tuple[Any, ...]
    shard_dim: int = 0
    head_dim: int | None = None

    @property
    def location(self) -> str:
        """File or folder, and name, for an error message."""
        path = self.shards[0].path if len(self.shards) == 1 else os.path.dirname(self.shards[0].path)
        return f'{path}: tensor {self.name!r}'

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in] of all shards together."""
        shape = list(self.shards[0].shape)
        shape[self.shard_dim] *= len(self.shards)
        return tuple(shape)

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle: a memory map if one shard holds it in this order, otherwise a small copy."""
        start, stop, _ = rows.indices(self.shape[0])
        heads = self._round_to_heads(start, stop)
        blocks = [self.shards[i].read(*inner) for i, _, inner in self._overlaps(heads, cols)]
        values = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, self.shard_dim)
        if self.head_dim:
            values = half_split(values, self.head_dim)
        return values[start - heads.start:stop - heads.start]

    def write(self, rows: slice, cols: slice, values: np.ndarray) -> None:
        """Write a rectangle; with a head_dim, rows must begin and end between heads."""
        if self.head_dim:
            values = interleaved(values, self.head_dim)
        for i, outer, inner in self._overlaps(rows, cols):
            self.shards[i][inner[:values.ndim]] = values[outer[:values.ndim]]

    def _round_to_heads(self, start, stop):
        """The smallest slice of complete heads around rows start to stop."""
        heads = self.head_dim or 1
        return slice(start // heads * heads, -(-stop // heads) * heads)

    def _overlaps(self, rows, cols) -> Iterator[tuple[int, tuple, tuple]]:
        """(shard index, (rows, cols) of the rectangle, (rows, cols) of the shard) where the two overlap."""
        size = self.shards[0].shape[self.shard_dim]
        rectangle = [rows, cols]
        start, stop, _ = rectangle[self.shard_dim].indices(self.shape[self.shard_dim])
        for i in range(start // size, -(-stop // size)):
            low, high = max(start, i * size), min(stop, (i + 1) * size)
            outer, inner = [ALL, ALL], list(rectangle)
            outer[self.shard_dim] = slice(low - start, high - start)
            inner[self.shard_dim] = slice(low - i * size, high - i * size)
            yield i, tuple(outer), tuple(inner)


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows [N * H, ...] from the interleaved order (2i and 2i + 1 rotated together) to i and i + H/2."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The inverse of half_split."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def equal(a: Matrix, b: Matrix) -> bool:
    """Whether two matrices hold the same bytes, compared a few rows at a time."""
    if a.shape != b.shape or a.shards[0].dtype != b.shards[0].dtype:
        return False
    step = max(1, 2**24 // (4 * a.shape[-1]))
    return all(
        np.array_equal(*(np.ascontiguousarray(x.read(slice(i, i + step))).view(np.uint8) for x in (a, b)))
        for i in range(0, a.shape[0], step)
    )
