import hashlib
import json

import numpy as np
import pytest
from tiny_store import BYTES, MemoryStore, make_store

from lct.data.batches import packing, packing_plan
from lct.data.batches.sharded_loader import ShardedLoader, read, read_plan
from lct.data.batches.store_documents import StoreDocuments
from lct.data.batches.store_source import StoreSource
from lct.data.layout import LAYOUTS, inverse, permutation

MODES = [getattr(packing_plan, name) for name in packing_plan.MODES]
NAMES = ('tokens', 'targets', 'positions', 'segment_ids', 'loss_mask')


def whole_rows(store, mode, seq_len, count=20):
    """(Sequence, StoreDocuments) of the first rows of a stream."""
    stream = StoreSource(store, BYTES, seed=1, mode=mode)
    return [stream.next_sequence(seq_len) for _ in range(count)], stream.documents


def held(batch_size, seq_len, degrees, process, num_processes):
    """What process number `process` holds of [batch_size, seq_len] on a mesh of (data * fsdp, sequence)
    degrees whose devices are dealt out in order."""
    replicas, ring = degrees
    devices = [(b, t) for b in range(replicas) for t in range(ring)]
    each = len(devices) // num_processes
    rows, width = batch_size // replicas, seq_len // ring
    return [(np.arange(b * rows, (b + 1) * rows), slice(t * width, (t + 1) * width))
            for b, t in devices[process * each:(process + 1) * each]]


def batches(store, count, layout, degrees, num_processes, state=None, batch_size=4, seq_len=128, **options):
    """Global batches [B, T] in the order of the text, put together from what simulated processes read."""
    out, states = [], []
    shards = [held(batch_size, seq_len, degrees, p, num_processes) for p in range(num_processes)]
    streams = [StoreSource(store, BYTES, seed=5, **options) for _ in shards]
    loaders = [ShardedLoader(stream, batch_size, seq_len, layout, degrees[1], held=shard)
               for stream, shard in zip(streams, shards, strict=True)]
    indices = inverse(permutation(layout, seq_len, degrees[1]))
    for loader in loaders:
        if state:
            loader.restore(state)
    for _ in range(count):
        made = [loader.next() for loader in loaders]
        counts = [loader.counts(batch, 7) for loader, (batch, _) in zip(loaders, made, strict=True)]
        assert set(counts) == {counts[0]}
        assert all(after == made[0][1] for _, after in made)
        whole = {name: np.full((batch_size, seq_len), -7, made[0][0][name].dtype) for name in NAMES}
        for (batch, _), shard in zip(made, shards, strict=True):
            for rows, places in shard:
                for name in NAMES:
                    whole[name][rows, places] = batch[name][rows, places]
        out.append({name: values[:, indices] for name, values in whole.items()})
        states.append(json.loads(json.dumps(made[0][1])))
    for loader in loaders:
        loader.close()
    return out, states


def digests(found):
    contents = (b''.join(np.ascontiguousarray(batch[name]).tobytes() for name in NAMES) for batch in found)
    return [hashlib.sha256(content).hexdigest() for content in contents]


@pytest.mark.parametrize('seq_len', [16, 200, 3000])
def test_a_row_is_what_packing_makes_of_the_whole_documents(seq_len):
    store = make_store()
    for row in whole_rows(store, packing_plan.packed, seq_len)[0]:
        segments = [
            packing.segment(store.documents[d], None, BYTES.bos_id, int(start), int(stop), BYTES.eos_id)
            for d, start, stop in zip(row.document, row.start, row.stop, strict=True)]
        found = read(row, StoreDocuments(store, BYTES.bos_id, BYTES.eos_id), [(0, seq_len)])
        for name, expected in packing.pack(segments, seq_len).items():
            np.testing.assert_array_equal(found[name], expected, err_msg=name)
            assert found[name].dtype == expected.dtype


@pytest.mark.parametrize('mode', MODES)
def test_targets_never_cross_a_document_and_positions_agree_with_offsets(mode):
    store = make_store()
    rows, documents = whole_rows(store, mode, 300)
    for row in rows:
        found, at = read(row, documents, [(0, 300)]), 0
        for d, start, stop in zip(row.document, row.start, row.stop, strict=True):
            here = slice(at, at + stop - start)
            text = np.concatenate([[BYTES.bos_id], store.documents[d], [BYTES.eos_id]])
            np.testing.assert_array_equal(found['tokens'][here], text[start:stop])
            following = text[start + 1:stop + 1]  # of the document itself, beyond the row's end too
            np.testing.assert_array_equal(found['targets'][here][:len(following)], following)
            mask = np.arange(stop - start) < len(following)
            np.testing.assert_array_equal(found['loss_mask'][here], mask)
            if mode is packing_plan.joined:
                np.testing.assert_array_equal(found['positions'][here], np.arange(here.start, here.stop))
                assert (found['segment_ids'][here] == 1).all()
            else:
                np.testing.assert_array_equal(found['positions'][here], np.arange(stop - start))
            at = here.stop
        assert (found['segment_ids'][:at] > 0).all() and (found['segment_ids'][at:] == 0).all()
        inside = found['segment_ids'] > 0
        assert row.counts() == (at, (found['positions'][inside] + 1).sum())
        assert row.counts(window=7) == (at, np.minimum(found['positions'][inside] + 1, 7).sum())


