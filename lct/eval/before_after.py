"""What is measured of a model before and after its context is extended: the same prompts and windows for
both.

Every measurement is kept in a file once it is done, so that a run that was stopped goes on behind it.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from lct import files, processes
from lct.data.tokenizer import Tokenizer
from lct.eval import recall_probe
from lct.eval.loss import by_position
from lct.eval.loss.by_position import EvaluationWindows, LossBins
from lct.eval.recall_probe import Decoding, RecallGrid, RecallResult
from lct.eval.report.text import recall_table
from lct.models.llama import LlamaConfig, Memory, Params
from lct.text import clock

SHORT_BATCH = 8  # windows of the native length that are computed at a time


@dataclasses.dataclass(frozen=True)
class Measurements:
    """Of one model. short_loss: the mean loss over windows of the native length, in one bin; None without
    gates."""

    recall: RecallResult
    loss: LossBins
    short_loss: LossBins | None = None


class GatedStage(Protocol):
    """What gate_scores reads of a train.stages.Stage."""

    name: str
    seq_len: int
    layout: str
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The prompts and windows, and how they are computed.

    haystack: int [n], token ids of held-out text, in which the recall probe hides its facts.
    windows: for the loss by position. short_windows: windows of the native length, for gates.
    decoding: layout and memory policy, of the losses too. batch_size: windows of a loss computed at a time.
    check_stop: called between batches; raises to stop. log: takes a line of progress.
    """

    tokenizer: Tokenizer
    haystack: np.ndarray
    grid: RecallGrid
    windows: EvaluationWindows
    short_windows: EvaluationWindows | None = None
    decoding: Decoding = Decoding()
    batch_size: int = 1
    check_stop: Callable[[], None] = lambda: None
    log: Callable[[str], None] = lambda text: None

    def recall(self, name: str, config: LlamaConfig, params: Params) -> RecallResult:
        """The recall probe on the current mesh. name: of the model, in progress lines."""
        start = time.monotonic()

        def progress(done, total, length):
            left = (time.monotonic() - start) / done * (total - done)
            self.log(f'recall probe, {name} | {done}/{total} prompts | up to {length:,} tokens | '
                     f'{clock(left)} left')
            self.check_stop()

        result = recall_probe.run(
            params, config, self.tokenizer, self.haystack, self.grid, self.decoding, progress)
        self.log(f'{name}: recall probe, percent right, depth downwards, length '
                 f'rightwards\n{recall_table(result)}')
        return result

    def loss(self, name: str, config: LlamaConfig, params: Params) -> LossBins:
        """Loss by position on the current mesh."""
        def progress(done, total):
            if done % 8 == 0 or done == total:
                self.log(f'loss by position, {name} | {done}/{total} windows')
            self.check_stop()

        losses = self._losses(config, params, self.windows, self.batch_size, progress)
        return by_position.bin_losses(losses, documents=self.windows.documents)

    def short_loss(self, name: str, config: LlamaConfig, params: Params) -> LossBins:
        """The mean loss over short_windows, in one bin."""
        losses = self._losses(config, params, self.short_windows, SHORT_BATCH, lambda *_: self.check_stop())
        return by_position.bin_losses(losses, (0, losses.shape[1]), self.short_windows.documents)

    def _losses(self, config, params, windows, batch_size, progress):
        return by_position.loss_by_position(
            params, config, windows.tokens, layout=self.decoding.layout, memory=self.decoding.memory,
            batch_size=batch_size, progress=progress)

    def gate_scores(self, stage: GatedStage, config: LlamaConfig, params: Params,
                    base_short: LossBins) -> dict[str, float]:
        """The scores of a gate (train.gates); its prompts are not those of the reported grid.

        base_short: the short_loss of the base model.
        """
        grid = dataclasses.replace(self.grid, lengths=(stage.seq_len,), seed=self.grid.seed + 1)
        decoding = dataclasses.replace(self.decoding, layout=stage.layout, memory=stage.memory)
        at_stage = dataclasses.replace(self, grid=grid, decoding=decoding, log=lambda text: None)
        recall = at_stage.recall(stage.name, config, params)
        short = at_stage.short_loss(stage.name, config, params)
        return {'needle': recall.scores.mean(), 'short_loss_rise': short.mean[0] - base_short.mean[0]}


def measure(evaluation: Evaluation, name: str, config: LlamaConfig, load_params: Callable[[], Params],
            folder: Path, mesh: jax.sharding.Mesh) -> Measurements:
    """The measurements of one model, read from their files in folder or computed on the mesh and kept there.

    name: 'base' or 'extended'. load_params: called at most once, and only if something is left to compute.
    """
    params = None

    def keep(kind, compute, read):
        nonlocal params
        path = folder / f'{kind}_{name}.json'
        if processes.from_first(path.exists()):
            return read(path.read_text())
        params = load_params() if params is None else params
        text = compute(name, config, params).to_json()
        if processes.is_first():
            files.write_atomically(path, text)
        return read(text)

    with jax.set_mesh(mesh):
        return Measurements(
            keep('needle', evaluation.recall, RecallResult.from_json),
            keep('loss', evaluation.loss, LossBins.from_json),
            keep('short', evaluation.short_loss, LossBins.from_json) if evaluation.short_windows else None,
        )
