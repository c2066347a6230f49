"""Checkpoints through Orbax: asynchronous, sharded, atomic, restorable onto any mesh, and verified."""

import contextlib
import functools
import json
import logging
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from lct import exit_status, processes, storage
from lct.out_of_memory import is_out_of_memory
from lct.train import fingerprints
from lct.train.state import TrainState

for _name in ('absl', 'asyncio'):  # Orbax reports every phase, and every array of a failure at length
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def _print_unless_late(hook, unraisable):
    """sys.unraisablehook without the reads and writes that end after those of a failed item were given up."""
    code = getattr(unraisable.object, 'cr_code', None)  # of a coroutine
    if str(unraisable.exc_value) != 'Event loop is closed' and not (code and 'orbax' in code.co_filename):
        hook(unraisable)


sys.unraisablehook = functools.partial(_print_unless_late, sys.unraisablehook)


class Unwritable(OSError):
    """Checkpoints cannot be written; the message says which step is on disk."""

    exit_status = exit_status.UNWRITABLE


class Damaged(ValueError):
    """The files of a checkpoint are not what was saved; the message says which item."""


class Restored(NamedTuple):
    """A checkpoint in memory. record: as it was saved. warnings: one line for each checkpoint that was newer
    but damaged, and one if the bits could not be checked."""

    step: int
    state: TrainState
    record: dict
    warnings: list[str]


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, each with the TrainState and a JSON record (data
    cursor, seconds of training, fingerprints of all arrays) that says where the run stood."""

    def __init__(self, folder: str | Path, keep: int = 2, max_failed: int = 5):
        """max_failed: saves that fail in a row before Unwritable ends the run."""
        self.folder = located(folder)
        self._keep, self._max_failed, self._failed, self._saving = keep, max_failed, 0, None
        self._manager = self._open()

    def _open(self):
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=self._keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_names=('state', 'record'),
        )

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: Mapping) -> str | None:
        """Start saving, after the save before has ended; returns before the files are written. A step that is
        saved already is left as it is.

        Returns:
          None, or in one line why this or the save before failed: a full disk does not end training.
        Raises:
          Unwritable: after max_failed failures in a row; in a run of several processes at the first, because
            the others would wait for this one.
        """
        problem = self.wait()
        if step in self._manager.all_steps():
            return problem
        record = fingerprints.seal(
            {**record, 'step': step, 'arrays': fingerprints.describe_bits(state)})
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            return self._fail(step, first_line(error))
        self._saving = step
        return problem

    def poll(self) -> str | None:
        """Call after every step: what wait returns, but without waiting for a save that goes on."""
        return None if self._manager.is_saving_in_progress() else self.wait()

    def wait(self) -> str | None:
        """Wait until the save that was started is on disk. Returns None, or in one line why it failed.

        Raises:
          Unwritable: see save.
        """
        step, self._saving = self._saving, None
        if step is None:
            return None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            return self._fail(step, first_line(error))
        if processes.is_first() and not (self.folder / str(step)).is_dir():
            return self._fail(step, 'its folder is missing')
        if self._failed and jax.process_count() == 1:  # a thread of a failed save may have come late
            self._remove_temporary()
        self._failed = 0
        return None

    def _remove_temporary(self):
        for path in self.folder.glob('*.orbax-checkpoint-tmp*'):
            shutil.rmtree(path, ignore_errors=True)  # none in a bucket, where Orbax writes commits

    def _fail(self, step, problem):
        """Clean up after a failed save. Returns the warning, or raises Unwritable if too many failed."""
        self._failed += 1
        if jax.process_count() > 1:
            raise Unwritable(
                f'process {jax.process_index()} could not write its shards of step {step} ({problem}); the '
                f'checkpoints before it under {self.folder} are complete: make room and run the same command '
                'to continue')
        with contextlib.suppress(Exception):  # the threads of the failed save end, with their errors
            self._manager.close()
        self._remove_temporary()
        self._manager = self._open()  # the steps that are on disk
        saved = f'step {self.latest()} is' if self.latest() else 'none is'
        if self._failed >= self._max_failed:
            raise Unwritable(
                f'{self._failed} checkpoints in a row could not be written, the last after step {step} '
                f'({problem}); {saved} on disk under {self.folder}: make room and run the same command to '
                'continue')
        return f'the checkpoint of step {step} could not be written ({problem}); {saved} on disk'

    def restore_newest_valid(self, target: Callable[[int], TrainState]) -> Restored | None:
        """The newest checkpoint whose every array has the bits that were saved, or None if there is none at
        all. Newer ones are renamed to '<step>.damaged', which no one reads or counts. All processes must call
        this.

        target: the tree of ShapeDtypeStructs that a step is restored onto.

        Raises:
          ValueError: if arrays of a checkpoint differ in dtype or shape from the target, or one lacks an
            array of the other, or if every checkpoint is damaged. All of them then stay as they are.
        """
        damaged = {}
        while step := self._next_older(min(damaged, default=None)):
            try:
                record = self._read_record(step)
                state = self._read_state(step, target(step), record)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            return Restored(step, state, record, self._warnings(step, record, damaged))
        if damaged:
            problems = ', '.join(f'step {step}: {problem}' for step, problem in damaged.items())
            raise ValueError(
                f'no checkpoint under {self.folder} can be restored ({problems}); to start the run again '
                'from its first step, move that folder away')
        return None

    def _warnings(self, step, record, damaged):
        """Set damaged checkpoints {step: problem} aside. Returns the warnings of a restored step."""
        warnings = [f'checkpoint {self.folder / str(bad)} is damaged ({problem}); it is now '
                    f'{self._set_aside(bad)} and the run continues from step {step}'
                    for bad, problem in damaged.items()]
        if damaged:
            processes.wait_for_all()
            self._manager.reload()
        if 'arrays' not in record:
            warnings.append(f'checkpoint {self.folder / str(step)} was saved without fingerprints; its bits '
                            'could not be checked')
        return warnings

    def _next_older(self, step):
        """The newest step that the first process finds below step, or 0."""
        steps = [found for found in self._manager.all_steps() if step is None or found < step]
        return processes.from_first(max(steps, default=0))

    def _read_record(self, step):
        path, problem, record = self.folder / str(step) / 'record' / 'metadata', None, None
        try:
            record = json.loads(path.read_text())
            if set(record) - {'cursor', 'seconds', 'norms'}:  # else saved before there were fingerprints
                record = fingerprints.unseal(record)
                if record['step'] != step:
                    raise ValueError(f'it is of step {record["step"]}')
            record['cursor']
        except Exception as error:
            problem = f'item record: {first_line(error)}'
        self._agree(problem)
        return record

    def _read_state(self, step, target, record):
        path, problem, stored, state = self.folder / str(step) / 'state', None, {}, None
        try:
            stored = record.get('arrays') or fingerprints.describe(
                ocp.StandardCheckpointHandler().metadata(path).tree)
        except Exception as error:
            problem = f'item state: {first_line(error)}'
        self._agree(problem)
        if differences := fingerprints.differences(stored, fingerprints.describe(target)):
            raise ValueError(
                f'checkpoint {self.folder / str(step)} does not fit this run: it holds {differences}; '
                'continue with the config and code that wrote it, or choose another work directory')
        try:
            state = restore_arrays(path, target)
        except Damaged as error:
            problem = f'item state: {error}'
        self._agree(problem)
        if 'arrays' in record:
            try:
                fingerprints.check(state, stored, 'item state')
            except ValueError as error:
                problem = str(error)
            self._agree(problem)
        return state

    def _agree(self, problem):
        """Raise Damaged in every process if one has a problem."""
        if processes.anyone(bool(problem)):
            raise Damaged(problem or 'as another process found')

    def _set_aside(self, step):
        """Rename the folder of a damaged step. Returns its new name."""
        new, count = self.folder / f'{step}.damaged', 1
        while new.exists():
            count += 1
            new = self.folder / f'{step}.damaged.{count}'
        if processes.is_first():
            (self.folder / str(step)).rename(new)
        return new.name

    def close(self) -> None:
        """Finish all saves and release the folder."""
        with contextlib.suppress(Unwritable):
            self.wait()
        with contextlib.suppress(Exception):  # of a failed save, of which the warning is written
            self._manager.close()


def located(folder: str | Path) -> Path:
    """The folder of checkpoints: the local one, or the bucket that a file FOLDER.url beside it names."""
    if url := storage.elsewhere(folder):
        from etils import epath  # a dependency of Orbax: pathlib's methods for buckets

        return epath.Path(url)
    storage.refuse_remote(folder)
    return Path(folder).absolute()


def restore_arrays(path: Path, target: Any) -> Any:
    """A tree of arrays that Orbax saved at path, placed as target (a tree of ShapeDtypeStructs) says; without
    Orbax's barriers, at which processes would wait for one that found damage.

    Raises:
      Damaged: in one line; nothing else is printed.
    """
    try:
        try:
            return _restore(path, target)
        except ValueError as error:
            if 'tree structures do not match' not in str(error):
                raise
            return _restore_by_name(path, target)
    except Exception as error:
        if is_out_of_memory(error):
            raise  # that says nothing about the files
        raise Damaged(first_line(error)) from error


def _restore(path, target):
    args = ocp.args.StandardRestore(target)
    return jax.block_until_ready(ocp.StandardCheckpointHandler().restore(path, args=args))


def _restore_by_name(path, target):
    """For a tree that was saved before its classes had optional parameters: Orbax records None for each, and
    takes their absence for another tree."""
    stored = ocp.StandardCheckpointHandler().metadata(path).tree
    wanted = fingerprints.named_leaves(target)
    if set(fingerprints.named_leaves(stored)) != set(wanted):
        raise ValueError('it does not hold the arrays of this model')
    stored = jax.tree_util.tree_map_with_path(lambda keys, _: wanted[fingerprints.name_of(keys)], stored)
    arrays = fingerprints.named_leaves(_restore(path, stored))
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted])


def save_arrays(path: Path, arrays: Any) -> None:
    """Write a tree of arrays for restore_arrays, into a new folder."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, arrays)


def describe_arrays(path: Path) -> dict[str, dict]:
    """{name: {dtype, shape}} of the arrays that save_arrays wrote. Raises whatever Orbax does."""
    return fingerprints.describe(ocp.StandardCheckpointHandler().metadata(path).tree)


def first_line(error: BaseException) -> str:
    """What happened, of Orbax's thousands of lines: the first, or an error of the operating system in it."""
    text = str(error).strip() or type(error).__name__
    system = re.search(r'([^:\n]+) \[os_error_code', text)
    return system[1].strip() if system else text.splitlines()[0][:300]
