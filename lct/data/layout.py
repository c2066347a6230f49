"""Which token is on which device of the ring. A layout is a permutation of the batch, made on the host."""

import numpy as np

from lct.text import multiples_near

LAYOUTS = ('contiguous', 'zigzag', 'striped')


def permutation(name: str, seq_len: int, ring_size: int) -> np.ndarray:
    """indices int [S] with permuted = original[:, indices]; device r holds the r-th S / ring_size columns.

    contiguous: device r holds chunk r of ring_size. Under a causal mask the first device is mostly idle.
    zigzag: device r holds chunks r and 2 * ring_size - 1 - r of 2 * ring_size, an early and a late one, so
        that every device has the same number of query-key pairs under a causal mask.
    striped: device r holds tokens r, r + ring_size, r + 2 * ring_size, ...

    Raises:
      ValueError: for an unknown layout, or a seq_len that the layout does not divide.
    """
    if name not in LAYOUTS:
        raise ValueError(f'layout {name!r} is not one of {", ".join(LAYOUTS)}')
    if seq_len < 1 or ring_size < 1:
        raise ValueError(f'seq_len {seq_len} and ring_size {ring_size} must both be at least 1')
    multiple = 2 * ring_size if name == 'zigzag' and ring_size > 1 else ring_size
    if seq_len % multiple:
        label = f'2 * ring_size = {multiple}' if multiple != ring_size else f'ring_size = {ring_size}'
        raise ValueError(f'seq_len {seq_len} is not a multiple of {label}; use '
                         f'{multiples_near(seq_len, multiple)}, or a smaller ring')
    tokens = np.arange(seq_len)
    if name == 'contiguous' or ring_size == 1:
        return tokens
    if name == 'striped':
        return tokens.reshape(-1, ring_size).T.reshape(-1)
    chunks = tokens.reshape(2 * ring_size, -1)
    order = [chunk for r in range(ring_size) for chunk in (r, 2 * ring_size - 1 - r)]
    return chunks[order].reshape(-1)


def inverse(indices: np.ndarray) -> np.ndarray:
    """int [S] that undoes the permutation: x[:, indices][:, inverse(indices)] == x."""
    result = np.empty_like(indices)
    result[indices] = np.arange(len(indices))
    return result


def permute(batch: dict[str, np.ndarray], indices: np.ndarray) -> dict[str, np.ndarray]:
    """A dict of arrays [..., T] in the order of indices [T]."""
    return {name: np.ascontiguousarray(array[..., indices]) for name, array in batch.items()}
