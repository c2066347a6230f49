"""What a session answers is what plain generation over the whole text answers, on every mesh."""

import dataclasses
import gc

import jax
import numpy as np
import pytest
from test_decode import CONFIG, MEMORY, SEQ_LEN, forward, host_params, on, placed_params

from lct import sharding
from lct.data import layout
from lct.models import decode, row_linear, sampling
from lct.models.session import Session
from lct.plan import hlo

TEXTS = [list(range(1, 40)), list(range(20, 31))]
QUESTIONS = [[[5, 6, 7], [9, 8, 7, 6, 5]], [[1], [2, 3]]]  # two rounds, a question for each text
NEW = 4


def logits_after(row):
    return forward((tuple(row),))[0, len(row) - 1]


def greedy(row):
    row = list(row)
    for _ in range(NEW):
        row.append(int(logits_after(row).argmax()))
    return row[-NEW:]


@pytest.mark.parametrize('degrees', [None, (1, 1, 8, 1), (2, 1, 4, 1), (1, 1, 4, 2)])
@pytest.mark.parametrize('prefill_chunk', [None, 16])
def test_questions_about_one_text_are_answered_as_if_each_were_alone(degrees, prefill_chunk):
    with on(degrees):
        indices = layout.permutation('striped', SEQ_LEN, sharding.axis_size('sequence'))
        session = Session(placed_params(), CONFIG, 2, SEQ_LEN, indices, MEMORY)
        session.read(TEXTS, prefill_chunk)
        np.testing.assert_allclose(session.logits, [logits_after(text) for text in TEXTS], atol=1e-5)
        for questions in QUESTIONS:
            answers = session.ask(questions, [NEW, NEW - 1], NEW)
            expected = [greedy(text + question) for text, question in zip(TEXTS, questions, strict=True)]
            assert answers == [expected[0], expected[1][:NEW - 1]]
        assert session.ask([[], []], [NEW] * 2, NEW) == [greedy(text) for text in TEXTS]


@pytest.mark.parametrize('degrees', [(1, 1, 4, 2), (1, 2, 4, 1)])
def test_a_chunk_is_read_alike_by_weights_that_are_gathered_and_by_weights_that_stay(degrees, monkeypatch):
    with on(degrees):
        logits = []
        for longest in (row_linear.STATIONARY_CHUNK, 0):
            monkeypatch.setattr(row_linear, 'STATIONARY_CHUNK', longest)
            assert row_linear.is_stationary(16) == bool(longest)
            session = Session(placed_params(), CONFIG, 2, SEQ_LEN, memory=MEMORY)
            session.read(TEXTS, 16)
            logits.append(session.logits)
    np.testing.assert_allclose(*logits, atol=1e-5)
    np.testing.assert_allclose(logits[0], [logits_after(text) for text in TEXTS], atol=1e-5)


def test_an_answer_ends_before_the_token_that_stops_it():
    expected = greedy(TEXTS[0])
    stop = np.zeros(CONFIG.vocab_size, bool)
    stop[expected[2]] = True
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read(TEXTS[:1])
    assert session.ask([[]], [NEW], NEW, stop) == [expected[:expected.index(expected[2])]]


def test_nucleus_sampling_keeps_to_the_most_likely_tokens():
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read(TEXTS[:1])
    certain = sampling.Sampling(top_p=1e-6)
    key = jax.random.key(0)
    assert session.ask([[]], [NEW], NEW, sampling=certain, key=key) == [greedy(TEXTS[0])]
    logits = np.log(np.tile([[0.5, 0.3, 0.15, 0.05]], (4000, 1)))
    tokens = sampling.sample(logits, key, sampling.Sampling(top_p=0.7))
    rounded = sampling.sample(logits[:9], key, sampling.Sampling(top_p=1e-50))
    assert rounded.tolist() == [0] * 9 and sampling.sample(
        logits[:1, ::-1], key, sampling.Sampling(top_p=1e-50)).tolist() == [3]
    share = np.bincount(tokens, minlength=4) / 4000
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)
    with pytest.raises(ValueError, match='temperature 0 must be above 0'):
        sampling.Sampling(temperature=0)
    with pytest.raises(ValueError, match='temperature nan must be above 0'):
        sampling.Sampling(temperature=float('nan'))
    steep = jax.numpy.array([[1.0, 90.0, 89.0]])
    assert sampling.sample(steep, key, sampling.Sampling(temperature=1e-37)).tolist() == [1]


