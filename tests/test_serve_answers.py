"""The answers of the server's model are those of plain generation, whatever it has read before."""

import contextlib
import shutil

import jax
import numpy as np
import pytest

from lct import sharding
from lct.data import chat_template, tokenizer
from lct.eval import runner
from lct.models import decode, llama
from lct.ops import rope
from lct.serve import answering, kept_texts
from lct.serve.answering import Limits, ModelAnswerer
from lct.serve.errors import ApiError
from lct.serve.jobs import Cancelled, Job
from lct.serve.requests import parse
from lct.serve.responses import End
from lct.weights.disk_texts import DiskTexts

CONFIG = llama.LlamaConfig(
    vocab_size=258, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_position_embeddings=256, rope=rope.RopeConfig(theta=1000.0),
)
TEMPLATE = ('{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}'
            '{% if add_generation_prompt %}<assistant>{% endif %}')
NEW = 6
LONG = 'A line of text that is read once, and then asked about for the rest of the day.\n'


@pytest.fixture(scope='module')
def model():
    params = jax.tree.map(np.asarray, llama.init(CONFIG, jax.random.key(1)))
    return runner.Model(params, CONFIG, tokenizer.BytesTokenizer(), chat_template.ChatTemplate(TEMPLATE))


def job(**fields):
    return Job(parse({'max_tokens': NEW, 'temperature': 0, **fields}, 'messages' in fields, 'm'), None)


def answered(answerer, **fields):
    """-> (text, End) of a request, and its tokens where log-probabilities are asked for."""
    *texts, end = answerer.answer(job(**fields))
    assert isinstance(end, End)
    return ''.join(one.text for one in texts), end, [token for one in texts for token in one.tokens]


def generated(model, prompt):
    return greedy(model, [256, *prompt.encode()])


def greedy(model, ids):
    # With slots for all positions, one program serves all prompts.
    tokens = decode.generate(model.params, CONFIG, [ids], NEW, indices=np.arange(256))[0].tolist()
    return model.tokenizer.decode(tokens[:tokens.index(257)] if 257 in tokens else tokens)


@pytest.mark.parametrize('degrees', [None, (2, 1, 2, 2)])
def test_texts_that_were_read_are_continued(model, degrees):
    with contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees)):
        answerer = ModelAnswerer(model, Limits(256, prefill_chunk=32))
        for prompt, reused in ((LONG, 0), (LONG, 81), (LONG + 'What?', 81), (LONG + 'Who?', 83),
                               ('Another', 0), (LONG[:40] + 'XY', 41)):
            text, end, _ = answered(answerer, prompt=prompt)
            assert text == generated(model, prompt)
            assert (end.prompt, end.reused) == (len(prompt) + 1, reused)


def test_an_answer_is_part_of_the_text_that_the_next_turn_continues(model):
    answerer = ModelAnswerer(model, Limits(256))
    text, end, _ = answered(answerer, prompt=LONG)
    _, following, _ = answered(answerer, prompt=LONG + text.encode().decode() + ' More?')
    kept = len(LONG) + end.answered  # the BOS too, and without the last token, which was never read
    assert following.reused in range(len(LONG) + 1, kept + 1)


def test_a_chat_is_rendered(model):
    answerer = ModelAnswerer(model, Limits(256))
    messages = [{'role': 'user', 'content': 'What is read once?'}]
    text, _, _ = answered(answerer, messages=messages)
    assert text == greedy(model, list(b'<user>What is read once?\n<assistant>'))


def test_log_probabilities_are_those_of_a_forward(model):
    answerer = ModelAnswerer(model, Limits(256))
    ids = [256, *LONG.encode()]
    new = decode.generate(model.params, CONFIG, [ids], NEW)[0].tolist()
    logits = llama.logits(model.params, CONFIG, np.array([[*ids, *new]]))[0, len(ids) - 1:-1]
    expected = np.asarray(jax.nn.log_softmax(logits, -1))
    _, _, tokens = answered(answerer, prompt=LONG, logprobs=3)
    np.testing.assert_allclose([one.logprob for one in tokens], expected.max(-1), atol=1e-5)
    for one, row in zip(tokens, expected, strict=True):
        top = list(one.top.values())
        assert top[0] == one.logprob and len(top) <= 3  # several bytes have the same text
        assert all(np.abs(value - np.sort(row)[-3:]).min() < 1e-5 for value in top)


