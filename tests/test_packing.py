import numpy as np
import pytest

from lct.data.batches.packing import pack, pack_documents, segment

BOS = 999


def random_documents(rng, count=40):
    """Documents whose tokens are all different: so the place of each is unambiguous."""
    lengths = rng.integers(0, 60, count)
    tokens = rng.permutation(998)[:min(998, lengths.sum())]
    return [d.astype(np.int32) for d in np.split(tokens, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize('bos_id', [None, BOS])
@pytest.mark.parametrize('seq_len', [1, 2, 7, 64, 5000])
def test_every_token_once_in_order_and_every_target_once(seq_len, bos_id):
    rng = np.random.default_rng(seq_len)
    documents = random_documents(rng)
    full = [np.concatenate([[bos_id], d]) if bos_id else d for d in documents if len(d)]
    rows = list(pack_documents(documents, seq_len, bos_id))
    assert all(array.shape == (seq_len,) for row in rows for array in row.values())
    real = [row['segment_ids'] > 0 for row in rows]
    tokens = np.concatenate([row['tokens'][keep] for row, keep in zip(rows, real, strict=True)])
    np.testing.assert_array_equal(tokens, np.concatenate(full))
    assert sum(keep.all() for keep in real) >= len(rows) - 1  # only the last row is padded
    # All tokens but the first of each document are predicted, once, in order, from the token before them.
    predicted = np.concatenate([row['targets'][row['loss_mask'] > 0] for row in rows])
    np.testing.assert_array_equal(predicted, np.concatenate([d[1:] for d in full]))
    pairs = {pair for d in full for pair in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)}
    for row in rows:
        masked = row['loss_mask'] > 0
        assert set(zip(row['tokens'][masked].tolist(), row['targets'][masked].tolist(), strict=True)) <= pairs


def test_positions_restart_and_segments_count_from_one():
    row = pack([segment([5, 6, 7], None, BOS), segment([8, 9])], 8)
    expected = {
        'tokens': [BOS, 5, 6, 7, 8, 9, 0, 0], 'targets': [5, 6, 7, 0, 9, 0, 0, 0],
        'positions': [0, 1, 2, 3, 0, 1, 0, 1], 'segment_ids': [1, 1, 1, 1, 2, 2, 0, 0],
        'loss_mask': [1, 1, 1, 0, 1, 0, 0, 0],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(row[name], values, err_msg=name)
        assert row[name].dtype == (np.float32 if name == 'loss_mask' else np.int32)


def test_a_cut_document_keeps_the_target_at_the_cut():
    first, second = pack_documents([[1, 2, 3, 4]], 3, BOS)
    np.testing.assert_array_equal(first['targets'], [1, 2, 3])
    np.testing.assert_array_equal(first['loss_mask'], [1, 1, 1])
    np.testing.assert_array_equal(second['tokens'][:2], [3, 4])
    np.testing.assert_array_equal(second['positions'][:2], [0, 1])
    np.testing.assert_array_equal(second['loss_mask'], [1, 0, 0])


def test_a_document_ends_in_eos_where_it_ends_and_not_where_it_is_cut():
    whole = segment([1, 2], None, BOS, eos_id=7)
    assert [x.tolist() for x in whole] == [[BOS, 1, 2], [1, 2, 7], [1, 1, 1]]
    cut, rest = segment([1, 2], None, BOS, 0, 2, 7), segment([1, 2], None, BOS, 2, 3, 7)
    assert [x.tolist() for x in cut] == [[BOS, 1], [1, 2], [1, 1]]
    assert [x.tolist() for x in rest] == [[2], [7], [1]]
    assert segment([1], None, None, eos_id=7).targets.tolist() == [7]
    assert not len(segment([], None, None, eos_id=7).targets)


def test_weights_belong_to_the_token_that_is_predicted():
    weights = np.array([.1, .2, .3, .4], np.float32)
    with_bos = segment([1, 2, 3, 4], weights, BOS)
    np.testing.assert_array_equal(with_bos.weights, np.float32([.1, .2, .3, .4, 0]))
    np.testing.assert_array_equal(segment([1, 2, 3, 4], weights).weights, np.float32([.2, .3, .4, 0]))
    np.testing.assert_array_equal(segment([1, 2, 3, 4], weights, None, 1, 3).weights, np.float32([.3, .4]))


def test_no_documents_and_too_many_tokens():
    assert list(pack_documents([], 4)) == [] == list(pack_documents([[]], 4, BOS))
    assert not pack([], 4)['segment_ids'].any()
    with pytest.raises(ValueError, match='segments of 3 tokens do not fit into a row of seq_len 2'):
        pack([segment([1, 2, 3])], 2)
