"""Copies of a run's metrics in Weights & Biases, MLflow or Trackio; metrics.jsonl stays the record.

A tracker works in a thread of its own, as these packages wait for servers: it can neither stop nor slow the
training. Where they send to is theirs to configure (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_DIR, ...).
"""

import importlib.util
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

PROJECT = 'lct'
CLOSE_S = 20.0  # for a tracker to send what is left: schedulers kill a job soon after its SIGTERM
MOST = 100_000  # rows that wait


class About(NamedTuple):
    """A run as a tracker shows it. id: the same in all calls of the run, so that they continue one curve."""

    name: str
    id: str
    folder: Path
    config: Mapping[str, Any]


class Backend(Protocol):
    """One package. It is opened with an About, and continues a run that has the id."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The finite numbers of one step."""

    def image(self, step: int, name: str, path: Path) -> None:
        """A PNG."""

    def close(self) -> None:
        """Send what is left."""


class Wandb:
    """Weights & Biases; WANDB_MODE=offline writes to WORKDIR/wandb alone."""

    def __init__(self, about: About):
        import wandb
        self._image = wandb.Image
        self._run = wandb.init(project=PROJECT, name=about.name, id=about.id, resume='allow',
                               dir=about.folder, config=dict(about.config))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """MLflow, at MLFLOW_TRACKING_URI."""

    def __init__(self, about: About):
        import mlflow
        self._mlflow, self._client = mlflow, mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        found = self._client.search_runs([number], f"tags.lct_run = '{about.id}'")
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status='RUNNING')
            return
        self._run = self._client.create_run(number, run_name=about.name,
                                            tags={'lct_run': about.id}).info.run_id
        self._client.log_dict(self._run, dict(about.config), 'config.json')

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)  # one request for all

    def image(self, step: int, name: str, path: Path) -> None:
        self._client.log_artifact(self._run, str(path), f'figures/step_{step}')

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio(Wandb):
    """Trackio, whose runs have the methods of wandb's; in TRACKIO_DIR on this machine unless its own settings
    name a space."""

    def __init__(self, about: About):
        import trackio
        self._image = trackio.Image
        self._run = trackio.init(project=PROJECT, name=f'{about.name}-{about.id}', resume='allow',
                                 config=dict(about.config))


BACKENDS: dict[str, Callable[[About], Backend]] = {'wandb': Wandb, 'mlflow': Mlflow, 'trackio': Trackio}


def parse_names(text: str) -> tuple[str, ...]:
    """The trackers of 'wandb,mlflow'.

    Raises:
      ValueError: for an unknown name, or a package that is not installed.
    """
    names = tuple(name.strip() for name in text.split(','))
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f'--track {name} is not one of {", ".join(BACKENDS)}')
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"--track {name} needs the package {name}; pip install '.[{name}]'")
    return names


class Tracker:
    """Sends rows and images to one backend, in order, until the first error, which is warned of once."""

    def __init__(self, name: str, about: About, warn: Callable[[str], object]):
        """warn: takes a line."""
        self._name, self._about, self._warn = name, about, warn
        self._queue, self._failed, self._dropped = queue.SimpleQueue(), False, False
        self._thread = threading.Thread(target=self._run, name=f'lct-{name}', daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of one step; those that are not finite are left out."""
        self._add('scalars', step, {name: x for name, x in values.items() if math.isfinite(x)})

    def image(self, step: int, name: str, path: Path) -> None:
        """Take a PNG file, which must not change until it is sent."""
        self._add('image', step, name, path)

    def close(self) -> None:
        """Send what is left, in at most CLOSE_S."""
        self._queue.put(('close',))
        self._thread.join(CLOSE_S)
        if self._thread.is_alive() or self._dropped:
            self._warn(f'WARNING: {self._name} did not take all metrics in time; they are in metrics.jsonl')

    def _add(self, *item):
        if self._queue.qsize() >= MOST:
            self._dropped = not self._failed
        else:
            self._queue.put(item)

    def _run(self):
        try:
            backend = BACKENDS[self._name](self._about)
            method = ''
            while method != 'close':
                method, *arguments = self._queue.get()
                getattr(backend, method)(*arguments)
        except Exception as error:  # of any kind: these packages raise their own
            self._failed = True
            text = ' '.join(str(error).split())[:200]
            self._warn(f'WARNING: no more metrics are sent to {self._name} ({type(error).__name__}: {text}); '
                       'training goes on, and metrics.jsonl has them')


def open_all(names: Sequence[str], about: About, warn: Callable[[str], object]) -> list[Tracker]:
    """A Tracker for each name."""
    return [Tracker(name, about, warn) for name in names]
