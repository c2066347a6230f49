"""A text that was read once is asked again from disk: on every mesh and layout, as if it had been read there,
and never when it belongs to something else or was altered."""

import dataclasses
import json
import os
import signal

import numpy as np
import pytest
from test_decode import CONFIG, MEMORY, SEQ_LEN, on, placed_params
from test_session import NEW, greedy

from lct import sharding
from lct.cli import sessions as named_sessions
from lct.data import layout
from lct.models import session as sessions
from lct.models.session import Session
from lct.ops.rope import RopeConfig
from lct.weights import saved_session, session_writer
from lct.weights.saved_session import DamagedSession, ForeignSession

MODEL = {'weights': 1}
TEXT = list(range(1, 51))
QUESTION = [5, 6, 7]
BLOCK = 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(session_writer, 'BLOCK', BLOCK)


def new_session(name='striped', rows=1, config=CONFIG, seq_len=SEQ_LEN, memory=MEMORY):
    indices = layout.permutation(name, seq_len, sharding.axis_size('sequence'))
    return Session(placed_params(), config, rows, seq_len, indices, memory)


def saved(folder, text=TEXT):
    """A session that holds the text and is saved in the folder."""
    session = new_session()
    session.read([text], 16)
    session_writer.save(folder, session, MODEL)
    return session


def loaded(folder, length=None, **options):
    """A new session that holds the first tokens of the text in the folder."""
    session = new_session(**options)
    one = saved_session.read(folder, session, MODEL)
    length = len(one.ids) if length is None else length
    saved_session.load(session, [(one, one.verify(length))])
    return session


def contents(session):
    """Keys and values of the text in the order of positions."""
    return [np.asarray(x)[:, 0][:, :, session.slots[:len(TEXT)]] for x in (session.cache.k, session.cache.v)]


def blocks(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith('.safetensors'))


@pytest.fixture(scope='module')
def answer():
    return greedy(TEXT + QUESTION)


@pytest.mark.parametrize(('written', 'read'), [
    (None, (1, 1, 8, 1)), ((1, 1, 8, 1), (1, 1, 2, 2)), ((2, 1, 2, 2), None), ((1, 1, 2, 1), (1, 1, 4, 1))])
def test_a_text_saved_on_one_mesh_is_asked_on_another(tmp_path, answer, written, read):
    with on(written):
        rows = sharding.axis_size('data')
        session = new_session('zigzag', rows)
        session.read([TEXT], 16)
        session_writer.save(tmp_path, session, MODEL)
        expected = contents(session)
    with on(read):
        session = loaded(tmp_path)
        assert session.texts == [TEXT]
        np.testing.assert_array_equal(contents(session), expected)
        assert session.ask([QUESTION], [NEW], NEW) == [answer]
        assert session.update([TEXT], 16) == [len(TEXT) - 1]  # the logits after the text are not saved
        assert session.ask([[]], [NEW], NEW) == [greedy(TEXT)]


def test_a_cache_in_8_bits_is_saved_with_its_scales(tmp_path):
    memory = dataclasses.replace(MEMORY, cache_dtype='int8')
    session = new_session(memory=memory)
    session.read([TEXT], 16)
    session_writer.save(tmp_path, session, MODEL)
    expected = session.ask([QUESTION], [NEW], NEW)
    with on((1, 1, 2, 2)):
        assert loaded(tmp_path, memory=memory).ask([QUESTION], [NEW], NEW) == expected
        with pytest.raises(ForeignSession, match='cache k'):
            loaded(tmp_path)


def test_what_follows_a_change_is_read_again(tmp_path):
    changed = [*TEXT[:37], 60, *TEXT[38:], 4]
    saved(tmp_path)
    before = blocks(tmp_path)
    session = loaded(tmp_path, 37)
    assert session.update([changed], 16) == [37]
    assert session.ask([QUESTION], [NEW], NEW) == [greedy(changed + QUESTION)]
    session_writer.save(tmp_path, session, MODEL)
    after = blocks(tmp_path)
    assert after[:2] == before[:2] and not set(after[2:]) & set(before)  # full blocks before the change stay
    assert loaded(tmp_path).texts == [changed]
    session.read([changed[:20]], 16)
    session_writer.save(tmp_path, session, MODEL)
    assert blocks(tmp_path) == after  # the longer text serves the shorter one


def test_texts_share_what_they_begin_with_in_memory():
    session = new_session(rows=2)
    session.read([TEXT, TEXT[::-1]], 16)
    kept = session.update([TEXT[:20] + QUESTION, TEXT[::-1]], 16)
    assert kept == [20, len(TEXT)]
    expected = [greedy([*TEXT[:20], *QUESTION, 1]), greedy([*TEXT[::-1], 1])]
    assert session.ask([[1], [1]], [NEW] * 2, NEW) == expected
    # The question and the answer before it are in the cache as well.
    session.update([TEXT, TEXT], 16)
    new = [int(tokens[0]) for tokens in session.stream([QUESTION, QUESTION], NEW)]
    chat = [*TEXT, *QUESTION, *new, 3]
    assert session.update([chat, TEXT], 16) == [len(chat) - 2, len(TEXT)]  # the last token was not fed back
    assert session.ask([[], []], [NEW] * 2, NEW) == [greedy(chat), greedy(TEXT)]


