"""The runner gives the answers of plain generation, and an interrupted file ends like any other."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from lct import sharding
from lct.data import chat_template, tokenizer
from lct.data.corpus.documents import Document
from lct.eval import answers, loglikelihood, runner, samples, suites
from lct.eval.suites.suite import teacher_forced_scores
from lct.eval.tasks.material import ChatOverhead, Material
from lct.models import decode, llama
from lct.models.session import Session
from lct.ops import rope

CONFIG = llama.LlamaConfig(
    vocab_size=258, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8,
    max_position_embeddings=256, rope=rope.RopeConfig(theta=1000.0),
)
NEW = 5
LINE = 'Line {} of the text holds {} words, or so it says.'
TEXT = [Document('a', '\n'.join(LINE.format(i, i * 7) for i in range(500)))]


@pytest.fixture(scope='module')
def model():
    params = jax.tree.map(np.asarray, llama.init(CONFIG, jax.random.key(1)))
    return runner.Model(params, CONFIG, tokenizer.BytesTokenizer(), batch_tokens=512)


def item(index, length=100, group=None, one_line=False):
    text = f'{"x" * (11 if group is None else 40)} {index}'
    make = lambda: samples.Sample('copy', length, index, text, ' =', [str(index)], NEW, {'index': index})
    return runner.Item('copy', length, index, make, group, one_line)


ITEMS = [item(0), item(1), item(2, 200), *[item(i, group=i // 3) for i in range(3, 8)]]


def expected(model, one):
    ids = model.prompt_ids(one.make())
    new = decode.generate(model.params, CONFIG, [ids], NEW)[0].tolist()
    return model.tokenizer.decode(new[:new.index(257)] if 257 in new else new)


@pytest.mark.parametrize('degrees', [None, (2, 1, 4, 1)])
def test_answers_are_those_of_generation(model, tmp_path, degrees):
    texts = [expected(model, one) for one in ITEMS]
    with contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees)):
        rows, problems = runner.run(model, ITEMS, tmp_path / 'a.jsonl')
    assert [row['text'] for row in rows] == texts and problems == []
    assert [row['index'] for row in rows] == list(range(8))


def test_right_answers_are_forced_where_they_are_wanted(model, tmp_path):
    items = [dataclasses.replace(one, teacher_forced=one.index > 3) for one in ITEMS]
    rows, _ = runner.run(model, items, tmp_path / 'a.jsonl')
    for one, row in zip(items, rows, strict=True):
        assert ('forced' in row) == one.teacher_forced
        if one.teacher_forced:
            sample = one.make()
            context, answer = model.prompt_ids(sample), model.tokenizer.encode(f' {sample.outputs[0]}')
            assert model.answer_ids(sample, sample.answer) == answer
            ((nats, greedy),) = loglikelihood.score(model, [(context, answer)])
            assert row['forced'] == {'nats': pytest.approx(nats, rel=1e-4), 'tokens': 2, 'greedy': greedy}
    assert teacher_forced_scores(rows) is None
    mean = teacher_forced_scores(rows[4:])
    assert mean['nats'] == pytest.approx(-sum(row['forced']['nats'] for row in rows[4:]) / 8)


def test_the_most_likely_of_the_choices_is_chosen(model, tmp_path):
    labels = 'ab a b abc ba'.split()
    choices = [[], labels, labels[3:], labels[::-1][:4], [], labels[1:2]]

    def chosen_of(i):
        made = item(i, group=i // 4).make()
        return dataclasses.replace(made, meta={'choices': choices[i]})

    items = [dataclasses.replace(item(i, group=i // 4), make=lambda i=i: chosen_of(i))
             for i in range(len(choices))]
    rows, _ = runner.run(model, items, tmp_path / 'a.jsonl')
    for one, row, names in zip(items, rows, choices, strict=True):
        context = model.prompt_ids(one.make())
        nats = [nats for nats, _ in loglikelihood.score(
            model, [(context, model.tokenizer.encode(f' {name}\n')) for name in names])] if names else []
        assert row.get('chosen') == (names[int(np.argmax(nats))] if names else None)
    assert [row['text'] for row in rows] == [expected(model, one) for one in items]
    assert len({row.get('chosen') for row in rows}) > 2


class Killed(Exception):
    pass


def stop_after(count):
    def progress(done, total, seconds):
        assert seconds >= 0
        if done >= count:
            raise Killed
    return progress


def test_an_interrupted_file_ends_the_same(model, tmp_path, monkeypatch):
    straight, broken = tmp_path / 'straight.jsonl', tmp_path / 'broken.jsonl'
    runner.run(model, ITEMS, straight)
    made = []
    make_row = answers.make_row
    monkeypatch.setattr(
        answers, 'make_row', lambda sample, *rest: made.append(sample.index) or make_row(sample, *rest))
    for count in (1, 3):
        with pytest.raises(Killed):
            runner.run(model, ITEMS, broken, stop_after(count))
    assert runner.run(model, ITEMS, broken)[1] == []
    assert broken.read_bytes() == straight.read_bytes()
    assert sorted(made) == list(range(8))  # none twice
    runner.run(model, ITEMS, broken)
    assert len(made) == 8 and broken.read_bytes() == straight.read_bytes()


def test_a_corrupt_line_is_reported_and_its_sample_made_again(model, tmp_path):
    path = tmp_path / 'a.jsonl'
    runner.run(model, ITEMS, path)
    good = path.read_bytes()
    lines = good.splitlines()
    fields = json.loads(lines[5])
    del fields['text']
    lines = [lines[0][:20], *lines[1:5], json.dumps(fields).encode(), *lines[6:]]
    path.write_bytes(b'\n'.join(lines) + b'\n{"ta')
    problems = runner.run(model, ITEMS, path)[1]
    assert [problem.split(' line ')[1].split(' ')[0] for problem in problems] == ['1', '9', '6']
    assert 'has no text' in problems[2] and path.read_bytes() == good


def test_an_edited_line_or_one_of_another_evaluation_is_made_again(model, tmp_path):
    path, item_0, item_1 = tmp_path / 'a.jsonl', ITEMS[0], ITEMS[1]
    runner.run(model, [item_0, item_1], path, identity='mine')
    good = path.read_bytes()
    first, second = good.splitlines()
    edited = json.dumps({**json.loads(first), 'text': '0'}).encode()
    renamed = json.dumps({**json.loads(second), 'index': 0}).encode()
    bare = json.dumps({name: x for name, x in json.loads(first).items() if name != 'checksum'}).encode()
    for lines, number in (([edited, second], 1), ([renamed, second], 1), ([bare, second], 1),
                          ([first, second.replace(b'"index": 1', b'"index": 2')], 2)):
        path.write_bytes(b'\n'.join(lines) + b'\n')
        rows, problems = runner.run(model, [item_0, item_1], path, identity='mine')
        assert [f'line {number} was edited, or belongs to another' in x for x in problems] == [True]
        assert path.read_bytes() == good and [row['index'] for row in rows] == [0, 1]
    assert len(answers.read(path, 'other')[1]) == 2
    assert len(answers.read(path, 'mine')[0]) == 2
    path.write_bytes(bare + b'\n')
    assert 'holds 1 answers without checksums' in answers.read(path, 'mine')[1][0]


def test_a_folder_that_vanishes_is_said(model, tmp_path):
    path = tmp_path / 'gone' / 'a.jsonl'
    path.parent.mkdir()
    batches = [ITEMS[0], ITEMS[2]]  # of different lengths

    def vanish(done, total, seconds):
        path.unlink(missing_ok=True)
        path.parent.rmdir()

    with pytest.raises(ValueError, match='a.jsonl vanished while answers were written to it; the'):
        runner.run(model, batches, path, vanish)
    assert not path.parent.exists()


def test_a_batch_is_of_one_task(model):
    items = [runner.Item(task, 100, i, None) for i in range(5) for task in ('short', 'long')]
    batches = [[(one.task, one.index) for one in batch.items] for batch in runner.make_batches(model, items)]
    # Two rows of 256 slots make a batch.
    assert batches[:2] == [[('long', 0), ('long', 1)], [('short', 0), ('short', 1)]]
    assert sorted(key for batch in batches for key in batch) == sorted((one.task, one.index) for one in items)


def test_a_smaller_run_keeps_the_answers_of_a_larger_one(model, tmp_path):
    path = tmp_path / 'a.jsonl'
    runner.run(model, ITEMS, path)
    good = path.read_bytes()
    assert len(runner.run(model, ITEMS[:2], path)[0]) == 2 and path.read_bytes() == good


def test_a_one_line_answer_ends_with_its_line(model):
    assert np.flatnonzero(model.stop_mask(one_line=True)).tolist() == [10, 257]
    assert np.flatnonzero(model.stop_mask(one_line=False)).tolist() == [257]


def test_a_template_frames_the_prompt(model):
    template = chat_template.ChatTemplate("{% for m in messages %}<{{ m.content }}>{% endfor %}"
                                 "{% if add_generation_prompt %}!{% endif %}")
    framed = runner.Model(model.params, CONFIG, model.tokenizer, template)
    assert framed.tokenizer.decode(framed.prompt_ids(ITEMS[0].make())) == f'<{"x" * 11} 0>! ='
    assert framed.overhead() == 2  # three characters, and no BOS
    assert framed.overhead_before() == 0  # one, and no BOS


def test_straddling_needles_lie_on_two_devices(model):
    template = chat_template.ChatTemplate("{% for m in messages %}<user>{{ m.content }}{% endfor %}"
                                 "{% if add_generation_prompt %}</user>!{% endif %}")
    framed = runner.Model(model.params, CONFIG, model.tokenizer, template)
    overhead = ChatOverhead(framed.overhead(), framed.overhead_before())
    material = Material(model.tokenizer, TEXT, overhead=overhead)
    with jax.set_mesh(sharding.make_mesh((1, 1, 8, 1))):
        plan = suites.Plan(material, (3000,), {3000: 10}, ('straddling',))
        share = runner.cache_slots(3000) // 8
        for one in suites.SUITES['adversarial'].items(plan):
            sample = one.make()
            begin, end = sample.meta['span']
            line = framed.tokenizer.decode(framed.prompt_ids(sample)[begin:end])
            assert line.startswith('One number') and line.endswith(f'is {sample.outputs[0]}.\n')
            assert begin // share < sample.meta['boundary'] // share == (end - 1) // share
    assert suites.SUITES['adversarial'].layout == 'contiguous'


def test_bad_input(model, tmp_path):
    with pytest.raises(ValueError, match='length 300 is more than the 256 positions of the model; use'):
        runner.run(model, [item(0, 300)], tmp_path / 'a.jsonl')
    with pytest.raises(ValueError, match="the tokenizer has 258 ids but the model has vocab_size 64; use"):
        runner.Model(model.params, llama.LlamaConfig(64, 16, 32, 2, 2, 2, 8), model.tokenizer)
    long = samples.Sample('copy', 100, 0, 'x' * 300, '', [''], NEW, {})
    with pytest.raises(ValueError, match='copy 0 takes 301 tokens and 5 for its answer, more than the 256'):
        runner.run(model, [runner.Item('copy', 100, 0, lambda: long)], tmp_path / 'b.jsonl')


def branch(index):
    """Prompts of two groups that go apart at odd tokens, two of them only before their last one."""
    place = (1, 37, 95, 150, 150, 37, 2)[index]
    text = 'x' * place + f'{index} ' + 'y' * (150 - place)
    make = lambda: samples.Sample('branch', 200, index, text, ' =', [str(index)], NEW, {'index': index})
    return runner.Item('branch', 200, index, make, f'group {index // 5}', teacher_forced=True)


@pytest.mark.parametrize('degrees, layout', [(None, 'striped'), ((2, 1, 2, 1), 'zigzag')])
def test_what_prompts_begin_with_is_read_once(model, tmp_path, monkeypatch, degrees, layout):
    monkeypatch.setattr(runner, 'SHARED_CHUNK', 16)
    kept, read, update = [], Session.read, Session.update
    monkeypatch.setattr(Session, 'read', lambda *args: kept.append([]) or read(*args))
    monkeypatch.setattr(Session, 'update', lambda *args: kept[-1].append(update(*args)))
    items = list(map(branch, range(7)))
    texts = [expected(model, one) for one in items]
    plain = dataclasses.replace(model, layout=layout)
    with contextlib.nullcontext() if degrees is None else jax.set_mesh(sharding.make_mesh(degrees)):
        alone, _ = runner.run(plain, [dataclasses.replace(one, group=None) for one in items],
                              tmp_path / 'alone.jsonl')
        kept.clear()
        rows, _ = runner.run(plain, items, tmp_path / 'a.jsonl')
        lines = (tmp_path / 'a.jsonl').read_bytes().splitlines(keepends=True)
        (tmp_path / 'b.jsonl').write_bytes(b''.join(lines[1:4] + lines[5:]))  # interrupted within a batch
        runner.run(plain, items, tmp_path / 'b.jsonl')
    assert [row['text'] for row in rows] == texts == [row['text'] for row in alone]
    for row, other in zip(rows, alone, strict=True):
        assert row['forced'] == {**other['forced'], 'nats': pytest.approx(other['forced']['nats'], rel=1e-4)}
    assert kept[0] == [[151, 3], [96, 155], [38, 155], [2, 155]]
    assert (tmp_path / 'b.jsonl').read_bytes() == (tmp_path / 'a.jsonl').read_bytes()


def test_a_text_is_split_where_replicas_would_wait(model):
    items = list(map(branch, range(5)))
    groups = lambda replicas: [[one.index for one in group] for group in runner._make_groups(items, replicas)]
    assert groups(1) == [[0, 1, 2, 3, 4]] and groups(2) == [[0, 2, 4], [1, 3]]
    assert groups(8) == [[0], [1], [2], [3], [4]]
