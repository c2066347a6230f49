"""A repository as one long document: its files, each under its path and after the files that it imports.

Definitions then come before their uses, often far before, so every use of a name trains reading back, without
any labels. Questions about a repository are asked over the same text (bundle.py). Dependency order and a path
above each file are as in DeepSeek-Coder (Guo et al. 2024, arXiv:2401.14196).
"""

import ast
import heapq
import os
import posixpath
from collections.abc import Callable, Iterator

from lct.data.corpus import bundle
from lct.data.corpus.documents import Document, read

PYTHON = ('.py', '.pyi')

Files = dict[str, str]  # {path: text}


def by_path(files: Files) -> list[str]:
    """Paths in ascending order."""
    return sorted(files)


def by_dependency(files: Files) -> list[str]:
    """Paths in the order of imports: a Python file after the files of its repository that it imports.

    Otherwise paths are in ascending order, and files that are not Python come first. A cycle is entered at
    the file with the fewest imports left; among equals, at the first path.
    """
    pending = _imports_by_path(files)
    imported_by = {path: [] for path in files}
    for path, imports in pending.items():
        for imported in imports:
            imported_by[imported].append(path)
    queue = [(len(imports), path.endswith(PYTHON), path) for path, imports in pending.items()]
    heapq.heapify(queue)
    order, done = [], set()
    while queue:
        _, _, path = heapq.heappop(queue)
        if path in done:
            continue
        order.append(path)
        done.add(path)
        for other in imported_by[path]:
            pending[other].discard(path)
            if other not in done:
                heapq.heappush(queue, (len(pending[other]), True, other))
    return order


def document(name: str, files: Files, order: Callable[[Files], list[str]] = by_dependency) -> Document:
    """The files as one Document, joined by bundle.text. Raises ValueError if there are none."""
    if not files:
        raise ValueError(f'repository {name} has no files with text; give a folder of sources')
    return Document(name, bundle.text([Document(path, files[path]) for path in order(files)]))


def repositories(root: str | os.PathLike,
                 order: Callable[[Files], list[str]] = by_dependency) -> Iterator[Document]:
    """One Document for each folder directly under root, in the order of their names.

    Files directly under root form another one, named '.'. documents.read decides which files are text.
    """
    found = {}
    for file in read(root):
        folder, slash, path = file.name.partition('/')
        name, path = (folder, path) if slash else ('.', folder)
        found.setdefault(name, {})[path] = file.text
    for name in sorted(found):
        yield document(name, found[name], order)


def _imports_by_path(files: Files) -> dict[str, set[str]]:
    """{path: paths of the files that it imports}; empty for a file that is not Python."""
    modules = {name: path for path in sorted(files) if path.endswith(PYTHON) for name in _module_names(path)}
    return {path: _imports(path, files[path], modules) - {path} if path.endswith(PYTHON) else set()
            for path in files}


def _module_names(path: str) -> list[str]:
    """The dotted names by which a Python file may be imported.

    They start at the root of the repository and at each folder above the file, which may be on the import
    path ('src/pkg/a.py' is src.pkg.a, pkg.a and a).
    """
    names = posixpath.splitext(path)[0].split('/')
    if names[-1] == '__init__':
        names = names[:-1]
    return ['.'.join(names[i:]) for i in range(len(names))]


def _imports(path: str, text: str, modules: dict[str, str]) -> set[str]:
    """The paths in modules {dotted name: path} that a source imports.

    A source that does not parse, such as one in an older dialect of Python, has none.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    folder = posixpath.dirname(path)
    package = folder.split('/') if folder else []
    found = set()
    for node in ast.walk(tree):
        for name in _imported_names(node, package):
            while name and name not in modules:  # a name in a module, or a package without a file
                name = name.rpartition('.')[0]
            if name:
                found.add(modules[name])
    return found


def _imported_names(node: ast.AST, package: list[str]) -> list[str]:
    """The dotted names that a node imports; package: the folders of its file."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[:len(package) - node.level + 1] if node.level else []
        base = '.'.join([*base, *([node.module] if node.module else [])])
        return [f'{base}.{alias.name}'.strip('.') for alias in node.names]
    return []
