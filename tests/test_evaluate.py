"""experiments/evaluate.py from end to end on the base model that the project ships."""

import json
import os
import pathlib
import re
import shutil
import types

import evaluate
import pytest
from test_suites import REPORT, check_html

from lct import sharding
from lct.cli import host_memory
from lct.cli import model as model_flags
from lct.data import tokenizer as tokenizers
from lct.data.corpus.documents import Document
from lct.eval import answers, provenance, results_file, runner, samples, suites
from lct.eval.loss import long_context
from lct.eval.suites import SUITES
from lct.eval.tasks import icl, ruler
from lct.eval.tasks.material import ChatOverhead, Material

HERE = pathlib.Path(__file__).parents[1] / 'experiments'


def run(workdir, **changes):
    flags = {
        'model': 'base', 'suite': 'ruler,needle', 'lengths': '512', 'samples': '1',
        'tasks': 'niah_single_1,vt,needle', 'workdir': workdir, 'mesh': '1,1,1,1', 'dtype': None,
        'plain': False,
        'haystack': str(pathlib.Path(__file__).parent / 'golden' / 'page.txt'), 'trained': None, 'seed': 42,
        'batch_tokens': 65536, 'piece': None, 'cache_dtype': None, 'base': None, 'evaluator': None,
        'data': None, 'compare': None, 'session': None, 'session_gb': 1.0, **changes,
    }
    evaluate.evaluate(types.SimpleNamespace(**flags))


def record_batches(monkeypatch):
    """A list to which every batch that is answered will be added."""
    batches, answer = [], runner.answer
    monkeypatch.setattr(
        runner, 'answer', lambda model, batch, rows: batches.append(batch) or answer(model, batch, rows))
    return batches


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('finished')
    run(workdir)
    return workdir


def test_results_are_written(finished):
    report = json.loads((finished / 'results.json').read_text())
    assert report['results']['ruler']['lengths'] == [512] and report['results']['ruler']['count'] == 2
    assert len(report['results']['needle']['scores']) == 11
    forced = report['results']['needle']['forced']
    assert 0 <= forced['right'] <= 1 and forced['nats'] > 0
    about = report['about']
    assert {'weights_sha256', 'tokenizer_sha256', 'template', 'seed', 'mesh', 'versions'} <= set(about)
    lines = (finished / 'results.csv').read_text().splitlines()
    assert lines[0] == 'suite,task,at,score,low,high,count' and len(lines) == 1 + 2 + 11
    page = (finished / 'report.html').read_text()
    assert page.count('<svg') == 3 and 'trained to 512' in page and report['about']['weights_sha256'] in page
    assert 'http' not in page.replace('http://www.w3.org', '')
    prediction = json.loads((finished / 'predictions' / '512' / 'vt.jsonl').read_text().splitlines()[0])
    assert {'index', 'pred', 'input', 'outputs', 'others'} <= set(prediction)


