"""Writes a token store (see store), a shard at a time.

A writer that was stopped leaves nothing under the name of the store. Its closed shards serve the next writer.

    FOLDER.partial/plan.json     the inputs and options of the store: another plan is refused
                   00000.json    the record of closed shard 0: checksum, where its input ended, counts so far
                   00000.npz     the documents that end in it, and the crc32 of its chunks
                   store/        becomes FOLDER
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
from array import array
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

from lct import files, storage
from lct.checksums import chunk_crc32s
from lct.data.corpus.index import CHUNK, COUNTS, FORMAT, TABLES, VERSION, fingerprint_of, ids_dtype
from lct.data.corpus.shards import check_size, sha256_of, shard_name
from lct.data.corpus.store import Store
from lct.data.sequence import KINDS, TEXT

START = {'cursor': None, 'counts': {}, 'num_tokens': 0, 'num_documents': 0, 'document_start': 0,
         'name_bytes': 0, 'sources': []}


class Writer(contextlib.AbstractContextManager):
    """Writes a store into FOLDER.partial, a shard at a time; finish() renames it to FOLDER.

    A Writer that is opened after another one was stopped, in whatever way, continues after its last closed
    shard.

    cursor: where the next shard begins in the input, as given to close_shard; None at the beginning.
    counts: Counter of COUNTS.

    Args:
      folder: the store; must not exist.
      plan: dict of JSON values, equal for two runs that write the same store.
    Raises:
      ValueError: if the folder exists, if it was begun with another tokenizer or plan, or if another process
        is writing it.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer_hash: str, vocab_size: int, plan: dict[str, Any]):
        storage.refuse_remote(folder)
        self.folder = pathlib.Path(folder)
        self.partial = self.folder.with_name(self.folder.name + '.partial')
        self._store = self.partial / 'store'
        if self.folder.exists():
            raise ValueError(f'{self.folder} exists; remove it or give another name')
        self._store.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.partial / 'lock', 'w')  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f'another process is writing {self.partial}; wait for it or stop it') from None
        self._plan = {'version': VERSION, 'tokenizer': tokenizer_hash, 'vocab_size': vocab_size, **plan}
        self._dtype = ids_dtype(vocab_size)
        try:
            self._check_plan()
            self._resume()
        except ValueError:
            self._lock.close()
            raise
        self._open_shard()

    def _resume(self) -> None:
        self._records = []
        while (record := self._read_record(len(self._records))) is not None:
            self._records.append(record)
        last = self._records[-1] if self._records else START
        self.cursor, self.counts = last['cursor'], Counter(last['counts'])
        self.num_tokens, self.num_documents = last['num_tokens'], last['num_documents']
        self._document_start, self._name_bytes = last['document_start'], last['name_bytes']
        self._sources = {name: i for i, name in enumerate(last['sources'])}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self._shard.abandon()
        self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f'{self.partial} cannot grow: {error.strerror}; make room and run the '
                          'same command again, it continues after the last closed shard') from error

    @property
    def shard_tokens(self) -> int:
        """Tokens in the open shard."""
        return self._shard.count

    def append(self, ids: np.ndarray, documents: Iterable[tuple[str, str, int]]) -> None:
        """Append ids int [n] to the stream of tokens.

        documents: (name, source, end) of the documents that end in ids; end is a position in ids. A document
          without tokens is counted and left out.

        Raises:
          ValueError: for an id outside the vocabulary, naming document and position, and for the source of a
            document if it has a reserved name.
        """
        if len(ids) and not 0 <= ids.min() <= ids.max() < self._plan['vocab_size']:
            raise self._wrong_id(ids, documents)
        begin = self.num_tokens
        self._shard.append(ids)
        self.num_tokens += len(ids)
        self._groups.append(self.num_tokens)
        for name, source, end in documents:
            end = begin + int(end)
            if end == self._document_start:
                self.counts['empty'] += 1
                continue
            self._document_start = end
            self.num_documents += 1
            check_source(source)
            self._ends.append(end)
            self._source_of.append(self._sources.setdefault(source, len(self._sources)))
            self._names += name.encode('utf-8', 'surrogateescape')
            self._name_ends.append(self._name_bytes + len(self._names))

    def _wrong_id(self, ids: np.ndarray, documents: Iterable[tuple[str, str, int]]) -> ValueError:
        at = int(np.argmax((ids < 0) | (ids >= self._plan['vocab_size'])))
        begin, document = self._document_start - self.num_tokens, f'document {self.num_documents}'
        for name, _, end in documents:
            if at < end:
                document = f'document {name!r}'
                break
            begin = end
        return ValueError(f'token {at - begin} of {document} has id {ids[at]}, which is not in the vocabulary'
                          f' of {self._plan["vocab_size"]}; the tokenizer states a wrong vocab_size')

    def close_shard(self, cursor: Any) -> None:
        """Make everything appended so far durable. A run that continues from here reads from cursor on."""
        number = len(self._records)
        shard = self._shard.close()
        with files.atomic_file(self.partial / f'{number:05d}.npz', 'wb') as file:
            np.savez(file, ends=np.array(self._ends, np.int64), source_of=np.array(self._source_of, np.int32),
                     names=np.frombuffer(self._names, np.uint8),
                     name_ends=np.array(self._name_ends, np.int64), groups=np.array(self._groups, np.int64),
                     crc32s=np.array(chunk_crc32s(self._store / shard_name(number), CHUNK), np.uint32))
        self._name_bytes += len(self._names)
        arrays = sha256_of(self.partial / f'{number:05d}.npz')
        record = {'file': shard, 'arrays': arrays, 'cursor': cursor, 'num_tokens': self.num_tokens,
                  'counts': dict(self.counts), 'num_documents': self.num_documents,
                  'document_start': self._document_start, 'name_bytes': self._name_bytes,
                  'sources': list(self._sources)}
        # The record is the last of the three files: it makes them count.
        text = json.dumps({**record, 'sha256': fingerprint_of(record)})
        files.write_atomically(self.partial / f'{number:05d}.json', text)
        self._records.append(record)
        self.cursor = cursor
        self._open_shard()

    def finish(self, cursor: Any) -> Store:
        """Write tables and index and rename the folder. Raises ValueError if there are no documents."""
        if self._shard.count:
            self.close_shard(cursor)
        if not self.num_documents:
            raise ValueError(f'the corpus of {self.folder} holds no text; it had {self.counts["empty"]} '
                             f'empty documents and {self.counts["bad"]} bad ones')
        self._shard.abandon()
        index = {
            'format': FORMAT, 'version': VERSION, 'tokenizer_hash': self._plan['tokenizer'],
            'vocab_size': self._plan['vocab_size'], 'chunk_bytes': CHUNK, 'num_tokens': self.num_tokens,
            'num_documents': self.num_documents, 'sources': list(self._sources),
            'counts': {key: self.counts[key] for key in COUNTS}, 'tables': self._write_tables(),
            'shards': [record['file'] for record in self._records]}
        text = json.dumps({**index, 'sha256': fingerprint_of(index)}, indent=1) + '\n'
        files.write_atomically(self._store / 'index.json', text)
        os.rename(self._store, self.folder)
        shutil.rmtree(self.partial)
        return Store(self.folder)

    def finish_part(self, cursor: Any, marker: str) -> pathlib.Path:
        """Make a part of a store of what was written (see parts.py): a folder of closed shards, in which the
        file `marker` makes them count. Returns the folder."""
        if self._shard.count:
            self.close_shard(cursor)
        self._shard.abandon()
        values = {'shards': len(self._records), 'counts': dict(self.counts), 'num_tokens': self.num_tokens,
                  'num_documents': self.num_documents}
        files.write_atomically(self.partial / marker,
                               json.dumps({**values, 'sha256': fingerprint_of(values)}))
        os.rename(self.partial, self.folder)
        return self.folder

    def _check_plan(self) -> None:
        path = self.partial / 'plan.json'
        if not (self.partial / '00000.json').exists():  # no shard to continue from: any plan will do
            files.write_atomically(path, json.dumps(self._plan))
        begun = self._read_json(path)
        for key, value in self._plan.items():
            if begun.get(key) != value and key == 'corpus':
                raise ValueError(f'the files of the corpus changed since {self.partial} was begun; remove '
                                 'that folder to begin anew')
            if begun.get(key) != value:
                raise ValueError(f'{self.partial} was begun with {key} {begun.get(key)!r}, and this run has '
                                 f'{value!r}; a store has one {key}: give the same, or remove the folder')

    def _read_record(self, number: int) -> dict[str, Any] | None:
        path = self.partial / f'{number:05d}.json'
        if not path.exists():
            return None
        record = self._read_json(path)
        if record.get('sha256') != fingerprint_of(record):
            raise self._damaged(path)
        check_size(self._store / shard_name(number), record['file']['bytes'])
        return record

    def _read_json(self, path: pathlib.Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text())
        except (ValueError, RecursionError, FileNotFoundError):
            raise self._damaged(path) from None
        return value if isinstance(value, dict) else {}

    def _damaged(self, path: pathlib.Path) -> ValueError:
        return ValueError(f'{path} differs from what was written; remove {self.partial} to begin anew')

    def _open_shard(self) -> None:
        self._shard = _NpyFile(self._store / shard_name(len(self._records)), self._dtype)
        self._ends, self._name_ends = array('q'), array('q')
        self._source_of, self._names, self._groups = array('i'), bytearray(), array('q')

    def _write_tables(self) -> dict[str, dict[str, Any]]:
        tables = {name: _NpyFile(self._store / f'{name}.npy', dtype) for name, dtype in TABLES.items()}
        for name in ('offsets', 'name_offsets'):
            tables[name].append(np.zeros(1, np.int64))
        end = 0
        for number, record in enumerate(self._records):
            path = self.partial / f'{number:05d}.npz'
            if not path.exists() or sha256_of(path) != record['arrays']:
                raise self._damaged(path)
            with np.load(path) as arrays:
                shard = dict(arrays)
            tables['offsets'].append(shard['ends'])
            tables['lengths'].append(np.diff(shard['ends'], prepend=end))
            tables['source_of'].append(shard['source_of'])
            tables['names'].append(shard['names'])
            tables['name_offsets'].append(shard['name_ends'])
            tables['crc32s'].append(shard['crc32s'])
            end = shard['ends'][-1] if len(shard['ends']) else end
        return {name: file.close() for name, file in tables.items()}


