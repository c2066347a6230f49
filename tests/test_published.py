"""Files of published benchmarks: what is read, cut and scored."""

import dataclasses
import json
import re
import types

import pytest

from lct.data import tokenizer as tokenizers
from lct.eval import runner
from lct.eval.published import babilong, infinitebench, longbench_v2, metrics
from lct.eval.published.question import Question
from lct.eval.suites import SUITES, Plan
from lct.models import llama

CHOICES = {f'choice_{letter}': f'It is {letter}.' for letter in 'ABCD'}
QUESTION = {'_id': '1', 'domain': 'Single-Document QA', 'sub_domain': 'Novel', 'difficulty': 'hard',
            'length': 'short', 'question': 'Which is it?', **CHOICES, 'answer': 'C',
            'context': 'First' + ' word' * 300 + ' last'}


@pytest.fixture(scope='module')
def model():
    config = llama.LlamaConfig(vocab_size=512, embed_dim=8, mlp_dim=8, num_layers=1, num_heads=1,
                               num_kv_heads=1, head_dim=8, max_position_embeddings=2048)
    return runner.Model(None, config, tokenizers.load('bytes'))


def planned(suite, folder, model, *lengths, count=9, tasks=None):
    material = types.SimpleNamespace(counter=types.SimpleNamespace(tokenizer=model.tokenizer))
    plan = Plan(material, lengths, dict.fromkeys(lengths, count), tasks)
    return SUITES[suite].with_data(plan, folder, model)


def answered(suite, plan, text):
    """Rows of all items, each answered with text(sample)."""
    return [{'task': one.task, 'length': one.length, 'index': one.index, 'text': text(one),
             'outputs': list(one.outputs), 'meta': one.meta}
            for one in (item.make() for item in SUITES[suite].items(plan))]


@pytest.mark.parametrize('suffix', ['json', 'jsonl', 'parquet'])
def test_longbench_v2_is_read_cut_and_scored(tmp_path, model, suffix):
    rows = [QUESTION, {**QUESTION, 'context': 'short', 'answer': 'A', 'length': 'long'}]
    path = tmp_path / f'data.{suffix}'
    if suffix == 'parquet':
        arrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        parquet.write_table(arrow.Table.from_pylist(rows), path)
        bad = 0
    else:
        wrong = [{**QUESTION, 'answer': 'E'}, {'context': 'x'}, 5]
        bad = len(wrong)
        lines = [json.dumps(row) for row in rows + wrong]
        path.write_text('\n'.join(lines) if suffix == 'jsonl' else f'[{",".join(lines)}]')
    plan, paths, problems = planned('longbench_v2', tmp_path, model, 600, 2000)
    assert paths == [path] and len(problems) == bad and all(f'data.{suffix} ' in one for one in problems)
    suite, (long, short) = SUITES['longbench_v2'], [
        item.make() for item in SUITES['longbench_v2'].items(plan)][:2]
    assert (long.meta['cut'], short.meta['cut']) == (True, False)
    assert 590 <= long.meta['tokens'] == len(model.prompt_ids(long)) + 128 <= 600
    # Both ends are kept: of the instruction, and of the choices.
    assert long.prompt.startswith(longbench_v2.HEAD) and '(D) It is D.' in long.prompt
    body = long.prompt[len(longbench_v2.HEAD):long.prompt.index('\n</text>')]
    assert body.startswith('First word') and body.endswith('word last')
    result = suite.scores(plan, answered('longbench_v2', plan, lambda one: 'The correct answer is (C).'))
    assert result['tasks']['single_document_qa'][600]['mean'] == 50
    groups = {name: records[600]['mean'] for name, records in result['groups'].items()}
    assert groups == {'overall': 50, 'hard': 50, 'short': 100, 'long': 0}
    assert suite.sentences(json.loads(json.dumps(result)))[:2] == [
        'by chance 25%', '1 of 4 texts lost their middle to fit into their length']
    assert list(suite.check(model, plan)) == []
    problems = list(suite.check(model, planned('longbench_v2', tmp_path, model, 200)[0]))
    assert len(problems) == 2 and 'without its text, too many for length 200' in problems[1]


