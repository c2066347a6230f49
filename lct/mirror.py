"""A work directory in an object store: a local folder that is uploaded while a run writes to it.

An object store has neither appends, nor renames, nor locks. So the run works in a local folder, in which a
file or folder that was given its final name is complete; a thread uploads what changed.

    URL/...                 the files of the folder, each replaced as a whole
    URL/checkpoints/12/...  a folder that is complete or absent: it counts once
    URL/checkpoints/12.commit.json  exists, which is written last and deleted first: {name: [bytes, crc32]}
    URL/checkpoints.url     instead of the two for gs://, where Orbax itself writes URL/checkpoints, so that
                            several hosts need no shared folder
    URL/.owner.json         the process that uploads; a later one takes over if it no longer renews this

A run that is continued on the machine of the last one finds its folder; on another it downloads what counts.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lct import bucket_cache, files, storage
from lct.storage import Remote, StorageError
from lct.upload import upload
from lct.work_files import ATOMIC, COMMIT, crc32, folder_state, is_single, record_of, states

OWNER = '.owner.json'
BEAT_S, LOST_AFTER_S = 20.0, 70.0  # renewals of the owner; without one it is given up
DIRECT, POINTER = ('gs',), 'checkpoints.url'
SYNC_S = 30.0  # between uploads; LCT_SYNC_S changes it


class Mirror:
    """The local folder of a work directory at a URL, and the threads that upload it and show that it is used.

    folder: the local one. warn: takes a line.
    """

    def __init__(self, url: str | os.PathLike, warn: Callable[[str], object]):
        self._remote, self._warn = Remote(url), warn
        self.url, self.folder = self._remote.url, local_folder(url)
        self._entry = self.folder.parent
        self._owner = {'id': secrets.token_hex(8), 'host': socket.gethostname(), 'pid': os.getpid()}
        self._uploaded: dict[str, Any] = {}  # {name of a file or an atomic folder: its state there}
        self._direct = storage.scheme_of(url) in DIRECT
        self._interval_s = bucket_cache.variable('LCT_SYNC_S', SYNC_S, 'seconds')
        self._uploading = threading.Lock()
        self._stop, self._released, self._lost = threading.Event(), threading.Event(), False
        self._threads = [threading.Thread(target=target, name=target.__name__, daemon=True)
                         for target in (self._upload_changes, self._renew)]

    def open(self) -> Path:
        """Take the work directory over and start to upload. Returns the local folder, in the state of the
        last run.

        Raises:
          ValueError: if another process runs in it, or if it holds something else.
          StorageError: if it cannot be read.
        """
        self._entry.mkdir(parents=True, exist_ok=True)
        if not bucket_cache.hold(self._entry.with_suffix('.lock'), alone=True):
            raise self._taken()
        try:
            last = self._wait_for_owner()
            known = _parse_file(self._entry.with_suffix('.json')).get('id')
            found = self._list()
            if last is None and found:
                raise ValueError(f'{self.url} is not empty, and no run has uploaded to it; choose another '
                                 '--workdir')
            if last is None or known != last.get('id'):  # another machine went on, or the URL was emptied
                self._download(found)
            self._note_uploaded(found)
            if self._direct:
                files.write_atomically(self.folder / POINTER, f'{self.url}/checkpoints\n')
            self._write_owner()
            self._write_record(unsaved=True)
        except BaseException:
            bucket_cache.release(self._entry.with_suffix('.lock'))
            raise
        for thread in self._threads:
            thread.start()
        return self.folder

    def flush(self) -> None:
        """Upload what changed, now."""
        with self._uploading:
            self._upload()

    def close(self) -> None:
        """Upload what is left and release the work directory.

        Raises:
          StorageError: if it cannot be uploaded; the local folder keeps it.
          ValueError: if another process has taken the work directory over.
        """
        self._stop.set()
        self._threads[0].join()
        try:
            self.flush()
            self._released.set()
            self._threads[1].join()
            if self._lost:
                raise ValueError(f'another process took {self.url} over, so this one has stopped; run one at '
                                 'a time, or choose another --workdir')
            self._remote.write(OWNER, json.dumps({**self._owner, 'pid': 0}).encode())
            self._write_record(unsaved=False)
        except StorageError as error:
            raise StorageError(f'{error}; {self.folder} holds what is not uploaded: the same command on this '
                               'machine continues') from error
        finally:
            self._released.set()
            bucket_cache.release(self._entry.with_suffix('.lock'))

    def _taken(self):
        return ValueError(f'another process runs in {self.url}; wait for it, or choose another --workdir')

    def _wait_for_owner(self):
        """The last owner, once it is certain that it has ended; None if there is none."""
        last, end = self._remote.read(OWNER), time.monotonic() + LOST_AFTER_S
        owner = _parse(last)
        here = owner.get('host') == self._owner['host']
        ended = not owner.get('pid') or here and not _is_other_process(owner['pid'])
        if not ended:
            self._warn(f'{self.url} was in use by process {owner["pid"]} of {owner.get("host")}; '
                       f'waiting up to {LOST_AFTER_S:.0f} s to see whether it still runs')
        while not ended and time.monotonic() < end:
            time.sleep(LOST_AFTER_S / 20)
            if self._remote.read(OWNER) != last:
                raise self._taken()
        return owner if last else None

    def _write_owner(self):
        self._remote.write(OWNER, json.dumps({**self._owner, 'beat': time.time()}).encode())

    def _write_record(self, unsaved):
        record = {'url': self.url, 'id': self._owner['id'], bucket_cache.UNSAVED: unsaved}
        files.write_atomically(self._entry.with_suffix('.json'), json.dumps(record))

    def _renew(self):
        """The thread that shows that this process lives, and notices when another one has taken over."""
        while not self._released.wait(BEAT_S):
            with contextlib.suppress(OSError):  # told by the other thread
                if self._check_owner():
                    self._write_owner()

    def _check_owner(self):
        """Whether this process still owns the work directory; else it is told to stop."""
        if not self._lost and _parse(self._remote.read(OWNER)).get('id') not in (None, self._owner['id']):
            self._lost = True
            self._warn(f'WARNING: another process took {self.url} over; this one stops')
            os.kill(os.getpid(), signal.SIGTERM)
        return not self._lost

    def _upload_changes(self):
        """The thread that uploads; failures wait for the next round."""
        failed = False
        while not self._stop.wait(self._interval_s) and not self._lost:
            try:
                self.flush()
                failed = False
            except OSError as error:
                if not failed:
                    self._warn(f'WARNING: {error}; the run goes on; {self.folder} is uploaded when it can')
                failed = True

    def _upload(self):
        """Upload what changed since the last round, and delete what is gone. Single files come first: what
        was written before a checkpoint is there when the checkpoint counts. Older ones go when it does."""
        if not self._check_owner():
            return
        single, atomic = states(self.folder)
        for name, state in {**single, **atomic}.items():
            if self._uploaded.get(name) == state:
                continue
            try:
                if name in single:
                    self._remote.put(self.folder / name, name)
                elif not self._upload_folder(name, state):
                    continue
            except OSError:
                if (self.folder / name).exists():
                    raise
                continue  # an old checkpoint that the run deleted meanwhile
            self._uploaded[name] = state
        for name in [name for name in self._uploaded if name not in single and name not in atomic]:
            self._delete(name)
            del self._uploaded[name]

    def _upload_folder(self, name, state):
        """Upload an atomic folder, its commit last. Returns whether it stayed the same meanwhile."""
        self._delete(name)
        record = record_of(self.folder / name)
        upload(self.folder / name, Remote(f'{self.url}/{name}'))
        if unchanged := folder_state(self.folder / name) == state:
            self._remote.write(name + COMMIT, json.dumps(record).encode())
        return unchanged

    def _delete(self, name):
        if not ATOMIC.fullmatch(name):
            self._remote.remove([name])
            return
        self._remote.remove([name + COMMIT])
        folder = Remote(f'{self.url}/{name}')
        folder.remove(folder.list())

    def _download(self, found):
        """Put into the local folder what counts of the objects found under the URL, and nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        wanted = {f'{folder}/{name}': entry for folder, record in self._commits(found).items()
                  for name, entry in record.items()}
        wanted |= {name: None for name in found if is_single(name)}
        bucket_cache.make_room(sum(found[name].size for name in wanted if name in found), self.url)
        self.folder.mkdir(parents=True)
        storage.in_parallel(lambda name: self._get(name, found.get(name), wanted[name]), wanted)

    def _get(self, name, info, entry):
        path = self.folder / name
        if info is not None:
            self._remote.get(name, path, info)
        if info is None or entry and entry != [info.size, crc32(path)]:
            raise StorageError(f'{self.url}/{name} is not what was uploaded; delete the object '
                               f'{ATOMIC.match(name)[0]}{COMMIT} there to continue without its folder')

    def _list(self):
        """{name: Info} of the objects under the URL that are ours, not Orbax's."""
        return {name: info for name, info in self._remote.list().items()
                if not (self._direct and name.startswith('checkpoints/'))}

    def _commits(self, found):
        """{atomic folder: its record} of those that count."""
        names = [name.removesuffix(COMMIT) for name in found if name.endswith(COMMIT)]
        return {name: _parse(self._remote.read(name + COMMIT)) for name in names if ATOMIC.fullmatch(name)}

    def _note_uploaded(self, found):
        """Find out what need not be uploaded again, and what is to be deleted."""
        commits = self._commits(found)
        for name in {match[0] for name in found if (match := ATOMIC.match(name))} | set(commits):
            same = commits.get(name) == record_of(self.folder / name) != {}
            self._uploaded[name] = folder_state(self.folder / name) if same else None
        for name in filter(is_single, found):
            if (self.folder / name).exists():  # others may be of a run in a folder below this one
                self._uploaded[name] = None


