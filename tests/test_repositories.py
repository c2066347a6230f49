import ast

import pytest

from lct.data.corpus.repositories import by_dependency, by_path, document, repositories

FILES = {
    'README.md': '# The project',
    'pkg/__init__.py': 'from pkg.core import run\n',
    'pkg/app.py': 'import sys\nfrom . import core, tools as t\nfrom .io.files import read\n',
    'pkg/core.py': 'import pkg.tools.text\nfrom pkg.io import files\n',
    'pkg/io/__init__.py': '',
    'pkg/io/files.py': 'def later():\n    from ..tools import text\n',
    'pkg/tools/__init__.py': '',
    'pkg/tools/text.py': 'import os\n',
    'tests/test_app.py': 'from pkg.app import main\nimport missing.module\n',
}


def before(order, first, *later):
    return all(order.index(first) < order.index(path) for path in later)


def test_a_file_comes_after_what_it_imports():
    order = by_dependency(FILES)
    assert sorted(order) == by_path(FILES) == sorted(FILES)
    assert order[0] == 'README.md'
    assert before(order, 'pkg/tools/text.py', 'pkg/io/files.py', 'pkg/core.py')
    assert before(order, 'pkg/io/files.py', 'pkg/core.py', 'pkg/app.py')
    assert before(order, 'pkg/core.py', 'pkg/__init__.py', 'pkg/app.py')
    assert order[-1] == 'tests/test_app.py'
    assert by_dependency(dict(reversed(FILES.items()))) == order


def test_cycles_broken_sources_and_a_source_folder():
    files = {'src/lib/a.py': 'import lib.b', 'src/lib/b.py': 'import lib.a', 'src/lib/c.py': 'from lib '
                                                                                             'import a',
             'bad.py': 'print "old"', 'nul.py': '\0', 'self.py': 'import self'}
    order = by_dependency(files)
    assert sorted(order) == sorted(files)
    assert before(order, 'src/lib/a.py', 'src/lib/b.py', 'src/lib/c.py')
    assert before(order, 'bad.py', 'src/lib/a.py')


def test_the_order_of_this_package_has_no_import_before_its_module():
    """The package itself, which has no cycles: every import of it points backwards."""
    import pathlib

    root = pathlib.Path(__file__).parents[1]
    files = {path.relative_to(root).as_posix(): path.read_text()
             for path in (root / 'lct' / 'data').rglob('*.py')}
    order = by_dependency(files)
    for path in order:
        for node in ast.walk(ast.parse(files[path])):
            if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('lct.data.'):
                module = node.module.replace('.', '/')
                for alias in node.names:
                    inside = f'{module}/{alias.name}.py'
                    assert before(order, inside if inside in files else f'{module}.py', path)


def test_documents_have_paths_above_their_files(tmp_path):
    files = {'one/b.py': 'import a\n', 'one/a.py': 'x = 1\n\n\n', 'two/t.md': 'hello', 'top.py': 'y'}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    found = {one.name: one.text for one in repositories(tmp_path)}
    assert list(found) == ['.', 'one', 'two']
    assert found['one'] == '======== a.py ========\nx = 1\n\n\n======== b.py ========\nimport a\n'
    two = next(one.text for one in repositories(tmp_path, by_path) if one.name == 'two')
    assert two == '======== t.md ========\nhello\n'
    with pytest.raises(ValueError, match='repository none has no files'):
        document('none', {})
