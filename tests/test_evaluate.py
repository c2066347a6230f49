"""experiments/evaluate.py from end to end on the base model that the project ships."""

import json
import math
import pathlib
import re
import types
from html.parser import HTMLParser
from xml.etree import ElementTree

import evaluate
import pytest

from lct.data import tokenizer
from lct.data.corpus.documents import Document
from lct.eval import answers, runner, samples, suites
from lct.eval.report import html as html_report
from lct.eval.report import svg
from lct.eval.report import tables as report_tables
from lct.eval.suites import SUITES
from lct.eval.tasks import icl, ruler
from lct.eval.tasks.material import ChatOverhead, Material

HERE = pathlib.Path(__file__).parents[1] / 'experiments'




def run(workdir, **changes):
    flags = {
        'model': 'base', 'suite': 'ruler,needle', 'lengths': '512', 'samples': '1', 'tasks': 'niah_single_1,vt,needle',
        'workdir': workdir, 'mesh': '1,1,1,1', 'dtype': None, 'plain': False,
        'haystack': str(pathlib.Path(__file__).parent / 'golden' / 'page.txt'), 'trained': None, 'seed': 42,
        'batch_tokens': 65536, 'piece': None, 'base': None, 'data': None, **changes,
    }
    evaluate.evaluate(types.SimpleNamespace(**flags))


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
    assert {'weights_sha256', 'tokenizer_sha256', 'template', 'seed', 'mesh', 'versions'} <= set(report['about'])
    lines = (finished / 'results.csv').read_text().splitlines()
    assert lines[0] == 'suite,task,at,score,low,high,count' and len(lines) == 1 + 2 + 11
    page = (finished / 'report.html').read_text()
    assert page.count('<svg') == 3 and 'trained to 512' in page and report['about']['weights_sha256'] in page
    assert 'http' not in page.replace('http://www.w3.org', '')
    prediction = json.loads((finished / 'predictions' / '512' / 'vt.jsonl').read_text().splitlines()[0])
    assert {'index', 'pred', 'input', 'outputs', 'others'} <= set(prediction)


def test_killed_and_started_again_it_ends_with_the_same_files(finished, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Progress, '__call__', killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert (tmp_path / 'ruler.jsonl').stat().st_size and not (tmp_path / 'needle.jsonl').exists()
    answered = []
    answer = runner.answer
    monkeypatch.setattr(runner, 'answer', lambda model, batch, rows: answered.append(batch) or answer(model, batch, rows))
    run(tmp_path)
    assert len(answered) == 1  # the needles' batch alone
    for name in ('ruler.jsonl', 'needle.jsonl', 'results.json', 'results.csv', 'report.html'):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_the_other_suites_run_on_a_mesh_and_share_their_texts(tmp_path, monkeypatch):
    read = []
    answer = runner.answer
    monkeypatch.setattr(runner, 'answer', lambda model, batch, rows: read.append(batch) or answer(model, batch, rows))
    run(tmp_path, suite='adversarial,icl', tasks='several,latest_4,lookup', samples='4', mesh='1,1,2,1')
    report = json.loads((tmp_path / 'results.json').read_text())['results']
    assert list(report['adversarial']['tasks']) == ['several', 'latest_4']
    assert report['adversarial']['tasks']['several']['512']['count'] == 4
    several = [group for batch in read for group in batch.groups if group[0].task == 'several']
    assert [len(group) for group in several] == [4]  # a text for four questions
    curve = report['icl']['tasks']['lookup']['curve']
    assert list(curve) == [str(2**i) for i in range(len(curve))] and all(x['count'] == 4 for x in curve.values())
    assert {x['interval'] for x in curve.values()} == {None}  # all of one set
    page = (tmp_path / 'report.html').read_text()
    assert 'model, no band of one rule' in page and 'more samples ask of more rules' in page
    assert re.search(r'^icl,lookup,1,[01.]+,,,4$', (tmp_path / 'results.csv').read_text(), re.MULTILINE)
    by_length = {item.length: group for batch in read for group in batch.groups for item in group if item.task == 'lookup'}
    assert len(by_length) == len(curve) and all(len(group) == 4 for group in by_length.values())
    assert report['icl']['tasks']['lookup']['references']['table'] == dict.fromkeys(curve, 1.0)
    before = len(read)
    run(tmp_path, suite='adversarial,icl', tasks='several,latest_4,lookup', samples='4', mesh='1,1,2,1')
    assert len(read) == before
    assert json.loads((tmp_path / 'results.json').read_text())['results'] == report


def test_shots_are_made_when_their_turn_comes():
    words = tokenizer.load(HERE / 'base')
    document = types.SimpleNamespace(name='', text='A line of text.\n' * 99)
    asked = lambda count: SUITES['icl'].items(suites.Plan(
        Material(words, [document], overhead=ChatOverhead(9)), (512, 4096), {512: 1, 4096: count}, ('cipher',)))
    icl._shots_text.cache_clear()
    items = asked(10)
    assert [item.key for item in asked(6)] == [item.key for item in items if item.index % 10**6 < 6]
    assert icl._shots_text.cache_info().misses == 0
    for item in items[-10:]:
        sample = item.make()
        assert (sample.task, sample.length, sample.index) == item.key
        assert len(words.encode(sample.text)) + 1 + 9 + sample.max_new_tokens <= sample.length <= 4096
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


def test_a_base_model_with_another_tokenizer_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, 'weights_hash', lambda folder: '')
    first = tokenizer.load
    monkeypatch.setattr(tokenizer, 'load', lambda folder: first('bytes' if str(folder) == str(tmp_path) else folder))
    with pytest.raises(ValueError, match='--base .* has another tokenizer than base, so their losses do not compare'):
        run(tmp_path / 'work', suite='loss', tasks=None, base=str(tmp_path))


