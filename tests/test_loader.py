import json
import threading

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.batches.loader import Loader, StopRequested, check_ids
from lct.data.batches.memory_source import MemorySource
from lct.data.layout import inverse, permutation

TOKENIZER = tokenizers.load('bytes')


def make_source(documents=None):
    rng = np.random.default_rng(0)
    documents = documents or [rng.integers(0, 256, rng.integers(1, 900)) for _ in range(20)]
    return MemorySource(documents, TOKENIZER, {'text': 0.6, 'recall': 0.2, 'copy': 0.2}, seed=1)


def assert_same(a, b):
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize('layout', ['contiguous', 'zigzag', 'striped'])
def test_batches_are_the_rows_of_the_source_in_order(layout):
    reference, indices = make_source(), permutation(layout, 256, 4)
    with Loader(make_source(), 3, 256, layout, 4) as loader:
        for _ in range(12):
            batch, state = loader.next()
            rows = [reference.next_row(256) for _ in range(3)]
            for name, array in batch.items():
                assert array.shape == (3, 256) and array.flags.c_contiguous
                expected = np.stack([row[name] for row in rows])
                np.testing.assert_array_equal(array[:, inverse(indices)], expected)
            assert state == reference.state
        assert loader.waited_s > 0


def test_resume_at_every_batch():
    with Loader(make_source(), 2, 128, 'zigzag', 2) as loader:
        first = loader._source.state
        batches, states = zip(*[loader.next() for _ in range(20)], strict=True)
    for k, state in enumerate([first, *states[:-1]]):
        with Loader(make_source(), 2, 128, 'zigzag', 2) as loader:
            loader.restore(json.loads(json.dumps(state)))
            for batch in batches[k:k + 3]:
                assert_same(loader.next()[0], batch)


def test_restore_goes_back_while_the_thread_runs():
    with Loader(make_source(), 2, 128) as loader:
        _, state = loader.next()
        expected = [loader.next()[0] for _ in range(4)]
        loader.restore(state)
        for batch in expected:
            assert_same(loader.next()[0], batch)


def test_close_gives_back_what_nobody_has_seen():
    source, reference = make_source(), make_source()
    for seq_len in (128, 512, 256):  # three stages over one source
        with Loader(source, 2, seq_len) as loader:
            for _ in range(3):
                batch, state = loader.next()
                rows = [reference.next_row(seq_len) for _ in range(2)]
                np.testing.assert_array_equal(batch['tokens'], np.stack([row['tokens'] for row in rows]))
        assert source.state == state == reference.state


def test_errors_of_the_thread_arrive_and_stay():
    loader = Loader(make_source([[1, 2, 3]]), 1, 64)
    for _ in range(2):
        with pytest.raises(ValueError, match='corpus has 4 tokens, fewer than one sequence of seq_len 64'):
            loader.next()


def test_a_bad_token_is_named_before_it_reaches_a_device():
    documents = [np.r_[np.arange(200), 257, np.arange(200)]]  # the model's vocabulary is the smaller one
    loader = Loader(MemorySource(documents, TOKENIZER), 1, 128, vocab_size=257)
    loader.next()
    with pytest.raises(ValueError, match=r'token id 257 in row 0, column 73 is not in 0\.\.256'):
        loader.next()


@pytest.mark.parametrize('bad', [-1, -100, 258, 2**31 - 1])
def test_check_ids(bad):
    ids = np.zeros((2, 5), np.int32)
    check_ids(ids, 258)
    ids[1, 3] = bad
    with pytest.raises(ValueError, match=f'token id {bad} in row 1, column 3'):
        check_ids(ids, 258)


def test_arguments_are_checked_at_once():
    with pytest.raises(ValueError, match='seq_len 100 is not a multiple of'):
        Loader(make_source(), 1, 100, 'zigzag', 8)
    with pytest.raises(ValueError, match='batch_size 0 must be at least 1'):
        Loader(make_source(), 0, 64)


class Unreliable(Loader):
    """A loader whose data cannot be read at some calls, after half a batch was made."""

    RETRY_S, POLL_S, ABANDON_S = (0.01, 0.01, 0.01), 0.01, 0.05

    def __init__(self, *args, bad=(), hangs=None):
        super().__init__(*args)
        self.calls, self.bad, self.hangs, self.lines = 0, bad, hangs, []
        self.warn = self.lines.append

    def _make(self):
        self.calls += 1
        if self.calls in self.bad:
            self._source.next_row(64)
            raise OSError(116, 'Stale file handle')
        if self.calls == self.hangs:
            threading.Event().wait()
        return super()._make()


def test_data_that_come_back_are_read_again_without_a_gap():
    with Loader(make_source(), 2, 64) as steady, Unreliable(make_source(), 2, 64, bad=(2, 3, 5)) as loader:
        for _ in range(6):
            (expected, at), (batch, state) = steady.next(), loader.next()
            assert_same(batch, expected)
            assert state == at
        assert loader.lines == [
            'WARNING: the data cannot be read ([Errno 116] Stale file handle); trying again for 0 s'] * 2


def test_data_that_stay_away_are_an_error_in_a_sentence():
    loader = Unreliable(make_source(), 2, 64, bad=range(2, 9))
    loader.next()
    for _ in range(2):
        with pytest.raises(OSError, match=r'cannot be read \(.*Stale file handle\), also after 0 s'):
            loader.next()
    assert len(loader.lines) == 1


def test_a_wait_ends_when_the_run_is_to_stop_and_never_lasts_for_ever():
    loader, stop_requested = Unreliable(make_source(), 2, 64, hangs=3), []
    loader.stop_requested = stop_requested
    for _ in range(2):
        _, state = loader.next()
    threading.Timer(0.1, stop_requested.append, ('SIGTERM',)).start()
    with pytest.raises(StopRequested):
        loader.next()
    loader.close()  # leaves the thread behind
    assert loader._source.state == state
    with pytest.raises(TimeoutError, match='gave no batch in 0 s'):
        loader = Unreliable(make_source(), 2, 64, hangs=1)
        loader.LIMIT_S = 0.05
        loader.next()
