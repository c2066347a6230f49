"""A corpus tokenized in parts, on as many machines, and joined to the store that one machine would write.

    OUTPUT.parts/3-of-16/   plan.json, NNNNN.json, NNNNN.npz, store/   as a Writer leaves them
                 complete.json                                         makes the part count

A part is a range of files. Tokens are written in groups of blocks that end where a range may end, on one
machine too, so that the join replays the same calls of a Writer: no text is read or tokenized again.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lct import json_files
from lct.data.corpus.index import fingerprint_of
from lct.data.corpus.shards import sha256_of, shard_name
from lct.data.corpus.store import Store
from lct.data.corpus.store_writer import Writer

UNIT = 2**26  # bytes of files after which a part may end
COMPLETE = 'complete.json'
MAX_BYTES = 2**28  # of a JSON file: the record of a shard names every source


def unit_starts(sizes: Sequence[int]) -> list[int]:
    """The numbers of the files that begin a unit; sizes: bytes of each file."""
    starts, size = [], UNIT
    for number, one in enumerate(sizes):
        if size >= UNIT:
            starts.append(number)
            size = 0
        size += one
    return starts


def files_of(sizes: Sequence[int], part: int, parts: int) -> tuple[int, int]:
    """(first file, end) of a part, 1 to parts: whole units, about equal bytes."""
    starts = unit_starts(sizes)
    before = np.concatenate([[0], np.cumsum(np.asarray(sizes, np.int64))])
    middles = [(before[a] + before[b]) / 2 for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]
    part_of = [min(int(middle * parts / max(before[-1], 1)), parts - 1) for middle in middles]
    first = next((start for start, one in zip(starts, part_of, strict=True) if one >= part - 1), len(sizes))
    end = next((start for start, one in zip(starts, part_of, strict=True) if one >= part), len(sizes))
    return first, end


def folder_of(output: str | os.PathLike, part: int, parts: int) -> Path:
    """The folder of a part."""
    return Path(f'{os.fspath(output)}.parts') / f'{part}-of-{parts}'


def is_complete(folder: Path) -> bool:
    return (folder / COMPLETE).is_file()


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Refuse a complete part that was made by another plan.

    Raises:
      ValueError: naming what differs.
    """
    recorded = _read(folder / 'plan.json')
    if differ := [key for key in plan if recorded.get(key) != plan[key]]:
        raise ValueError(f'{folder} is complete, but its {differ[0]} differs from that of this command; '
                         'remove the folder to make the part again')


def join(output: str | os.PathLike) -> Store:
    """The Store of all parts, which are deleted. A join that was stopped continues.

    Raises:
      ValueError: if parts are missing, differ in their plans, or are damaged.
    """
    folders = _folders(Path(f'{os.fspath(output)}.parts'))
    plans = [_read(folder / 'plan.json') for folder in folders]
    for folder, plan in zip(folders, plans, strict=True):
        del plan['part']
        if plan != plans[0]:
            key = next(key for key in plan | plans[0] if plan.get(key) != plans[0].get(key))
            raise ValueError(f'{folder} and {folders[0]} differ in their {key}; remove the one that is wrong '
                             'and make that part again')
    apart = 'version', 'tokenizer', 'vocab_size'
    plan = {key: value for key, value in plans[0].items() if key not in apart}
    with Writer(output, plans[0]['tokenizer'], plans[0]['vocab_size'], plan) as writer:
        done = tuple(writer.cursor or (0, 0, 0))
        for number, folder in enumerate(folders):
            for cursor, ids, documents in _groups(folder, number):
                if cursor <= done:
                    continue
                writer.append(ids, documents)
                if writer.shard_tokens >= plan['shard_tokens']:
                    writer.close_shard(list(cursor))
        counts = sum((Counter(_complete(folder)['counts']) for folder in folders), Counter())
        writer.counts = counts
        store = writer.finish([len(folders), 0, 0])
    shutil.rmtree(folders[0].parent)
    return store


def _folders(root):
    """The complete folders of all parts, in order."""
    names = [path.name for path in root.glob('*-of-*') if path.name.replace('-of-', '').isdigit()]
    if not names:
        raise ValueError(f'{root} has no parts; make them with --part 1/N to --part N/N')
    counts = {int(name.split('-of-')[1]) for name in names}
    if len(counts) > 1:
        raise ValueError(f'{root} has parts of {" and of ".join(map(str, sorted(counts)))} in total; remove '
                         'all but those of one total')
    (count,) = counts
    folders = [root / f'{part}-of-{count}' for part in range(1, count + 1)]
    missing = [folder.name for folder in folders if not is_complete(folder)]
    if missing:
        raise ValueError(f'{root} lacks {len(missing)} of {count} parts, first {missing[0]}; run them with '
                         f'--part {missing[0].replace("-of-", "/")}, then join again')
    return folders


def _read(path: Path) -> dict[str, Any]:
    return json_files.read_json(path, max_bytes=MAX_BYTES)


def _complete(folder: Path) -> dict[str, Any]:
    values = _read(folder / COMPLETE)
    if values.get('sha256') != fingerprint_of(values):
        raise ValueError(f'{folder / COMPLETE} is damaged; remove {folder} and make that part again')
    return values


def _groups(folder: Path, number: int) -> Iterator[tuple[tuple[int, int, int], np.ndarray, list]]:
    """(cursor after it, ids, documents as Writer.append takes them) of every group of a part."""
    start, names_start = 0, 0
    for shard in range(_complete(folder)['shards']):
        record = _read(folder / f'{shard:05d}.json')
        path, arrays_path = folder / 'store' / shard_name(shard), folder / f'{shard:05d}.npz'
        if sha256_of(path) != record['file']['sha256'] or sha256_of(arrays_path) != record['arrays']:
            raise ValueError(f'{path} or {arrays_path} is damaged; remove {folder} and make that part again')
        ids = np.load(path, mmap_mode='r')
        with np.load(arrays_path) as arrays:
            arrays = dict(arrays)
        names, name_ends = arrays['names'].tobytes(), arrays['name_ends'] - names_start
        begins = np.concatenate([[0], name_ends[:-1]]) if len(name_ends) else name_ends
        documents = [(names[a:b].decode('utf-8', 'surrogateescape'), record['sources'][source], int(end))
                     for a, b, source, end in zip(begins, name_ends, arrays['source_of'], arrays['ends'],
                                                  strict=True)]
        first, at = 0, start
        for index, end in enumerate(arrays['groups'].tolist(), 1):
            last = first
            while last < len(documents) and documents[last][2] <= end:
                last += 1
            group = [(name, source, place - at) for name, source, place in documents[first:last]]
            yield (number, shard, index), np.asarray(ids[at - start:end - start]), group
            first, at = last, end
        start, names_start = record['num_tokens'], record['name_bytes']
