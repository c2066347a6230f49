"""Results of evaluations kept in files, each with the settings that it was measured with."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lct import files


def read(path: Path, settings: Mapping[str, Any], log: Callable[[str], None]) -> Any | None:
    """The result kept at path, or None if it has to be measured: there is none, it was measured with other
    settings, or the file is not as write left it. log: takes a line that says so."""
    if not path.exists():
        return None
    try:
        kept = json.loads(path.read_bytes())
        intact = kept['crc32'] == _crc32(kept)
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        log(f'WARNING: {path} was edited or damaged, or is of an earlier version; it is measured again')
        return None
    wanted = json.loads(json.dumps(settings))
    changed = sorted(name for name in {*wanted, *kept['settings']}
                     if kept['settings'].get(name) != wanted.get(name))
    if changed:
        log(f'{path} was measured with other settings ({", ".join(changed)}); it is measured again')
        return None
    return kept['result']


def write(path: Path, settings: Mapping[str, Any], result: Any) -> None:
    """Keep a result, plain values for JSON, under path."""
    kept = json.loads(json.dumps({'settings': settings, 'result': result}))
    files.write_atomically(path, json.dumps({**kept, 'crc32': _crc32(kept)}, indent=1))


def crc32_of(array: np.ndarray) -> int:
    """CRC-32 of the values of an array, to compare settings by."""
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _crc32(kept):
    return zlib.crc32(json.dumps([kept['settings'], kept['result']], sort_keys=True).encode())