def test_a_seed_gives_the_same_sample(model):
    answerer = ModelAnswerer(model, Limits(256))
    texts = [answered(answerer, prompt=LONG, temperature=1.5, top_p=0.9, seed=seed)[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    unseeded = {answered(answerer, prompt=LONG, temperature=1.9)[0] for _ in range(3)}
    assert len(unseeded) > 1


def test_another_temperature_needs_no_other_program(model):
    from lct.models import session
    answerer = ModelAnswerer(model, Limits(256))
    answered(answerer, prompt=LONG, temperature=0.5, top_p=0.5)
    size = session._next_token._cache_size()
    for temperature, top_p in ((0.6, 0.7), (1, 1)):
        answered(answerer, prompt=LONG, temperature=temperature, top_p=top_p)
    assert session._next_token._cache_size() == size


def test_prompts_of_all_lengths_share_few_programs(model):
    from lct.models import session
    answerer = ModelAnswerer(model, Limits(256))
    session._extend.clear_cache()
    for length in (1, 9, 23, 37, 40, 41, 60, 61):
        answered(answerer, prompt=chr(65 + length) * length, max_tokens=1)
    assert session._extend._cache_size() == 2  # chunks of 32 and of 64 tokens


def test_a_stop_string_ends_an_answer(model):
    answerer = ModelAnswerer(model, Limits(256))
    whole, end, _ = answered(answerer, prompt=LONG)
    assert end.reason == 'length' and end.answered == NEW
    text, end, _ = answered(answerer, prompt=LONG, stop=[whole[-1]])
    assert text == whole[:whole.index(whole[-1])] and end.reason == 'stop'


@pytest.mark.parametrize('when', [0, 2, 3, 6])  # checks: before reading, after chunks of 32, between tokens
def test_a_cancelled_request_leaves_what_it_read(model, when):
    answerer = ModelAnswerer(model, Limits(256, prefill_chunk=32))
    one, checks = job(prompt=LONG), iter(range(100))

    def check():
        if next(checks) == when:
            raise Cancelled

    one.check = check
    with pytest.raises(Cancelled):
        list(answerer.answer(one))
    text, end, _ = answered(answerer, prompt=LONG)
    assert text == generated(model, LONG)
    assert end.reused == (0, None, 64, 80, None, None, 81)[when]


def test_a_long_text_is_not_overwritten_by_one_that_begins_alike(model, monkeypatch):
    monkeypatch.setattr(kept_texts, 'MAX_DROPPED', 20)
    answerer = ModelAnswerer(model, Limits(256))
    other = LONG[:40] + 'and something else'
    for prompt, reused in ((LONG, 0), (other, 41), (LONG, 81), (other, 59)):
        text, end, _ = answered(answerer, prompt=prompt)
        assert text == generated(model, prompt) and end.reused == reused
    assert sorted(one['tokens'] for one in answerer.texts.listing) == [59, 81]


def test_a_text_that_outgrows_its_cache_moves_to_a_larger_one(model):
    answerer = ModelAnswerer(model, Limits(512))
    assert answered(answerer, prompt=LONG)[0] == generated(model, LONG)
    text, end, _ = answered(answerer, prompt=LONG + 'What?', max_tokens=200)
    assert text.startswith(generated(model, LONG + 'What?')) and end.reused == 81
    assert [one['slots'] for one in answerer.texts.listing] == [512]


def test_kept_texts_are_bounded(model):
    answerer = ModelAnswerer(model, Limits(256))
    answered(answerer, prompt='first ' * 9)
    size = answerer.texts.listing[0]['bytes']
    answerer = ModelAnswerer(model, Limits(256, cache_bytes=2 * size))
    for name in ('first', 'second', 'third', 'first'):
        assert answered(answerer, prompt=f'{name} ' * 9)[1].reused == 0
        assert sum(one['bytes'] for one in answerer.texts.listing) <= 2 * size
    assert len(answerer.texts.listing) == 2


def on_disk(folder, name='m', prune=lambda folder: None):
    return lambda probe: DiskTexts(folder, probe, {'name': name}, {}, prune)


def test_a_server_that_starts_again_continues_what_it_has_read(model, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_texts, 'MAX_DROPPED', 20)
    texts = [LONG * 2, LONG + 'Another text with the same beginning, and its own end: ' + 'x' * 40]
    first = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    for prompt in texts:
        answered(first, prompt=prompt)
    assert first.idle() and first.idle() and not first.idle()
    assert [one['place'] for one in first.texts.listing] == ['memory and disk'] * 2
    again = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    assert [one['place'] for one in again.texts.listing] == ['disk'] * 2
    for prompt in texts:
        text, end, _ = answered(again, prompt=prompt)
        assert text == generated(model, prompt) and end.reused == len(prompt)  # all but the last token
    assert not again.idle()  # nothing new to write
    other = ModelAnswerer(model, Limits(256), on_disk(tmp_path, name='another model'))
    assert other.texts.listing == [] and answered(other, prompt=texts[0])[1].reused == 0


def test_texts_leave_the_memory_for_the_disk_and_the_disk_in_the_end(model, tmp_path):
    pruned = []

    def prune(new):
        pruned.extend(old for old in tmp_path.iterdir() if old != new)
        for old in pruned:
            shutil.rmtree(old, ignore_errors=True)

    answerer = ModelAnswerer(model, Limits(256, cache_bytes=1), on_disk(tmp_path))
    for prompt in (LONG * 2, 'B' * 200):
        answered(answerer, prompt=prompt)
    assert [one['place'] for one in answerer.texts.listing] == ['disk'] * 2
    assert answered(answerer, prompt='B' * 200)[1].reused == 200
    answerer = ModelAnswerer(model, Limits(256, cache_bytes=1), on_disk(tmp_path, prune=prune))
    answered(answerer, prompt='C' * 200)
    assert len(pruned) == 2 and [one['tokens'] for one in answerer.texts.listing] == [201]


def test_saving_ends_where_the_disk_keeps_one_text_or_two_texts_come_from_one(model, tmp_path):
    def prune(new):
        for old in new.parent.iterdir():
            if old != new:
                shutil.rmtree(old)

    answerer = ModelAnswerer(model, Limits(512), on_disk(tmp_path / 'one', prune=prune))
    for prompt in ('A' * 200, 'B' * 200):
        answered(answerer, prompt=prompt)
    assert answerer.idle() and answerer.idle() and not answerer.idle()
    answerer.close()
    answerer = ModelAnswerer(model, Limits(512), on_disk(tmp_path / 'two'))
    first, second = ('C' * 100 + x * 150 for x in 'XY')
    answered(answerer, prompt=first)
    while answerer.idle():
        pass
    for prompt in (second, first):  # the second takes over the first's folder, the first is on disk
        answered(answerer, prompt=prompt)
    assert sum(answerer.idle() for _ in range(9)) <= 2
    folders = [one.folder for one in answerer.texts._texts]
    assert len(folders) == len({*folders}) == 2


def test_sessions_of_others_are_continued_but_not_overwritten(model, tmp_path):
    first = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    answered(first, prompt=LONG * 2)
    first.close()
    (own,) = tmp_path.iterdir()
    own.rename(tmp_path / 'mine')
    again = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    assert answered(again, prompt=LONG * 2 + 'D' * 80, max_tokens=1)[1].reused == 2 * len(LONG) + 1
    again.close()
    assert sorted(one['tokens'] for one in ModelAnswerer(
        model, Limits(256), on_disk(tmp_path)).texts.listing) == [2 * len(LONG) + 1, 2 * len(LONG) + 81]


def test_a_damaged_text_is_read_anew(model, tmp_path, capsys):
    first = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    answered(first, prompt=LONG * 2)
    first.close()
    again = ModelAnswerer(model, Limits(256), on_disk(tmp_path))
    for path in tmp_path.glob('*/*.safetensors'):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    text, end, _ = answered(again, prompt=LONG * 2)
    assert text == generated(model, LONG * 2) and end.reused == 0


def test_a_failure_of_the_device_costs_the_text_alone(model, monkeypatch):
    answerer = ModelAnswerer(model, Limits(512))
    answered(answerer, prompt=LONG)

    def fail(*args):
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

    with monkeypatch.context() as patch:
        patch.setattr(answering, '_top', fail)
        with pytest.raises(ApiError, match='out of memory; ask again'):
            answered(answerer, prompt=LONG, logprobs=1)
    answered(answerer, prompt=LONG)
    with monkeypatch.context() as patch:
        patch.setattr(kept_texts, 'copy_text', fail)
        with pytest.raises(ApiError, match='out of memory; ask again'):
            answered(answerer, prompt=LONG, max_tokens=200)  # which needs a larger cache
    assert answerer.texts.listing == []
    text, end, _ = answered(answerer, prompt=LONG)
    assert text == generated(model, LONG) and end.reused == 0


@pytest.mark.parametrize(('fields', 'code', 'message'), [
    ({'prompt': LONG * 4}, 'context_length_exceeded', 'the prompt takes 321 and the answer up to 6; send'),
    ({'prompt': LONG, 'max_tokens': 176}, 'context_length_exceeded', 'maximum context length of 256 tokens'),
    ({'prompt': [256, 258]}, None, 'prompt has the token id 258, which is not in 0..257'),
])
def test_what_does_not_fit_is_refused(model, fields, code, message):
    answerer = ModelAnswerer(model, Limits(256))
    with pytest.raises(ApiError, match=message) as raised:
        answered(answerer, **fields)
    assert raised.value.status == 400 and raised.value.code == code
    assert answerer.texts.listing == []


def test_a_model_without_a_template_cannot_chat(model):
    plain = runner.Model(model.params, CONFIG, model.tokenizer)
    with pytest.raises(ApiError, match='no chat template; use /v1/completions'):
        answered(ModelAnswerer(plain, Limits(256)), messages=[{'role': 'user', 'content': 'hi'}])
    hostile = chat_template.ChatTemplate("{{ raise_exception('only once') }}")
    with pytest.raises(ApiError, match='messages cannot be rendered: .*only once'):
        refusing = runner.Model(model.params, CONFIG, model.tokenizer, hostile)
        answered(ModelAnswerer(refusing, Limits(256)), messages=[{'role': 'user', 'content': 'hi'}])