@pytest.mark.parametrize('changes, message', [
    ({'suite': 'repository', 'tasks': None}, 'the documents hold no Python file; give a repository, such as'),
    ({'suite': 'rulers'}, "unknown suite 'rulers'; the suites are ruler, needle, adversarial, icl, repository, loss"),
    ({'tasks': 'niah_single_9'}, "unknown task 'niah_single_9'; the tasks of ruler, needle are niah_single_1"),
    ({'suite': 'loss', 'tasks': 'vt'}, 'the suite loss has no tasks such as vt; leave --tasks out'),
    ({'tasks': 'needle'}, 'suite ruler has none of the tasks needle; leave it out'),
    ({'lengths': '1024'}, 'length 1024 is more than the 512 positions of the model; use'),
    ({'lengths': '64'}, 'length 64'),
    ({'lengths': '512,x'}, '--lengths 512,x must be whole numbers'),
    ({'samples': '1,2'}, '--samples 1,2 has 2 numbers for 1 lengths'),
    ({'mesh': '1,1'}, 'must be four degrees'),
])
def test_bad_input_is_one_sentence(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **changes)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer.Tokenizer, 'vocab_size', 10**6, raising=False)
    words = tokenizer.load('bytes')
    words.vocab_size = 10**6
    monkeypatch.setattr(tokenizer, 'load', lambda folder: words)
    with pytest.raises(ValueError, match='the tokenizer has 1000000 ids but the model has vocab_size'):
        run(tmp_path)


def test_answers_of_other_models_are_not_mixed(finished):
    with pytest.raises(ValueError, match='holds answers made with other samples_from, seed .*use another --workdir'):
        run(finished, seed=7)


def test_answers_about_other_documents_are_not_mixed(finished, tmp_path):
    haystack = tmp_path / 'page.txt'
    haystack.write_text('Another text.\n' * 100)
    about = json.loads((finished / 'about.json').read_text())
    about['samples_from']['haystack'] = str(haystack)
    (tmp_path / 'about.json').write_text(json.dumps(about))
    (tmp_path / 'ruler.jsonl').write_bytes((finished / 'ruler.jsonl').read_bytes())
    with pytest.raises(ValueError, match='holds answers made with other documents_sha256 .*use another --workdir'):
        run(tmp_path, haystack=str(haystack))


