import json

import numpy as np
import pytest
from tiny_store import BYTES, MemoryStore, lognormal, make_store

from lct.data.batches import packing_plan
from lct.data.batches.random_order import shuffled, uniform
from lct.data.batches.store_source import StoreSource

MODES = [getattr(packing_plan, name) for name in packing_plan.MODES]
EXACT = [mode for mode in MODES if mode is not packing_plan.truncated]


def covered(plan, lengths, seq_len):
    """Checks a plan in itself; returns {document: [(start, stop)] in the order of the stream}."""
    found = {}
    for r in range(plan.num_sequences):
        fragments = slice(plan.first[r], plan.first[r + 1])
        sizes = plan.stop[fragments] - plan.start[fragments]
        assert 0 < sizes.sum() <= seq_len and (sizes > 0).all()
        columns = (plan.document[fragments], plan.start[fragments], plan.stop[fragments])
        for d, start, stop in zip(*columns, strict=True):
            found.setdefault(int(d), []).append((int(start), int(stop)))
    assert plan.first[0] == 0 and plan.first[-1] == len(plan.document)
    return found


@pytest.mark.parametrize('mode', EXACT)
@pytest.mark.parametrize('seed', range(6))
def test_every_token_is_planned_once_and_in_order(mode, seed):
    rng = np.random.default_rng(seed)
    lengths = lognormal(rng, int(rng.integers(1, 400)), median=int(rng.integers(2, 200)))
    seq_len = int(rng.choice([1, 2, 7, 64, 500, 5000]))
    plan = mode(lengths, seq_len, rng)
    found = covered(plan, lengths, seq_len)
    for d, n in enumerate(lengths.tolist()):
        ranges = found.pop(d, [])
        assert [x for one in ranges for x in range(*one)] == list(range(n))
    assert not found


