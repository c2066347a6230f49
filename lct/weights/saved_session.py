"""Texts that were read once, on disk: the cache of a session, to be asked again by any later process.

A folder holds one text. session.json says what the cache belongs to and names the blocks, files of up to
BLOCK tokens each: their ids and, in the order of positions, their keys and values, [L, K, tokens, H]. So any
mesh and layout can map them, a text that changes or grows keeps the blocks before the change, and nothing
larger than a layer is gathered. A new session.json replaces the old one when its blocks are on disk, and only
then are the old blocks removed: whatever ends the process, the folder holds one text or the other.
"""

import dataclasses
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lct import files, sharding
from lct.checksums import THREADS, chunk_crc32s, total_crc32
from lct.json_files import read_json, short_repr
from lct.models.kv_cache import CACHE, named_arrays
from lct.models.session import Session
from lct.weights import safetensors_files
from lct.weights.safetensors_files import ARRAYS, SHARD_NAME
from lct.weights.tensors import Tensor

INDEX = 'session.json'
LOCK = 'session.lock'
FORMAT, VERSION = 'lct session', 1
BLOCK = 1024  # tokens
CHUNK = 2**22  # bytes of a checksum
DTYPES = {dtype.name: kind for kind, dtype in ARRAYS.items()}


class ForeignSession(ValueError):
    """A folder that belongs to something else, and must not be overwritten."""


class DamagedSession(ValueError):
    """A session that cannot be used any more; its text must be read again."""


class Block(NamedTuple):
    """file: its name. tokens: how many it holds. bytes, crc32: of the file. ids_crc32: of its token ids."""

    file: str
    tokens: int
    bytes: int
    crc32: int
    ids_crc32: int