def check_source(name: str) -> None:
    """Refuse a name of a source that means something else in the weights of a mixture."""
    if name in (TEXT, *KINDS):
        raise ValueError(f'a source of the corpus is named {name!r}, which in a mixture is a kind of '
                         'sequence; name it otherwise: NAME=FOLDER, or another --source-field')


class _NpyFile:
    """A one-dimensional .npy that grows, under a temporary name until it is closed."""

    def __init__(self, path: pathlib.Path, dtype: np.dtype):
        self.path, self.dtype, self.count = path, np.dtype(dtype), 0
        self._partial = files.partial_path(path)
        self._file = open(self._partial, 'wb')  # noqa: SIM115
        self._write_header()

    def append(self, numbers: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(numbers, self.dtype).data)
        self.count += len(numbers)

    def close(self) -> dict[str, Any]:
        """Returns {count, bytes, sha256}."""
        self._file.seek(0)
        self._write_header()
        self._file.close()
        digest = sha256_of(self._partial)
        files.publish(self._partial, self.path)
        return {'count': self.count, 'bytes': os.path.getsize(self.path), 'sha256': digest}

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # of a full disk; the contents are discarded anyway
            self._file.close()
        self._partial.unlink(missing_ok=True)

    def _write_header(self) -> None:
        # numpy pads a header so that the first dim may grow in place: it has one size for every count.
        header = {'descr': np.lib.format.dtype_to_descr(self.dtype), 'fortran_order': False,
                  'shape': (self.count,)}
        np.lib.format.write_array_header_1_0(self._file, header)