def local_folder(url: str | os.PathLike) -> Path:
    """The local folder of a work directory at a URL."""
    remote = Remote(url)
    return bucket_cache.entry_of('workdirs', remote.url) / remote.name


def copy(url: str | os.PathLike, number: int) -> Path:
    """A local folder for process `number` of several: the one that process 0 mirrors, or, where Orbax writes
    checkpoints to the bucket, a copy of its single files. Process 0 must have opened it."""
    if storage.scheme_of(url) not in DIRECT:
        return local_folder(url)
    remote = Remote(url)
    entry = bucket_cache.entry_of('workdirs', f'{remote.url} {number}')
    entry.mkdir(parents=True, exist_ok=True)
    bucket_cache.hold(entry.with_suffix('.lock'))
    files.write_atomically(entry.with_suffix('.json'), json.dumps({'url': remote.url}))
    folder = entry / remote.name
    shutil.rmtree(folder, ignore_errors=True)
    found = {name: info for name, info in remote.list().items()
             if is_single(name) and not name.startswith('checkpoints/')}
    storage.in_parallel(lambda name: remote.get(name, folder / name, found[name]), found)
    return folder


@contextlib.contextmanager
def mirrored(url: str | os.PathLike, warn: Callable[[str], object] = print) -> Iterator[Path]:
    """The local folder of a work directory at a URL, uploaded before the block, in it, and at its end; see
    Mirror."""
    mirror = Mirror(url, warn)
    folder = mirror.open()
    try:
        mirror.flush()  # what a killed run left; also for the other processes
        yield folder
    except BaseException:
        try:
            mirror.close()
        except (OSError, ValueError) as error:
            warn(f'WARNING: {error}')
        raise
    mirror.close()


def _is_other_process(pid: int) -> bool:
    """Whether a process of this machine runs that is not this one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def _parse_file(path: Path) -> Mapping[str, Any]:
    return _parse(path.read_bytes()) if path.is_file() else {}


def _parse(content: bytes | None) -> Mapping[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(content or b'{}')
        return value if isinstance(value, dict) else {}
    return {}
