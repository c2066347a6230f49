"""Copies of files of object stores on the local disk, within a bound.

    LCT_CACHE_DIR/objects/KEY/NAME    a folder or file; KEY depends on URL and versions of its files
                          KEY.json    makes it count: written when all files are there
                          KEY.lock    held by the processes that use it; KEY.download by one that copies it

LCT_CACHE_DIR is the folder lct/ in the user's cache by default, and LCT_CACHE_GB the bound, 100 by default.
Copies that no process uses are deleted to stay within it, those unused for longest first. What is read of
weights and stores is compared with their own checksums, as on any disk.
"""

import contextlib
import fcntl
import fnmatch
import glob
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

from lct import files, storage
from lct.storage import Info, Remote, StorageError

DEFAULT_GB = 100
UNSAVED = 'unsaved'  # in the record of an entry that is not a copy alone, and is kept
_held = {}  # {path of a lock: its open file} of what this process uses


def root() -> Path:
    """The folder of all copies."""
    chosen = os.environ.get('LCT_CACHE_DIR', '')
    return Path(chosen).expanduser().absolute() if chosen else files.user_cache() / 'buckets'


def variable(name: str, default: float, unit: str) -> float:
    """The number in an environment variable.

    Raises:
      ValueError: if it is not above 0.
    """
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ValueError(f'{name}={text} must be a number of {unit} above 0')
    return value


def entry_of(kind: str, key: str) -> Path:
    """The folder of a copy of some kind."""
    return root() / kind / hashlib.sha256(key.encode()).hexdigest()[:24]


def local(path: str | os.PathLike) -> str | os.PathLike:
    """A path as it is if it is local, else the copy of the file, folder or glob that it names."""
    return fetch(path) if storage.scheme_of(path) else path


def fetch(url: str | os.PathLike) -> Path:
    """The local copy of a file, a folder or a glob by its URL, downloaded unless it is there.

    Raises:
      StorageError: if there is nothing under the URL, if it cannot be read, or if there is no room for it.
    """
    remote, pattern = Remote(url), ''
    if glob.has_magic(remote.url):
        fixed = remote.url[:glob.magic_check.search(remote.url).start()].rpartition('/')[0]
        pattern = remote.url.removeprefix(fixed + '/')
        remote = Remote(fixed)
    found = {name: info for name, info in remote.list().items()
             if not pattern or fnmatch.fnmatch(name, pattern.replace('**/', '*'))}
    if not found:
        raise StorageError(f'{storage.url_of(url)} does not exist or is empty; check its name')
    folder = _copy(remote, found)
    return folder / pattern if pattern else folder


class RemoteFolder:
    """A folder by its URL, of which each file is copied when it is first used.

    sizes: {name: bytes} of its files.
    """

    def __init__(self, url: str | os.PathLike):
        self._url, self._found = storage.url_of(url), Remote(url).list()
        self.sizes = {name: info.size for name, info in self._found.items()}

    def path(self, name: str) -> Path:
        """The local copy of a file: to be opened at once, as it may be deleted for room later.

        Raises:
          StorageError: if it does not exist, or cannot be copied.
        """
        if name not in self._found:
            raise StorageError(f'{self._url}/{name} does not exist; check its name')
        return _copy(Remote(f'{self._url}/{name}'), {'': self._found[name]}, keep=False)


def _copy(remote, found: dict[str, Info], keep: bool = True) -> Path:
    """The local copy of objects {name: Info} of a folder, or of the one {'': Info}.

    keep: hold it while this process lives.
    """
    versions = json.dumps([remote.url, sorted((name, *info[:2]) for name, info in found.items())])
    entry = entry_of('objects', versions)
    target, record = entry / remote.name, entry.with_suffix('.json')
    entry.parent.mkdir(parents=True, exist_ok=True)
    in_use = entry.with_suffix('.lock')
    keep = keep or in_use in _held
    hold(in_use)
    with open(entry.with_suffix('.download'), 'a') as lock:
        with contextlib.suppress(OSError):  # some network file systems have no flock
            fcntl.flock(lock, fcntl.LOCK_EX)
        if record.is_file() and _is_complete(target, found):
            os.utime(record)  # when it was used
        else:
            make_room(sum(info.size for info in found.values()), remote.url)
            storage.in_parallel(lambda name: _download(remote, name, target, found[name]), found)
            files.write_atomically(record, json.dumps({'url': remote.url, 'bytes': _bytes_below(entry)}))
    if not keep:
        release(in_use)
    return target


def _download(remote, name, target, info):
    """Download an object below target, unless a download that was stopped has it."""
    path = target / name if name else target
    if path.is_file() and path.stat().st_size == info.size:
        return
    with files.atomic_path(path) as partial:
        remote.get(name, partial, info)


def _is_complete(target, found):
    paths = {target / name if name else target: info.size for name, info in found.items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def hold(path: Path, alone: bool = False) -> bool:
    """Keep an entry from deletion by other processes until this one ends: lock its file.

    alone: only if no other process holds it. Returns whether it is held.
    """
    if path in _held and not alone:
        return True
    while True:
        file = open(path, 'a')  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            file.close()
            return False
        except OSError:
            pass  # some network file systems have no flock
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            _held[path] = file
            return True
        file.close()  # of an entry that another process deleted meanwhile


def release(path: Path) -> None:
    """Let an entry go that was held."""
    if file := _held.pop(path, None):  # another thread may have let it go
        file.close()


def make_room(needed: int, url: str) -> None:
    """Delete copies that no process uses, the ones unused for longest first, until `needed` bytes more stay
    within the bound and fit on the disk.

    Raises:
      StorageError: if they cannot.
    """
    bound, entries = variable('LCT_CACHE_GB', DEFAULT_GB, 'gigabytes') * 1e9, {}
    root().mkdir(parents=True, exist_ok=True)
    for record in root().glob('*/*.json'):
        entries[record] = record.stat().st_mtime, _bytes_below(record.with_suffix(''))
    total = sum(size for _, size in entries.values())
    for record in sorted(entries, key=entries.get):
        if total + needed <= bound and needed < shutil.disk_usage(root()).free:
            break
        total -= entries[record][1] if _delete_unused(record.with_suffix('')) else 0
    free = shutil.disk_usage(root()).free
    if total + needed > bound or needed >= free:
        raise StorageError(
            f'{url} has {needed / 1e9:.2f} GB to copy, but {root()} may hold {bound / 1e9:g} GB of which '
            f'{total / 1e9:.2f} are in use, and its disk has {free / 1e9:.1f} GB free; raise LCT_CACHE_GB, '
            'or set LCT_CACHE_DIR to a folder on a larger disk')


def delete(entry: Path) -> None:
    """Delete an entry that this process holds alone."""
    entry.with_suffix('.json').unlink(missing_ok=True)
    shutil.rmtree(entry, ignore_errors=True)
    for kind in ('.lock', '.download'):
        entry.with_suffix(kind).unlink(missing_ok=True)


def _delete_unused(entry):
    """Delete an entry unless a process holds it. Returns whether it is gone."""
    lock = entry.with_suffix('.lock')
    if lock in _held or not hold(lock, alone=True):
        return False
    with contextlib.suppress(OSError, ValueError):
        if json.loads(entry.with_suffix('.json').read_text()).get(UNSAVED):
            release(lock)
            return False
    delete(entry)
    release(lock)
    return True


def _bytes_below(folder):
    return sum(os.path.getsize(os.path.join(parent, name))
               for parent, _, names in os.walk(folder) for name in names)
