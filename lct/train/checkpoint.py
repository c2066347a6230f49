"""Checkpoints through Orbax: asynchronous, sharded, atomic, restorable onto any mesh."""

import logging
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

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
