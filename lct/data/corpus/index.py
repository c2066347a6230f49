"""The index of a token store (see store): reading it strictly."""

import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from lct.checksums import num_chunks

FORMAT, VERSION = 'lct token store', 2
CHUNK = 2**16  # bytes of a shard with a crc32 of their own: about what a disk reads ahead anyway
TABLES = {'offsets': np.int64, 'lengths': np.int64, 'source_of': np.int32, 'names': np.uint8,
          'name_offsets': np.int64, 'crc32s': np.uint32}
COUNTS = ('empty', 'bad', 'inexact_cuts')
MAX_BYTES = 2**26  # a store of 10 TB has an index of 3 MB; the names of many sources may be longer
MAX_COUNT = 2**48  # of anything; a larger number would overflow what is computed from it

Index = dict[str, Any]


def ids_dtype(vocab_size: int) -> np.dtype:
    """The dtype in which ids below vocab_size are stored: uint16 or int32, little-endian."""
    return np.dtype('<u2' if vocab_size <= 2**16 else '<i4')


def read_index(folder: pathlib.Path) -> Index:
    """The index in a folder.

    Raises:
      ValueError: for anything but an index as it was written, of a version that is read here.
    """
    path = folder / 'index.json'
    if not path.is_file():
        raise ValueError(f'{folder} is not a token store: it has no index.json; make one with '
                         'experiments/tokenize_corpus.py')
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f'{path} has {size} bytes, too many for an index (at most {MAX_BYTES}); copy it '
                         'again')
    try:
        index = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again') from None
    if not isinstance(index, dict) or index.get('format') != FORMAT:
        raise ValueError(f'{path} is not the index of a token store; give the folder of one')
    if index.get('version') not in (1, VERSION):
        raise ValueError(f'{folder} is a token store of version {_short(index.get("version"))}, and this '
                         f'release reads versions 1 and {VERSION}; tokenize the corpus again, or use the '
                         'release that wrote it')
    if index.get('sha256') != fingerprint_of(index):
        raise ValueError(f'{path} differs from what was written (another sha256); copy it again')
    try:
        _check(index)
    except ValueError as error:
        raise ValueError(f'{path} {error}; tokenize the corpus again') from None
    return index


def fingerprint_of(index: Index) -> str:
    """sha256 of an index without its own sha256."""
    rest = {key: value for key, value in index.items() if key != 'sha256'}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check(index: Index) -> None:
    """Refuse an index whose fields are missing, of other types, or contradict each other. Raises ValueError
    with a predicate; the caller adds the file."""
    _field(index, 'tokenizer_hash', _is_text)
    vocab_size = _field(index, 'vocab_size', lambda x: _is_count(x) and 1 <= x <= 2**31)
    for name in ('num_tokens', 'num_documents'):
        _field(index, name, _is_count)
    sources = _field(index, 'sources', lambda x: isinstance(x, list) and all(map(_is_text, x)))
    if len(set(sources)) != len(sources):
        raise ValueError('names a source twice')
    counts = _field(index, 'counts', lambda x: isinstance(x, dict))
    for name in COUNTS:
        _field(counts, name, _is_count)
    shards = _field(index, 'shards', lambda x: isinstance(x, list))
    for shard in shards:
        _check_file(shard, 'shards', ids_dtype(vocab_size))
    lengths = {'offsets': index['num_documents'] + 1, 'lengths': index['num_documents'],
               'source_of': index['num_documents'], 'name_offsets': index['num_documents'] + 1}
    if index['version'] > 1:
        chunk_bytes = _field(index, 'chunk_bytes', lambda x: _is_count(x) and 2**9 <= x <= 2**28)
        lengths['crc32s'] = sum(num_chunks(shard['bytes'], chunk_bytes) for shard in shards)
    tables = _field(index, 'tables', lambda x: isinstance(x, dict))
    for name in (*lengths, 'names'):
        _check_file(_field(tables, name, lambda x: isinstance(x, dict)), name, np.dtype(TABLES[name]))
        if tables[name]['count'] != lengths.get(name, tables[name]['count']):
            raise ValueError(f'has {tables[name]["count"]} numbers in {name}, and {lengths[name]} are needed')
    if sum(shard['count'] for shard in shards) != index['num_tokens']:
        raise ValueError(f'has shards that do not hold num_tokens {index["num_tokens"]} in total')


def _check_file(file: Any, name: str, dtype: np.dtype) -> None:
    """Check the entry {count, bytes, sha256} of a .npy: a header and count numbers."""
    if not isinstance(file, dict):
        raise ValueError(f'has an entry {_short(file)} in {name}, which is not an object')
    count, nbytes = _field(file, 'count', _is_count), _field(file, 'bytes', _is_count)
    _field(file, 'sha256', _is_text)
    if not 0 < nbytes - count * dtype.itemsize < 2**16:
        raise ValueError(f'gives {name} {nbytes} bytes, which are not a header and {count} numbers of '
                         f'{dtype}')


def _field(record: dict[str, Any], name: str, is_valid: Callable[[Any], bool]) -> Any:
    if name not in record:
        raise ValueError(f'lacks the field {name!r}')
    if not is_valid(record[name]):
        raise ValueError(f'has an invalid {name} {_short(record[name])}')
    return record[name]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_COUNT


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _short(value: Any) -> str:
    if isinstance(value, int) and abs(value) > MAX_COUNT:  # Python prints no integer of over 4300 digits
        return 'with too many digits'
    text = repr(value)
    return text if len(text) < 80 else text[:80] + '...'
