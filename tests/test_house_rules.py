"""Sizes and words that the linter does not know: functions that read at a glance, and the terms of the
field."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = {'lct': 60, 'experiments': 80}
MAX_NESTING = 4
MAX_PARAMETERS = 8  # but for kernels, which get every buffer by itself
FILES = sorted(path.relative_to(ROOT).as_posix() for top in MAX_FUNCTION_LINES
               for path in (ROOT / top).rglob('*.py'))
TEXTS = [*FILES, 'README.md', 'experiments/README.md', *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / 'notebooks').glob('*.ipynb'))]

VAGUE_NAMES = {'words', 'how', 'where', 'what', 'asked', 'said', 'seen', 'told', 'gold', 'doubts', 'crumbs',
               'census'}
ODD_PHRASES = re.compile(
    r'whole or not at all|at the door|comes? home|said aloud|piece of memory|gathered whole|likeliest|for '
    r'nobody|'
    r'what is waited for|hides behind|\b[Rr]eckon|\bis no (file|folder|config)\b|\bbegun '
    r'answer|\b[Mm]end(s|ed)?\b')
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)


def nesting(node, depth=0):
    """Blocks inside blocks below a node; an elif is as deep as its if, and a function inside counts for
    itself."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def names_bound(tree):
    """(line, name) of every variable, parameter and function that a source binds."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef):
            yield node.lineno, node.name


def size_violations(path, source):
    """What is too large in a source at path, one sentence each."""
    top = path.split('/')[0]
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f'{path} has {lines} lines, more than {MAX_FILE_LINES}; make it two files'
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        place = f'{path}:{node.lineno} {node.name}'
        if (lines := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES[top]:
            yield f'{place} has {lines} lines, more than {MAX_FUNCTION_LINES[top]}'
        if (depth := nesting(node)) > MAX_NESTING:
            yield f'{place} is nested {depth} deep, more than {MAX_NESTING}'
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ('self', 'cls')])
        if count > MAX_PARAMETERS and '/kernels/' not in path:
            yield f'{place} has {count} parameters, more than {MAX_PARAMETERS}; make a record of some'


def vague_names(path, source):
    """Tasks about words may call them words; elsewhere that was a tokenizer."""
    vague = VAGUE_NAMES - ({'words'} if path.startswith('lct/eval/tasks/') else set())
    return [f'{path}:{line} {name}' for line, name in names_bound(ast.parse(source)) if name in vague]


def odd_phrases(path, text):
    return [f'{path}: {match[0]!r}' for match in ODD_PHRASES.finditer(' '.join(text.split()))]


@pytest.mark.parametrize('path', FILES)
def test_sizes(path):
    assert list(size_violations(path, (ROOT / path).read_text())) == []


@pytest.mark.parametrize('path', FILES)
def test_names_say_what_they_hold(path):
    assert vague_names(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize('path', TEXTS)
def test_texts_use_the_terms_of_the_field(path):
    assert odd_phrases(path, (ROOT / path).read_text()) == []


def test_violations_are_caught():
    deep = 'def f():\n' + ''.join('    ' * (i + 1) + 'if x:\n' for i in range(5)) + '    ' * 6 + 'pass\n'
    many = f'def f({", ".join(f"a{i}" for i in range(9))}):\n    pass\n'
    long = 'def f():\n' + '    x()\n' * 60
    for source, word in ((deep, 'nested 5 deep'), (many, '9 parameters'), (long, '61 lines'),
                         ('\n' * 351, '351 lines')):
        found = list(size_violations('lct/ops/a.py', source))
        assert len(found) == 1 and word in found[0]
    assert not list(size_violations('experiments/a.py',
                                    long)) and not list(size_violations('lct/ops/kernels/a.py', many))
    assert vague_names('a.py', 'def f(how):\n    words = 1\n    return words') == ['a.py:1 how',
                                                                                   'a.py:2 words']
    assert odd_phrases('a.md', 'a file comes\nhome, x is no folder') == ["a.md: 'comes home'", "a.md: 'is no "
                                                                                               "folder'"]


def test_an_elif_does_not_nest():
    chain = 'def f():\n    if a:\n        pass\n' + '    elif b:\n        pass\n' * 6
    assert not list(size_violations('lct/a.py', chain))