def test_a_killed_run_continues_to_the_same_files(finished, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Progress, '__call__', killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert (tmp_path / 'ruler.jsonl').stat().st_size and not (tmp_path / 'needle.jsonl').exists()
    answered = record_batches(monkeypatch)
    run(tmp_path)
    assert len(answered) == 1  # the needles' batch alone
    for name in ('ruler.jsonl', 'needle.jsonl', 'results.json', 'results.csv', 'report.html'):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize('name, edit, message', [
    ('results.json', lambda text: text.replace('"mean": ', '"mean": 1'), 'suite needle in .* were edited'),
    ('results.json', lambda text: text[:99], 'results.json is not valid JSON'),
    ('results.json', lambda text: '', 'results.json is not valid JSON'),
    ('results.json', lambda text: '[]', 'results.json must hold a JSON object'),
    ('results.json', lambda text: '{"results": 5}', 'results.json lacks results'),
    ('needle.jsonl', lambda text: '', 'needle.jsonl holds 0 of the 11 answers that results.json counts'),
    ('needle.jsonl', lambda text: text[:-9], 'needle.jsonl line 11 is not valid JSON'),
])
def test_damaged_files_are_named_and_measured_again(finished, tmp_path, monkeypatch, capsys, name, edit,
                                                       message):
    workdir = shutil.copytree(finished, tmp_path / 'copy')
    (workdir / name).write_text(edit((workdir / name).read_text()))
    answered = record_batches(monkeypatch)
    run(workdir)
    assert re.search(message, capsys.readouterr().err)
    assert len(answered) == name.startswith('needle')
    for one in ('ruler.jsonl', 'needle.jsonl', 'results.json'):
        assert (workdir / one).read_bytes() == (finished / one).read_bytes()


def test_a_damaged_provenance_is_refused(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / 'copy')
    for text in ('', '{', '[]'):
        (workdir / 'about.json').write_text(text)
        with pytest.raises(ValueError, match='about.json .*, or use another --workdir: without it'):
            run(workdir)


def test_other_suites_run_on_a_mesh_and_share_their_texts(tmp_path, monkeypatch):
    read = record_batches(monkeypatch)
    run(tmp_path, suite='adversarial,icl', tasks='several,latest_4,lookup', samples='4', mesh='1,1,2,1')
    report = json.loads((tmp_path / 'results.json').read_text())['results']
    assert list(report['adversarial']['tasks']) == ['several', 'latest_4']
    assert report['adversarial']['tasks']['several']['512']['count'] == 4
    several = [group for batch in read for group in batch.groups if group[0].task == 'several']
    assert [len(group) for group in several] == [4]  # a text for four questions
    curve = report['icl']['tasks']['lookup']['curve']
    assert list(curve) == [str(2**i) for i in range(len(curve))]
    assert all(x['count'] == 4 for x in curve.values())
    assert {x['interval'] for x in curve.values()} == {None}  # all of one set
    page = (tmp_path / 'report.html').read_text()
    assert 'model, no band for one rule' in page and 'more samples test more rules' in page
    assert re.search(r'^icl,lookup,1,[01.]+,,,4$', (tmp_path / 'results.csv').read_text(), re.MULTILINE)
    by_length = {item.length: group for batch in read for group in batch.groups for item in group
                 if item.task == 'lookup'}
    assert len(by_length) == len(curve) and all(len(group) == 4 for group in by_length.values())
    assert report['icl']['tasks']['lookup']['references']['table'] == dict.fromkeys(curve, 1.0)
    before = len(read)
    run(tmp_path, suite='adversarial,icl', tasks='several,latest_4,lookup', samples='4', mesh='1,1,2,1')
    assert len(read) == before
    assert json.loads((tmp_path / 'results.json').read_text())['results'] == report


def test_shots_are_made_when_they_are_needed():
    tokenizer = tokenizers.load(HERE / 'base')
    document = types.SimpleNamespace(name='', text='A line of text.\n' * 99)
    material = Material(tokenizer, [document], overhead=ChatOverhead(9))
    items_of = lambda count: SUITES['icl'].items(
        suites.Plan(material, (512, 4096), {512: 1, 4096: count}, ('cipher',)))
    icl._shots_text.cache_clear()
    items = items_of(10)
    assert [item.key for item in items_of(6)] == [item.key for item in items if item.index % 10**6 < 6]
    assert icl._shots_text.cache_info().misses == 0
    for item in items[-10:]:
        sample = item.make()
        assert (sample.task, sample.length, sample.index) == item.key
        assert len(tokenizer.encode(sample.text)) + 1 + 9 + sample.max_new_tokens <= sample.length <= 4096
    # Four queries and four and two share their shots, which are made once for them.
    assert [len({item.group for item in items[-10:][i:i + 4]}) for i in (0, 4, 8)] == [1, 1, 1]
    assert len({item.group for item in items[-10:]}) == icl._shots_text.cache_info().misses == 3


def test_losses_of_a_repository_beside_a_base_model(tmp_path):
    (tmp_path / 'repo').mkdir()
    for i in range(9):
        lines = [f'def part_{i}_{j}(value, other=part_{j}):\n    return value + other\n' for j in range(24)]
        (tmp_path / 'repo' / f'{i}.py').write_text('\n'.join(lines))
    run(tmp_path, suite='loss', tasks=None, samples='2', haystack=str(tmp_path / 'repo'), base='base')
    loss = json.loads((tmp_path / 'results.json').read_text())['results']['loss']
    assert loss['short']['difference'] == 0 and loss['short']['num_windows'] == 2  # the same model
    assert loss['documents'] == loss['short']['documents'] == 2 and None not in loss['stderr']
    assert loss['growing']['contexts'] == [64, 128, 256, 480] and loss['long_ppl']['context'] == 128
    counts, means = loss['identifiers']['counts'], loss['identifiers']['mean']
    assert sum(counts) > 50 and min(mean for mean in means if mean) > 0
    assert {'loss', 'identifiers'} == {json.loads(line)['task'] for line in (tmp_path / 'loss.jsonl').open()}
    page = (tmp_path / 'report.html').read_text()
    assert page.count('<svg') == 3 and 'LongPPL' in page and 'the base model' in page


def test_an_evaluator_is_named_and_known_when_it_is_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(long_context, 'ALPHA', 0.1)
    run(tmp_path, suite='loss', tasks=None, evaluator='base')
    report = json.loads((tmp_path / 'results.json').read_text())
    one, about = report['results']['loss']['long_ppl'], report['about']
    assert (one['evaluator'], one['is_model'], one['context']) == ('base', True, 128)
    assert about['evaluator_sha256'] == about['weights_sha256']
    # The same tokens as those that the model chooses by itself.
    row, = map(json.loads, (tmp_path / 'loss.jsonl').open())
    assert (one['key_tokens'], one['nats'] * one['key_tokens']) == (
        row['meta']['key'], pytest.approx(row['meta']['key_loss'])) and one['key_tokens']
    with pytest.raises(ValueError, match='windows of 8 tokens are too short to find key tokens in'):
        run(tmp_path / 'short', suite='loss', tasks=None, lengths='8', evaluator='base')


def test_a_base_model_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, 'weights_hash', lambda folder: '')
    load = tokenizers.load
    monkeypatch.setattr(
        tokenizers, 'load', lambda folder: load('bytes' if str(folder) == str(tmp_path) else folder))
    message = '--base .* has another tokenizer than base, so their losses do not compare'
    with pytest.raises(ValueError, match=message):
        run(tmp_path / 'work', suite='loss', tasks=None, base=str(tmp_path))
    with pytest.raises(ValueError, match=message.replace('base', 'evaluator', 1)):
        run(tmp_path / 'work', suite='loss', tasks=None, evaluator=str(tmp_path))