def test_data_files_of_ruler_are_answered(tmp_path, capsys):
    words = tokenizer.load(HERE / 'base')
    material = Material(words, [Document('page', 'Some line of a page.\n' * 100)])
    made = [material.sample(ruler.task('vt'), 500, i) for i in range(3)]
    lines = [json.dumps(samples.to_ruler(one)) for one in made]
    theirs = json.loads(lines[0])
    for name in ('task', 'budget', 'max_new_tokens', 'meta'):  # which are ours
        del theirs[name]
    (tmp_path / 'vt').mkdir()
    (tmp_path / 'vt' / 'validation.jsonl').write_text('\n'.join([json.dumps(theirs), '{"cut', *lines[1:]]) + '\n')
    flags = {'suite': 'ruler', 'tasks': None, 'samples': '2', 'data': tmp_path}
    run(tmp_path / 'work', **flags)
    assert 'line 2 is not valid JSON' in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / 'work' / 'ruler.jsonl').open()]
    assert [(row['task'], row['length'], row['index'], row['outputs']) for row in rows] == [
        ('vt', 512, i, made[i].outputs) for i in range(2)]
    assert [row['prompt'] for row in rows] == [
        answers.digest(([] if words.bos_id is None else [words.bos_id]) + words.encode(one.text)) for one in made[:2]]
    with pytest.raises(ValueError, match='has no TASK/.*.jsonl of RULER.s tasks fwe; give the folder that holds theirs'):
        run(tmp_path / 'other', **{**flags, 'tasks': 'fwe'})
    with pytest.raises(ValueError, match='of RULER of one length; use --suite ruler and one of --lengths, not ruler,needle'):
        run(tmp_path / 'other', **{**flags, 'suite': 'ruler,needle'})
    with pytest.raises(ValueError, match='holds answers made with other data'):
        run(tmp_path / 'work', **{**flags, 'data': None})


def test_a_refused_call_does_not_bind_its_workdir(tmp_path):
    with pytest.raises(ValueError, match='length 1024 is more than the 512 positions'):
        run(tmp_path, lengths='1024', seed=1)
    assert (tmp_path / 'about.json').is_file()
    run(tmp_path, suite='ruler', tasks='vt')
    with pytest.raises(ValueError, match='holds answers made with other samples_from, seed'):
        run(tmp_path, suite='ruler', tasks='vt', seed=1)


def test_suites_of_one_workdir_share_its_results_and_a_base_may_come_later(tmp_path):
    run(tmp_path, suite='needle', tasks=None)
    with pytest.raises((ValueError, OSError)):
        run(tmp_path, suite='loss', tasks=None, base=str(tmp_path / 'none'))
    run(tmp_path, suite='loss', tasks=None, base='base')
    report = json.loads((tmp_path / 'results.json').read_text())
    assert set(report['results']) == {'needle', 'loss'} and report['about']['base'] == 'base'
    assert {line.split(',')[0] for line in (tmp_path / 'results.csv').read_text().splitlines()[1:]} == {'needle', 'loss'}


REPORT = {
    'about': {'model': 'm'}, 'trained': 1024, 'samples': {'1024': 2}, 'results': {
        'adversarial': {'tasks': {'latest': {'1024': {
            'target': 0.5, 'stale': 0.25, 'mixed': 0.25, 'none': 0, 'interval': [0.2, 0.8], 'count': 4}}}},
        'icl': {'tasks': {'parity': {
            'curve': {str(n): {'accuracy': 0.5, 'interval': [0.3, 0.7], 'count': 8, 'gain': None} for n in (1, 2, 4)},
            'chosen': {str(n): {'accuracy': 0.75, 'interval': [0.5, 0.9], 'count': 8, 'gain': 0.25} for n in (1, 2, 4)},
            'references': {'elimination': {'1': 0.5, '2': 0.75, '4': 1.0}}}}},
        'repository': {'tasks': {'defines': {'1024': {'mean': 50.0, 'interval': None, 'count': 4}}}},
        'loss': {
            'edges': [0, 64, 128], 'mean': [3.0, 2.5], 'stderr': [None, None], 'num_windows': 1, 'documents': 1,
            'growing': {'contexts': [64, 112], 'targets': 16, 'mean': [2.75, 2.25], 'stderr': [0.5, None],
                        'effective_context': 112},
            'identifiers': {'edges': [1, 64, 128, 256], 'mean': [1.25, None, 4.5], 'counts': [8, 0, 1000],
                            'stderr': [0.125, None, None], 'bundles': [3, 0, 1]},
            'border': {'edges': [0, 1, 2], 'mean': [2.5, 2.625], 'stderr': [None, None], 'num_windows': 1, 'documents': 1},
            'long_ppl': {'key_tokens': 5, 'of': 128, 'context': 32, 'value': 4.25, 'nats': math.log(4.25), 'stderr': 0.1,
                         'documents': 5},
            'short': {'length': 64, 'extended': 2.5, 'base': 2.25, 'difference': 0.25, 'stderr': 0.125, 'num_windows': 2,
                      'documents': 2},
        },
    },
}


