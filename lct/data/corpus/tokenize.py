"""Tokenizes a corpus into a token store, with several processes.

The writing process reads blocks in order and sends them to the workers, which parse and tokenize them; it
writes the ids that come back in order. So the store depends on the corpus, the tokenizer and shard_tokens
alone, a run continues after its last closed shard, and memory holds a few blocks per worker.
"""

import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lct.data import tokenizer as tokenizers
from lct.data.corpus import files, listing, parts
from lct.data.corpus.blocks import BLOCK, FIELDS, Block, Fields, File
from lct.data.corpus.index import ids_dtype
from lct.data.corpus.store import Store
from lct.data.corpus.store_writer import Writer, check_source

BATCH = 64  # segments encoded at a time: meanwhile the library holds hundreds of bytes per token


@dataclasses.dataclass(frozen=True)
class Options:
    """What to read of a corpus.

    skip_bad: count documents that are not UTF-8 or not JSON, instead of refusing the corpus.
    exclude, tally: see listing.find. part: (number from 1, number of parts), see parts.py.
    """

    skip_bad: bool = False
    exclude: tuple[str, ...] = ()
    tally: listing.Tally | None = None
    part: tuple[int, int] | None = None


class Progress(NamedTuple):
    """How far a run has come.

    Bytes of the corpus' files, done and in total; tokens and documents written; errors of the documents that
    were skipped since the last Progress.
    """
    bytes_done: int
    bytes_total: int
    tokens: int
    documents: int
    skipped: list[str]


class Encoded(NamedTuple):
    """An encoded group of blocks.

    ids [n]; the documents that end in them, as (name, source, end); the errors of bad documents; the number
    of cuts that may have changed ids.
    """
    ids: np.ndarray
    documents: list[tuple[str, str, int]]
    errors: list[str]
    inexact_cuts: int


class Position(NamedTuple):
    """Where reading stands after a group of blocks.

    cursor: [file, block] where the next group begins. bytes_done: bytes of all files read by then.
    """
    cursor: list[int]
    bytes_done: int


def tokenize_corpus(specs: Sequence[str | os.PathLike], tokenizer_name: str | os.PathLike,
                    folder: str | os.PathLike, *, workers: int, shard_tokens: int = 2**27,
                    fields: Fields = FIELDS, options: Options = Options(),  # noqa: B008
                    progress: Callable[[Progress], object] = lambda progress: None) -> Store | None:
    """Write the documents of specs (see listing.find) into a new store, or continue one that was begun.

    Documents keep the order of specs and of names. A text file longer than BLOCK is cut, at line ends
    where there are any (see Tokenizer.split_stream); the store counts the cuts that may have changed ids.

    Args:
      tokenizer_name: as tokenizer.load takes it; every worker loads it.
      folder: the new store.
      shard_tokens: a shard is closed after the block that makes it this long.
      progress: called after every block that was written.
    Returns:
      The Store; None for a part, which parts.join makes a store of.
    Raises:
      ValueError: naming file and line of the first bad document; see Writer for the rest.
    """
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f'workers {workers} and shard_tokens {shard_tokens} must be at least 1')
    tokenizer = tokenizers.load(tokenizer_name)
    digest, sizes = _fingerprint(specs, options)
    first, end = 0, len(sizes)
    if options.part:
        first, end = parts.files_of(sizes, *options.part)
        folder = parts.folder_of(folder, *options.part)
    # skip_bad is not in the plan: a run that met a bad document after hours may continue with it.
    plan = {'shard_tokens': shard_tokens, 'fields': list(fields), 'corpus': digest}
    plan |= {'part': list(options.part)} if options.part else {}
    if options.part and parts.is_complete(folder):
        parts.check_plan(folder, {**plan, 'tokenizer': tokenizer.fingerprint})
        return None
    bytes_total = sum(sizes[first:end])
    with (Writer(folder, tokenizer.fingerprint, tokenizer.vocab_size, plan) as writer,
          ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start_worker,
                              (tokenizer_name, fields)) as pool):
        try:
            groups = _groups(specs, tokenizer, fields, writer.cursor or [first, 0], options,
                             (parts.unit_starts(sizes), end))
            for encoded, position in _in_order(pool, groups, ahead=2 * workers + 2):
                if encoded.errors and not options.skip_bad:
                    raise ValueError(encoded.errors[0] + ', or skip such documents (--skip-bad)')
                writer.append(encoded.ids, encoded.documents)
                writer.counts.update(bad=len(encoded.errors), inexact_cuts=encoded.inexact_cuts)
                if writer.shard_tokens >= shard_tokens:
                    writer.close_shard(position.cursor)
                progress(Progress(position.bytes_done, bytes_total, writer.num_tokens, writer.num_documents,
                                  encoded.errors))
        except BrokenProcessPool:
            raise ValueError('a worker was killed, perhaps for its memory; the same command with fewer '
                             'workers continues after the last closed shard') from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if options.part:
            writer.finish_part(position.cursor, parts.COMPLETE)
            return None
        return writer.finish(position.cursor)