@pytest.mark.parametrize('mode', MODES)
def test_any_ranges_of_a_row_equal_those_of_the_complete_row(mode):
    rng = np.random.default_rng(0)
    rows, documents = whole_rows(make_store(), mode, 300)
    for row in rows:
        whole = read(row, documents, [(0, 300)])
        cuts = np.unique(rng.integers(0, 301, 2 * rng.integers(1, 9)))
        runs = [(int(a), int(b)) for a, b in zip(cuts[::2], cuts[1::2])]
        for name, values in read(row, documents, runs).items():
            np.testing.assert_array_equal(values, np.concatenate([whole[name][a:b] for a, b in runs] or [[]]))


@pytest.mark.parametrize('layout', LAYOUTS)
def test_columns_are_read_in_runs_and_placed_as_the_layout_says(layout):
    indices = permutation(layout, 64, 4)
    for slices in [{(0, 16)}, {(16, 32), (48, 64)}, {(0, 64)}, {(3, 9)}]:
        plan = read_plan(indices, slices)
        needed = np.concatenate([np.arange(*run) for run in plan.runs])
        assert all(b[0] > a[1] for a, b in zip(plan.runs, plan.runs[1:]))
        for one, places in plan.indices.items():
            np.testing.assert_array_equal(needed[places], indices[slice(*one)])
    assert len(read_plan(indices, {(0, 16)}).runs) == {'contiguous': 1, 'zigzag': 2, 'striped': 16}[layout]


MESHES = [(1, 1), (1, 4), (2, 4), (4, 2), (1, 8)]


def test_the_stream_of_batches_is_the_same_on_any_mesh_layout_and_number_of_processes():
    store = make_store()
    expected = digests(batches(store, 6, 'zigzag', (1, 1), 1)[0])
    assert len(set(expected)) == 6
    for degrees in MESHES:
        for layout in LAYOUTS:
            for num_processes in {1, 2, 4, degrees[0] * degrees[1]}:
                if degrees[0] * degrees[1] % num_processes == 0:
                    assert digests(batches(store, 6, layout, degrees, num_processes)[0]) == expected


@pytest.mark.parametrize('options', [
    {}, {'mode': packing_plan.joined},
    {'weights': {'books': 3, 'chat': 1, 'recall': 1, 'copy': 1, 'forms': 1, 'long': 1}}])
def test_resume_on_another_mesh_and_number_of_processes_hash_for_hash(options):
    store = MemoryStore(make_store(count=80, median=400).documents, ('books', 'code'), np.arange(80) % 2)
    options |= {'seq_len': 2048}
    found, states = batches(store, 8, 'zigzag', (2, 2), 2, **options)
    for k in (0, 5):
        for degrees, num_processes, layout in (
                ((1, 8), 4, 'zigzag'), ((4, 1), 1, 'contiguous'), ((2, 4), 8, 'striped')):
            again, _ = batches(store, 7 - k, layout, degrees, num_processes, states[k], **options)
            assert digests(again) == digests(found[k + 1:])


@pytest.mark.parametrize('layout, most', [('contiguous', 1.05), ('zigzag', 1.05), ('striped', 2.05)])
def test_a_process_reads_its_share(layout, most):
    """16 hosts of one device; a striped device needs two tokens for each of its places: it and the one after
    it."""
    store = make_store(count=40, median=3000)
    seq_len, total = 2**14, 0
    for process in range(16):
        stream = StoreSource(store, BYTES)
        loader = ShardedLoader(stream, 1, seq_len, layout, 16, held=held(1, seq_len, (1, 16), process, 16))
        loader._make()
        assert stream.documents.bytes_read <= most * 4 * seq_len / 16
        total += stream.documents.bytes_read
    assert total >= 4 * (seq_len - 200)