@pytest.mark.parametrize('changes, message', [
    ({'suite': 'repository', 'tasks': None}, 'the documents hold no Python file; give a repository, such as'),
    ({'suite': 'rulers'},
     "unknown suite 'rulers'; the suites are ruler, needle, adversarial, comprehension, icl, repository, "
     'loss, own'),
    ({'tasks': 'niah_single_9'},
     "unknown task 'niah_single_9'; the tasks of ruler, needle are niah_single_1"),
    ({'suite': 'loss', 'tasks': 'vt'}, 'the suite loss has no tasks such as vt; leave --tasks out'),
    ({'tasks': 'needle'}, 'suite ruler has none of the tasks needle; leave it out'),
    ({'lengths': '1024'}, 'length 1024 is more than the 512 positions of the model; use'),
    ({'lengths': '64'}, 'length 64'),
    ({'lengths': '512,x'}, '--lengths 512,x must be lengths in tokens'),
    ({'samples': '1,2'}, '--samples 1,2 has 2 numbers for 1 lengths'),
    ({'samples': '1000000'}, '--samples 1000000 has a number above 100,000'),
    ({'trained': -1}, '--trained -1 must be a whole number above 0'),
    ({'mesh': '1,1'}, 'must be four degrees'),
])
def test_bad_input_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers.Tokenizer, 'vocab_size', 10**6, raising=False)
    tokenizer = tokenizers.load('bytes')
    tokenizer.vocab_size = 10**6
    monkeypatch.setattr(tokenizers, 'load', lambda folder: tokenizer)
    with pytest.raises(ValueError, match='the tokenizer has 1000000 ids but the model has vocab_size'):
        run(tmp_path)


def test_answers_of_other_models_are_not_mixed(finished):
    message = 'holds answers made with other samples_from, seed .*use another --workdir'
    with pytest.raises(ValueError, match=message):
        run(finished, seed=7)


def test_answers_about_other_documents_are_not_mixed(finished, tmp_path):
    haystack = tmp_path / 'page.txt'
    haystack.write_text('Another text.\n' * 100)
    about = json.loads((finished / 'about.json').read_text())
    about['samples_from']['haystack'] = str(haystack)
    (tmp_path / 'about.json').write_text(json.dumps(about))
    (tmp_path / 'ruler.jsonl').write_bytes((finished / 'ruler.jsonl').read_bytes())
    message = 'holds answers made with other documents_sha256 .*use another --workdir'
    with pytest.raises(ValueError, match=message):
        run(tmp_path, haystack=str(haystack))


