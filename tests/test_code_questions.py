"""Questions about a repository have the answers that the syntax tree gives, and fill the budget."""

import pathlib

import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data.corpus import bundle
from lct.data.corpus.documents import Document
from lct.eval import scoring, suites
from lct.eval.tasks import code_questions
from lct.eval.tasks.material import Material

ROOT = pathlib.Path(__file__).parents[1]
BASE = tokenizers.load(ROOT / 'experiments' / 'base' / 'tokenizer.json')
SOURCE = '''import math


def area(width, height=2.0) -> float:
    size = width * height
    return size


class Box:
    def area_of(self, a, b):
        return a + self.café.wide + area(b, 1)


def long_one(
        a, b):
    return f'{a}'


async def later(a, b):
    pass
'''


@pytest.fixture(scope='module')
def material():
    files = [
        Document(f'lct/{path.parent.name}/{path.name}', path.read_text())
        for folder in ('ops', 'data')
        for path in sorted((ROOT / 'lct' / folder).glob('*.py'))
        if path.stat().st_size
    ]
    return Material(BASE, [*files, Document('README.md', 'no Python'), Document('old.py', 'print "2"')])


def test_names_of_the_syntax_tree():
    assert code_questions.functions(SOURCE) == [
        code_questions.Function('area', '(width, height=2.0) -> float:')
    ]
    assert set(code_questions.defined_names(SOURCE)) == {'area', 'Box', 'area_of', 'long_one', 'later'}
    found = code_questions.identifiers(SOURCE)
    names = [name for _, name in found]
    assert names == ('width height float size width height size self a b a self café wide area b a b a a '
                     'b').split()
    assert all(SOURCE.startswith(name, start) for start, name in found)
    twice = Document('twice.py', f"{SOURCE}\nclass Other:\n    def area(self, x):\n        pass\n")
    assert (
        len(code_questions._question_subjects([Document('once.py', SOURCE)])) == 1
        and code_questions._question_subjects([twice]) == []
    )
    assert code_questions.functions('print "2"') == [] and code_questions.identifiers('def (') == []


@pytest.mark.parametrize('task', code_questions.TASKS)
def test_a_prompt_has_complete_files_one_answer_and_a_full_budget(material, task):
    config, sizes, depths = code_questions.TASKS[task], [], []
    for i in range(8):
        sample = config.generate(material, 8192, i)
        sizes.append(len(BASE.encode(sample.text)) + 1 + sample.max_new_tokens)
        depths += sample.meta['depths']
        assert sample.meta['tokens'] == sizes[-1]
        path, name = sample.meta['path'], sample.meta['function']
        sections = sample.prompt.split('======== ')[1:]
        paths = [section.split(' ========\n')[0] for section in sections]
        assert paths == sorted(paths) and len(paths) == sample.meta['files']
        defining = [one for one, section in zip(paths, sections, strict=True) if f'def {name}(' in section]
        assert defining == [path]
        right = {'defines': path, 'signature': sample.outputs[0]}[task]
        assert sample.outputs == [right] and scoring.score(task, f' say {right}.', sample.outputs) == 1
        assert (f'def {name}{right}\n' in sample.prompt) == (task == 'signature')
    assert max(sizes) <= 8192 and np.median(sizes) >= 0.9 * 8192
    assert len(set(depths)) >= 6 and 0 < min(depths) < max(depths) < 1


def test_questions_about_one_text_share_it(material):
    plan = suites.Plan(material, (8192,), {8192: 8})
    items = suites.SUITES['repository'].items(plan)
    texts = {}
    for item in items:
        texts.setdefault(item.group, set()).add(item.make().prompt.rpartition('Question:')[0])
    assert [len(found) for found in texts.values()] == [1, 1] and len(set.union(*texts.values())) == 2
    assert len({item.make().meta['function'] for item in items if item.task == 'defines'}) >= 5
    rows = [
        {
            'task': item.task,
            'length': item.length,
            'index': item.index,
            'text': item.make().outputs[0] * (i % 2),
            'outputs': item.make().outputs,
            'meta': {},
        }
        for i, item in enumerate(items)
    ]
    scores = suites.SUITES['repository'].scores(plan, rows)['tasks']
    assert {task: one[8192]['count'] for task, one in scores.items()} == {'defines': 8, 'signature': 8}
    assert sum(one[8192]['mean'] for one in scores.values()) == 100


def test_bad_input(material):
    with pytest.raises(ValueError, match='length 512 has no room for files of the repository'):
        code_questions.TASKS['defines'].generate(material, 512, 0)
    prose = Material(BASE, [Document('a.txt', 'def no_python(a, b):\n    pass\n')])
    with pytest.raises(ValueError, match='the documents hold no Python file; give a repository'):
        code_questions.TASKS['defines'].generate(prose, 4096, 0)


def test_distances_to_the_first_use_cross_files():
    files = [
        Document('a.py', 'first = 1\nsecond = first\n'),
        Document('b.py', 'third = "é"\nfirst += third + second\n'),
    ]
    for tokenizer in (BASE, tokenizers.load('bytes')):
        ids, found = code_questions.identifier_distances(files, tokenizer)
        assert ids == tokenizer.encode(bundle.text(files))
        names = [tokenizer.decode(ids[first:last + 1]).strip() for first, last, _ in found]
        assert names == ['first', 'first', 'third', 'second']
        assert all(first > distance > 0 for first, _, distance in found)
    # In bytes 'first' begins after the header of a.py, and again after 'first = 1\nsecond = '.
    assert [distance for _, _, distance in found][0] == 19
    losses = np.zeros(len(ids))
    for first, last, _ in found[:3]:
        losses[first:last + 1] = 0.5
    sums, counts = code_questions.identifier_losses(losses, found, [1, 16, 32, 128])
    assert counts.tolist() == [0, 2, 2] or counts.tolist() == [1, 1, 2]
    assert sums.sum() == pytest.approx(0.5 * 15)
    assert code_questions.identifier_losses(losses[:40], found, [1, 128])[1].tolist() == [0]


def test_oversized_bundles(material):
    files = code_questions.oversized_bundle(material, 6000, 0)
    size = len(BASE.encode(bundle.text(files)))
    assert size >= 6000 and files == sorted(files, key=lambda one: one.name)
    assert (
        files != code_questions.oversized_bundle(material, 6000, 1)
        and code_questions.oversized_bundle(material, 10**7, 0) == []
    )
