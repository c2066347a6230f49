"""Checkpoints through Orbax: asynchronous, sharded, atomic, restorable onto any mesh."""

import fcntl
import json
import logging
import pathlib

import jax
import orbax.checkpoint as ocp

from lct import files, processes

logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax reports every phase of every save


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, each with the TrainState and a JSON record (data
    cursor, seconds of training) that says where the run stood."""

    def __init__(self, folder, keep=2):
        self.folder = pathlib.Path(folder).absolute()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
            ),
            item_names=('state', 'record'),
        )

    def latest(self):
        """The newest committed step, or None."""
        return self._manager.latest_step()

    def save(self, step, state, record):
        """Start saving; returns before the files are written. A step that is already there is left.

        Returns:
          None, or in one line why a checkpoint was not written: a full disk must not end the training.
        Raises:
          OSError: instead, in one of several processes: the others cannot know of it, and would wait.
        """
        if step in self._manager.all_steps():
            return None
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # that of the save before this one, found in the background
            problem = _first_line(error)
            _give_up_if_several(problem)
            try:
                self._manager.save(step, args=items)
            except Exception as again:
                problem = _first_line(again)
            return f'a checkpoint could not be written ({problem}); the ones before it are whole'
        return None

    def record(self, step):
        """The JSON record of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))['record']

    def restore(self, step, target):
        """The TrainState of a step, placed as target (a tree of ShapeDtypeStructs) says.

        Raises:
          ValueError: naming the step, when its files do not fit or are damaged.
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

    def wait(self):
        """Block until what was saved is on disk. Returns None, or in one line what went wrong there."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            _give_up_if_several(_first_line(error))
            self._manager.reload()  # latest() must be what lies on the disk
            return f'the last checkpoint could not be written ({_first_line(error)}); those before are whole'
        return None

    def close(self):
        self.wait()
        self._manager.close()


def _give_up_if_several(problem):
    if jax.process_count() > 1:
        raise OSError(
            f'process {jax.process_index()} could not write its part of a checkpoint ({problem}); the ones '
            'before it are whole: mend this and run the same command to continue'
        )


def _first_line(error):
    """Orbax's messages run to thousands of lines; the first says what happened."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def lock_workdir(workdir, config):
    """Make workdir this run's own, or continue in it if it holds the same config. Of several processes the
    first does it for all.

    Returns:
      The open lock file, None in the other processes; the folder is this process's while it lives.
    Raises:
      ValueError: if workdir holds a run of another config (naming what differs), if another process is at
        work in it, or if the processes of this run are not of one config.
    """
    workdir = pathlib.Path(workdir)
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
            f'another process is at work in {workdir}; wait for it, or choose another --workdir'
        ) from error
    except OSError:
        pass  # some network file systems have no flock: a run without the guard is better than none
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
    """Where the JSON of path and text differ, as 'stages.0.num_steps 80 -> 40, ...'; '' if nowhere."""
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
