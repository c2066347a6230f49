"""The token ids of a corpus on disk: shards and tables, with checksums of all of them.

    index.json          version, tokenizer, vocab_size, sources, counts; of each file: count, bytes, sha256
    shard-00000.npy ..  uint16 or int32 [tokens]: all documents one after the other, cut anywhere into shards
    crc32s.npy          uint32: the crc32 of every 64 KiB of every shard
    offsets.npy         int64 [documents + 1]: where each document begins in the tokens of all shards
    lengths.npy         int64 [documents]
    source_of.npy       int32 [documents]: index into the sources
    names.npy           uint8: all names in UTF-8
    name_offsets.npy    int64 [documents + 1]: where each name begins

Every file but the index is numpy's .npy: 128 bytes of header, then the numbers. Formats that were considered:
Megatron's .bin/.idx is the closest (it maps as well, but has 32-bit lengths, one file per data set, and no
names, sources, tokenizer or checksums). Parquet, MDS and array_record read a page or a record at a time, and
zarr a chunk, so a slice of a long document costs more than the slice. Arrow IPC maps, but is a dependency of
40 MB.
"""

import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lct import bucket_cache, storage
from lct.data.corpus.index import CHUNK, TABLES, ids_dtype, read_index
from lct.data.corpus.shards import (
    MAX_OPEN,
    Shards,
    check_size,
    damaged,
    sha256_of,
    shard_name,
    wrong_size,
)

MAX_OPEN_COPIES = 16  # files of a bucket; an open one takes room on the disk when its copy is deleted


def is_store(folder: str | os.PathLike) -> bool:
    """Whether there is an index in a folder, or in one of a bucket."""
    if storage.scheme_of(folder):
        return storage.Remote(folder).exists('index.json')
    folder = pathlib.Path(folder)
    return (folder / 'index.json').is_file() and not any(folder.glob('*.mds*'))  # of another library


