"""evaluate.py --session: what prompts begin with is read once, and answers stay the same."""

import json
import re

import pytest
from test_evaluate import run

from lct.cli import sessions
from lct.eval.prefixes import shared_prefixes
from lct.weights import saved_session
from lct.weights.saved_session import ForeignSession

STORY = 'The keeper of the lighthouse wrote down every ship that passed, and what the wind was like. ' * 10
QUESTIONS = ['Who wrote?', 'What passed?', 'What was the wind like?', 'Where did he write it?']


@pytest.fixture
def data(tmp_path):
    (tmp_path / 'data' / 'keeper').mkdir(parents=True)
    lines = [json.dumps({'input': f'{STORY}\n{question}\n', 'outputs': ['a'], 'max_new_tokens': 4})
             for question in QUESTIONS]
    (tmp_path / 'data' / 'keeper' / 'a.jsonl').write_text('\n'.join(lines))
    return tmp_path / 'data'


def evaluated(workdir, capsys, **changes):
    """-> (rows, tokens reused, tokens of all prompts, what was printed to stderr)"""
    capsys.readouterr()
    run(workdir, **changes)
    error = capsys.readouterr().err
    numbers = re.search(r'session  ([\d,]+) of ([\d,]+) tokens reused from .* in [\d.]+ s', error)
    rows = [json.loads(line) for path in sorted(workdir.glob('*.jsonl')) for line in path.open()]
    return rows, *(int(x.replace(',', '')) for x in numbers.groups() if numbers), error


def assert_alike(rows, expected):
    """Equal but for the rounding of likelihoods."""
    nats = lambda rows: [row['forced'].pop('nats') * row.pop('checksum').isalnum() for row in rows]
    assert nats(rows) == pytest.approx(nats(expected), rel=1e-4) and rows == expected


def test_questions_about_one_text_read_it_once(tmp_path, data, capsys, monkeypatch):
    flags = {'suite': 'own', 'tasks': None, 'data': data, 'samples': '9', 'session': str(tmp_path / 'kept')}
    expected, first, total, _ = evaluated(tmp_path / 'first', capsys, **flags)
    run(tmp_path / 'plain', **flags | {'session': None})
    plain = list(map(json.loads, (tmp_path / 'plain' / 'own.jsonl').open()))
    assert plain == expected and first == 0
    (text,) = (tmp_path / 'kept').iterdir()  # one for four prompts
    changes = {'mesh': '1,1,2,1', 'piece': 32, 'batch_tokens': 512}
    rows, reused, again, _ = evaluated(tmp_path / 'again', capsys, **flags | changes)
    assert rows == expected and again == total and total - 4 * 16 < reused < total
    assert saved_session.describe(text)['tokens'] < min(row['prompt_tokens'] for row in rows)
    block = next(text.glob('*.safetensors'))
    content = block.read_bytes()
    block.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    rows, reused, _, error = evaluated(tmp_path / 'damaged', capsys, **flags)
    assert rows == expected and reused == 0 and error.count('is damaged from token 0 on') == 1
    assert not block.exists() and len([*text.glob('*.safetensors')]) == 1  # replaced
    (text / 'session.json').write_text('{')
    rows, reused, _, error = evaluated(tmp_path / 'no_index', capsys, **flags)
    assert rows == expected and reused == 0 and '1 of 1 texts in' in error and 'cannot be used' in error


def test_questions_of_one_row_keep_their_text_by_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    flags = {'suite': 'adversarial', 'tasks': 'several', 'samples': '8', 'session': 'mine'}
    expected, first, total, _ = evaluated(tmp_path / 'first', capsys, **flags)
    assert first == 0 and len(sessions.entries()) == 2
    rows, reused, again, _ = evaluated(tmp_path / 'second', capsys, **flags)
    assert_alike(rows, expected)
    assert 2 * 256 <= reused and again == total
    # Within a bound, what this evaluation has used is not deleted for the rest.
    size = sessions.entries()[0].bytes
    _, reused, _, error = evaluated(tmp_path / 'bound', capsys, **flags | {
        'session': 'bound', 'session_gb': 1.5e-9 * size})
    assert 'GB are full of texts of this evaluation' in error
    assert [one.name.split('/')[0] for one in sessions.entries()] == ['bound'], error
    assert sessions.manage(['--delete-session', 'bound']) and sessions.entries() == []


def test_a_folder_of_anything_else_is_refused(tmp_path):
    (tmp_path / 'notes.txt').write_text('')
    for name, message in (('', 'holds notes.txt and is not for sessions; name a new or an empty folder'),
                          ('notes.txt', 'notes.txt is a file; name a folder')):
        with pytest.raises(ForeignSession, match=message):
            run(tmp_path / 'work', session=f'{tmp_path}/{name}')
    (tmp_path / 'notes.txt').rename(tmp_path / 'session.json')
    with pytest.raises(ForeignSession, match='holds the one text of ask.py'):
        run(tmp_path / 'work', session=f'{tmp_path}/')


def test_shared_prefixes_are_those_with_the_nearest_text():
    assert shared_prefixes([[1, 2, 3], [2], [1, 2, 4, 5], [1, 2, 4], [3]]) == [2, 0, 3, 3, 0]