@dataclasses.dataclass(frozen=True)
class SavedSession:
    """The text in a folder. ids: int32 [tokens]. about: what the writer noted. tensors: of each block."""

    folder: Path
    about: dict[str, Any]
    blocks: tuple[Block, ...]
    ids: np.ndarray
    tensors: tuple[dict[str, Tensor], ...]

    def spans(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(index, start, stop) of the blocks that hold the first length tokens."""
        start = 0
        for i, block in enumerate(self.blocks):
            if start < length:
                yield i, start, min(start + block.tokens, length)
            start += block.tokens

    def verify(self, length: int) -> int:
        """How many of the first length tokens are in blocks that are as they were written."""
        spans = list(self.spans(length))
        with ThreadPoolExecutor(THREADS) as pool:
            intact = pool.map(self._is_intact, (i for i, *_ in spans))
            damaged = (start for (_, start, _), good in zip(spans, intact, strict=True) if not good)
            return next(damaged, length)

    def _is_intact(self, i):
        try:
            return total_crc32(chunk_crc32s(self.folder / self.blocks[i].file, CHUNK)) == self.blocks[i].crc32
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------------


def identity(session: Session, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache belongs to. model: what identifies the weights, the tokenizer and the template."""
    facts = {
        'model': dict(model), 'config': _not_default(session.config.architecture()),
        'rope': _not_default(session.rope), 'dtype': str(session.params.embed.dtype),
        'cache': {name: str(x.dtype) for name, x in named_arrays(session.abstract_cache()).items()},
    }
    return json.loads(json.dumps(facts))


def _not_default(config):
    """{field: value} of a dataclass without its defaults: a later release may have more fields, and their
    defaults are what this one does."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)
              if getattr(config, field.name) != field.default}
    return {name: _not_default(x) if dataclasses.is_dataclass(x) else x for name, x in values.items()}


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """What a folder says of its session without its blocks: tokens, bytes, about. Raises as read."""
    content = read_index(Path(folder))
    return {'tokens': sum(block['tokens'] for block in content['blocks']),
            'bytes': sum(block['bytes'] for block in content['blocks']), 'about': content['about']}


def _difference(was, now, path=''):
    """The name of the first fact that differs."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in sorted({*was, *now}):
            if was.get(name) != now.get(name):
                return _difference(was.get(name), now.get(name), f'{path} {name}')
    was, now = ('the default' if x is None else short_repr(x) for x in (was, now))
    return f'{path.strip()} {was} instead of {now}'


# ---------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------


def read(folder: str | os.PathLike, session: Session, model: Mapping[str, Any]) -> SavedSession | None:
    """The text in a folder; None if there is none yet. What is in the blocks is not yet verified.

    Raises:
      ForeignSession: if the folder holds other files, or a session of another model.
      DamagedSession: if it was not written to its end, was altered, or is of another release.
    """
    folder = Path(folder)
    if not (folder / INDEX).exists():
        check_is_ours(folder)
        return None
    content = read_index(folder)
    now = identity(session, model)
    if content['identity'] != now:
        raise ForeignSession(f'session {folder} was made with another model or setting '
                             f'({_difference(content["identity"], now)}); use another name, or delete it')
    try:
        blocks = tuple(Block(**entry) for entry in content['blocks'])
        shapes = {name: x for name, x in named_arrays(session.abstract_cache()).items()}
        tensors = tuple(_read_block(folder, block, shapes) for block in blocks)
        ids = [_map(one['ids']) for one in tensors]
        for block, own in zip(blocks, ids, strict=True):
            if zlib.crc32(own.tobytes()) != block.ids_crc32:
                raise ValueError(f'{folder / block.file} has another crc32 of its token ids')
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedSession(f'session {folder} is damaged: {error}') from None
    ids = np.concatenate([np.zeros(0, np.int32), *ids])
    return SavedSession(folder, content['about'], blocks, ids, tensors)


def check_is_ours(folder):
    """Refuse a folder with files that no session has."""
    if folder.exists() and not folder.is_dir():
        raise ForeignSession(f'session {folder} is a file; name a folder')
    names = os.listdir(folder) if folder.is_dir() else []
    ours = (INDEX, LOCK, files.partial_path(INDEX).name)
    other = sorted(name for name in names if name not in ours and not is_block(name))
    if other:
        raise ForeignSession(f'{folder} holds {other[0]} and is not a session; name a new or an empty folder')


def is_block(name):
    return name[:9].isdigit() and name[9:10] == '-' and name.endswith('.safetensors')


def read_index(folder):
    path = folder / INDEX
    try:
        content = read_json(path)
        version = content.get('format'), content.get('version')
        if version != (FORMAT, VERSION):
            raise ValueError(f'it is of {short_repr(version)}, and this release reads {(FORMAT, VERSION)}')
        if content.get('crc32') != crc32_of(content):
            raise ValueError('it differs from what was written (another crc32)')
        return content
    except ValueError as error:
        raise DamagedSession(f'session {folder} cannot be used: {error}') from None


def crc32_of(content):
    rest = {key: value for key, value in content.items() if key != 'crc32'}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _read_block(folder, block, arrays):
    """{name: Tensor} of a block, which must hold the arrays of the cache for its tokens."""
    path = folder / block.file
    if not SHARD_NAME.fullmatch(block.file):
        raise ValueError(f'{short_repr(block.file)} is not the name of a block')
    if not path.exists() or path.stat().st_size != block.bytes:
        raise ValueError(f'{path} is missing or does not have {block.bytes} bytes')
    tensors = safetensors_files.read_header(path)
    expected = block_shapes(arrays, block.tokens)
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError(f'{path} holds {short_repr(found)}, not {short_repr(expected)}')
    return tensors


def block_shapes(arrays, tokens):
    """{name: (shape, dtype)} of a block. arrays: those of the cache, [L, B, K, S, ...]."""
    of_cache = {name: ((x.shape[0], x.shape[2], tokens, *x.shape[4:]), DTYPES[jnp.dtype(x.dtype).name])
                for name, x in arrays.items()}
    return {'ids': ((tokens,), 'I32')} | of_cache


def _map(tensor):
    return np.memmap(tensor.path, ARRAYS[tensor.dtype], 'r', tensor.offset, tensor.shape)


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def load(session: Session, texts: Sequence[tuple[SavedSession, int] | None]) -> None:
    """Make the session hold the first tokens of saved texts, (saved, how many) for each row from the first.

    A process maps the files and reads what its own devices hold. Rows without a text are empty.
    """
    texts = [*texts, *[None] * (session.rows - len(texts))]
    arrays = {name: _load_array(session, name, x, texts)
              for name, x in named_arrays(session.abstract_cache()).items()}
    session.restore(arrays, [[] if one is None else one[0].ids[:one[1]] for one in texts])


def _load_array(session, name, target, texts):
    indices = np.arange(session.seq_len) if session.indices is None else session.indices

    def read_shard(index):
        rows, heads, slots = index[1:4]
        shape = [len(range(*one.indices(n))) for one, n in zip(index, target.shape, strict=True)]
        out = np.zeros(shape, target.dtype)
        for i, row in enumerate(range(*rows.indices(target.shape[1]))):
            if texts[row] is not None:
                _fill(out[:, i], name, heads, indices[slots], *texts[row])
        return out

    if sharding.current_mesh() is None:
        return jax.device_put(read_shard((slice(None),) * len(target.shape)))
    placed = NamedSharding(jax.sharding.get_mesh(), P(*CACHE[:len(target.shape)]))
    return jax.make_array_from_callback(target.shape, placed, read_shard)


def _fill(out, name, heads, positions, saved, length):
    """Copy the heads of the first length tokens to out [L, K, slots, ...], whose slots have the positions."""
    for i, start, stop in saved.spans(length):
        slots = np.flatnonzero((positions >= start) & (positions < stop))
        if slots.size:
            block = _map(saved.tensors[i][name])[:, heads]
            # Copies of slices are several times faster than those of lists of indices.
            out[:, :, _as_slice(slots)] = block[:, :, _as_slice(positions[slots] - start)]


def _as_slice(indices):
    """The slice of evenly spaced ascending indices, or the indices themselves."""
    steps = np.unique(np.diff(indices))
    if len(steps) > 1 or (steps < 1).any():
        return indices
    return slice(int(indices[0]), int(indices[-1]) + 1, int(steps[0]) if len(steps) else 1)
