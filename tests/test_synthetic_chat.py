import numpy as np
import pytest
from tiny_store import BYTES, MemoryStore

from lct.data.batches.sharded_loader import read
from lct.data.batches.store_documents import StoreDocuments
from lct.data.batches.store_source import StoreSource
from lct.data.chat_template import ChatTemplate
from lct.data.synthetic import chat as chats
from lct.data.synthetic.recall import is_held_out

TEMPLATE = ChatTemplate(
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}</s>{% endfor %}",
    {'bos_token': '<b>'})


def make(count=30, seed=0):
    """StoreDocuments of letters, whose only digits are statements of facts."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(97, 123, n) for n in rng.integers(3000, 9000, count)]
    return StoreSource(MemoryStore(documents), BYTES, {'chat': 1}, seed=seed)


def texts(row, documents, seq_len):
    """The whole row as (arrays, text)."""
    found = read(row, documents, [(0, seq_len)])
    return found, bytes(i for i in found['tokens'].tolist() if i < 256).decode()


def answers(found):
    """[(text of the answer, its weights)] of a row: the targets with a weight, in runs."""
    places = np.flatnonzero(found['loss_mask'])
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [(bytes(found['targets'][run].astype(np.uint8).tolist()).decode(), found['loss_mask'][run])
            for run in runs]


@pytest.mark.parametrize('seq_len', [1500, 20_000, 60_000])
def test_answers_are_in_the_text_and_only_they_have_weight(seq_len):
    stream, kinds = make(), set()
    for _ in range(20):
        row = stream.next_sequence(seq_len)
        found, text = texts(row, stream.documents, seq_len)
        assert (row.stop - row.start).sum() == seq_len and (found['segment_ids'] == 1).all()
        np.testing.assert_array_equal(found['positions'], np.arange(seq_len))
        np.testing.assert_array_equal(found['targets'][:-1], found['tokens'][1:])
        context, *turns = text.split('\n\nQuestion:\n')
        assert len(turns) == len(answers(found))
        for question, (answer, _) in zip(turns, answers(found), strict=True):
            question, shown = question.rstrip('\n').split('\nAnswer:\n')
            assert answer.rstrip('\n') == shown
            if question.startswith('What is the secret code of the '):
                key = question.removeprefix('What is the secret code of the ').removesuffix('?')
                assert f'\nThe secret code: {key} {shown}.\n' in context
                assert not is_held_out(key) and not is_held_out(shown)
                kinds.add('fact')
            else:
                passage = question.removeprefix(chats.CONTINUE)
                assert len(passage) == len(shown) == 24 and passage + shown in context
                kinds.add('passage')
    assert kinds == {'fact', 'passage'}


def test_answers_have_equal_weight_and_a_chat_the_weight_of_a_sequence_of_text():
    stream = make()
    for seq_len in (3000, 30_000):
        found, _ = texts(stream.next_sequence(seq_len), stream.documents, seq_len)
        sums = [weights.sum() for _, weights in answers(found)]
        np.testing.assert_allclose(sums, seq_len / len(sums), rtol=1e-5)
    np.testing.assert_allclose(chats.answer_weights([2, 8], 100), [25, 6.25])


def test_evidence_is_all_over_the_text_and_numbers_vary():
    stream, depths, counts = make(), [], []
    for _ in range(60):
        row = stream.next_sequence(20_000)
        _, text = texts(row, stream.documents, 20_000)
        context, *turns = text.split('\n\nQuestion:\n')
        counts.append(len(turns))
        depths += [at / len(context) for at in range(len(context)) if context.startswith('\nThe secret', at)]
    np.testing.assert_allclose(np.quantile(depths, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.07)
    assert min(counts) == 1 and max(counts) > 15


def test_a_chat_is_planned_without_reading_and_is_the_same_again():
    a, b = make(), make()
    for _ in range(5):
        one, two = a.next_sequence(5000), b.next_sequence(5000)
        for x, y in zip(one, two, strict=True):
            np.testing.assert_array_equal(x, y)
    assert a.documents.bytes_read == 0
    runs = [(0, 700), (900, 2500), (4800, 5000)]
    whole, ranges = (read(one, a.documents, r) for r in ([(0, 5000)], runs))
    for name, values in ranges.items():
        np.testing.assert_array_equal(values, np.concatenate([whole[name][i:j] for i, j in runs]))


def test_a_chat_template_delimits_the_contents():
    delimiters = chats.delimiters(BYTES, TEMPLATE)
    shown = [bytes(ids).decode() for ids in delimiters]
    assert shown == ['<b><user>\n', '\n\n', '</s><assistant>\n', '</s><user>\n', '</s>']
    plain = chats.delimiters(BYTES)
    assert plain.opening == [256] and bytes(plain.answer).decode() == '\nAnswer:\n'
    with pytest.raises(ValueError, match='does not keep the messages in their order'):
        chats.delimiters(BYTES, ChatTemplate('{{ messages[0].content }}'))
    with pytest.raises(ValueError, match='opens the second answer differently'):
        chats.delimiters(BYTES, ChatTemplate('{% for m in messages %}{{ loop.index if loop.index > 2 }}:{{ '
                                        'm.content }}{% endfor %}'))


def test_sequences_too_short_for_a_chat_are_refused():
    with pytest.raises(ValueError, match='seq_len 100 does not hold a chat with one question'):
        make().next_sequence(100)
    short = StoreSource(MemoryStore([[1] * 20] * 5), BYTES, {'chat': 1})
    with pytest.raises(ValueError, match='chats and recall need documents of 48 tokens or more'):
        short.next_sequence(5000)
    assert StoreDocuments(MemoryStore([[1]]), None).num_bos == 0