def test_shards_of_several_devices_of_a_process_are_read_once():
    store = make_store(count=40, median=3000)
    stream = StoreSource(store, BYTES)
    shard = held(1, 4096, (1, 8), 0, 1)
    batch, _ = ShardedLoader(stream, 1, 4096, 'striped', 8, held=shard + shard)._make()
    assert stream.documents.bytes_read <= 4 * 4097 and batch['tokens'][shard[3]].shape == (1, 512)
    assert batch['tokens'][np.array([[0]]), slice(0, 512)].shape == (1, 1, 512)
    assert batch['loss_mask'].dtype == np.float32 and batch['tokens'].dtype == np.int32


def test_ids_that_the_model_does_not_have_are_refused():
    store = MemoryStore([np.r_[np.arange(200), 300]])
    loader = ShardedLoader(StoreSource(store, BYTES), 1, 256)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"token 201 of document 0 \('.*'\) of the store "
                           r'\(with its bos\) has id 300, which is not in 0\.\.257'):
            loader.next()


@pytest.mark.parametrize('kind', ['recall', 'copy', 'forms'])
def test_synthetic_rows_are_those_of_their_modules_over_text_of_the_store(kind):
    """The same random numbers over the tokens themselves give the same rows."""
    from lct.data.synthetic import over_store, recall
    from lct.data.synthetic.forms import documents as forms
    from lct.data.synthetic.forms.passages import PassageEncoder

    store = make_store(count=20, median=500)
    if kind == 'forms':  # no line ends, near which statements are placed: references do not show them
        store = MemoryStore([ids % 200 + 20 for ids in store.documents])
    encoder = PassageEncoder(BYTES)
    documents, recall_vocabulary = StoreDocuments(store, BYTES.bos_id), recall.RecallVocabulary(BYTES)
    spans = [(d, 1, int(store.lengths[d]) + 1) for d in np.flatnonzero(store.lengths > 20).tolist()]
    haystack = np.concatenate([store.documents[d] for d, _, _ in spans])
    vocab_ids = np.arange(256)
    for seed in range(20):
        one, two = np.random.default_rng(seed), np.random.default_rng(seed)
        if kind == 'recall':
            row = over_store.recall(one, recall_vocabulary, spans, 900)
            expected = recall.recall_documents(two, recall_vocabulary, haystack, 900)
        elif kind == 'forms':
            row = over_store.forms(one, encoder, spans, 900)
            expected = forms.form_documents(two, encoder, haystack, 900)
        else:
            row = over_store.copy(one, spans, 900, vocab_ids, documents.bos)
            expected = [recall.copy_row(two, haystack, 899, vocab_ids=vocab_ids)]
        expected = packing.pack([packing.segment(*pair, BYTES.bos_id) for pair in expected], 900)
        for name, values in read(row, documents, [(0, 900)]).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_long_rows_are_one_stretch_of_one_document():
    store = MemoryStore([np.arange(n) % 200 for n in (30, 90, 40, 64)])
    stream, starts = StoreSource(store, BYTES, {'long': 1}), set()
    for _ in range(200):
        row = read(stream.next_sequence(65), stream.documents, [(0, 65)])
        assert row['tokens'][0] == BYTES.bos_id and (row['segment_ids'] == 1).all()
        np.testing.assert_array_equal(row['positions'], np.arange(65))
        assert (np.diff(row['tokens'][1:]) == 1).all()
        np.testing.assert_array_equal(row['targets'][:-1], row['tokens'][1:])
        np.testing.assert_array_equal(row['loss_mask'], np.arange(65) < 64)
        starts.add(int(row['tokens'][1]))
    assert starts == set(range(27))  # every stretch of the two documents that are long enough
    with pytest.raises(ValueError, match="kind 'long' needs documents of seq_len 92 tokens"):
        stream.next_sequence(92)


@pytest.mark.parametrize('mesh', [(1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2)])
def test_the_loop_places_what_the_loader_read(mesh):
    import jax

    from lct import sharding
    from lct.train import placement
    from lct.train.stages import Stage

    stage = Stage('x', 128, 1, batch_size=2, accumulation=2, mesh=mesh)
    reference = StoreSource(make_store(), BYTES)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        source = StoreSource(make_store(), BYTES)
        loader = source.loader(4, 128, 'zigzag', mesh[2], 258, placement.held_rows(stage))
        batch, _ = loader.next()
        placed = jax.device_get(placement.place_batch(batch, stage))
        loader.close()
    rows = [read(reference.next_sequence(128), reference.documents, [(0, 128)]) for _ in range(4)]
    for name, values in placed.items():
        expected = np.stack([row[name] for row in rows])[:, permutation('zigzag', 128, mesh[2])]
        np.testing.assert_array_equal(values, expected.reshape(2, 2, 128))
        assert values.dtype == expected.dtype
