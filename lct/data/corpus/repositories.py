"""A whole repository as one long document: its files, each under a line with its path, after what it imports.

Definitions then stand before their uses, often far before: a use of a name is an exercise in reading back that
nobody had to write. Questions about a repository are asked over the same text (bundle.py). Dependency order and a
path above each file are as in DeepSeek-Coder (Guo et al. 2024, arXiv:2401.14196).
"""

import ast
import heapq
import posixpath

from lct.data.corpus import bundle
from lct.data.corpus.documents import Document, read

PYTHON = ('.py', '.pyi')


def by_path(files):
    """[path] of files {path: text}, ascending."""
    return sorted(files)


def by_dependency(files):
    """[path] of files {path: text}: a Python file after those of its repository that it imports, otherwise in the order
    of paths, and what is not Python before it all. A cycle is entered at the file with the fewest imports left, of
    those the first path."""
    modules = {name: path for path in sorted(files) if path.endswith(PYTHON) for name in _names(path)}
    waits = {path: _imports(path, files[path], modules) - {path} if path.endswith(PYTHON) else set() for path in files}
    needed_by = {path: [] for path in files}
    for path, needs in waits.items():
        for need in needs:
            needed_by[need].append(path)
    queue = [(len(needs), path.endswith(PYTHON), path) for path, needs in waits.items()]
    heapq.heapify(queue)
    order, done = [], set()
    while queue:
        _, _, path = heapq.heappop(queue)
        if path in done:
            continue
        order.append(path)
        done.add(path)
        for other in needed_by[path]:
            waits[other].discard(path)
            if other not in done:
                heapq.heappush(queue, (len(waits[other]), True, other))
    return order


def document(name, files, order=by_dependency):
    """-> documents.Document of files {path: text}, as bundle.text puts them together."""
    if not files:
        raise ValueError(f'repository {name} has no files with text; give a folder of sources')
    return Document(name, bundle.text([Document(path, files[path]) for path in order(files)]))


def repositories(root, order=by_dependency):
    """One Document for each folder directly under root, in the order of their names; files beside them are one more,
    named '.'. What counts as text is documents.read's matter."""
    found = {}
    for file in read(root):
        folder, slash, path = file.name.partition('/')
        name, path = (folder, path) if slash else ('.', folder)
        found.setdefault(name, {})[path] = file.text
    for name in sorted(found):
        yield document(name, found[name], order)


def _names(path):
    """The dotted names by which a Python file may be imported: from the root of the repository and from each folder
    above it, which may be on the path ('src/pkg/a.py' is src.pkg.a, pkg.a and a)."""
    parts = posixpath.splitext(path)[0].split('/')
    if parts[-1] == '__init__':
        parts = parts[:-1]
    return ['.'.join(parts[i:]) for i in range(len(parts))]


def _imports(path, text, modules):
    """The paths of modules {dotted name: path} that a source imports; those of a file that is no Python, as a text in
    an older dialect is not, are none."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()
    found, package = set(), posixpath.dirname(path).split('/') if posixpath.dirname(path) else []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            wanted = [f'{base}.{alias.name}'.strip('.') for alias in node.names]
        else:
            continue
        for name in wanted:
            while name and name not in modules:  # a name in a module, or a package without a file
                name = name.rpartition('.')[0]
            if name:
                found.add(modules[name])
    return found
