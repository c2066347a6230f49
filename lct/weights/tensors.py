"""Where the numbers of a weight lie: tensors of files, and matrices that are cut over several of them."""

import os
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOATS = {
    'F32': np.dtype(np.float32), 'F16': np.dtype(np.float16), 'BF16': np.dtype(ml_dtypes.bfloat16),
}
DTYPES = {dtype.name: kind for kind, dtype in FLOATS.items()}
ALL = slice(None)


def check_dtype(dtype, purpose):
    """Refuse the name of a dtype in which weights are not kept; purpose ends 'is no dtype ...'."""
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is no dtype {purpose}; use one of {", ".join(DTYPES)}')


class Tensor(NamedTuple):
    """Where one tensor lies in a file: offset in bytes, strides in elements (None where row by row)."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    def read(self, rows=ALL, cols=ALL):
        """A read-only memory map of a rectangle; nothing is read until it is used."""
        dtype = FLOATS[self.dtype]
        strides = self.strides or row_by_row(self.shape)
        parts = [range(n)[part] for n, part in zip(self.shape, (rows, cols))]
        start = sum(part.start * stride for part, stride in zip(parts, strides))
        extent = 1 + sum((len(part) - 1) * stride for part, stride in zip(parts, strides))
        flat = np.memmap(self.path, dtype, 'r', self.offset + start * dtype.itemsize, (extent,))
        steps = [stride * dtype.itemsize for stride in strides]
        return np.ndarray([len(part) for part in parts], dtype, flat, strides=steps)


def row_by_row(shape):
    """Strides in elements of a tensor whose last dim is contiguous."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


class Matrix(NamedTuple):
    """A weight [out, in], or a vector [out], as a format stores it: in one piece, or cut along dim `cut`.

    head_dim: set where the rows of a head lie as the pairs (2i, 2i + 1) of a rotation, in Meta's order; read
      and write speak of rows in the half-split order (i, i + head_dim/2).
    """

    name: str
    pieces: tuple[Any, ...]  # Tensors to read, or arrays to write
    cut: int = 0
    head_dim: int | None = None

    @property
    def where(self):
        path = self.pieces[0].path if len(self.pieces) == 1 else os.path.dirname(self.pieces[0].path)
        return f'{path}: tensor {self.name!r}'

    @property
    def shape(self):
        shape = list(self.pieces[0].shape)
        shape[self.cut] *= len(self.pieces)
        return tuple(shape)

    def read(self, rows=ALL, cols=ALL):
        """A rectangle as an array: a map of the file where it lies there as it is, else a small copy."""
        start, stop, _ = rows.indices(self.shape[0])
        whole = self._whole_heads(start, stop)
        parts = [self.pieces[i].read(*inner) for i, _, inner in self._cuts(whole, cols)]
        values = parts[0] if len(parts) == 1 else np.concatenate(parts, self.cut)
        if self.head_dim:
            values = half_split(values, self.head_dim)
        return values[start - whole.start:stop - whole.start]

    def write(self, rows, cols, values):
        """Write a rectangle; rows must be whole heads where there is a head_dim."""
        if self.head_dim:
            values = interleaved(values, self.head_dim)
        for i, outer, inner in self._cuts(rows, cols):
            self.pieces[i][inner[:values.ndim]] = values[outer[:values.ndim]]

    def _whole_heads(self, start, stop):
        heads = self.head_dim or 1
        return slice(start // heads * heads, -(-stop // heads) * heads)

    def _cuts(self, rows, cols):
        """(piece, (rows, cols) within the rectangle, (rows, cols) within the piece) of what a rectangle meets."""
        size = self.pieces[0].shape[self.cut]
        asked = [rows, cols]
        start, stop, _ = asked[self.cut].indices(self.shape[self.cut])
        for i in range(start // size, -(-stop // size)):
            low, high = max(start, i * size), min(stop, (i + 1) * size)
            outer, inner = [ALL, ALL], list(asked)
            outer[self.cut] = slice(low - start, high - start)
            inner[self.cut] = slice(low - i * size, high - i * size)
            yield i, tuple(outer), tuple(inner)


def half_split(rows, head_dim):
    """Rows [N * H, ...] from Meta's order, dims 2i and 2i + 1 of a head rotated together, to i and i + H/2."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def interleaved(rows, head_dim):
    """The inverse of half_split."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def equal(a, b):
    """Whether two matrices hold the same bytes, compared a few rows at a time."""
    if a.shape != b.shape or a.pieces[0].dtype != b.pieces[0].dtype:
        return False
    step = max(1, 2**24 // (4 * a.shape[-1]))
    return all(
        np.array_equal(*(np.ascontiguousarray(x.read(slice(i, i + step))).view(np.uint8) for x in (a, b)))
        for i in range(0, a.shape[0], step)
    )