def test_every_suite_has_its_figure_table_and_cells():
    page = html_report.page(REPORT)
    for drawing in re.findall('<svg.*?</svg>', page):
        ElementTree.fromstring(drawing)
    assert page.count('<svg') == 6 and '50 right, 25 misled' in page and 'model chooses' in page
    assert 'since one round of the labels: choosing +25<' in page and 'over bundles of this repository' in page
    assert 'elimination' in page and '3.000' in page
    assert [cell[:2] for cell in report_tables.cells(REPORT)] == [
        ('adversarial', 'latest'), *[('icl', 'parity')] * 3, *[('icl', 'parity_chosen')] * 3, ('repository', 'defines'),
        *[('loss', 'loss')] * 2,
        *[('loss', 'growing')] * 2, *[('loss', 'border')] * 2, *[('loss', 'identifiers')] * 2, ('loss', 'long_ppl'),
        ('loss', 'short')]
    text = report_tables.terminal(REPORT)
    for said in ('50 right, 25 misled', 'parity_chosen', 'all questions are about one text', 'nats per token, the same 16  2.750  2.250', '1,000',
                 'within 1% of the loss with the longest context: 112 tokens', 'on 5 of 128 tokens',
                 'all windows come from one document, so the error of these means is unknown', '(documents: 2)',
                 '2.5000 nats, the base model 2.2500, difference +0.2500 ± 0.1250'):
        assert said in text and said.partition('  ')[0] in page


def test_intervals_of_losses_are_students():
    one = {**REPORT['results']['loss'], 'documents': 4}
    found = {cell[1:3]: cell[3:6] for cell in report_tables.cells({'results': {'loss': one}})}
    # Two-sided 95% points of the published tables, by degrees of freedom.
    t = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
    assert found['growing', 64] == pytest.approx((2.75, 2.75 - t[3] * 0.5, 2.75 + t[3] * 0.5), abs=1e-3)
    assert found['short', 64] == pytest.approx((0.25, 0.25 - t[1] * 0.125, 0.25 + t[1] * 0.125), abs=1e-3)
    assert found['identifiers', 1] == pytest.approx((1.25, 1.25 - t[2] * 0.125, 1.25 + t[2] * 0.125), abs=1e-3)
    assert found['long_ppl', 32] == pytest.approx((4.25, 4.25 * math.exp(-t[4] / 10), 4.25 * math.exp(t[4] / 10)), abs=1e-2)
    assert found['growing', 112] == (2.25, '', '') and found['identifiers', 128] == (4.5, '', '')
    assert 'perplexity 4.25 (95% interval 3.22 to 5.61)' in ' '.join(SUITES['loss'].sentences(one))


def test_intervals_stay_above_what_is_possible():
    loss = {'edges': [0, 64], 'mean': [1.0], 'stderr': [0.5], 'num_windows': 2, 'documents': 2,
            'long_ppl': {'key_tokens': 5, 'of': 128, 'context': 32, 'value': 1.5, 'nats': math.log(1.5), 'stderr': 0.2,
                         'documents': 2},
            'identifiers': {'edges': [1, 64], 'mean': [1.25], 'counts': [8]},  # of an earlier version
            'short': {'length': 64, 'extended': 2.5, 'base': 2.25, 'difference': 0.25, 'stderr': 0.125, 'num_windows': 2,
                      'documents': 2}}
    low = {cell[1]: cell[4] for cell in report_tables.cells({'results': {'loss': loss}})}
    assert low['loss'] == 0 and low['long_ppl'] == 1 and low['short'] < -1 and low['identifiers'] == ''
    assert 'over bundles' not in html_report.page({**REPORT, 'results': {'loss': loss}})