@pytest.fixture
def interruptible():
    """Ctrl-C raises, also where the tests were started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_between_a_donation_and_its_result_waits(monkeypatch, interruptible):
    """Ctrl-C arrives while the program runs that takes the cache and gives it back."""
    session = new_session()
    for name in ('_extend', '_step', '_decode'):
        program = getattr(sessions, name)

        def interrupted(*args, program=program):
            result = program(*args)
            os.kill(os.getpid(), signal.SIGINT)
            return result

        monkeypatch.setattr(sessions, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            session.update([TEXT], 16)
            if name == '_step':
                list(session.stream([[]], NEW))
            session.ask([[]], [NEW], NEW)
        monkeypatch.setattr(sessions, name, program)
        if name == '_extend':
            assert session.texts == [TEXT[:16]]
        kept = session.update([TEXT], 16)
        assert kept == [16 if name == '_extend' else len(TEXT)]  # reading continues after an interrupt
        assert session.ask([QUESTION], [NEW], NEW) == [greedy(TEXT + QUESTION)]


def test_a_block_that_was_altered_ends_what_is_used(tmp_path, answer):
    saved(tmp_path)
    path = tmp_path / blocks(tmp_path)[2]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    session = loaded(tmp_path)
    assert session.texts == [TEXT[:2 * BLOCK]]
    assert session.update([TEXT], 16) == [2 * BLOCK]
    assert session.ask([QUESTION], [NEW], NEW) == [answer]
    session_writer.save(tmp_path, session, MODEL)
    assert loaded(tmp_path).texts == [TEXT]  # the altered block was replaced


def test_what_cannot_be_used_is_refused_in_a_sentence(tmp_path):
    assert saved_session.read(tmp_path / 'new', new_session(), MODEL) is None
    saved(tmp_path)
    index = tmp_path / saved_session.INDEX
    content = json.loads(index.read_text())
    other_norm = dataclasses.replace(CONFIG, norm_eps=1e-6)
    other_rope = dataclasses.replace(CONFIG, rope=RopeConfig(theta=5e5))
    for model, config, message in (
            ({'weights': 2}, CONFIG, r'\(model weights 1 instead of 2\)'),
            (MODEL, other_norm, 'config norm_eps the default instead of 1e-06'),
            (MODEL, other_rope, 'theta 10000.0 instead of 500000')):
        with pytest.raises(ForeignSession, match=f'made with another model or setting .*{message}'):
            saved_session.read(tmp_path, new_session(config=config), model)
    for text, message in (
            (json.dumps(content | {'version': 0}), r"it is of .*'lct session', 0.* this release reads"),
            (json.dumps(content | {'blocks': []}), 'another crc32'), ('{', 'not valid JSON')):
        index.write_text(text)
        with pytest.raises(DamagedSession, match=message):
            saved_session.read(tmp_path, new_session(), MODEL)
    index.write_text(json.dumps(content))
    (tmp_path / blocks(tmp_path)[1]).unlink()
    with pytest.raises(DamagedSession, match='is missing or does not have'):
        saved_session.read(tmp_path, new_session(), MODEL)
    session = saved(tmp_path)  # read anew, in the place of what was damaged
    assert loaded(tmp_path).texts == session.texts
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other' / 'thesis.tex').touch()
    with pytest.raises(ForeignSession, match='holds thesis.tex and is not a session; name a new'):
        saved(tmp_path / 'other')


def test_an_unfinished_save_leaves_the_text_before(tmp_path, monkeypatch):
    saved(tmp_path)
    before = blocks(tmp_path)

    def fail(path, ids):
        raise OSError('no space left')

    monkeypatch.setattr(session_writer, '_finish_block', fail)
    with pytest.raises(OSError, match='no space'):
        saved(tmp_path, TEXT[::-1])
    assert blocks(tmp_path) == before and loaded(tmp_path).texts == [TEXT]


def test_sessions_that_others_deleted_free_space_and_those_of_others_stay(tmp_path, monkeypatch, capsys):
    entries = [named_sessions.Entry(name, tmp_path / name, 10, 100, used, 'm')
               for name, used in (('new', 4), ('old', 3), ('gone', 2), ('foreign', 1))]
    (tmp_path / 'foreign').mkdir()

    def delete(name, parent):
        if name in ('gone', 'foreign'):
            raise ValueError(f'there is no session {name!r}')

    monkeypatch.setattr(named_sessions, 'entries', lambda parent: entries)
    monkeypatch.setattr(named_sessions, 'delete', delete)
    assert named_sessions.prune(300) == [] and named_sessions.prune(200) == ['old']
    assert 'gone' not in (text := capsys.readouterr().err) and 'session foreign cannot be deleted' in text