@pytest.mark.parametrize('degrees', [None, (1, 1, 1, 1), (2, 1, 4, 1)])
def test_a_stream_gives_the_tokens_of_an_answer_one_by_one(degrees):
    with on(degrees):
        indices = layout.permutation('striped', SEQ_LEN, sharding.axis_size('sequence'))
        session = Session(placed_params(), CONFIG, 2, SEQ_LEN, indices, MEMORY)
        calls = []
        session.read(TEXTS, 16, lambda *progress: calls.append(progress))
        assert calls == [(16, 39), (32, 39), (39, 39)]
        answers = session.ask(QUESTIONS[0], [NEW] * 2, NEW)
        assert np.stack(list(session.stream(QUESTIONS[0], NEW))).T.tolist() == answers
        stream = session.stream(QUESTIONS[1], SEQ_LEN - 45)
        assert next(stream).shape == (2,)
        stream.close()  # an abandoned answer leaves nothing in the cache
        assert session.ask(QUESTIONS[0], [NEW] * 2, NEW) == answers
        key, nucleus = jax.random.key(3), sampling.Sampling(0.8, 0.9)
        answers = session.ask(QUESTIONS[0], [NEW] * 2, NEW, sampling=nucleus, key=key)
        assert np.stack(list(session.stream(QUESTIONS[0], NEW, nucleus, key))).T.tolist() == answers


@pytest.mark.parametrize('backend, expected', [('cpu', [0, 1, 1]), ('gpu', [0, 1, 2])])
def test_weights_for_decoding_are_made_after_the_first_token_and_kept_on_cpus(monkeypatch, backend, expected):
    copies, count = [], []
    monkeypatch.setattr(row_linear, '_for_decoding',  # without jit, which would keep the other backend's
                        lambda *args: copies.append(1) or row_linear.for_decoding(*args))
    monkeypatch.setattr(row_linear, 'device', lambda: (backend, ''))
    params = host_params().replace()  # no other test has this one
    gc.collect()  # what earlier tests have left
    before, answers = len(row_linear._kept), []
    for _ in range(2):
        session = Session(params, CONFIG, 1, SEQ_LEN, memory=MEMORY)
        session.read(TEXTS[:1])
        next(session.stream(QUESTIONS[0][:1], NEW))
        session.loglikelihood(QUESTIONS[0][:1], [[[3]], [[4]]])
        count.append(len(copies))
        answers.append(list(session.stream(QUESTIONS[0][:1], NEW)))
    assert [*count, len(copies)] == expected and answers[0] == answers[1]
    assert len(row_linear._kept) == before + (backend == 'cpu')
    del params, session
    gc.collect()
    assert len(row_linear._kept) == before


def test_layers_for_decoding_share_the_memory_of_their_stacks_on_one_cpu_device():
    params = jax.tree.map(jax.device_put, host_params())
    params = params.replace(layers=jax.tree.map(lambda x: jax.block_until_ready(x * 1), params.layers))
    stack, layer = params.layers.w_up, row_linear.placed(params, CONFIG).layers[1].w_up
    assert layer.unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + stack.nbytes // CONFIG.num_layers


def test_placing_an_array_compiles_nothing(caplog):
    with jax.log_compiles():
        sharding.put(np.ones((3, 5, 7), np.float32), jax.P())  # a shape of this test
    assert 'compilation' not in caplog.text


