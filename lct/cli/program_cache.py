"""Compiled programs are kept between runs, in a folder of the user: ~/.cache/lct/compiled.

JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=0 keeps nothing. Programs for
CPUs hold machine code, so every kind of CPU has its own folder: a home directory may be shared by machines.
"""

import contextlib
import hashlib
import os
import platform
import re
import sys
import time
import zlib
from pathlib import Path

from lct import clusters, files

MAX_BYTES = 10 << 30  # of the folder; beyond it the programs that were not used for longest are deleted
CHECKED = 'checked'  # a file whose time of change is that of the last check


def enable() -> Path | None:
    """Let jax keep its programs, unless the user has decided otherwise. Call it before anything is compiled.

    Returns:
      The folder; None if the environment already decides, or if no folder of the user can be written.
    """
    if os.environ.get('JAX_COMPILATION_CACHE_DIR') is not None or _is_off():
        return None
    folder = files.user_cache() / 'compiled' / cpu_kind()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
        if state.st_uid != os.getuid() or state.st_mode & 0o022 or not os.access(folder, os.W_OK):
            return None  # programs are machine code: they are read only from where nobody else can write
        if _is_first():
            tidy(folder)
    except OSError:
        return None
    settings = {'JAX_COMPILATION_CACHE_DIR': str(folder)}  # child processes inherit them
    if 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS' not in os.environ:
        settings['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ.update(settings)
    if 'jax' in sys.modules:  # it has read its environment
        update = sys.modules['jax'].config.update
        for name, value in settings.items():
            update(name.lower(), float(value) if name.endswith('SECS') else value)
    return folder


def tidy(folder: Path, max_bytes: int = MAX_BYTES) -> None:
    """Delete programs that a kill or a full disk has cut short, among those written since the last call, and
    the oldest beyond max_bytes. jax would warn of the former at every start, and never write them again."""
    checked = folder / CHECKED
    last = checked.stat().st_mtime if checked.exists() else 0.0
    now = time.time()
    entries = []
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            if entry.is_file() and entry.name.endswith('-cache'):
                entries.append((entry.stat(), Path(entry)))
    damaged = {path for state, path in entries if state.st_mtime >= last and not _is_complete(path)}
    for path in damaged:
        path.unlink(missing_ok=True)
    entries = [(state, path) for state, path in entries if path not in damaged]
    total = sum(state.st_size for state, _ in entries)
    if total > max_bytes:
        for state, path in sorted(entries, key=lambda entry: max(entry[0].st_atime, entry[0].st_mtime)):
            if total <= max_bytes // 2:
                break
            path.unlink(missing_ok=True)
            total -= state.st_size
    checked.touch()
    os.utime(checked, (now, now))


def cpu_kind() -> str:
    """A name for the instruction sets of this machine's CPU: programs are shared by machines of one name."""
    try:
        text = Path('/proc/cpuinfo').read_text()
    except OSError:
        text = platform.processor()
    lines = sorted(set(re.findall(r'^(?:model name|flags|Features|CPU part)\s*:.*$', text, re.MULTILINE)))
    kind = hashlib.sha256('\n'.join(lines or [text]).encode()).hexdigest()[:12]
    return f'{platform.machine() or "cpu"}-{kind}'


def _is_first():
    """Whether this is the first process of its run: not all of them need to read the same entries."""
    try:
        place = clusters.find(os.environ)
    except ValueError:  # processes.join reports it
        return False
    return place is None or not place.index


def _is_off():
    return os.environ.get('JAX_ENABLE_COMPILATION_CACHE', '').lower() in ('0', 'false', 'no', 'off', 'n', 'f')


def _is_complete(path):
    """Whether an entry that zlib compressed is; those of zstd, where that is installed, are not read here."""
    try:
        content = path.read_bytes()
    except OSError:
        return True
    if content[:1] != b'\x78':
        return bool(content)
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
