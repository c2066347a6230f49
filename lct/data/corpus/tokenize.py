"""A corpus through a tokenizer into a token store, over several processes.

The process that writes reads blocks, in order, and hands them to the workers; they parse, tokenize and send back
ids, which are written in order. So the store depends on the corpus, the tokenizer and shard_tokens alone, a run
goes on from its last closed shard, and memory holds a few blocks a worker.
"""

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from lct.data import tokenizer
from lct.data.corpus import files
from lct.data.corpus.store import ids_dtype
from lct.data.corpus.store_writer import Writer

BATCH = 64  # pieces that are encoded at a time: the library holds hundreds of bytes a token meanwhile


class Progress(NamedTuple):
    """Bytes of the corpus' files done and in all; tokens and documents done; bad documents that were just skipped."""
    done: int
    total: int
    tokens: int
    documents: int
    skipped: list


class Encoded(NamedTuple):
    """ids [n], the documents that end in them as (name, source, end), what was wrong with others, and how many
    cuts may have changed ids."""
    ids: np.ndarray
    documents: list
    bad: list
    inexact: int


def tokenize_corpus(specs, tokenizer_name, folder, *, workers, shard_tokens=2**27, fields=files.FIELDS, skip_bad=False,
             progress=lambda progress: None):
    """Write the documents of specs (see sources.find) into a new store in folder, or go on with one that was begun.

    Documents keep the order of specs and of names. A text file longer than sources.BLOCK is cut (see
    Tokenizer.split_stream), at line ends where there are any; the store counts the cuts that may have changed ids.

    Args:
      tokenizer_name: as data.tokenizer.load takes it; every worker loads it.
      shard_tokens: a shard is closed behind the block that makes it as long.
      skip_bad: count documents that are not UTF-8 or no JSON, instead of refusing the corpus.
      progress: called with a Progress after every block that was written.
    Returns:
      The Store.
    Raises:
      ValueError: naming file and line of the first bad document; see Writer for the rest.
    """
    if workers < 1 or shard_tokens < 1:
        raise ValueError(f'workers {workers} and shard_tokens {shard_tokens} must be at least 1')
    words = tokenizer.load(tokenizer_name)
    digest, total = _fingerprint(specs)
    # skip_bad is no part of it: a run that met a bad document after hours may go on with it.
    plan = {'shard_tokens': shard_tokens, 'fields': list(fields), 'corpus': digest}
    with (Writer(folder, words.fingerprint, words.vocab_size, plan) as writer,
          ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), _start_worker,
                              (tokenizer_name, fields)) as pool):
        try:
            found = _in_order(pool, _blocks(specs, words, fields, writer.cursor or [0, 0]), ahead=2 * workers + 2)
            for encoded, cursor, done in found:
                if encoded.bad and not skip_bad:
                    raise ValueError(encoded.bad[0] + ', or skip such documents (--skip-bad)')
                writer.append(encoded.ids, encoded.documents)
                writer.counts.update(bad=len(encoded.bad), inexact_cuts=encoded.inexact)
                if writer.shard_tokens >= shard_tokens:
                    writer.close_shard(cursor)
                progress(Progress(done, total, writer.num_tokens, writer.num_documents, encoded.bad))
        except BrokenProcessPool:
            raise ValueError('a worker was killed, perhaps for its memory; the same command with fewer workers goes '
                             'on behind the last closed shard') from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return writer.finish(cursor)


def _fingerprint(specs):
    """(sha256 over the names, sizes and times of all files, their bytes)."""
    digest, total = hashlib.sha256(), 0
    for file in _files(specs):
        stat = os.stat(file.path)
        digest.update(repr((file.source, file.name, stat.st_size, stat.st_mtime_ns)).encode())
        total += stat.st_size
    if not total:
        raise ValueError(f'the corpus {" ".join(map(str, specs))} holds no text; a folder is searched for '
                         f'{" ".join(sorted(files.SUFFIXES))}, so name other files by a glob')
    return digest.hexdigest(), total


def _files(specs):
    return itertools.chain.from_iterable(map(files.find, specs))


def _blocks(specs, words, fields, cursor):
    """([Block], cursor, bytes) from cursor on: what a worker gets, where the next one begins, and the bytes of all
    files read by then. cursor is [file, block in it]; small files go together."""
    group, size, before = [], 0, 0
    for number, file in enumerate(_files(specs)):
        for index, block in enumerate(files.blocks(file, words.split_stream, fields) if number >= cursor[0] else ()):
            if [number, index] < cursor:
                continue
            group.append(block)
            size += block.size
            if size >= files.BLOCK:
                yield group, [number, index + 1], before + block.read
                group, size = [], 0
        before += os.path.getsize(file.path)
    yield group, [number + 1, 0], before


def _in_order(pool, groups, ahead):
    """(Encoded, cursor, bytes) of each group, in order; up to ahead of them are being made."""
    waiting = deque()
    for group, cursor, done in groups:
        waiting.append((pool.submit(_encode, group), cursor, done))
        if len(waiting) > ahead:
            future, cursor, done = waiting.popleft()
            yield future.result(), cursor, done
    for future, cursor, done in waiting:
        yield future.result(), cursor, done


def _start_worker(tokenizer_name, fields):
    global _words, _fields
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the workers are the parallelism
    _words, _fields = tokenizer.load(tokenizer_name), fields


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # it was killed: nobody reads what this worker makes


def _encode(blocks):
    """The Encoded of a list of Blocks, in a worker."""
    pieces, ends, bad = [], [], []
    inexact = sum(not block.exact for block in blocks)
    for block in blocks:
        for text in files.texts(block, _fields):
            if text.bad is not None:
                bad.append(text.bad)
                continue
            for piece, exact in _words.split_stream([text.text]):
                pieces.append(piece)
                inexact += not exact
            if text.ends:
                ends.append((text.name, text.source, len(pieces)))
    dtype = ids_dtype(_words.vocab_size)
    ids = [np.array(one, dtype) for i in range(0, len(pieces), BATCH)
           for one in _words.encode_batch(pieces[i:i + BATCH])]
    offsets = np.cumsum([0, *map(len, ids)])
    documents = [(name, source, int(offsets[count])) for name, source, count in ends]
    return Encoded(np.concatenate([np.zeros(0, dtype), *ids]), documents, bad, inexact)