def test_few_documents_are_said():
    said = lambda n: ' '.join(SUITES['loss'].sentences({'documents': n, 'mean': [1.0]}))
    assert 'the windows come from 4 documents: with so few the intervals are wide' in said(4) and said(5) == ''


def test_losses_that_are_no_numbers_are_left_out():
    wrong = {
        'edges': [0, 64, 128], 'mean': [3.0, math.inf], 'stderr': [0.5, math.nan], 'num_windows': 2, 'documents': 2,
        'growing': {'contexts': [64, 112], 'targets': 16, 'mean': [-math.inf, math.nan], 'stderr': [math.nan] * 2,
                    'effective_context': None},
        'identifiers': {'edges': [1, 64, 128], 'mean': [1.25, math.inf], 'counts': [8, 2]},
        'border': {'edges': [0, 1, 2], 'mean': [math.nan, 2.5], 'stderr': [0.5, 0.5], 'num_windows': 2, 'documents': 2},
        'short': {'length': 64, 'extended': math.inf, 'base': 2.25, 'difference': math.inf, 'stderr': math.nan,
                  'num_windows': 2, 'documents': 2},
    }
    report = evaluate.strict({**REPORT, 'results': {'loss': wrong}})
    json.dumps(report, allow_nan=False)
    assert [cell[1:4] for cell in report_tables.cells(report)] == [
        ('loss', 0, 3.0), ('border', 1, 2.5), ('identifiers', 1, 1.25)]
    page, text = html_report.page(report), report_tables.terminal(report)
    assert page.count('<svg') == 2  # the growing context has no point
    for said in ('some losses are NaN or infinite', 'a loss of this or of the base model is NaN or infinite'):
        assert said in page and said in text
    assert 'within 1% of the loss' not in page


def test_losses_without_their_documents_are_not_kept(tmp_path, capsys):
    path, loss = tmp_path / 'results.json', REPORT['results']['loss']
    path.write_text(json.dumps({'samples': {}, 'results': {'icl': {}, 'loss': loss}}))
    assert evaluate.earlier_results(path)['results'] == {'icl': {}, 'loss': loss} and not capsys.readouterr().err
    old = {name: value for name, value in loss.items() if name != 'documents'}
    path.write_text(json.dumps({'samples': {}, 'results': {'icl': {}, 'loss': old}}))
    assert evaluate.earlier_results(path)['results'] == {'icl': {}} and 'run the suite loss again' in capsys.readouterr().err


def test_a_small_python_file_among_texts_leaves_identifiers_out(tmp_path, capsys):
    (tmp_path / 'mixed').mkdir()
    (tmp_path / 'mixed' / 'tiny.py').write_text('first = 1\nsecond = first\n')
    page = (pathlib.Path(__file__).parent / 'golden' / 'page.txt').read_text()
    (tmp_path / 'mixed' / 'page.txt').write_text(page)
    run(tmp_path / 'work', suite='loss', tasks=None, samples='1', haystack=str(tmp_path / 'mixed'))
    loss = json.loads((tmp_path / 'work' / 'results.json').read_text())['results']['loss']
    assert loss['num_windows'] == 1 and 'identifiers' not in loss
    assert ('no loss on identifiers: the Python files of the haystack do not fill a window of 512 tokens; give a larger '
            'repository (--haystack) or shorter lengths') in capsys.readouterr().err


class Balanced(HTMLParser):
    """Every element that is opened is closed, in order."""

    open = ()

    def handle_starttag(self, tag, attrs):
        self.open = (*self.open, tag) if tag != 'meta' else self.open

    def handle_startendtag(self, tag, attrs):
        assert 'svg' in self.open  # HTML itself knows no such tags

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag
        self.open = self.open[:-1]


def test_the_page_is_sound_html(finished):
    for page in (html_report.page(REPORT), (finished / 'report.html').read_text()):
        parser = Balanced()
        parser.feed(page)
        assert parser.open == () and page.startswith('<!doctype html>')


def test_the_colour_scale_is_fixed():
    low, high = (svg.heat_map([1024], ['0%'], [[score]], 1024, '').text for score in (0.0, 1.0))
    assert '#f0496e' in low and '#0cd79f' in high
