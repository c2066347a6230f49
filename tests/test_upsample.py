import numpy as np
import pytest
from tiny_store import BYTES, MemoryStore

from lct.data.batches import packing_plan
from lct.data.batches.store_source import StoreSource
from lct.data.batches.upsample import Upsample, chosen, profile, token_shares

RECIPE = Upsample(at_least=400, keep=0.1)


@pytest.fixture(scope='module')
def store():
    """Three sources with very different lengths: books nearly all long, web nearly all short."""
    rng = np.random.default_rng(0)
    lengths, source_of = [], []
    for source, (median, sigma, count) in enumerate([(900, 0.8, 60), (250, 1.0, 400), (80, 0.9, 3000)]):
        lengths += rng.lognormal(np.log(median), sigma, count).astype(int).tolist()
        source_of += [source] * count
    return MemoryStore([rng.integers(0, 256, n) for n in lengths], ('books', 'code', 'web'), source_of)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr('lct.data.batches.store_source.MIN_SEQUENCES', 1)
    monkeypatch.setattr('lct.data.batches.store_source.MIN_TOKENS', 2**17)


def drawn(stream):
    """(tokens int64 [n], document int64 [n]) of the fragments of twenty windows."""
    rows, windows = [], 0
    while windows < 20:
        rows.append(stream.next_sequence(4096))
        windows += not stream.state['windows']
    document = np.concatenate([row.document for row in rows])
    return np.concatenate([row.stop - row.start for row in rows]), document


def test_long_documents_rise_inside_each_source_and_the_mix_stays(store):
    before, long_before = profile(store.lengths, store.source_of, 3, 400)
    sizes, document = drawn(StoreSource(store, BYTES, upsample=RECIPE))
    source, length = store.source_of[document], store.lengths[document]
    tokens = np.bincount(source, sizes)
    np.testing.assert_allclose(tokens / tokens.sum(), before, atol=0.003)
    for s in range(3):
        here = source == s
        share = sizes[here & (length >= 400)].sum() / sizes[here].sum()
        inside = store.lengths[store.source_of == s]
        was = profile(inside, np.zeros(len(inside), int), 1, 400)[1]
        # short documents come a tenth as often, so the odds of a long one are ten times what they were
        assert share == pytest.approx(10 * was / (10 * was + 1 - was), abs=0.04)
    assert sizes[length >= 400].sum() / sizes.sum() > long_before + 0.2


def test_without_it_the_same_mix_has_the_lengths_of_the_store(store):
    before, long_before = profile(store.lengths, store.source_of, 3, 400)
    sizes, document = drawn(StoreSource(store, BYTES, token_shares(store)))
    tokens = np.bincount(store.source_of[document], sizes)
    np.testing.assert_allclose(tokens / tokens.sum(), before, atol=0.003)
    assert sizes[store.lengths[document] >= 400].sum() / sizes.sum() == pytest.approx(long_before, abs=0.02)


def test_a_long_document_comes_once_an_epoch_and_a_short_one_in_a_tenth_of_them():
    lengths = np.where(np.arange(2000) % 2, 5000, 100)
    found = np.array([chosen(Upsample(), np.arange(2000), lengths, (0, epoch)) for epoch in range(50)])
    assert found[:, 1::2].all()
    assert found[:, ::2].mean() == pytest.approx(0.1, abs=0.01)
    assert found[:, ::2].any(0).mean() > 0.98  # others in each epoch


def test_impossible_recipes_are_refused(store):
    for recipe in (Upsample(0, 0.1), Upsample(4096, 1.5), Upsample(4096, -0.1)):
        with pytest.raises(ValueError, match='is not possible'):
            StoreSource(store, BYTES, upsample=recipe)
    with pytest.raises(ValueError, match="source 'books' has 0 tokens in 2 epochs of 60 documents"):
        StoreSource(store, BYTES, {'books': 1}, upsample=Upsample(10**9, 0),
                    mode=packing_plan.packed).next_sequence(64)
    with pytest.raises(ValueError, match='the store holds no tokens'):
        token_shares(MemoryStore([[], []]))
