"""From the spec of a corpus to its files, and an account of what was not read."""

import dataclasses
import fnmatch
import glob
import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from lct import bucket_cache
from lct.data.corpus.blocks import File
from lct.data.corpus.compression import DECOMPRESSORS
from lct.data.corpus.files import COMPRESSIBLE, PACKED, SUFFIXES

EMBEDDED = 'embedded'  # the spec of the standard library of this interpreter
# Subfolders of the standard library that are not prose: installed packages, test data, tables of code points.
NOT_EMBEDDED = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'encodings'}
# Files beside .arrow files that say what is in them, as datasets.save_to_disk writes them
ARROW_METADATA = frozenset(('state.json', 'dataset_info.json', 'dataset_dict.json'))


@dataclasses.dataclass
class Tally:
    """What became of the files of a corpus.

    files, documents: that were read. left: files after the last document that max_bytes allows. latin1: files
    read as Latin-1. skipped: {suffix or reason: files}.
    """

    files: int = 0
    documents: int = 0
    left: int = 0
    latin1: int = 0
    skipped: Counter = dataclasses.field(default_factory=Counter)

    def sentence(self, max_bytes: int | None = None) -> str:
        """One line, such as '7 of 60 documents (7 files); not read: 3 .csv.zip'."""
        total, kind = self.documents, 'documents'
        if self.documents == self.files and self.left:
            total, kind = f'{self.documents} of {self.documents + self.left}', 'documents'
        elif self.left:
            kind = f'documents of {self.files} of {self.files + self.left} files'
        elif self.documents != self.files:
            kind = f'documents of {self.files} files'
        bound = f' (corpus_bytes {max_bytes:,})' if self.left and max_bytes is not None else ''
        latin1 = f'; {self.latin1} read as Latin-1' if self.latin1 else ''
        skipped = ', '.join(f'{count:,} {name}' for name, count in self.skipped.most_common())
        return f'{total} {kind}{bound}{latin1}{f"; not read: {skipped}" if skipped else ""}'


def find(spec: str | os.PathLike, exclude: Sequence[str] = (), tally: Tally | None = None) -> Iterator[File]:
    """The Files of a corpus, in the order of their names, one at a time.

    spec: a folder (searched recursively for SUFFIXES; hidden entries are skipped, links to files are
      followed, links to folders are not), a glob, a single file, or 'embedded': the .py files of this
      interpreter's standard library, ten megabytes of long documents without a download. 'name=...' before
      any of them names the corpus. A folder that is a git checkout gives the files that git does not ignore;
      one that datasets.save_to_disk wrote gives its .arrow files.
    exclude: patterns of names, of files or of folders in them, that are left out.
    tally: counts what is skipped.
    A File's name is relative to the folder, or to the fixed prefix of a glob: it does not depend on where a
    corpus is mounted. Its source is the first folder in that name, otherwise the folder searched, or the
    file. A name in spec becomes the source of all files and the first component of their names.

    Raises:
      FileNotFoundError: if spec matches no file.
      ValueError: for a folder in a format that is not read.
    """
    tally = tally or Tally()
    given, path = _split_spec(str(spec))
    for source, name, file, kind in _find(path, tally):
        if any(_matches(name, pattern) for pattern in exclude):
            tally.skipped['excluded'] += 1
            continue
        yield File(given or source, f'{given}/{name}' if given else name, os.fspath(file), kind)


