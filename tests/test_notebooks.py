"""Every notebook runs from top to bottom, defines no functions or classes, and stays small.

The code cells run in order in one fresh namespace, in the folder in which Jupyter would run them. The last
expression of a cell is rendered as Jupyter would render it. This needs no kernel and no further packages.
"""

import ast
import json
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[1] / 'notebooks'
NOTEBOOKS = sorted(FOLDER.glob('*.ipynb'))
MAX_BYTES = 150_000
MAY_IMPORT = {'lct', 'jax', 'numpy', 'os', 'json', 'pathlib', 'functools', 'dataclasses', 'tempfile', 'time'}
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def cells(path, kind='code'):
    """The sources of a notebook's cells of a kind."""
    notebook = json.loads(path.read_text())
    return [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == kind]


def render(value):
    """The output of a cell as Jupyter renders it: an SVG or text; None without a value."""
    if value is None:
        return None
    return value._repr_svg_() if hasattr(value, '_repr_svg_') else repr(value)


def run(source, names):
    """Execute a cell and render its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, 'cell', 'exec'), names)
    return render(eval(compile(ast.Expression(last.value), 'cell', 'eval'), names)) if last else None


def test_there_are_notebooks_and_none_pins_the_cpu():
    assert len(NOTEBOOKS) == 8
    assert not any('jax_platforms' in source.lower() for path in NOTEBOOKS for source in cells(path))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER)
    names, rendered = {'__name__': '__main__'}, []
    for source in cells(path):
        rendered.append(run(source, names))
    figures = [text for text in rendered if text and '<svg' in text]
    assert figures or path.stem == '6_load_and_ask'
    assert all('xmlns="http://www.w3.org/2000/svg"' in text for text in figures)  # pages show them as images
    assert capsys.readouterr().out
    check_claims(path.stem, names)


def check_claims(name, names):
    """The claims of the text around the cells hold."""
    if name == '1_online_softmax':
        assert abs(names['weights'] @ names['values'] - names['weighted'] / names['total']) < 1e-12
        dense, chunked = names['temporaries'].values()
        assert dense[-1] / dense[0] > 10 and chunked[-1] / chunked[0] < 8
    elif name == '2_ring':
        assert abs(names['out'][:, names['layout'].inverse(names['order'])] - names['expected']).max() < 1e-5
        ring = {layout: pairs.max(0).sum() / pairs.sum() * 8 for layout, pairs in names['pairs'].items()}
        assert ring['contiguous'] == pytest.approx(1.875, abs=0.01)
        assert max(ring['zigzag'], ring['striped']) < 1.01
    elif name == '3_theta':
        assert names['safe'] == 35
        assert abs(names['ours'] - names['exact']).max() < 1e-6 < abs(names['naive'] - names['exact']).max()
    elif name == '4_cost':
        costs = zip(names['lengths'], names['attention'], names['matmul'], strict=True)
        assert next(length for length, attention, matmul in costs if attention > matmul) == 2**16
        assert all(plan.buffers.peak < names['h100'].memory for plan in names['plans'].values())
    elif name == '5_reports':
        assert names['after'].scores.mean() > names['before'].scores.mean()
    elif name == '7_extend_your_own_model':
        before, after = (names['recall'][when].scores.mean(0) for when in ('before', 'after'))
        assert before[0] == after[0] == 1 and before[1] < 0.5 < after[1]
        before, after = (names['bins'][when].mean for when in ('before', 'after'))
        assert before[-1] - before[-2] > 0.2 > after[-1] - after[-2]
        assert names['saved'].max_position_embeddings == 2 * names['native']
    elif name == '8_attention_over_length':
        assert len(names['errors']) == 6 and max(names['errors'].values()) < 1e-5
        short, long = names['DENSE'][0], names['DENSE'][-1]
        growth = {kind: names['temporaries'][kind, long] / names['temporaries'][kind, short]
                  for kind in ('dense', 'chunks')}
        assert growth['dense'] > 10 and growth['chunks'] < 4
    elif name == '6_load_and_ask':
        assert names['tokenizer'].decode(names['answer']).lstrip().startswith(names['fact'].value)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_no_logic_and_imports_the_package(path):
    for source in cells(path):
        for node in ast.walk(ast.parse(source)):
            assert not isinstance(node, DEFINITIONS), f'line {node.lineno} of {source!r}'
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            assert {module.split('.')[0] for module in modules} <= MAY_IMPORT


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_in_jupyter_and_is_small(path):
    """The fields that nbformat 4.5 asks for; outputs are stored, without errors."""
    text = path.read_text()
    notebook = json.loads(text)
    assert len(text.encode()) <= MAX_BYTES
    assert (notebook['nbformat'], notebook['nbformat_minor']) == (4, 5)
    assert notebook['metadata']['kernelspec']['name'] == 'python3'
    ids = [cell['id'] for cell in notebook['cells']]
    assert len(set(ids)) == len(ids) and notebook['cells'][0]['cell_type'] == 'markdown'
    assert text.count('<svg ') == text.count(r'xmlns=\"http://www.w3.org/2000/svg\"')
    for cell in notebook['cells']:
        assert {'cell_type', 'id', 'metadata', 'source'} <= set(cell)
        if cell['cell_type'] == 'code':
            assert cell['source'] and {'outputs', 'execution_count'} <= set(cell)
            assert all(output['output_type'] != 'error' for output in cell['outputs'])
    assert any(cell.get('outputs') for cell in notebook['cells'])
