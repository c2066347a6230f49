"""Measurements of a model before and after its context is extended, on the same prompts and windows.

Every measurement is kept in a file once it is done, so that a run that was stopped continues after it.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from lct import processes
from lct.data.corpus.documents import Document
from lct.data.tokenizer import Tokenizer
from lct.eval import kept_results, quick_ruler, recall_probe, runner
from lct.eval.loss import by_position
from lct.eval.loss.by_position import EvaluationWindows, LossBins
from lct.eval.recall_probe import Decoding, RecallGrid, RecallResult
from lct.eval.report.text import recall_table
from lct.eval.suites.needle import NEEDLE, NeedleSuite
from lct.eval.suites.suite import Plan
from lct.eval.tasks.material import Material
from lct.models.llama import LlamaConfig, Memory, Params
from lct.text import clock

SHORT_BATCH = 8  # windows of the native length that are computed at a time
NEEDLE_DESCRIPTION = "suite 'needle' of evaluate.py: a wording that no training row has"
# The grid of the suite 'needle' is small: it is a check of the recall probe, and both models answer it.
NEEDLE_LENGTHS, NEEDLE_DEPTHS, NEEDLE_SAMPLES = (512, 2048, 8192), (0.0, 0.5, 1.0), 2


@dataclasses.dataclass(frozen=True)
class Measurements:
    """The measurements of one model; None for those that the evaluation does not have.

    short_loss: the mean loss over windows of the native length, in one bin; None without gates.
    needle, ruler: results of the suites 'needle' and 'ruler', as evaluate.py reports them; None where no
    prompt fits.
    """

    recall: RecallResult | None = None
    loss: LossBins | None = None
    short_loss: LossBins | None = None
    needle: dict | None = None
    ruler: dict | None = None

    @property
    def needle_grid(self) -> RecallResult | None:
        """The scores of the suite 'needle' as a grid like the one of the recall probe."""
        if self.needle is None:
            return None
        lengths, depths, scores, records = (
            self.needle[name] for name in ('lengths', 'depths', 'scores', 'records'))
        return RecallResult(tuple(lengths), tuple(depths), np.asarray(scores), tuple(records))

    @property
    def ruler_grid(self) -> RecallResult | None:
        """The scores of the suite 'ruler', with tasks in place of depths."""
        return quick_ruler.grid(self.ruler) if self.ruler else None


class QuickNeedles(NeedleSuite):
    """The suite 'needle' without likelihoods of the right answers, whose programs take longest to compile."""

    def items(self, plan: Plan) -> list[runner.Item]:
        return [dataclasses.replace(item, teacher_forced=False) for item in super().items(plan)]


class GatedStage(Protocol):
    """The fields of a train.stages.Stage that gate_scores reads."""

    name: str
    seq_len: int
    layout: str
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The prompts and windows, and how they are computed.

    haystack: int [n], token ids of held-out text, in which the recall probe hides its facts.
    grid: of the recall probe. windows: for the loss by position. short_windows: of the native length, for
      gates.
    needle_plan, ruler_plan: of those suites, see make_needle_plan and quick_ruler.make_plan.
    decoding: layout and memory policy, of the losses too. batch_size: windows of a loss computed at a time.
    check_stop: called between batches; raises to stop. log: takes a line of progress.
    """

    tokenizer: Tokenizer
    haystack: np.ndarray
    grid: RecallGrid | None
    windows: EvaluationWindows | None
    short_windows: EvaluationWindows | None = None
    needle_plan: Plan | None = None
    ruler_plan: Plan | None = None
    decoding: Decoding = Decoding()
    batch_size: int = 1
    check_stop: Callable[[], None] = lambda: None
    log: Callable[[str], None] = lambda text: None

    def settings(self, kind: str) -> dict[str, Any]:
        """What a measurement depends on apart from the model, as plain values. kind: as in measure."""
        text = {'haystack': kept_results.crc32_of(self.haystack), 'tokenizer': self.tokenizer.fingerprint}
        if kind == 'needle':
            return {**dataclasses.asdict(self.grid), **text}
        if kind in ('needle_suite', 'ruler_suite'):
            plan = self.needle_plan if kind == 'needle_suite' else self.ruler_plan
            return {'lengths': plan.lengths, 'depths': plan.depths, 'tasks': plan.tasks,
                    'samples': sorted(plan.counts.items()), 'seed': plan.material.seed, **text}
        windows = self.windows if kind == 'loss' else self.short_windows
        return {'windows': windows.tokens.shape, 'tokens': kept_results.crc32_of(windows.tokens)}

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
        self.log(f'{name}: recall probe, percent right, depth downwards, length rightwards\n'
                 f'{recall_table(result)}')
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

    def needle(self, name: str, config: LlamaConfig, params: Params) -> dict:
        """The result of the suite 'needle' on the current mesh, as plain values."""
        return self._answer(QuickNeedles(), self.needle_plan, name, config, params)

    def ruler(self, name: str, config: LlamaConfig, params: Params) -> dict:
        """The result of some tasks of the suite 'ruler' on the current mesh, as plain values."""
        return self._answer(quick_ruler.QuickRuler(), self.ruler_plan, name, config, params)

    def _answer(self, suite, plan, name, config, params):
        def progress(done, total, left):
            self.log(f'{suite.name} suite, {name} | {done}/{total} prompts | {clock(left)} left')
            self.check_stop()

        # The runner refuses prompts beyond the positions that a model declares; here they are what is tested.
        positions = max(config.max_position_embeddings, *plan.lengths)
        config = dataclasses.replace(config, max_position_embeddings=positions)
        model = runner.Model(params, config, self.tokenizer, memory=self.decoding.memory)
        with tempfile.TemporaryDirectory() as folder:
            return suite.run(model, plan, Path(folder) / f'{suite.name}.jsonl', progress).result

    def gate_scores(self, stage: GatedStage, config: LlamaConfig, params: Params,
                    base_short: LossBins) -> dict[str, float]:
        """The scores of a gate (train.gates); its prompts are not those of the reported grid.

        base_short: the short_loss of the base model.
        """
        grid = dataclasses.replace(self.grid, lengths=(stage.seq_len,), seed=self.grid.seed + 1)
        decoding = dataclasses.replace(self.decoding, layout=stage.layout, memory=stage.memory.in_inference)
        at_stage = dataclasses.replace(self, grid=grid, decoding=decoding, log=lambda text: None)
        recall = at_stage.recall(stage.name, config, params)
        short = at_stage.short_loss(stage.name, config, params)
        return {'needle': recall.scores.mean(), 'short_loss_rise': short.mean[0] - base_short.mean[0]}