def test_a_text_is_cut_and_asked_about_from_there():
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read(TEXTS[:1])
    session.rewind([30])
    assert session.ask([[5, 6]], [NEW], NEW) == [greedy(TEXTS[0][:30] + [5, 6])]


def test_a_new_text_takes_the_place_of_the_old_one():
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read([[3] * (SEQ_LEN - NEW)])
    session.read(TEXTS[:1])
    assert session.ask([[]], [NEW], NEW) == [greedy(TEXTS[0])]
    for texts, prefill_chunk in (([[1] * (SEQ_LEN + 1)], None), (TEXTS[:1], 1), ([[1]] * 3, None)):
        with pytest.raises(ValueError, match='use'):
            session.read(texts, prefill_chunk)
        assert session.ask([[]], [NEW], NEW) == [greedy(TEXTS[0])]  # the cache is unchanged


@pytest.mark.parametrize('prefill_chunk', [None, 48])
def test_a_cache_that_is_full_to_the_last_slot(prefill_chunk):
    full = [*range(1, SEQ_LEN - 2), 5, 6, 7]
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read([full], prefill_chunk)
    np.testing.assert_allclose(session.logits, [logits_after(full)], atol=1e-5)
    session.read([full[:-3]], prefill_chunk)
    assert session.ask([full[-3:]], [1], 1) == [[int(logits_after(full).argmax())]]


@pytest.mark.parametrize('degrees', [None, (1, 1, 4, 2)])
def test_decoding_keeps_to_the_window(degrees):
    config = dataclasses.replace(CONFIG, window=8)
    with on(degrees):
        session = Session(placed_params(), config, 2, SEQ_LEN, memory=MEMORY)
        whole = [text + answer for text, answer in zip(TEXTS, [[7, 9, 8, 3]] * 2, strict=True)]
        session.read(whole)
        after = np.asarray(session.logits)
        session.read([text[:-1] for text in whole])
        tokens = session.ask([text[-1:] for text in whole], [1, 1], 1)
        assert tokens == after.argmax(-1)[:, None].tolist()
        nats = []
        for texts, answers in ((TEXTS, [[7, 9, 8, 3]] * 2), (TEXTS, [[7, 9, 8]] * 2)):
            session.read(texts)
            nats.append([value for value, _ in session.loglikelihood([[], []], [answers])[0]])
        session.read([text[:-1] for text in whole])
        last = [value for value, _ in session.loglikelihood([[], []], [[[3], [3]]])[0]]
        np.testing.assert_allclose(np.subtract(*nats), last, atol=1e-5)


def test_an_abandoned_stream_disturbs_nothing():
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    session.read(TEXTS[:1])
    abandoned = session.stream([[6]], 9)
    next(abandoned)
    assert session.ask([[]], [NEW], NEW) == [greedy(TEXTS[0])]
    abandoned = session.stream([[6]], 9)
    next(abandoned)
    session.read(TEXTS[1:])
    stream = session.stream([[6]], NEW)
    assert [token for (token,) in stream] == greedy([*TEXTS[1], 6])
    assert session.ask([[]], [NEW], NEW) == [greedy(TEXTS[1])]


def test_errors_name_the_remedy():
    session = Session(host_params(), CONFIG, 1, SEQ_LEN, memory=MEMORY)
    with pytest.raises(ValueError, match='use fewer, or a longer cache'):
        session.read([[1] * (SEQ_LEN + 1)])
    with pytest.raises(ValueError, match='prefill chunk 3 is not a multiple of 2; use 2'):
        session.read([[1]], prefill_chunk=3)
    session.read(TEXTS[:1])
    with pytest.raises(ValueError, match='use fewer, or a longer cache'):
        session.ask([[1]], [SEQ_LEN], SEQ_LEN)
    refusal = 'limits of up to 2 new tokens are more than max_new_tokens 1; raise it'
    with pytest.raises(ValueError, match=refusal):
        session.ask([[1]], [2], 1)
    with pytest.raises(ValueError, match='text 0 is empty; give it a token at least'):
        session.read([[]])
    with pytest.raises(ValueError, match='token id 64'):
        session.ask([[64]], [1], 1)