class Store:
    """A finished store. Opening it reads the index alone, so the time does not depend on the corpus.

    A table is verified when it is first used, and every range of tokens whenever it is read, so that a run
    over a hundredth of a large store reads a hundredth of it. Tables are memory-mapped. Of a store in a
    bucket, each file is copied when it is first used (see bucket_cache).

    lengths: int64 [documents], tokens without special tokens. sources: their names.
    source_of: int32 [documents], index into sources. names: a sequence of str, read on access.
    tokenizer_hash: the tokenizer's fingerprint.
    fingerprint: sha256 of the index, and thereby of all contents.
    counts: of empty documents that were left out, of bad records that were skipped, of cuts that may have
      changed ids.

    Raises:
      ValueError: for a folder that is not a store of a known version, and for files of a wrong size; on use,
        for contents that are not as they were written.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder, self._remote = pathlib.Path(folder), None
        if storage.scheme_of(folder):
            self._remote = bucket_cache.RemoteFolder(folder)
        self._index = index = read_index(self._path('index.json').parent)
        self.version = index['version']
        self.tokenizer_hash, self.vocab_size = index['tokenizer_hash'], index['vocab_size']
        self.fingerprint, self.counts = index['sha256'], index['counts']
        self.num_tokens, self.num_documents = index['num_tokens'], index['num_documents']
        self.sources = tuple(index['sources'])
        for name, file in self._files():
            self._check_size(name, file['bytes'])

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        lengths = self._table('lengths')
        self._check('lengths', lengths.min(initial=0) >= 0 and lengths.sum() == self.num_tokens,
                    f'do not add up to {self.num_tokens} tokens')
        return lengths

    @functools.cached_property
    def source_of(self) -> np.ndarray:
        source_of = self._table('source_of')
        is_valid = source_of.min(initial=0) >= 0 and source_of.max(initial=-1) < len(self.sources)
        self._check('source_of', is_valid, f'are not all below {len(self.sources)}, the number of sources')
        return source_of

    @functools.cached_property
    def names(self) -> Sequence[str]:
        text, offsets = self._table('names'), self._table('name_offsets')
        is_valid = offsets[0] == 0 and offsets[-1] == len(text) and (np.diff(offsets) >= 0).all()
        self._check('name_offsets', is_valid, f'do not ascend from 0 to {len(text)}, the bytes of all names')
        return _Names(text, offsets)

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        offsets = self._table('offsets')
        is_valid = offsets[0] == 0 and np.array_equal(np.diff(offsets), self.lengths)
        self._check('offsets', is_valid, 'contradict lengths.npy')
        return offsets

    @functools.cached_property
    def _shards(self) -> Shards:
        crc32s = np.array(self._table('crc32s')) if self.version > 1 else None
        return Shards(self._path, self._index['shards'], ids_dtype(self.vocab_size), crc32s,
                      self._index.get('chunk_bytes', CHUNK),
                      MAX_OPEN_COPIES if self._remote else MAX_OPEN)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start..stop of a document. No others are read.

        Raises:
          ValueError: if the document does not have them, or their shard is not as it was written.
        """
        if not (0 <= document < self.num_documents and 0 <= start <= stop <= self.lengths[document]):
            held = self.lengths[document] if 0 <= document < self.num_documents else 'none'
            raise ValueError(f'tokens {start} to {stop} of document {document}: {self.folder} has '
                             f'{self.num_documents} documents, and of this one {held} tokens')
        out = np.empty(stop - start, np.int32)
        self._shards.read(int(self._offsets[document]) + start, out)
        return out

    def verify(self, progress: Callable[[int, int], object] | None = None) -> None:
        """Read every file and compare its sha256.

        Args:
          progress: called with (bytes read, bytes in total) after each file.
        Raises:
          ValueError: naming the first file that differs from what was written.
        """
        done, total = 0, sum(file['bytes'] for _, file in self._files())
        for name, file in self._files():
            self._verify_file(name, file)
            done += file['bytes']
            if progress is not None:
                progress(done, total)

    def _path(self, name: str) -> pathlib.Path:
        """The local path of a file of the store."""
        return self._remote.path(name) if self._remote else self.folder / name

    def _check_size(self, name: str, expected: int) -> None:
        if self._remote is None:
            check_size(self.folder / name, expected)
        elif (size := self._remote.sizes.get(name)) != expected:
            raise wrong_size(self.folder / name, size, expected)

    def _files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, {count, bytes, sha256}) of every file but the index."""
        yield from ((f'{name}.npy', file) for name, file in self._index['tables'].items() if name in TABLES)
        yield from ((shard_name(i), file) for i, file in enumerate(self._index['shards']))

    def _verify_file(self, name: str, file: dict[str, Any]) -> None:
        path = self._path(name)
        check_size(path, file['bytes'])
        if sha256_of(path) != file['sha256']:
            raise damaged(path, 'another sha256')

    def _table(self, name: str) -> np.ndarray:
        """A memory-mapped table, verified."""
        file, dtype = self._index['tables'][name], np.dtype(TABLES[name])
        self._verify_file(f'{name}.npy', file)
        if not file['count']:
            return np.zeros(0, dtype)
        offset = file['bytes'] - file['count'] * dtype.itemsize
        return np.memmap(self._path(f'{name}.npy'), dtype, 'r', offset, (file['count'],)).view(np.ndarray)

    def _check(self, name: str, is_valid: bool, contradiction: str) -> None:
        if not is_valid:
            raise ValueError(f'{self.folder / name}.npy has numbers that {contradiction}; tokenize the '
                             'corpus again')


class _Names(Sequence):
    def __init__(self, text: np.ndarray, offsets: np.ndarray):
        self._text, self._offsets = text, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, document: int) -> str:
        if not 0 <= document < len(self):
            raise IndexError(f'document {document} of {len(self)}')
        start, stop = self._offsets[document:document + 2]
        return self._text[start:stop].tobytes().decode('utf-8', 'surrogateescape')
