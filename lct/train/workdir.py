"""The work directory of a run: one process at a time, and one config, of which some fields may change."""

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

from lct import files, processes, storage
from lct.train import changes
from lct.train.checkpoint import located
from lct.train.metrics import log

MOST = 5  # changes that an error lists


def lock_workdir(workdir: str | Path, config: dict[str, Any], may_change: bool = False) -> TextIO | None:
    """Lock workdir for this run: record its config there, or compare it with the recorded one. Of several
    processes the first does it for all.

    config: plain dicts, lists and values. may_change: whether the fields of lct.train.changes may differ.
    Then the new config is recorded, config.json keeps every change under 'changes', with the steps that were
    taken before it took effect, and a line names it.

    Returns:
      The open lock file, which holds the lock until it is closed; None in the other processes.
    Raises:
      ValueError: if workdir holds a run with another config (naming the differences), if another process has
        locked it, or if the processes of this run have different configs or do not share the folder.
    """
    storage.refuse_remote(workdir)
    workdir = Path(workdir)
    config = json.loads(json.dumps(config))
    fields = {'.'.join(path): json.dumps(value) for path, value in changes.flatten(config)}
    fields['checkpoints'] = bucket = storage.elsewhere(workdir / 'checkpoints')
    processes.check_same(fields, 'their config or the inputs that it names')
    if processes.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    if not bucket:
        processes.check_same_folder(workdir)
    if not processes.is_first():
        return None
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
    try:
        _record(workdir, config, may_change)
    except ValueError:
        lock.close()
        raise
    return lock


def recorded_changes(workdir: str | Path) -> list[dict[str, Any]]:
    """The changes of a run's config so far, oldest first: {step, field, old, new}."""
    return _read(Path(workdir) / 'config.json').get('changes', [])


def _record(workdir, config, may_change):
    path = workdir / 'config.json'
    history = []
    if path.exists():
        old = _read(path)
        history, step = old.pop('changes', []), _steps_taken(workdir)
        found = changes.differences(old, config)
        refused = [changes.refusal(change, old, config, step) if may_change else str(change)
                   for change in found]
        _refuse([text for text in refused if text], workdir)
        if not found:
            return
        log(f'config changed after step {step}: {", ".join(map(str, found))}')
        history += [{'step': changes.steps_before(change, old, step), 'field': change.field,
                     'old': change.old, 'new': change.new} for change in found]
    changed = {'changes': history} if history else {}
    files.write_atomically(path, json.dumps({**config, **changed}, indent=2, sort_keys=True))


def _refuse(differences, workdir):
    if not differences:
        return
    more = len(differences) - MOST
    more = f' and {more} more (see {workdir / "config.json"})' if more > 0 else ''
    raise ValueError(
        f'{workdir} holds a run with another config: {", ".join(differences[:MOST])}{more}; set this back to '
        'continue that run, or choose another --workdir, or delete it')


def _read(path):
    try:
        config = json.loads(path.read_text())
        if isinstance(config, dict) and isinstance(config.get('stages', []), list):
            return config
    except ValueError:
        pass
    raise ValueError(f'{path} is damaged: it is not a JSON object; write the config of the run there, or '
                     'choose another --workdir')


def _steps_taken(workdir):
    """The step of the newest checkpoint under workdir, damaged or not; 0 without one."""
    folder = located(workdir / 'checkpoints')
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdigit()), default=0)