def test_a_text_without_room_for_half_a_character_is_left_out(model):
    question = Question('', '', 10 * 'head', '\u20ac' * 50, 'tail', '', ['A'], 8, 'stated_letter')
    length = question.sample(model, 100, 0, '').meta['tokens'] + 2
    sample = question.fitted(model, length, 0)
    assert sample.prompt == 10 * 'head' + 'tail' and sample.meta['cut'] and sample.meta['tokens'] <= length


def test_babilong_takes_the_files_of_the_lengths(tmp_path, model):
    row = {'input': 'Mary went to the garden. Long ago.', 'question': 'Where is Mary? ', 'target': 'garden'}
    other = {'input': 'Is it?', 'question': 'How many objects?', 'target': 'two'}
    for name, rows in (('data/qa1/1k.json', [row, {'input': 'x'}]), ('0k/qa1-00000.jsonl', [row] * 3),
                       ('qa7/1k-0.jsonl', [other, {**other, 'target': 'none'}])):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(rows) if name.endswith('json') else
                                     ''.join(json.dumps(one) + '\n' for one in rows))
    plan, paths, problems = planned('babilong', tmp_path, model, 512, 1024, count=2)
    assert len(paths) == 3 and len(problems) == 1
    assert "1k.json entry 2 has no text in 'question', 'target'" in problems[0]
    rows = answered('babilong', plan, lambda one: f' {one.outputs[0]} of the {one.meta["answers"][0]}')
    assert [row['length'] for row in rows] == [512, 512, 1024, 1024, 1024]
    tasks = SUITES['babilong'].scores(plan, rows)['tasks']
    # Another possible answer beside the right one, the bathroom, or none beside two, is wrong.
    assert tasks['qa1'][512]['mean'] == 0 and tasks['qa7'][1024]['mean'] == 50
    assert rows[0]['meta']['cut'] is False
    assert SUITES['babilong'].sentences(SUITES['babilong'].scores(plan, rows))[0] == (
        'by chance 16.7% on qa1; 50% on qa7')
    with pytest.raises(ValueError, match="length 3000 is not one of BABILong's files"):
        planned('babilong', tmp_path, model, 3000)
    (tmp_path / 'qa2').mkdir()
    (tmp_path / 'qa2' / '1k-0.jsonl').write_text(json.dumps({**row, 'input': 'x' * 3000}) + '\n')
    plan, *_ = planned('babilong', tmp_path, model, 1024)
    problem, = SUITES['babilong'].check(model, plan)
    assert re.search('1k-0.jsonl line 1 takes 3... tokens .* than the 2048 positions', problem)
    problem, = SUITES['babilong'].check(model, dataclasses.replace(plan, tasks=('qa9',)))
    assert 'no questions of qa9 at lengths 1024' in problem


INFINITE = {
    'passkey': (['71432'], [], ' 71432.', ' 7143'),
    'number_string': (['0099'], [], 'is 0099', '99'),
    'kv_retrieval': (['ab-1'], [], '"ab-1"}', 'ab-11'),
    'longbook_sum_eng': (['The end.\nOf it'], [], 'the END\nof it', 'nothing'),
    'longbook_choice_eng': (['two'], ['one', 'two', 'three', 'four'], 'The answer is B', 'C'),
    'longbook_qa_eng': (['The cat'], [], 'a cat', 'dog'),
    'longbook_qa_chn': (['北京市'], [], '“北京市”。', '上海'),
    'longdialogue_qa_eng': (['JOHN'], [], 'John.', 'Mary'),
    'math_find': ([12.5], [], 'It is 12.5', '12'),
    'math_calc': ([3, 5, 6], [], '[3, 5, 6]', '[4, 5, 6]'),
    'code_run': ([-7], [], 'The value is: -7', '7'),
    'code_debug': (['f2'], ['f1', 'f2', 'f3', 'f4'], 'B. f2', 'f2'),
}


