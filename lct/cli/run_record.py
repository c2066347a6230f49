"""WORKDIR/run.json: what a run was, written from its start on.

It holds the resolved config, seeds and hashes of inputs, and for every call of the script its command, times,
outcome and environment (lct.environment), and what 'auto' stood for on its devices. 'ended' is null for a
call that was killed, or still runs.
"""

import contextlib
import datetime
import json
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lct import environment, exit_status, files, json_files, processes
from lct.cli.paths import experiments_folder

NAME = 'run.json'


@contextlib.contextmanager
def call(workdir: Path, config: Mapping[str, Any], inputs: Mapping[str, Any],
         resolved: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Record a call of a script in the work directory, which must exist, and at the end how it ended.

    config: the resolved config. inputs: hashes of what the run reads. resolved: what depends on the devices
    of this call. All as plain values.

    Yields:
      The id of the run, the same in all its calls. Only the first process writes.
    """
    if not processes.is_first():
        yield ''
        return
    path = workdir / NAME
    record = _read(path)
    here = environment.describe(experiments_folder())
    if here not in record['environments']:
        record['environments'].append(here)
    this = {'command': environment.command(), 'started': _now(), 'ended': None, 'outcome': None,
            'environment': record['environments'].index(here), 'resolved': dict(resolved or {})}
    record['calls'].append(this)
    record |= {'config': config, 'seeds': seeds(config), 'inputs': inputs}
    _write(path, record)
    try:
        yield record['id']
        this['outcome'] = 'done'
    except BaseException as error:
        this['outcome'] = outcome(error)
        raise
    finally:
        this['ended'] = _now()
        with contextlib.suppress(OSError):  # a full disk is reported by what it stops
            _write(path, record)


def seeds(config: Any, name: str = '') -> dict[str, int]:
    """{field: value} of every field 'seed' or 'seeds' of a config."""
    if isinstance(config, Mapping):
        pairs = config.items()
    elif isinstance(config, (list, tuple)):
        pairs = enumerate(config)
    else:
        return {}
    found = {}
    for key, value in pairs:
        field = f'{name}.{key}'.lstrip('.')
        found |= {field: value} if key in ('seed', 'seeds') else seeds(value, field)
    return found


def outcome(error: BaseException) -> str:
    """How a call ended, in one line."""
    if isinstance(error, KeyboardInterrupt):
        return 'stopped'
    if isinstance(error, SystemExit):
        return 'stopped' if error.code == exit_status.STOPPED else f'exit status {error.code}'
    return f'{type(error).__name__}: {" ".join(str(error).split())[:500]}'


def _read(path):
    """The record so far; one that is damaged is begun anew, as it is never needed to continue."""
    new = {'id': secrets.token_hex(6), 'environments': [], 'calls': []}
    try:
        return {**new, **json_files.read_json(path, max_bytes=1 << 30)} if path.is_file() else new
    except ValueError:
        return new


def _write(path, record):
    files.write_atomically(path, json.dumps(record, indent=1) + '\n')


def _now():
    return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
