"""The token ids of a corpus on disk: shards and tables that are memory-mapped, with their sha256.

    index.json          version, tokenizer, vocab_size, sources, counts; of each file: count, bytes, sha256
    shard-00000.npy ..  uint16 or int32 [tokens]: all documents one after the other, cut anywhere into shards
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

import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

FORMAT, VERSION = 'lct token store', 1
TABLES = {'offsets': np.int64, 'lengths': np.int64, 'source_of': np.int32, 'names': np.uint8,
          'name_offsets': np.int64}


def ids_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which ids below vocab_size are stored: uint16 or int32, little-endian."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<i4')


class Store:
    """A finished store. Opening it reads the index alone, so the time does not depend on the corpus.

    lengths: int64 [documents], tokens without special tokens. sources: their names.
    source_of: int32 [documents], index into sources. names: a sequence of str, read on access.
    tokenizer_hash: the tokenizer's fingerprint.
    fingerprint: sha256 of the index, and thereby of all contents.
    counts: of empty documents that were left out, of bad records that were skipped, of cuts that may have
      changed ids.

    Raises:
      ValueError: for a folder that is not a store of this version, and for files of a wrong size.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self._index = index = _read_index(self.folder)
        self._dtype = ids_dtype(index['vocab_size'])
        self.tokenizer_hash, self.vocab_size = index['tokenizer_hash'], index['vocab_size']
        self.fingerprint, self.counts = index['sha256'], index['counts']
        self.num_tokens, self.num_documents = index['num_tokens'], index['num_documents']
        self.sources = tuple(index['sources'])
        for name, file in self._files():
            check_size(self.folder / name, file['bytes'])
        tables = {name: _map(self.folder / f'{name}.npy', dtype, index['tables'][name]['count'])
                  for name, dtype in TABLES.items()}
        self.lengths, self.source_of = tables['lengths'], tables['source_of']
        self._offsets = tables['offsets']
        self.names = _Names(tables['names'], tables['name_offsets'])
        self._shard_ends = np.cumsum([shard['count'] for shard in index['shards']])
        self._shards = {}

    def __reduce__(self) -> tuple:
        return Store, (self.folder,)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: tokens start..stop of a document. No others are read.

        Raises:
          ValueError: if the document does not have them.
        """
        if not (0 <= document < self.num_documents and 0 <= start <= stop <= self.lengths[document]):
            held = self.lengths[document] if 0 <= document < self.num_documents else 'none'
            raise ValueError(f'tokens {start} to {stop} of document {document}: {self.folder} has '
                             f'{self.num_documents} documents, and of this one {held} tokens')
        out = np.empty(stop - start, np.int32)
        at, done = int(self._offsets[document]) + start, 0
        while done < len(out):
            number = int(np.searchsorted(self._shard_ends, at, side='right'))
            end = int(self._shard_ends[number])
            first = at - (end - self._index['shards'][number]['count'])
            count = min(len(out) - done, end - at)
            out[done:done + count] = self._shard(number)[first:first + count]
            at, done = at + count, done + count
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
            path = self.folder / name
            check_size(path, file['bytes'])
            if sha256_of(path) != file['sha256']:
                raise ValueError(f'{path} differs from what was written (another sha256); copy it again from '
                                 'an intact store, or tokenize the corpus again')
            done += file['bytes']
            if progress is not None:
                progress(done, total)

    def _files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(name, {count, bytes, sha256}) of every file but the index."""
        yield from ((f'{name}.npy', file) for name, file in self._index['tables'].items())
        yield from ((shard_name(i), file) for i, file in enumerate(self._index['shards']))

    def _shard(self, number: int, max_open: int = 256) -> np.ndarray:
        shard = self._shards.get(number)
        if shard is None:
            count = self._index['shards'][number]['count']
            shard = _map(self.folder / shard_name(number), self._dtype, count)
            if len(self._shards) >= max_open:  # each open map holds a file descriptor
                self._shards.clear()
            self._shards[number] = shard
        return shard


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


def shard_name(number: int) -> str:
    return f'shard-{number:05d}.npy'


def _map(path: pathlib.Path, dtype: np.dtype, count: int) -> np.ndarray:
    """The memory-mapped numbers of a .npy, which must be what the index says."""
    try:
        numbers = np.load(path, mmap_mode='r')
    except ValueError as error:
        raise ValueError(f'{path} is damaged ({error}); copy it again') from None
    if numbers.dtype != dtype or numbers.shape != (count,):
        raise ValueError(f'{path} holds {numbers.dtype} {list(numbers.shape)} where the index says '
                         f'{np.dtype(dtype)} [{count}]; copy it again')
    return numbers.view(np.ndarray)


def check_size(path: pathlib.Path, expected: int) -> None:
    """Refuse a file that is missing or does not have the expected bytes."""
    size = path.stat().st_size if path.exists() else None
    if size != expected:
        found = 'is missing' if size is None else f'has {size} bytes where {expected} were written'
        raise ValueError(f'{path} {found}; copy it again from an intact store, or tokenize the corpus again')


def _read_index(folder: pathlib.Path) -> dict[str, Any]:
    path = folder / 'index.json'
    if not path.is_file():
        raise ValueError(f'{folder} is not a token store: it has no index.json; make one with '
                         'experiments/tokenize_corpus.py')
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again') from None
    if not isinstance(index, dict) or index.get('format') != FORMAT:
        raise ValueError(f'{path} is not the index of a token store; give the folder of one')
    if index.get('version') != VERSION:
        raise ValueError(f'{folder} is a token store of version {index.get("version")!r}, and this release '
                         f'reads version {VERSION}; tokenize the corpus again, '
                         'or use the release that wrote it')
    if index.get('sha256') != fingerprint_of(index):
        raise ValueError(f'{path} differs from what was written (another sha256); copy it again')
    return index


def fingerprint_of(index: dict[str, Any]) -> str:
    """sha256 of an index without its own sha256."""
    rest = {key: value for key, value in index.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256_of(path: str | os.PathLike) -> str:
    """sha256 of a file."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