def test_a_token_costs_the_network_the_same_whatever_the_context():
    """No weights travel inside the loop over tokens, and no activations but those of one token per row."""
    in_loop = []
    for seq_len in (64, 256):
        with on((1, 1, 8, 1)):
            indices = layout.permutation('striped', seq_len, 8)
            session = Session(placed_params(), CONFIG, 2, seq_len, indices, MEMORY)
            session.read(TEXTS)
            limits, stop = np.array([NEW, NEW], np.int32), np.zeros(CONFIG.vocab_size, bool)
            request = decode.place_request(limits, stop, NEW)
            last = sharding.put(session.lengths - 1, sharding.spec('B'))
            run = jax.jit(decode.decode, static_argnames='config')
            lowered = run.lower(placed_params(), CONFIG, session.cache, session.logits, last, session.slot_of,
                                request, session.tables)
            text = lowered.compile().as_text()
        program = hlo.Program(text)
        transfers = program.transfers({'data': 1, 'fsdp': 1, 'sequence': 8, 'tensor': 1})
        in_loop.append(sorted((x.kind, x.size) for x in transfers if not x.exact))
    assert in_loop[0] == in_loop[1]
    heads = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    gathered = CONFIG.num_layers * heads + CONFIG.embed_dim + CONFIG.vocab_size  # of a row; a device has 1/8
    assert 8 * sum(size for kind, size in in_loop[0] if kind == 'all-gather') == len(TEXTS) * 4 * gathered
    # of a layer: the merge of attention, its largest score first, and the products with wo and w_down
    assert [kind for kind, _ in in_loop[0] if kind != 'all-gather'] == ['all-reduce'] * 4 * CONFIG.num_layers


@pytest.mark.parametrize('degrees', [None, (2, 1, 2, 2)])
def test_the_loglikelihood_of_an_answer_is_the_one_of_a_forward(degrees):
    with on(degrees):
        indices = layout.permutation('striped', SEQ_LEN, sharding.axis_size('sequence'))
        session = Session(placed_params(), CONFIG, 2, SEQ_LEN, indices, MEMORY)
        session.read(TEXTS)
        for questions in ([[], []], QUESTIONS[0]):
            texts = [text + question for text, question in zip(TEXTS, questions, strict=True)]
            alternatives = [[greedy(texts[0]), [7, 7, 7]], [[3], greedy(texts[1])], [[5, 6], [7]]]
            got = session.loglikelihood(questions, alternatives)
            for answers, rows in zip(alternatives, got, strict=True):
                for text, answer, (nats, is_greedy) in zip(texts, answers, rows, strict=True):
                    logits = [logits_after(text + answer[:i]) for i in range(len(answer))]
                    logprobs = [x[token] - np.log(np.exp(x).sum())
                                for x, token in zip(logits, answer, strict=True)]
                    np.testing.assert_allclose(nats, sum(logprobs), rtol=1e-5)
                    assert is_greedy == (answer == greedy(text)[:len(answer)])
        assert session.ask([[], []], [NEW] * 2, NEW) == [greedy(text) for text in TEXTS]
        session.read([[9] * (SEQ_LEN - 1), TEXTS[1]])  # room for an answer of one token beside one of four
        logits = np.asarray(session.logits)
        nats = session.loglikelihood([[], []], [[[1], [7] * 4]])[0][0][0]
        np.testing.assert_allclose(nats, logits[0, 1] - np.log(np.exp(logits[0]).sum()), rtol=1e-5)
        assert session.ask([[], []], [1, 1], 1) == logits.argmax(-1)[:, None].tolist()
