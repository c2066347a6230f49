"""Checkpoints through Orbax: asynchronous, sharded, atomic, restorable onto any mesh."""

import fcntl
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import orbax.checkpoint as ocp

from lct import files, processes
from lct.train.state import TrainState

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax reports every phase of every save


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, each with the TrainState and a JSON record (data
    cursor, seconds of training) that says where the run stood."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_names=('state', 'record'),
        )

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: Mapping) -> str | None:
        """Start saving; returns before the files are written. A step that is saved already is left as it is.

        Returns:
          None, or in one line the reason why no checkpoint was written: a full disk must not end training.
        Raises:
          OSError: in a run of several processes, where the others would wait for this one.
        """
        if step in self._manager.all_steps():
            return None
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # raised in the background by the save before this one
            problem = _first_line(error)
            _give_up_if_several(problem)
            try:
                self._manager.save(step, args=items)
            except Exception as again:
                problem = _first_line(again)
            return f'a checkpoint could not be written ({problem}); the ones before it are complete'
        return None

    def record(self, step: int) -> dict:
        """The JSON record of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))['record']

    def restore(self, step: int, target: TrainState) -> TrainState:
        """The TrainState of a step, placed as target (a tree of ShapeDtypeStructs) says.

        Raises:
          ValueError: naming the step, if its files do not fit the target or are damaged.
        """
        try:
            return self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )['state']
        except Exception as error:
            raise ValueError(
                f'checkpoint {self.folder / str(step)} cannot be restored ({_first_line(error)}); '
                'delete that folder to continue from the one before'
            ) from error

    def wait(self) -> str | None:
        """Wait until everything saved is on disk. Returns None, or the error in one line."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            _give_up_if_several(_first_line(error))
            self._manager.reload()  # latest() must name a step that is on disk
            return (
                f'the last checkpoint could not be written ({_first_line(error)}); those before are complete')
        return None

    def close(self) -> None:
        """Finish all saves and release the folder."""
        self.wait()
        self._manager.close()


def _give_up_if_several(problem):
    if jax.process_count() > 1:
        raise OSError(
            f'process {jax.process_index()} could not write its shards of a checkpoint ({problem}); the ones '
            'before it are complete: fix this and run the same command to continue'
        )


def _first_line(error):
    """Orbax's messages run to thousands of lines; the first says what happened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


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