def test_data_files_of_ruler_are_answered(tmp_path, capsys):
    tokenizer = tokenizers.load(HERE / 'base')
    material = Material(tokenizer, [Document('page', 'Some line of a page.\n' * 100)])
    made = [material.sample(ruler.task('vt'), 500, i) for i in range(3)]
    lines = [json.dumps(samples.to_ruler(one)) for one in made]
    first = json.loads(lines[0])
    for name in ('task', 'budget', 'max_new_tokens', 'meta'):  # fields that RULER does not have
        del first[name]
    (tmp_path / 'vt').mkdir()
    lines = [json.dumps(first), '{"cut', *lines[1:]]
    (tmp_path / 'vt' / 'validation.jsonl').write_text('\n'.join(lines) + '\n')
    flags = {'suite': 'ruler', 'tasks': None, 'samples': '2', 'data': tmp_path}
    run(tmp_path / 'work', **flags)
    assert 'line 2 is not valid JSON' in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / 'work' / 'ruler.jsonl').open()]
    assert [(row['task'], row['length'], row['index'], row['outputs']) for row in rows] == [
        ('vt', 512, i, made[i].outputs) for i in range(2)]
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert [row['prompt'] for row in rows] == [
        answers.digest(bos + tokenizer.encode(one.text)) for one in made[:2]]
    (tmp_path / 'long' / 'vt').mkdir(parents=True)
    (tmp_path / 'long' / 'vt' / 'validation.jsonl').write_text(
        f"{lines[2]}\n{json.dumps(first | {'input': first['input'] * 2})}\n")
    with pytest.raises(ValueError, match='vt/validation.jsonl line 2 takes 941 tokens .* than the 512 posi'):
        run(tmp_path / 'other', **{**flags, 'data': tmp_path / 'long'})
    message = 'has no TASK/.*.jsonl of the tasks fwe; give the folder that holds theirs'
    with pytest.raises(ValueError, match=message):
        run(tmp_path / 'other', **{**flags, 'tasks': 'fwe'})
    message = 'of one suite; use --suite with one of ruler, own, longbench_v2, .*, not ruler,needle'
    with pytest.raises(ValueError, match=message):
        run(tmp_path / 'other', **{**flags, 'suite': 'ruler,needle'})
    with pytest.raises(ValueError, match='holds samples of one length; give one of --lengths, not 256,512'):
        run(tmp_path / 'other', **{**flags, 'lengths': '512,256'})
    with pytest.raises(ValueError, match='holds answers made with other data'):
        run(tmp_path / 'work', **{**flags, 'data': None, 'tasks': 'vt'})


def test_tasks_of_ones_own_are_folders_of_files(tmp_path):
    for task, metric in (('colours', 'f1'), ('sizes', None)):
        (tmp_path / 'data' / task).mkdir(parents=True)
        line = {'input': f'The {task} are red and tall.', 'outputs': ['red'], 'max_new_tokens': 4,
                'answer_prefix': ' Answer:', **({'metric': metric} if metric else {})}
        (tmp_path / 'data' / task / 'a.jsonl').write_text(f'{json.dumps(line)}\n' * 2)
    flags = {'suite': 'own', 'tasks': None, 'data': tmp_path / 'data', 'samples': '9'}
    run(tmp_path / 'work', **flags)
    result = json.loads((tmp_path / 'work' / 'results.json').read_text())['results']['own']['tasks']
    assert {task: result[task]['512']['count'] for task in result} == {'colours': 2, 'sizes': 2}
    with pytest.raises(ValueError, match='--suite own takes its tasks from files; name their folder'):
        run(tmp_path / 'other', **{**flags, 'data': None})
    path = tmp_path / 'data' / 'sizes' / 'a.jsonl'
    path.write_text(json.dumps({'input': 'x', 'outputs': ['y'], 'metric': 'bleu'}))
    with pytest.raises(ValueError, match="a.jsonl line 1 has the metric 'bleu', which is not one of all, "):
        run(tmp_path / 'other', **flags)


def test_a_refused_call_does_not_bind_its_workdir(tmp_path):
    with pytest.raises(ValueError, match='length 1024 is more than the 512 positions'):
        run(tmp_path, lengths='1024', seed=1)
    with pytest.raises(ValueError, match='length 128 is too small for vt'):
        run(tmp_path, suite='needle,ruler', tasks='needle,vt', lengths='128,512')
    assert not list(tmp_path.iterdir())  # no suite has run
    run(tmp_path, suite='ruler', tasks='vt')
    with pytest.raises(ValueError, match='holds answers made with other samples_from, seed'):
        run(tmp_path, suite='ruler', tasks='vt', seed=1)


