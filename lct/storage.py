"""Folders and files by URL, such as s3://bucket/folder: in object stores, through fsspec.

Orbax brings fsspec; a scheme needs its own package beside it (s3fs, gcsfs, ...), which also finds the
credentials. Such paths are downloaded (bucket_cache) or mirrored (mirror) into local folders, so that all
other code has local files: memory maps, locks and atomic renames. It never opens a URL.
"""

import base64
import contextlib
import datetime
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/+')  # one slash: what pathlib leaves of two
# What fsspec knows beside stores of files: other names of the local disk, archives, wrappers, web pages.
NOT_STORES = frozenset('file local data zip tar libarchive reference dir cached filecache simplecache '
                       'blockcache async_wrapper asyncwrapper asynclocal generic git github gist http https '
                       'jupyter jlab pyscript dask root dvc'.split())
EXAMPLES = 's3://, gs:// and az://'
PACKAGES = {'s3': 's3fs', 's3a': 's3fs', 'gs': 'gcsfs', 'gcs': 'gcsfs', 'az': 'adlfs', 'abfs': 'adlfs'}
VERSIONS = ('generation', 'ETag', 'etag', 'LastModified', 'last_modified', 'mtime', 'updated', 'created')
TIMES = ('LastModified', 'last_modified', 'mtime', 'updated', 'created')
THREADS = 8  # transfers at once


class StorageError(OSError):
    """A URL cannot be read or written; the message says why."""


class Info(NamedTuple):
    """An object. version: differs for another content. modified: seconds since the epoch, 0 if unknown."""

    size: int
    version: str
    modified: float
    md5: bytes | None = None


def scheme_of(path: str | os.PathLike) -> str:
    """'s3' of 's3://bucket/folder'; '' of a local path."""
    match = SCHEME.match(os.fspath(path))
    return match[1].lower() if match else ''


def url_of(path: str | os.PathLike) -> str:
    """A URL with two slashes after its scheme and none at its end, also of what pathlib makes of it."""
    scheme = scheme_of(path)
    return f'{scheme}://{SCHEME.sub("", os.fspath(path), count=1).strip("/")}'


def refuse_remote(path: str | os.PathLike, name: str = '') -> None:
    """Refuse a path with a scheme where only local ones are supported; else the operating system would make a
    local folder 's3:' of it.

    name: of the flag or field that holds it.

    Raises:
      ValueError: with the remedy.
    """
    if scheme := scheme_of(path):
        remedy = 'write it without file://' if scheme == 'file' else 'give a local path'
        raise ValueError(f'{_named(name)}{os.fspath(path)} has the scheme {scheme}://, which is not '
                         f'supported here; {remedy}')


def elsewhere(folder: str | os.PathLike) -> str:
    """The URL at which the content of a local folder is, as the file FOLDER.url says; '' without one."""
    path = Path(folder)
    path = path.with_name(path.name + '.url')
    return path.read_text().strip() if path.is_file() else ''


def check_scheme(path: str | os.PathLike, name: str = '') -> None:
    """Refuse a URL whose scheme is not the one of a store, or whose package is missing; nothing is read.

    Raises:
      ValueError: with the remedy.
    """
    import fsspec

    scheme = scheme_of(path)
    if scheme == 'file':
        refuse_remote(path, name)
    if scheme in NOT_STORES or scheme not in fsspec.available_protocols():
        raise ValueError(f'{_named(name)}{os.fspath(path)} has the scheme {scheme}://, which is not '
                         f'supported; give a local path or one of a bucket, such as {EXAMPLES}')
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = PACKAGES.get(scheme)
        remedy = f'pip install {package}' if package else str(error)
        raise ValueError(f'{_named(name)}{os.fspath(path)} needs another package; {remedy}') from None


def _named(name):
    name = name.strip()
    return name + ' ' * bool(name and not name.endswith('='))


class Remote:
    """A folder or an object of a store by its URL.

    Raises (every method):
      StorageError: naming the URL. The libraries try again what may pass.
    """

    def __init__(self, url: str | os.PathLike):
        import fsspec

        check_scheme(url)
        self.url = url_of(url)
        self.name = self.url.rpartition('/')[2]
        with _explained(self.url):
            self._files, self._path = fsspec.url_to_fs(self.url, use_listings_cache=False)
        self._path = self._path.rstrip('/')

    def list(self) -> dict[str, Info]:
        """{name relative to this folder: Info} of all objects below it; {'': Info} if it is an object."""
        with _explained(self.url):
            self._files.invalidate_cache()
            found = self._files.find(self._path, detail=True)
            if set(found) == {self._path}:
                found = {self._path: self._files.info(self._path)}
        found = {path[len(self._path):].lstrip('/'): _info(entry) for path, entry in sorted(found.items())
                 if path == self._path or path.startswith(self._path + '/') and path[-1] != '/'}
        if strange := [name for name in found if {'', '.', '..'} & set(name.split('/')) and name]:
            raise StorageError(f'{self.url} has an object {strange[0]!r}, which is not the name of a file; '
                               'rename it')
        return found

    def exists(self, name: str) -> bool:
        """Whether there is an object of this name."""
        with _explained(self._url(name)):
            return bool(self._files.isfile(self._full(name)))

    def read(self, name: str) -> bytes | None:
        """The content of an object, None if it does not exist."""
        with _explained(self._url(name)), contextlib.suppress(FileNotFoundError):
            return self._files.cat_file(self._full(name))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Write or replace an object."""
        with _explained(self._url(name)):
            self._files.pipe_file(self._full(name), content)

    def get(self, name: str, path: Path, info: Info) -> None:
        """Download an object to a local path, which gets the time of the object, and its folders."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with _explained(self._url(name)):
            self._files.get_file(self._full(name), str(path))
            if (size := path.stat().st_size) != info.size:
                raise OSError(f'{size} bytes came instead of {info.size}; it was replaced meanwhile')
            if info.md5 and _md5(path) != info.md5:
                raise OSError('it came with another md5')
        os.utime(path, (info.modified, info.modified))

    def put(self, path: str | os.PathLike, name: str) -> None:
        """Upload a local file."""
        with _explained(self._url(name)):
            self._files.put_file(os.fspath(path), self._full(name))

    def remove(self, names: Iterable[str]) -> None:
        """Delete objects; those that do not exist are no error."""
        for name in names:
            with _explained(self._url(name)), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._full(name))

    def _full(self, name):
        return f'{self._path}/{name}' if name else self._path

    def _url(self, name):
        return f'{self.url}/{name}' if name else self.url


def in_parallel(function, items: Iterable) -> list:
    """[function(item)] by THREADS threads; the first error is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _md5(path):
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'md5').digest()


def _info(entry):
    version = next((str(entry[key]) for key in VERSIONS if entry.get(key) is not None), '')
    when = next((entry[key] for key in TIMES if entry.get(key) is not None), 0)
    with contextlib.suppress(ValueError, TypeError):
        if isinstance(when, str):
            when = datetime.datetime.fromisoformat(when.replace('Z', '+00:00'))
        when = when.timestamp() if isinstance(when, datetime.datetime) else float(when)
    md5 = entry.get('md5Hash')  # of Google's; the ETag of others is not always one
    return Info(int(entry['size'] or 0), version, when if isinstance(when, float) else 0.0,
                base64.b64decode(md5) if md5 else None)


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Whatever the library of a store raises becomes a StorageError."""
    try:
        yield
    except Exception as error:
        text = ' '.join(str(error).split())[:300] or type(error).__name__
        raise StorageError(f'{url} can be neither read nor written ({type(error).__name__}: {text}); check '
                           'its name, the network and your credentials') from error