def no_text_error(spec: object, tally: Tally | None = None) -> ValueError:
    """The error for a corpus without any text."""
    skipped = f' ({tally.sentence()})' if tally and tally.skipped else ''
    return ValueError(f'the corpus {spec} holds no text{skipped}; a folder is searched for '
                      f'{" ".join(sorted(COMPRESSIBLE))}, these as {" or ".join(DECOMPRESSORS)}, and '
                      f'{" ".join(sorted(PACKED))}; name other files by a glob')


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern, as in a .gitignore, matches a name, or one of its folders."""
    parts = name.split('/')
    pattern = pattern.strip('/') if pattern.strip('/') else pattern
    if '/' in pattern:
        return any(fnmatch.fnmatch('/'.join(parts[:i]), pattern) for i in range(1, len(parts) + 1))
    return any(fnmatch.fnmatch(part, pattern) for part in parts)


def _split_spec(spec: str) -> tuple[str | None, str]:
    """(name or None, path) of 'name=path' or 'path'."""
    match = re.fullmatch(r'([\w.-]+)=(.+)', spec, re.DOTALL)
    return match.groups() if match and not os.path.exists(spec) else (None, spec)


def _find(path: str, tally: Tally) -> Iterator[tuple[str, str, str | Path, str]]:
    """(source, name, path, kind) of every file."""
    if not path:  # Path('') would be the current folder
        raise ValueError('the name of a corpus is empty; '
                         'give a folder, a glob, or a file of text, .jsonl or .parquet')
    if path == EMBEDDED:
        yield from ((EMBEDDED, name, file, '') for name, file in _standard_library())
        return
    path = Path(bucket_cache.local(path))
    if path.is_dir():
        folder_name = path.resolve().name
        listed = _tracked(path, tally) if (path / '.git').exists() else None
        for name, file, kind in _walk(path, tally) if listed is None else listed:
            yield name.split('/')[0] if '/' in name else folder_name, name, file, kind
    elif path.is_file():
        yield path.name.split('.')[0], path.name, path, _kind_of(path)
    else:
        yield from _find_matches(path)


def _find_matches(pattern: Path) -> Iterator[tuple[str, str, str, str]]:
    """(source, name, path, kind) of every file that matches a glob."""
    files = sorted(filter(os.path.isfile, glob.glob(str(pattern), recursive=True)))
    if not files:
        raise FileNotFoundError(f'corpus {pattern} does not exist and matches no file; give a folder, a '
                                'glob, or a file of text, .jsonl or .parquet')
    fixed = next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))
    for file in files:
        name = Path(file).relative_to(fixed).as_posix()
        yield name.split('/')[0] if '/' in name else fixed.resolve().name, name, file, _kind_of(Path(file))


def _standard_library() -> Iterator[tuple[str, Path]]:
    """(name, path) of the files of the standard library, sorted by the components of their names."""
    root = Path(sysconfig.get_paths()['stdlib'])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders
                         if name not in NOT_EMBEDDED and not name.startswith('config-')]
        files += [Path(folder, name) for name in names
                  if name.endswith('.py') and not name.startswith('_sysconfigdata')]
    for file in sorted(files):
        yield file.relative_to(root).as_posix(), file


def _walk(folder: str | Path, tally: Tally, prefix: str = '',
          kind: str = '') -> Iterator[tuple[str, str, str]]:
    """(name, path, kind) of the files in a folder, sorted by the components of their names.

    kind: of all files, in the folders of a Maildir.
    """
    with os.scandir(folder) as entries:
        entries = sorted(entries, key=lambda one: one.name)
    tally.skipped['hidden'] += sum(one.name.startswith('.') for one in entries)
    tally.skipped += Counter()  # without those that are 0
    entries = [one for one in entries if not one.name.startswith('.')]
    names = {one.name for one in entries}
    _refuse_folder(folder, names)
    has_arrow = 'dataset_dict.json' in names or any(name.endswith('.arrow') for name in names)
    is_maildir = {'cur', 'new', 'tmp'} <= names
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):  # links may form a loop
            mail = '.eml' if is_maildir and entry.name in ('cur', 'new') else ''
            yield from _walk(entry.path, tally, f'{prefix}{entry.name}/', mail)
        elif entry.is_dir():
            tally.skipped['links to folders'] += 1
        elif has_arrow and entry.name in ARROW_METADATA:
            tally.skipped['metadata of .arrow files'] += 1
        elif entry.is_file():
            yield from _accepted(prefix + entry.name, entry.path, tally, kind)


def _refuse_folder(folder, names):
    if 'index.json' in names and any('.mds' in name for name in names):
        raise ValueError(f'{folder} is a MosaicML streaming dataset (.mds), which is not read; write it as '
                         '.jsonl or Parquet, for example by a loop over streaming.LocalDataset, or leave it '
                         'out with --exclude')


def _accepted(name, path, tally, kind=''):
    """The (name, path, kind) of a file that is read, or none, and then it is counted."""
    kind = kind or _kind_of(Path(path))
    if kind or name.lower().endswith(tuple(SUFFIXES)):
        yield name, path, kind
        return
    suffixes = Path(name).suffixes
    packed = len(suffixes) > 1 and suffixes[-1].lower() in DECOMPRESSORS
    tally.skipped[''.join(suffixes[-2:] if packed else suffixes[-1:]).lower() or 'without suffix'] += 1


def _kind_of(path: Path) -> str:
    """'.mbox' for a mailbox whose name does not say so, else ''."""
    if path.suffix or not path.is_file():
        return ''
    with open(path, 'rb') as file:
        first, second = file.readline(1000), file.readline(1000)
    is_mbox = first.startswith(b'From ') and re.match(rb'>?[A-Za-z][A-Za-z0-9-]*:', second)
    return '.mbox' if is_mbox else ''


def _tracked(folder: Path, tally: Tally) -> list[tuple[str, str, str]] | None:
    """The same as _walk for a git checkout: the files that git tracks or would add; None without git."""
    # A checkout is not trusted: its own settings must not start a program.
    command = ['git', '-c', 'core.fsmonitor=false', '-c', 'safe.directory=*', '-C', str(folder), 'ls-files',
               '-z', '--cached', '--others', '--exclude-standard']
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=600)
    except (OSError, subprocess.SubprocessError):
        tally.skipped['(git failed: ignored files are read too)'] += 1
        return None
    names = [os.fsdecode(name) for name in done.stdout.split(b'\0') if name]
    found = []
    for name in sorted(set(names), key=lambda one: one.split('/')):
        path = folder / name
        if any(part.startswith('.') for part in name.split('/')):
            tally.skipped['hidden'] += 1
        elif path.is_file():
            found += _accepted(name, os.fspath(path), tally)
        elif path.is_dir():
            tally.skipped['links to folders' if path.is_symlink() else 'submodules'] += 1
    return found
