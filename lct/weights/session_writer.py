"""Writes the text of a session into its folder; saved_session says what is in it."""

import contextlib
import fcntl
import json
import os
import secrets
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import lax

from lct import files, processes, sharding
from lct.checksums import chunk_crc32s, total_crc32
from lct.models.kv_cache import named_arrays
from lct.models.prompt_layout import common_prefix
from lct.models.session import Session
from lct.weights import safetensors_files
from lct.weights.saved_session import (
    BLOCK,
    CHUNK,
    FORMAT,
    INDEX,
    LOCK,
    VERSION,
    Block,
    DamagedSession,
    block_shapes,
    check_is_ours,
    crc32_of,
    identity,
    is_block,
    read,
    read_index,
)


def save(folder: str | os.PathLike, session: Session, model: Mapping[str, Any], row: int = 0,
         about: Mapping[str, Any] | None = None) -> None:
    """Write the text of a row. Blocks of the text before that begins alike are kept; a saved text that begins
    with all of this one stays as it is. Every process of a run must call this, the first one writes.

    about: JSON values that SavedSession.about returns.

    Raises:
      ForeignSession: as read.
      OSError: if the disk is full; the folder then holds what it held.
    """
    folder, ids = Path(folder), np.array(session.texts[row], np.int32)
    with _lock(folder) if processes.is_first() else contextlib.nullcontext():
        try:
            old = read(folder, session, model)
        except DamagedSession:
            old = None
        common = 0 if old is None else common_prefix(old.ids, ids)
        intact = 0 if old is None else old.verify(common)
        if intact == len(ids):
            return
        kept = [] if old is None else [
            old.blocks[i] for i, start, stop in old.spans(intact) if stop - start == BLOCK]
        try:
            new = _write_blocks(folder, session, row, ids, len(kept) * BLOCK)
            if processes.is_first():
                _write_index(folder, identity(session, model), [*kept, *new], about or {})
        finally:
            if processes.is_first():
                _remove_unused(folder)


@contextlib.contextmanager
def _lock(folder):
    """One process at a time writes to the folder, which only its user may read: texts are private."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_is_ours(folder)
    with open(folder / LOCK, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write_blocks(folder, session, row, ids, first):
    """Write the tokens ids[first:] of a text into new files -> their Blocks, in the first process."""
    arrays, writes = named_arrays(session.cache), processes.is_first()
    parts = {folder / f'{start:09d}-{secrets.token_hex(4)}.safetensors': ids[start:start + BLOCK]
             for start in range(first, len(ids), BLOCK)} if writes else {}
    maps = [_create_block(path, arrays, part) for path, part in parts.items()]
    for name, array in arrays.items():
        for layer in range(array.shape[0]):
            values = sharding.fetch(_layer(array, layer))[row][:, session.slots[first:len(ids)]]
            for i, block in enumerate(maps):
                block[name][layer] = values[:, i * BLOCK:(i + 1) * BLOCK]
    return [_finish_block(path, part) for path, part in parts.items()]


def _create_block(path, arrays, ids):
    expected = block_shapes(arrays, len(ids))
    block = safetensors_files.create_file(path, {name: shape for name, (shape, _) in expected.items()},
                                          {name: dtype for name, (_, dtype) in expected.items()})
    block['ids'][:] = ids
    return block


def _finish_block(path, ids):
    files.sync(path)
    return Block(path.name, len(ids), path.stat().st_size, total_crc32(chunk_crc32s(path, CHUNK)),
                 zlib.crc32(ids.tobytes()))


def _write_index(folder, facts, blocks, about):
    content = {'format': FORMAT, 'version': VERSION, 'identity': facts, 'about': dict(about),
               'blocks': [block._asdict() for block in blocks]}
    text = json.dumps(content | {'crc32': crc32_of(content)}, indent=1, sort_keys=True)
    files.write_atomically(folder / INDEX, text + '\n')


def _remove_unused(folder):
    """Remove blocks that the index does not name: of the text before, or of one that was not finished."""
    named = set()
    if (folder / INDEX).exists():
        try:
            named = {block['file'] for block in read_index(folder)['blocks']}
        except DamagedSession:
            return
    for name in os.listdir(folder):
        if is_block(name) and name not in named:
            (folder / name).unlink(missing_ok=True)


@jax.jit
def _layer(array, layer):
    """[B, K, S, ...] of one layer; its number is an argument, so that one program serves all."""
    return lax.dynamic_index_in_dim(array, layer, keepdims=False)