def measure(evaluation: Evaluation, name: str, config: LlamaConfig, load_params: Callable[[], Params],
            folder: Path, mesh: jax.sharding.Mesh, trained: Mapping[str, Any] | None = None) -> Measurements:
    """The measurements of one model, read from their files in folder or computed on the mesh and kept there.

    name: 'base', 'extended', or that of a stage. load_params: called at most once, and only if something is
      left to compute.
    trained: what the weights depend on, as plain values. A measurement is computed again where it, or the
      settings of the evaluation, differ from those in the file.
    """
    params = None

    def keep(kind, compute, to_json, from_json):
        nonlocal params
        path, settings = folder / f'{kind}_{name}.json', {**evaluation.settings(kind), **(trained or {})}
        kept = kept_results.read(path, settings, evaluation.log)
        if processes.from_first(kept is not None):
            return from_json(json.dumps(kept))
        params = load_params() if params is None else params
        text = to_json(compute(name, config, params))
        if processes.is_first():
            kept_results.write(path, settings, json.loads(text))
        return from_json(text)

    loss_json = (LossBins.to_json, LossBins.from_json)
    with jax.set_mesh(mesh):
        recall, loss, short, needle, ruler = None, None, None, None, None
        if evaluation.grid:
            recall = keep('needle', evaluation.recall, RecallResult.to_json, RecallResult.from_json)
        if evaluation.windows:
            loss = keep('loss', evaluation.loss, *loss_json)
        if evaluation.short_windows:
            short = keep('short', evaluation.short_loss, *loss_json)
        if evaluation.needle_plan:
            needle = keep('needle_suite', evaluation.needle, json.dumps, json.loads)
        if evaluation.ruler_plan:
            ruler = keep('ruler_suite', evaluation.ruler, json.dumps, json.loads)
    return Measurements(recall, loss, short, needle, ruler)


def make_needle_plan(tokenizer: Tokenizer, haystack: np.ndarray, longest: int, seed: int) -> Plan | None:
    """Prompts of the suite 'needle' over held-out text, up to `longest` tokens; None if no length fits.

    Their wording occurs in no training row, so they show whether what a model recalls carries over.
    """
    text = tokenizer.decode(haystack[:4 * max(NEEDLE_LENGTHS)].tolist())
    material = Material(tokenizer, [Document('held out', text)], text_source='held-out documents', seed=seed)

    def fits(length):
        try:
            return length <= longest and material.sample(NEEDLE, length, 0) is not None
        except ValueError:  # a tokenizer that makes many tokens of a short text
            return False

    lengths = tuple(filter(fits, NEEDLE_LENGTHS))
    counts = dict.fromkeys(lengths, NEEDLE_SAMPLES)
    return Plan(material, lengths, counts, depths=NEEDLE_DEPTHS) if lengths else None
