import json

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.batches.memory_source import MemorySource

ALL = {'text': 0.5, 'recall': 0.2, 'copy': 0.1, 'entries': 0.05, 'forms': 0.15}
TOKENIZER = tokenizers.load('bytes')


def make_documents(seed=0, count=25):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, 400)).astype(np.int32) for _ in range(count)]


def make(weights=None, seed=3, documents=None):
    return MemorySource(make_documents() if documents is None else documents, TOKENIZER, weights, seed)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('seq_len', [1, 37, 512])
def test_every_epoch_has_every_token_once_and_orders_differ(seq_len):
    documents = make_documents(count=6)
    source = make(documents=documents)
    full = {tuple(d.tolist()) for d in documents}
    rows = [source.next_row(seq_len) for _ in range(3 * source.num_tokens // seq_len + 1)]
    stream = np.concatenate([row['tokens'] for row in rows])[:3 * source.num_tokens]
    orders = []
    for epoch in stream.reshape(3, -1):
        texts = np.split(epoch, np.flatnonzero(epoch == TOKENIZER.bos_id))[1:]
        texts = [tuple(text[1:].tolist()) for text in texts]
        assert epoch[0] == TOKENIZER.bos_id and set(texts) == full and len(texts) == len(documents)
        orders.append(texts)
    assert orders[0] != orders[1] or orders[1] != orders[2]
    assert source.state['epoch'] >= 2


def test_rows_are_well_formed_and_of_every_kind():
    source, kinds = make(ALL), set()
    for r in range(60):
        kind = source.kind(r)
        kinds.add(kind)
        row = source.next_row(700)
        assert (row['segment_ids'] > 0).all() and row['loss_mask'].max() <= 8 and row['loss_mask'].min() >= 0
        starts = np.flatnonzero(np.diff(row['segment_ids'], prepend=0))
        assert (row['positions'][starts] == 0).all()
        inside = np.setdiff1d(np.arange(700), starts)
        assert (np.diff(row['positions'])[inside - 1] == 1).all()
        # The target of a token is the next token of its own segment; the mask is zero where there is none.
        same = row['segment_ids'][1:] == row['segment_ids'][:-1]
        np.testing.assert_array_equal(row['targets'][:-1][same], row['tokens'][1:][same])
        # But for documents of text, which end in EOS.
        ends = np.flatnonzero(~same)
        assert (row['loss_mask'][ends] == (kind == 'text')).all()
        assert kind != 'text' or (row['targets'][ends] == TOKENIZER.eos_id).all()
    assert kinds == set(ALL)


def test_long_rows_are_one_stretch_of_one_document_each():
    rng = np.random.default_rng(0)
    documents = [np.arange(n, dtype=np.int32) + 50 * i for i, n in enumerate((30, 90, 40, 64))]
    source = MemorySource([d % 250 for d in documents], TOKENIZER, {'long': 1.0}, seed=int(rng.integers(9)))
    starts = set()
    for _ in range(200):
        row = source.next_row(65)
        assert row['tokens'][0] == TOKENIZER.bos_id and (row['segment_ids'] == 1).all()
        np.testing.assert_array_equal(row['positions'], np.arange(65))
        assert (np.diff(row['tokens'][1:]) % 250 == 1).all()
        np.testing.assert_array_equal(row['targets'][:-1], row['tokens'][1:])
        starts.add(int(row['tokens'][1]))
    assert starts == {*range(50, 50 + 27), 150}  # every stretch of the two documents that are long enough
    with pytest.raises(ValueError, match="needs a document of seq_len 92 tokens, but the longest has 90"):
        source.next_row(92)


def test_shares_follow_the_weights():
    source = make(ALL)
    kinds = [source.kind(r) for r in range(3000)]
    for kind, share in ALL.items():
        assert abs(kinds.count(kind) / 3000 - share) < 0.04
    source.weights = {'copy': 2}
    assert {source.kind(r) for r in range(50)} == {'copy'}


def test_resume_at_every_row_across_epochs_and_stages():
    stages = [128] * 30 + [512] * 20 + [1024] * 15
    source, states, rows = make(ALL), [], []
    for seq_len in stages:
        states.append(json.loads(json.dumps(source.state)))
        rows.append(source.next_row(seq_len))
    assert source.state['epoch'] > 1 and source.state['row'] == len(stages)
    for k, state in enumerate(states):
        resumed = make(ALL)
        resumed.state = state
        for seq_len, row in list(zip(stages, rows, strict=True))[k:k + 4]:
            assert_same(resumed.next_row(seq_len), row)


def test_text_continues_across_a_change_of_length_and_weights():
    plain, staged = make(), make({'text': 1})
    expected = np.concatenate([plain.next_row(64)['tokens'] for _ in range(16)])
    found = [staged.next_row(64)['tokens'] for _ in range(4)]
    staged.weights = {'copy': 1}
    staged.next_row(256)
    staged.weights = {'text': 2}
    found += [staged.next_row(256)['tokens'] for _ in range(3)]
    np.testing.assert_array_equal(np.concatenate(found), expected)


def test_seeds_give_different_streams():
    assert (make(seed=1).next_row(500)['tokens'] != make(seed=2).next_row(500)['tokens']).any()
    assert_same(make(seed=1).next_row(500), make(seed=1).next_row(500))


def test_empty_documents_are_skipped_and_lists_are_accepted():
    source = make(documents=[[], [1, 2, 3], np.zeros(0, np.int32), [4, 5, 6, 7]])
    assert source.num_tokens == 9
    assert set(source.next_row(9)['tokens'].tolist()) == {1, 2, 3, 4, 5, 6, 7, 256}


def test_another_corpus_or_seed_is_noticed():
    documents = make_documents()
    state = make(documents=documents).state
    make(documents=documents).state = state
    swapped = [documents[1], documents[0], *documents[2:]]
    cut = [documents[0][:-1], np.append(documents[0][-1], documents[1]), *documents[2:]]  # the same tokens
    for other in (swapped, cut):
        with pytest.raises(ValueError, match='data state is of another corpus: .*; resume with the corpus'):
            make(documents=other).state = state
    with pytest.raises(ValueError, match='data state is of another seed: 3, here 4'):
        make(documents=documents, seed=4).state = state
    old = {name: state[name] for name in ('row', 'epoch', 'document', 'offset')}
    source = make(documents=documents)
    source.state = old
    assert source.state == {**state, 'eos': None}


def test_a_run_keeps_to_its_choice_of_eos():
    """A state of a version before EOS continues without it, with the rows of that version."""
    source, without = make(), make()
    assert source.eos_id == source.state['eos'] == TOKENIZER.eos_id
    without.eos_id = None
    for _ in range(5):
        row, other = source.next_row(900), without.next_row(900)
        ended = (row['targets'] == 257) & (row['loss_mask'] > 0)
        assert ended.any() and not other['loss_mask'][ended].any()
        np.testing.assert_array_equal(row['targets'][~ended], other['targets'][~ended])
        np.testing.assert_array_equal(row['tokens'], other['tokens'])
    old = without.state
    del old['eos']
    for state in (old, without.state):  # and so does a checkpoint of the run that continued
        resumed, again = make(), make()
        resumed.state = again.state = state
        expected = again.next_row(300)
        assert again.state['eos'] is None and resumed.eos_id is None
        assert_same(resumed.next_row(300), expected)
        assert not expected['loss_mask'][expected['targets'] == 257].any()
    ended = make()
    ended.eos_id = None
    ended.state = source.state
    assert ended.eos_id == 257


@pytest.mark.parametrize('state, message', [
    ({'row': 0}, 'is not {row, epoch, document, offset}'),
    ({'row': 0, 'epoch': 0, 'document': 25, 'offset': 0}, 'is at document 25 of an epoch of 25'),
    ({'row': 0, 'epoch': 0, 'document': 0, 'offset': 5000}, 'is at token 5000 of a document'),
])
def test_foreign_states_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        make().state = state


def test_errors():
    with pytest.raises(ValueError, match='corpus has 4 tokens, fewer than one sequence of seq_len 8; add'):
        make(documents=[[1, 2, 3]]).next_row(8)
    with pytest.raises(ValueError, match='the corpus has no tokens'):
        make(documents=[[]])
    with pytest.raises(ValueError, match="mixture weight 'prose' is not one of text, recall, copy"):
        make({'prose': 1})
    for weights in ({'text': -1, 'copy': 2}, {'text': 0}, {'text': float('nan')}):
        with pytest.raises(ValueError, match='must be non-negative with a positive sum'):
            make(weights)
    for wrong in (258, 259, -1, -100, 2**31, 2**32 + 1, 2**63 - 1):
        with pytest.raises(ValueError, match=f'document 1 has token id {wrong} at 2, which is not in 0..257'):
            make(documents=[[1], np.array([1, 2, wrong])])
    with pytest.raises(ValueError, match='document 0 is float64'):
        make(documents=[np.ones(3)])
