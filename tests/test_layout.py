import numpy as np
import pytest

from lct.data.layout import LAYOUTS, inverse, permutation, permute


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.parametrize('ring_size', [1, 2, 3, 8])
def test_permutation_and_its_inverse(name, ring_size):
    indices = permutation(name, 48, ring_size)
    np.testing.assert_array_equal(np.sort(indices), np.arange(48))
    rng = np.random.default_rng(0)
    batch = {'tokens': rng.integers(0, 99, (3, 48)), 'loss_mask': rng.random((3, 48), np.float32)}
    permuted = permute(batch, indices)
    for key, array in batch.items():
        np.testing.assert_array_equal(permuted[key], array[:, indices])
        assert permuted[key].dtype == array.dtype
        np.testing.assert_array_equal(permute(permuted, inverse(indices))[key], array)
    local = indices.reshape(ring_size, -1)
    assert (np.diff(local, axis=1) > 0).all()  # each device holds its tokens in ascending order


def test_known_layouts():
    assert permutation('contiguous', 8, 2).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert permutation('zigzag', 8, 2).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
    assert permutation('striped', 8, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert permutation('zigzag', 7, 1).tolist() == list(range(7))


@pytest.mark.parametrize('ring_size', [2, 4, 8])
def test_zigzag_balances_causal_work(ring_size):
    def work(name):  # a token at position p attends to p + 1 tokens
        return (permutation(name, 64, ring_size) + 1).reshape(ring_size, -1).sum(axis=1)
    assert np.ptp(work('zigzag')) == 0 < np.ptp(work('striped')) < np.ptp(work('contiguous'))


def test_errors():
    with pytest.raises(ValueError, match=r'1000 is not a multiple of 2 \* ring_size = 16; use 992 or 1008'):
        permutation('zigzag', 1000, 8)
    with pytest.raises(ValueError, match='seq_len 10 is not a multiple of ring_size = 4; use 8 or 12'):
        permutation('striped', 10, 4)
    with pytest.raises(ValueError, match="layout 'spiral' is not one of contiguous, zigzag, striped"):
        permutation('spiral', 8, 2)
    with pytest.raises(ValueError, match='must both be at least 1'):
        permutation('zigzag', 8, 0)
