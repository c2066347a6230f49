"""The work directory of a run: one process at a time, and one config."""

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

from lct import files, processes


def lock_workdir(workdir: str | Path, config: Any) -> TextIO | None:
    """Lock workdir for this run: record its config there, or check that it equals the recorded one. Of
    several processes the first does it for all.

    Returns:
      The open lock file, which holds the lock until it is closed; None in the other processes.
    Raises:
      ValueError: if workdir holds a run with another config (naming the differences), if another process has
        locked it, or if the processes of this run have different configs.
    """
    workdir = Path(workdir)
    path = workdir / 'config.json'
    text = json.dumps(config, indent=2, sort_keys=True)
    processes.check_same(text, 'their config or the inputs that it names')
    if not processes.is_first():
        return None
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / 'lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise ValueError(
            f'another process runs in {workdir}; wait for it, or choose another --workdir'
        ) from error
    except OSError:
        pass  # some network file systems have no flock: a run without the lock is better than none
    if path.exists():
        differences = _differences(path, text)
        if differences:
            lock.close()
            raise ValueError(
                f'{workdir} holds a run with another config: {differences}; set this back to continue that '
                'run, or choose another --workdir, or delete it'
            )
    else:
        files.write_atomically(path, text)
    return lock


def _differences(path, text, most=5):
    """The fields of text that differ from the JSON at path: 'stages.0.num_steps 80 -> 40, ...', or ''."""
    try:
        old = dict(_flat(json.loads(path.read_text())))
    except ValueError:
        return f'{path} is damaged'
    new = dict(_flat(json.loads(text)))
    show = lambda values, key: json.dumps(values[key]) if key in values else '(absent)'
    changed = [key for key in sorted({*old, *new}) if show(old, key) != show(new, key)]
    more = f' and {len(changed) - most} more (see {path})' if len(changed) > most else ''
    return ', '.join(f'{key} {show(old, key)} -> {show(new, key)}' for key in changed[:most]) + more


def _flat(tree, prefix=''):
    """(dotted path, value) of every leaf of nested dicts and lists; an empty one is a leaf."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree)) or tree
    items = tree.items() if isinstance(tree, dict) else ()
    if not items and prefix:
        yield prefix, tree
    for key, value in items:
        yield from _flat(value, f'{prefix}.{key}' if prefix else str(key))