def _fingerprint(specs: Sequence[str | Path], options: Options) -> tuple[str, Sequence[int]]:
    """(sha256 over the names, sizes and times of all files, the bytes of each)."""
    digest, sizes = hashlib.sha256(), array('q')
    for file in _files(specs, options):
        check_source(file.source)
        stat = os.stat(file.path)
        digest.update(repr((file.source, file.name, stat.st_size, stat.st_mtime_ns)).encode())
        sizes.append(stat.st_size)
    if not sum(sizes):
        raise listing.no_text_error(' '.join(map(str, specs)), options.tally)
    if options.tally:
        options.tally.files = len(sizes)
    return digest.hexdigest(), sizes


def _files(specs: Sequence[str | Path], options: Options) -> Iterator[File]:
    for spec in specs:
        yield from listing.find(spec, options.exclude, options.tally)


def _groups(specs: Sequence[str | Path], tokenizer: tokenizers.Tokenizer, fields: Fields,
            cursor: list[int], options: Options = Options(),  # noqa: B008
            units: tuple[Sequence[int], int | None] = ((), None),
            ) -> Iterator[tuple[list[Block], Position]]:
    """(blocks for one worker, Position after them), from cursor on. Small files are grouped.

    units: the files that begin a unit of parts, before which a group ends, and the file to end before.
    """
    group, size, bytes_before = [], 0, 0
    starts, end = set(units[0]), units[1]
    chosen = dataclasses.replace(options, tally=None)  # which has counted already
    for number, file in enumerate(itertools.islice(_files(specs, chosen), end)):
        if group and number in starts:
            yield group, Position([number, 0], bytes_before)
            group, size = [], 0
        if number < cursor[0]:
            bytes_before += 0 if options.part else os.path.getsize(file.path)
            continue
        file_blocks = files.blocks(file, tokenizer.split_stream, fields)
        for index, block in enumerate(file_blocks):
            if [number, index] < cursor:
                continue
            group.append(block)
            size += block.size
            if size >= BLOCK:
                yield group, Position([number, index + 1], bytes_before + block.bytes_read)
                group, size = [], 0
        bytes_before += os.path.getsize(file.path)
    last = number + 1 if end is None else end
    yield group, Position([last, 0], bytes_before)


def _in_order(pool: ProcessPoolExecutor, groups: Iterator[tuple[list[Block], Position]],
              ahead: int) -> Iterator[tuple[Encoded, Position]]:
    """(Encoded, Position) of each group, in order; up to `ahead` groups are encoded meanwhile."""
    pending = deque()
    for group, position in groups:
        pending.append((pool.submit(_encode, group), position))
        if len(pending) > ahead:
            future, position = pending.popleft()
            yield future.result(), position
    for future, position in pending:
        yield future.result(), position


def _start_worker(tokenizer_name: str | os.PathLike, fields: Fields) -> None:
    global _tokenizer, _fields
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    _tokenizer, _fields = tokenizers.load(tokenizer_name), fields


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # the parent was killed, so the result has no reader


def _encode(blocks: list[Block]) -> Encoded:
    """The Encoded of a group of Blocks, in a worker."""
    segments, ends, errors = [], [], []
    inexact_cuts = sum(not block.exact for block in blocks)
    for block in blocks:
        for text in files.texts(block, _fields):
            if text.error is not None:
                errors.append(text.error)
                continue
            for segment, exact in _tokenizer.split_stream([text.text]):
                segments.append(segment)
                inexact_cuts += not exact
            if text.ends_document:
                ends.append((text.name, text.source, len(segments)))
    ids = [np.array(one, np.int64) for i in range(0, len(segments), BATCH)
           for one in _tokenizer.encode_batch(segments[i:i + BATCH])]
    offsets = np.cumsum([0, *map(len, ids)])
    documents = [(name, source, int(offsets[count])) for name, source, count in ends]
    ids = np.concatenate([np.zeros(0, np.int64), *ids])
    is_known = ids.min(initial=0) >= 0 and ids.max(initial=0) < _tokenizer.vocab_size
    return Encoded(ids.astype(ids_dtype(_tokenizer.vocab_size)) if is_known else ids, documents, errors,
                   inexact_cuts)  # the writer refuses unknown ones