def test_modes_do_what_their_names_say():
    rng = np.random.default_rng(0)
    lengths = lognormal(rng, 500, median=100)
    packed, alone = (mode(lengths, 1000, rng) for mode in (packing_plan.packed, packing_plan.alone))
    short = np.flatnonzero((lengths <= 1000) & (lengths > 0))
    assert (np.bincount(packed.document, minlength=500)[short] == 1).all()  # nothing is cut that fits
    for r in range(alone.num_sequences):
        sizes = (alone.stop - alone.start)[alone.first[r]:alone.first[r + 1]]
        assert len(sizes) == 1 or sizes.max() < 500
    joined = packing_plan.joined(lengths, 1000, rng)
    concatenated = packing_plan.concatenated(lengths, 1000, rng)
    assert joined.joined and not concatenated.joined
    np.testing.assert_array_equal(joined.document, concatenated.document)
    assert packing_plan.stats(concatenated, 1000)['padding'] < 1000
    truncated = packing_plan.truncated(lengths, 1000, rng)
    assert (truncated.start == 0).all() and truncated.stop.sum() == np.minimum(lengths, 1000).sum()
    assert packing_plan.stats(packed, 1000)['cut'] == ((lengths[lengths > 0] - 1) // 1000).sum()


def test_documents_that_attend_to_each_other_have_one_segment_and_no_target_between_them():
    plan = packing_plan.joined(np.array([3, 4]), 10, None)
    row = packing_plan.sequence_of(plan, 0, np.array([5, 8]), np.zeros(2, np.int64), np.array([3, 4]))
    assert row.segment.tolist() == [1, 1] and row.position.tolist() == [0, 3]
    assert not row.follows.any() and not row.continues.any() and row.counts() == (7, 28)
    apart = packing_plan.concatenated(np.array([3, 4]), 10, None)
    row = packing_plan.sequence_of(apart, 0, np.array([5, 8]), np.zeros(2, np.int64), np.array([3, 4]))
    assert row.segment.tolist() == [1, 2] and row.position.tolist() == [0, 0] and row.counts() == (7, 16)


@pytest.mark.parametrize('seq_len', [2048, 8192, 65536])
def test_waste_is_under_one_percent_on_a_long_tail(seq_len):
    lengths = np.random.default_rng(1).lognormal(np.log(1000), 1.3, 40_000).astype(np.int64)
    stats = packing_plan.stats(packing_plan.packed(lengths, seq_len, np.random.default_rng(2)), seq_len)
    assert stats['tokens'] == lengths.sum() and stats['waste'] < 0.01


def test_best_fit_is_best_fit():
    rows = packing_plan.best_fit(np.array([6, 5, 0, 4, 3, 10, 1]), 10)
    assert rows[2] == -1 and rows[0] == rows[3] and rows[1] != rows[0] and rows[4] == rows[1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 100, 200)
        rows = packing_plan.best_fit(lengths, 100)
        filled = np.bincount(rows, lengths)
        assert filled.max() <= 100 and len(filled) <= 11 / 9 * np.ceil(lengths.sum() / 100) + 1


def test_the_rest_of_a_plan_is_a_range_of_each_document():
    rng = np.random.default_rng(3)
    lengths = lognormal(rng, 100)
    plan = packing_plan.packed(lengths, 64, rng)
    for r in (0, 1, plan.num_sequences // 2, plan.num_sequences - 1, plan.num_sequences):
        begin, end = packing_plan.remaining(plan, r, len(lengths))
        left = np.zeros(100, np.int64)
        np.add.at(left, plan.document[plan.first[r]:], (plan.stop - plan.start)[plan.first[r]:])
        np.testing.assert_array_equal(end - begin, left)
        assert (end[begin < end] == lengths[begin < end]).all()


@pytest.mark.parametrize('n', [1, 2, 3, 10, 97, 1024, 5000])
def test_shuffled_is_a_permutation_that_depends_on_its_key(n):
    order = shuffled(n, np.arange(n), (1, 2))
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(shuffled(n, [n - 1, 0], (1, 2)), order[[-1, 0]])
    if n > 90:
        other = shuffled(n, np.arange(n), (1, 3))
        assert (other == order).mean() < 0.1 and abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.3
    with pytest.raises(ValueError, match=f'place {n} is not in an order of {n}'):
        shuffled(n, [n], (1,))


def test_neighbours_in_a_shuffled_order_are_unrelated_and_coins_are_fair():
    order = shuffled(100_000, np.arange(100_000), (0,))
    gaps = np.abs(np.diff(order)) / 100_000
    assert abs(gaps.mean() - 1 / 3) < 0.01 and (np.diff(order) > 0).mean() == pytest.approx(0.5, abs=0.01)
    coins = uniform(np.arange(100_000), (4,))
    np.testing.assert_allclose(np.histogram(coins, 10, (0, 1))[0], 10_000, rtol=0.05)
    np.testing.assert_array_equal(uniform([7, 3], (4,)), coins[[7, 3]])


# -- the stream over a store -------------------------------------------------------------------------------


def tokens_of(sequence):
    """{document: [place]} of one sequence, places with the bos as 0."""
    found = {}
    for d, start, stop in zip(sequence.document, sequence.start, sequence.stop, strict=True):
        found.setdefault(int(d), []).extend(range(int(start), int(stop)))
    return found


def whole_epochs(stream, lengths, seq_lens):
    """Sequences of each of seq_lens in turn, over and over, until some epoch ends exactly; the places
    found."""
    found = {}
    while True:
        for seq_len in seq_lens:
            for d, places in tokens_of(stream.next_sequence(seq_len)).items():
                found.setdefault(d, []).extend(places)
            state = stream.state
            if not state['windows'] and all(place == 0 for _, place in state['cursors'].values()):
                return found


@pytest.mark.parametrize('mode', EXACT)
@pytest.mark.parametrize('seq_lens', [[64], [1000], [37, 64, 64, 512]])
def test_every_token_of_every_document_comes_once_an_epoch(mode, seq_lens):
    store = make_store()
    stream = StoreSource(store, BYTES, seed=1, mode=mode)
    lengths = store.lengths + (store.lengths > 0)
    first = None
    for epoch in range(3):
        found = whole_epochs(stream, lengths, seq_lens)
        assert stream.state['cursors'] == {'text': [epoch + 1, 0]}
        for d, n in enumerate(lengths.tolist()):
            assert found.get(d, []) == list(range(n))
        assert list(found) != first
        first = list(found)


def test_windows_smaller_than_an_epoch_change_nothing(monkeypatch):
    monkeypatch.setattr('lct.data.batches.store_source.MIN_SEQUENCES', 4)
    monkeypatch.setattr('lct.data.batches.store_source.MIN_TOKENS', 1)
    store = make_store(count=100)
    stream = StoreSource(store, BYTES, seed=2)
    found = whole_epochs(stream, None, [64, 64, 64, 256])
    assert stream.state['cursors']['text'] == [1, 0] and stream.state['sequence'] > 50
    for d, n in enumerate(store.lengths.tolist()):
        assert found.get(d, []) == list(range(n + (n > 0)))


def test_resume_anywhere_across_lengths_weights_and_epochs(monkeypatch):
    monkeypatch.setattr('lct.data.batches.store_source.MIN_SEQUENCES', 3)
    monkeypatch.setattr('lct.data.batches.store_source.MIN_TOKENS', 1)
    store = make_store(count=40)
    steps = [(64, {'text': 1})] * 9 + [(256, {'text': 1})] * 5 + [(256, {'books': 3, 'web': 1})] * 8
    steps += [(512, {'code': 1, 'text': 1})] * 6
    stream, states, found = StoreSource(store, BYTES, seed=3), [], []
    for seq_len, weights in steps:
        stream.weights = weights
        states.append(json.loads(json.dumps(stream.state)))
        found.append(tokens_of(stream.next_sequence(seq_len)))
    assert max(len(state['windows']) for state in states) > 1
    for k, state in enumerate(states):
        resumed = StoreSource(store, BYTES, seed=3)
        resumed.state = state
        for (seq_len, weights), expected in list(zip(steps, found, strict=True))[k:k + 4]:
            resumed.weights = weights
            assert tokens_of(resumed.next_sequence(seq_len)) == expected


def test_tokens_come_from_the_sources_as_the_weights_say():
    store = make_store(count=600)
    stream = StoreSource(store, BYTES, {'books': 6, 'code': 3, 'web': 1})
    tokens = np.zeros(3)
    for _ in range(400):
        for d, places in tokens_of(stream.next_sequence(512)).items():
            tokens[store.source_of[d]] += len(places)
    np.testing.assert_allclose(tokens / tokens.sum(), [0.6, 0.3, 0.1], atol=0.03)


def test_held_out_documents_are_in_no_epoch_of_any_source_or_seed():
    store = make_store(count=300)
    texts = None
    for seed, weights in ((0, {'text': 1}), (1, {'books': 1, 'code': 2}), (2, {'web': 1})):
        stream = StoreSource(store, BYTES, weights, seed=seed, held_out=0.2)
        unseen = [ids.tobytes() for ids in stream.held_out(10**9)]
        assert 20 < len(unseen) < 100 and texts in (None, unseen)
        texts = unseen
        found = {d for _ in range(100) for d in tokens_of(stream.next_sequence(2000))}
        assert len(found) > 50
        assert not {store.documents[d].tobytes() for d in found if store.lengths[d] > 8} & set(unseen)
    assert len(stream.held_out(1)) == 1


def test_documents_of_no_token_and_of_one():
    class NoBos:
        fingerprint, bos_id, eos_id, vocab_size = BYTES.fingerprint, None, None, 258

    store = MemoryStore([[], [7], [], [8], [1, 2, 3]])
    row = StoreSource(store, NoBos(), seed=0).next_sequence(16)
    assert sorted(row.document.tolist()) == [1, 3, 4] and row.counts() == (5, 8) and not row.continues.any()
    row = StoreSource(store, BYTES, seed=0).next_sequence(16)
    assert sorted(row.document.tolist()) == [1, 3, 4] and row.counts()[0] == 8
    assert StoreSource(store, NoBos()).stats() == {'documents': 5, 'empty': 2, 'without target': 2}
    assert StoreSource(store, BYTES).stats() == {'documents': 5, 'empty': 2, 'without target': 0}
    NoBos.eos_id = 257  # the target of the only token
    assert StoreSource(store, NoBos()).stats() == {'documents': 5, 'empty': 2, 'without target': 0}
    assert StoreSource(store, NoBos(), seed=0).next_sequence(16).continues.all()


def test_bad_mixes_and_states():
    store = make_store()
    for weights, message in [
        ({'news': 1}, "weight 'news' is neither text, long, chat, recall, copy, forms nor a source of the "
                      "store, which has books, code, web"),
        ({'books': 0}, 'must be non-negative with a positive sum'),
        ({'books': -1, 'code': 3}, 'must be non-negative with a positive sum'),
        ({'books': float('nan')}, 'must be non-negative with a positive sum'),
    ]:
        with pytest.raises(ValueError, match=message):
            StoreSource(store, BYTES, weights)
    state = StoreSource(store, BYTES, seed=1).state
    with pytest.raises(ValueError, match='data state is of another corpus'):
        StoreSource(make_store(seed=1), BYTES, seed=1).state = state
    with pytest.raises(ValueError, match='data state is of another seed: seed 1, here 2'):
        StoreSource(store, BYTES, seed=2).state = state
    old = {name: value for name, value in state.items() if name != 'eos'}
    resumed = StoreSource(store, BYTES, seed=1)
    resumed.state = old  # of a version before EOS
    assert resumed.eos_id is None and resumed.state == {**old, 'eos': None}
    again = StoreSource(store, BYTES, seed=1)
    again.state = resumed.state  # the next checkpoint of that run
    assert again.eos_id is None and again.state == resumed.state
    with pytest.raises(ValueError, match='is not one of a token store'):
        StoreSource(store, BYTES).state = {'row': 0, 'epoch': 0, 'document': 0, 'offset': 0}
    with pytest.raises(ValueError, match='fewer than one sequence of seq_len 1000000'):
        StoreSource(store, BYTES).check_length(1_000_000)
    with pytest.raises(ValueError, match='held_out 1.5 is not a fraction'):
        StoreSource(store, BYTES, held_out=1.5)
    with pytest.raises(ValueError, match="the store has a source named 'chat', which is a kind of sequence"):
        StoreSource(MemoryStore([[1]], ('chat',)), BYTES)
    other = make_store()
    other.tokenizer_hash = 'f' * 64
    with pytest.raises(ValueError, match='the store was made with the tokenizer ffffffffffff'):
        StoreSource(other, BYTES)
    with pytest.raises(ValueError, match="source 'text' has 0 tokens in 2 epochs"):
        StoreSource(MemoryStore([[], []]), BYTES).next_sequence(8)
    with pytest.raises(ValueError, match="source 'b' has no documents"):
        StoreSource(MemoryStore([[1]], ('a', 'b')), BYTES, {'b': 1}).next_sequence(8)
    for weights, message in [({'long': 1}, "kind 'long' needs documents of seq_len 3000"),
                             ({'chat': 1}, 'chats and recall need documents of 48 tokens'),
                             ({'text': 2, 'b': 1}, "source 'b' has no documents")]:
        with pytest.raises(ValueError, match=message):  # before anything is computed
            StoreSource(MemoryStore([[1, 2, 3]] * 2000, ('a', 'b')), BYTES, weights).check_length(3000)
