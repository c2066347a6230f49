"""The files of a work directory that count, and what distinguishes their states."""

import contextlib
import os
import re
from pathlib import Path

from lct import checksums

ATOMIC = re.compile(r'(checkpoints/\d+|model)(?=/|$)')  # folders that are complete or absent
COMMIT = '.commit.json'  # after the name of an atomic folder in a bucket: the object that makes it count
PASSING = re.compile(r'(^|/)(\.|lock$)|\.part$|\.orbax-checkpoint-tmp')  # names of what is not complete
CHUNK = 2**24  # bytes of one crc32

State = tuple[int, int]  # bytes and time of a file


def states(folder: Path) -> tuple[dict[str, State], dict[str, dict[str, State]]]:
    """({name: state} of single files, {name: state} of atomic folders) that have their final names."""
    single, atomic = {}, {}
    for parent, folders, names in os.walk(folder):
        place = Path(parent).relative_to(folder).as_posix().removeprefix('.')
        inside = [f'{place}/{name}'.lstrip('/') for name in folders]
        atomic |= {name: folder_state(folder / name) for name in inside if ATOMIC.fullmatch(name)}
        folders[:] = [name.rpartition('/')[2] for name in inside
                      if not ATOMIC.fullmatch(name) and not PASSING.search(name)]
        for name in [f'{place}/{name}'.lstrip('/') for name in names]:
            if not PASSING.search(name) and (state := file_state(folder / name)):
                single[name] = state
    return single, atomic


def folder_state(folder: Path) -> dict[str, State]:
    """{name: [bytes, time]} of all files below a folder."""
    found = {path.relative_to(folder).as_posix(): file_state(path) for path in sorted(folder.rglob('*'))}
    return {name: state for name, state in found.items() if state}


def file_state(path: Path) -> State | None:
    """(bytes, time) of a file; None if there is none."""
    with contextlib.suppress(OSError):
        if path.is_file():
            return path.stat().st_size, path.stat().st_mtime_ns
    return None


def record_of(folder: Path) -> dict[str, list]:
    """{name: [bytes, crc32]} of all files below a folder; {} if it does not exist."""
    return {name: [size, crc32(folder / name)] for name, (size, _) in folder_state(folder).items()}


def is_single(name: str) -> bool:
    """Whether an object is a file that counts by itself."""
    return not (ATOMIC.match(name) or PASSING.search(name) or name.endswith(COMMIT))


def crc32(path: Path) -> str:
    """The crc32 of the crc32s of a file's chunks, eight hexadecimal digits."""
    return f'{checksums.total_crc32(checksums.chunk_crc32s(path, CHUNK)):08x}'
