"""bad_steps.jsonl: the steps that left the weights alone, why, and the rows of their batches."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lct import processes
from lct.train.metrics import log

MAX_BYTES = 16 * 2**20  # of the file; a run whose every step is bad ends long before

NO_TARGET, NOT_FINITE = 'no target', 'loss or gradient not finite'
SPIKE = 'gradient norm far above its median'


def reason_of(values: Mapping[str, float]) -> str:
    """Why a step with these metrics left the weights alone; '' if it did not."""
    if values['targets'] == 0:
        return NO_TARGET
    if not (math.isfinite(values['loss']) and math.isfinite(values['grad_norm'])):
        return NOT_FINITE
    return SPIKE if values.get('spike') else ''


class BadSteps:
    """Appends to bad_steps.jsonl in a run's work directory; in a run of several processes only the first.

    A step that is taken again after a resume gets another line. Nothing is written beyond MAX_BYTES, and a
    full disk costs lines, not the run.
    """

    def __init__(self, workdir: str | Path):
        self.path = Path(workdir) / 'bad_steps.jsonl'
        self._warned = False

    def add(self, step: int, reason: str, values: Mapping[str, float], rows: list[dict[str, Any]]) -> None:
        """Add the line of one step. values: its metrics. rows: of its batch, from Loader.describe."""
        if not processes.is_first():
            return
        line = json.dumps({
            'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()), 'step': step, 'reason': reason,
            **{name: _strict(values[name]) for name in ('loss', 'grad_norm', 'targets')}, 'rows': rows,
        }, allow_nan=False) + '\n'
        try:
            size = self.path.stat().st_size if self.path.exists() else 0
            if size + len(line) > MAX_BYTES:
                raise OSError(f'it has reached {MAX_BYTES >> 20} MiB')
            with self.path.open('a') as file:
                file.write(line)
        except OSError as error:
            if not self._warned:
                log(f'WARNING: {self.path} no longer takes the rows of bad steps ({error})')
            self._warned = True


def _strict(value):
    """A number as strict JSON has it: 'nan', 'inf' and '-inf' are strings."""
    return value if math.isfinite(value) else str(value)
