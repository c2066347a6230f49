"""experiments/ask.py on the base model of the project: right answers, reported sizes, short errors."""

import argparse
import pathlib
import re
import shutil

import ask
import pytest

from lct.cli import reader
from lct.data import tokenizer as tokenizers
from lct.data.corpus import bundle
from lct.data.corpus.documents import Document
from lct.models import decode
from lct.weights import llama_hf

HERE = pathlib.Path(__file__).parents[1] / 'experiments'



QUESTIONS = ['What does add return?', '0 or 1?']


@pytest.fixture(scope='module')
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp('repo')
    (folder / 'b.py').write_text('def add(left, right):\n    return left + right\n')
    (folder / 'a.py').write_text('def double(value):\n    return add(value, value)')
    (folder / 'notes').mkdir()
    (folder / 'notes' / 'c.md').write_text('Nothing of note.\n')
    return folder


def run(repo, **changes):
    flags = {
        'model': 'base', 'mesh': '1,1,1,1', 'dtype': None, 'cache_dtype': None, 'plain': False,
        'batch_tokens': 65536, 'piece': 32, 'files': [str(repo)], 'question': QUESTIONS, 'length': None,
        'max_new_tokens': 8, 'temperature': 0.0, 'top_p': 1.0, 'stop': [], 'seed': 0, 'session': None,
        'session_gb': 1.0, 'cite': False, **changes}
    return ask.ask(argparse.Namespace(exclude=[], **flags))


@pytest.fixture(scope='module')
def answers(repo):
    return run(repo)


def test_files_stand_under_their_paths_in_order(repo):
    text = bundle.text(bundle.read([str(repo)]))
    assert text.startswith('======== a.py ========\ndef double')
    assert 'value)\n======== b.py ========\ndef add' in text
    assert text.endswith('======== notes/c.md ========\nNothing of note.\n')
    assert bundle.text(bundle.read([f'{repo}/*.py', f'{repo}/notes'])).count('========\n') == 3
    message = "1 of 2 files have a name that another file has too, the first is 'a.py'"
    with pytest.raises(ValueError, match=message):
        bundle.read([f'{repo}/a.py', f'{repo}/*a.py'])


def answers_alone(files):
    """The answers to the prompts by themselves, each read as a whole."""
    tokenizer = tokenizers.load(HERE / 'base')
    config, params = llama_hf.load(HERE / 'base', 'float32')
    for question in QUESTIONS:
        text = f'{bundle.text(files)}\nQuestion: {question}\nAnswer:'
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
        yield tokenizer.decode(decode.generate(params, config, [ids], 8, stop_id=tokenizer.eos_id)[0])


def test_every_answer_equals_that_to_its_prompt_alone(repo, answers):
    assert answers == list(answers_alone(bundle.read([str(repo)])))


def test_what_questions_do_not_share_is_read_again(repo, answers, monkeypatch):
    # All of this prompt is read, more than any other question has in common with it.
    monkeypatch.setattr(reader, 'PROBE_QUESTIONS', ('Why',))
    assert run(repo, mesh='2,1,2,1') == answers


def test_it_reports_how_much_it_read(repo, answers, capsys):
    assert run(repo, question=QUESTIONS[:1], mesh='1,1,2,1') == answers[:1]
    out, status = capsys.readouterr()
    assert QUESTIONS[0] in out and '3 documents; ' in status and 'of 512: it fits' in status
    for phrase in ('tokens of question read in', 'without the cache', '8 tokens answered'):
        assert phrase in status


def test_an_answer_ends_at_a_stop_string(repo, answers):
    stop = answers[0][2:4]
    assert run(repo, question=QUESTIONS[:1], stop=[stop]) == [answers[0][:answers[0].index(stop)]]


def test_sampled_answers_follow_their_seed(repo):
    sampled = [run(repo, question=QUESTIONS[:1], temperature=1.5, top_p=0.9, seed=seed)[0]
               for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_the_same_question_is_sampled_anew_and_temperature_0_is_greedy(repo, answers):
    twice = run(repo, question=QUESTIONS[:1] * 2, temperature=1.5)
    assert twice[0] != twice[1]
    assert run(repo, question=QUESTIONS[:1], temperature=0.0, top_p=0.5) == answers[:1]


def test_a_second_process_reads_only_what_follows_a_change(repo, answers, tmp_path, capsys):
    def reused(files=repo, mesh='1,1,1,1'):
        """-> (answers, tokens reused, tokens of the files)"""
        got = run(files, mesh=mesh, session=str(tmp_path / 'kept'))
        numbers = re.search(r'([\d,]+) of ([\d,]+) tokens reused', capsys.readouterr().err)
        return got, *(int(x.replace(',', '')) for x in numbers.groups())

    _, first, total = reused()
    assert first == 0
    for mesh in ('1,1,2,1', '2,1,1,1'):
        assert reused(mesh=mesh) == (answers, total, total)
    changed = shutil.copytree(repo, tmp_path / 'changed')
    size = lambda text: len(tokenizers.load(HERE / 'base').encode(text))
    others = bundle.text(bundle.read([str(repo)])[1:])
    for name, before in (('twice', ''), ('thrice', others)):
        (changed / 'a.py').write_text((repo / 'a.py').read_text().replace('double', name))
        got, kept, _ = reused(changed)
        a, *rest = bundle.read([str(changed)])
        assert got == list(answers_alone([*rest, a]))  # what changes is read last
        assert 0 <= kept - size(before) <= size('======== a.py ========\ndef ') + 1


def test_questions_are_typed_until_an_empty_line(repo, answers, monkeypatch, capsys):
    typed = iter([QUESTIONS[1], 'why ' * 400, QUESTIONS[0], ''])
    monkeypatch.setattr('builtins.input', lambda prompt: next(typed))
    assert run(repo, question=None) == answers[::-1]
    assert 'leaves no room for an answer within 512; ask a shorter one' in capsys.readouterr().err


@pytest.mark.parametrize(('changes', 'message'), [
    ({'length': 64}, r'3 files with question and answer take \d+ tokens, \d+ more than the 64 that the model '
                     r'may read; the largest are b.py \(\d+\), a.py \(\d+\), notes/c.md \(\d+\): leave '
                     'some out'),
    ({'length': 513}, '--length 513 is not within the 512 positions of the model; use 512'),
    ({'max_new_tokens': 0}, '--max-new-tokens 0 must be at least 1'),
    ({'length': 0}, '--length 0 must be a whole number above 0'),
    ({'temperature': -1.0}, 'temperature -1.0 must be above 0'),
    ({'top_p': float('nan')}, r'top_p nan in \(0, 1\]'),
    ({'top_p': 2.0}, r'top_p 2.0 in \(0, 1\]'),
    ({'stop': ['']}, 'a stop string is empty'),
    ({'mesh': '1'}, 'must be four degrees'),
])
def test_bad_input_is_one_sentence(repo, changes, message):
    with pytest.raises(ValueError, match=message):
        run(repo, **changes)


def test_files_that_do_not_exist(repo):
    with pytest.raises(FileNotFoundError, match='does not exist and matches no file'):
        run(repo, files=[f'{repo}/none/*.py'])


def test_a_file_without_a_last_line_end_gets_one():
    section = '======== x ========\na\n'
    assert bundle.section(Document('x', 'a')) == section == bundle.section(Document('x', 'a\n'))
