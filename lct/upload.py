"""New folders at URLs: written locally, then uploaded."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lct import bucket_cache, files, storage
from lct.storage import Remote

UPLOADING = '.uploading'  # an object that is there from the first to the last of a folder
LAST = ('config.json', 'params.json', 'index.json')  # without them a folder is not read: uploaded last


def upload(folder: Path, remote: Remote) -> None:
    """Upload all files of a folder, those without which nobody reads it last."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
    storage.in_parallel(lambda name: remote.put(folder / name, name),
                        [name for name in names if name not in LAST])
    for name in [name for name in names if name in LAST]:
        remote.put(folder / name, name)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike, overwrite: bool = False, key: str = '') -> Iterator[Path]:
    """The local folder to write in the block: path itself, or one that is uploaded to it at the end.

    overwrite: replace the files directly under the URL. key: names the work, which another call with the same
    one continues in the same folder; without, the folder is new.

    Raises:
      ValueError: if there is something under the URL, or another process writes it.
      storage.StorageError: if it cannot be uploaded.
    """
    if not storage.scheme_of(path):
        yield Path(path)
        return
    remote = Remote(path)
    before = remote.list()
    if before and not overwrite and UPLOADING not in before:
        raise ValueError(f'{remote.url} exists; remove it or give another name')
    entry = bucket_cache.entry_of('outputs', json.dumps([remote.url, key]))
    entry.mkdir(parents=True, exist_ok=True)
    lock = entry.with_suffix('.lock')
    if not bucket_cache.hold(lock, alone=True):
        raise ValueError(f'another process is writing {remote.url}; wait for it or stop it')
    try:
        if not key:
            shutil.rmtree(entry)
            entry.mkdir()
        files.write_atomically(entry.with_suffix('.json'), json.dumps({'url': remote.url}))
        yield entry / remote.name
        remote.write(UPLOADING, b'')
        remote.remove([name for name in LAST if name in before])
        remote.remove([name for name in before if '/' not in name and name not in (*LAST, UPLOADING)])
        upload(entry / remote.name, remote)
        remote.remove([UPLOADING])
        bucket_cache.delete(entry)
    finally:
        bucket_cache.release(lock)