def test_every_task_of_infinitebench_is_read_and_scored(tmp_path, model):
    assert set(INFINITE) == set(infinitebench.TASKS)
    for task, (answer, options, _, _) in INFINITE.items():
        row = {'id': 0, 'context': f'{task} {{text}} ' * 200, 'input': 'What?', 'answer': answer,
               'options': options}
        (tmp_path / f'{task}.jsonl').write_text(json.dumps(row) + '\nnot JSON\n')
    plan, paths, problems = planned('infinitebench', tmp_path, model, 1024)
    assert len(paths) == len(problems) == 12 and all('line 2 is not valid JSON' in one for one in problems)
    for i, wanted in ((2, 100), (3, 0)):
        rows = answered('infinitebench', plan, lambda one, i=i: INFINITE[one.task][i])
        tasks = SUITES['infinitebench'].scores(plan, rows)['tasks']
        means = {task: records[1024]['mean'] for task, records in tasks.items()}
        assert means == dict.fromkeys(INFINITE, wanted)
    assert tasks['code_debug'][1024]['chance'] == 25 and tasks['passkey'][1024]['chance'] == 0
    with pytest.raises(ValueError, match='has no file of InfiniteBench; give the folder of its TASK.jsonl'):
        planned('infinitebench', tmp_path / 'none', model, 1024)


@pytest.mark.parametrize('function, text, outputs, wanted', [
    ('stated_letter', '**The correct answer is (B)**', ['B'], 1),
    ('stated_letter', 'The answer is (B)', ['B'], 0),
    ('choice', 'I think that option is D', ['D'], 1), ('choice', 'So A it is', ['A'], 1),
    ('choice', 'answer:', ['A'], 0), ('option', 'My answer is: f2', ['B', 'f2'], 1),
    ('option', 'Surely B', ['B', 'f2'], 0), ('first_number', '12.5', ['12'], 0),
    ('leading_numbers', '1, 2, 9, 4', ['1', '2', '3', '4'], 0.5), ('last_integer', '', ['1'], 0),
    ('f1_characters', '北京', ['北京市'], 0.8),
    # From the package rouge_score 0.1.2: rougeLsum of three lines beside two.
    ('rouge_lsum', 'a b c\nd x\nb', ['a c d\nb e'], 8 / 11),
])
def test_metrics_at_their_edges(function, text, outputs, wanted):
    assert metrics.METRICS[function](text, outputs) == pytest.approx(wanted)


def test_babilong_answers():
    places = babilong.PLACES
    question = 'Where was the milk before the kitchen?'
    assert metrics.only_answer('In the hallway, not the kitchen. Or office', 'hallway', question, places) == 1
    assert metrics.only_answer('hallway or office', 'hallway', question, places) == 0
    things = ('apple', 'milk', 'nothing')
    assert metrics.only_answer('Apple and milk', 'milk,apple', 'What?', things) == 1
    assert metrics.only_answer('milk', 'milk,apple', 'What?', things) == 0
    way = lambda text, target: metrics.only_answer(text, target, 'How?', ('e,n', 'e,s', 's,e', 's,s'))
    assert way('s,e', 's,e') == 1
    assert way('e,s', 's,e') == way('seen', 's,e') == way('s', 's,s') == 0


def test_a_long_text_is_counted_once_and_questions_about_it_share_it(tmp_path, model, monkeypatch):
    (tmp_path / 'qa1').mkdir()
    rows = [{'input': 'A word. ' * 90 + end, 'question': 'Where is it?', 'target': 'garden'} for end in 'ab']
    (tmp_path / 'qa1' / '1k.json').write_text(json.dumps(rows))
    plan, *_ = planned('babilong', tmp_path, model, 1024)
    encode, long = model.tokenizer.encode, []
    monkeypatch.setattr(model.tokenizer, 'encode',
                        lambda text: (len(text) > 700 and long.append(text)) or encode(text))
    suite = SUITES['babilong']
    assert [*suite.check(model, plan)] == [] and len(long) == 2
    items = suite.items(plan)
    for item in items:
        sample = item.make()
        assert item.tokens == sample.meta['tokens'] == len(model.prompt_ids(sample)) + sample.max_new_tokens
    assert len(long) == 4  # and once for the model
    (tmp_path / 'data.json').write_text(json.dumps([QUESTION, {**QUESTION, 'context': 'x'}, QUESTION]))
    plan, *_ = planned('longbench_v2', tmp_path, model, 2000, 8192)
    groups = [item.group for item in SUITES['longbench_v2'].items(plan)]
    assert groups[:3] == [None] * 3 and groups[3] == groups[5] != groups[4]