def test_calls_of_one_workdir_add_up(tmp_path):
    flags = {'suite': 'ruler,needle', 'tasks': 'niah_single_1,needle'}
    run(tmp_path, lengths='320', **flags)
    run(tmp_path, lengths='512', samples='2', mesh='1,1,2,1', batch_tokens=1024, **flags)
    run(tmp_path, lengths='512', suite='ruler', tasks='vt')
    report = json.loads((tmp_path / 'results.json').read_text())
    ruler_result, needles = report['results']['ruler'], report['results']['needle']
    counts = {task: {length: record['count'] for length, record in records.items()}
              for task, records in ruler_result['tasks'].items()}
    assert counts == {'niah_single_1': {'320': 1, '512': 2}, 'vt': {'512': 1}}
    assert ruler_result['averaged'] == ['niah_single_1'] and ruler_result['lengths'] == [320, 512]
    assert needles['lengths'] == [320, 512] and needles['samples'][0] == [1, 2]
    assert [one['mesh'] for one in report['about']['runs']] == [[1, 1, 1, 1], [1, 1, 2, 1]]
    rows = [json.loads(line) for line in (tmp_path / 'needle.jsonl').open()]
    assert {(row['length'], row['run']) for row in rows} == {(320, 0), (512, 1)}
    assert sum(line.startswith('needle,') for line in (tmp_path / 'results.csv').open()) == 22
    assert (tmp_path / 'predictions' / '320' / 'niah_single_1.jsonl').is_file()


def test_suites_of_one_workdir_share_its_results_and_a_base_may_come_later(tmp_path):
    run(tmp_path, suite='needle', tasks=None)
    with pytest.raises((ValueError, OSError)):
        run(tmp_path, suite='loss', tasks=None, base=str(tmp_path / 'none'))
    run(tmp_path, suite='loss', tasks=None, base='base')
    report = json.loads((tmp_path / 'results.json').read_text())
    assert set(report['results']) == {'needle', 'loss'} and report['about']['base'] == 'base'
    lines = (tmp_path / 'results.csv').read_text().splitlines()
    assert {line.split(',')[0] for line in lines[1:]} == {'needle', 'loss'}


def test_losses_without_their_documents_are_not_kept(tmp_path):
    path, loss = tmp_path / 'results.json', REPORT['results']['loss']
    path.write_text(json.dumps({'samples': {}, 'results': {'icl': {}, 'loss': loss}}))
    assert results_file.earlier(path) == (
        {'samples': {}, 'results': {'icl': {}, 'loss': loss}}, [])
    old = {name: value for name, value in loss.items() if name != 'documents'}
    path.write_text(json.dumps({'samples': {}, 'results': {'icl': {}, 'loss': old}}))
    before, (problem,) = results_file.earlier(path)
    assert before['results'] == {'icl': {}} and 'run the suite loss again' in problem


def test_a_small_python_file_among_texts_leaves_identifiers_out(tmp_path, capsys):
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed' / 'tiny.py').write_text('first = 1\nsecond = first\n')
    page = (pathlib.Path(__file__).parent / 'golden' / 'page.txt').read_text()
    (tmp_path / 'mixed' / 'page.txt').write_text(page)
    run(tmp_path / 'work', suite='loss', tasks=None, samples='1', haystack=str(tmp_path / 'mixed'))
    loss = json.loads((tmp_path / 'work' / 'results.json').read_text())['results']['loss']
    assert loss['num_windows'] == 1 and 'identifiers' not in loss
    assert ('no loss on identifiers: the Python files of the haystack do not fill a window of 512 tokens; '
            'give a larger repository (--haystack) or shorter lengths') in capsys.readouterr().err


def test_the_page_is_sound_html(finished):
    check_html((finished / 'report.html').read_text())


def test_the_default_mesh_is_one_replica_for_each_core(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(5), raising=False)
    with model_flags.mesh_context('auto', 'base'):
        assert model_flags.mesh_degrees() == [5, 1, 1, 1]
    with model_flags.mesh_context('auto'):
        assert model_flags.mesh_degrees() == [1, 1, 4, 1]
    monkeypatch.setattr(host_memory, 'host_memory', lambda: 22e6)  # the base takes 3.5 MB in float32
    with model_flags.mesh_context('auto', 'base'):
        assert model_flags.mesh_degrees() == [3, 1, 1, 1]
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: range(1))
    with model_flags.mesh_context('auto', 'base'):
        assert sharding.current_mesh() is None
