"""The training run: stages in order, checkpoints, metrics, and a stop that loses no step."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lct import processes, sharding, watchdog
from lct.data.batches.loader import StopRequested
from lct.models import lora
from lct.models.flops import train_flops
from lct.models.llama import LlamaConfig, Params
from lct.ops import rope
from lct.text import clock
from lct.train import gates, spikes
from lct.train import optimizer as optimizers
from lct.train import stages as stage_plans
from lct.train import state as states
from lct.train.bad_steps import BadSteps
from lct.train.checkpoint import Checkpoints
from lct.train.final_model import final_model
from lct.train.memory_errors import located
from lct.train.metrics import Metrics, log, measured_peak
from lct.train.observers import Observers
from lct.train.placement import held_rows, place_batch
from lct.train.progress import StageProgress, Work
from lct.train.settings import Run
from lct.train.step import train_step
from lct.train.stopping import Interrupted, loss_message, stop_message
from lct.train.straggler import StragglerCheck


def train(
    run: Run, config: LlamaConfig, params: Callable[..., Params], mixture: Any, workdir: str | Path,
    stop_requested: Sequence[str] = (), gate_scores: Callable | None = None,
    observers: Observers | None = None,
) -> tuple[LlamaConfig, Params, dict]:
    """Train through all stages, continuing from the newest valid checkpoint under workdir if there is one.

    Args:
      run: the settings. config: of the base model.
      params: returns the base model's weights on the current mesh. Called only when there is no checkpoint,
        or when the run has an adapter, as checkpoints hold no frozen weights. To freeze weights in 8 bits,
        params(convert) replaces each by convert(name, weight) as soon as it is loaded (streaming.load).
      mixture: the rows, a MemorySource or StoreSource of lct.data.batches; its cursor goes into every
        checkpoint.
      workdir: holds checkpoints/, metrics/, gates.json and bad_steps.jsonl.
      stop_requested: a list that is not empty once the run is to stop (stopping.catch_signals).
      gate_scores: callable (Stage, LlamaConfig, Params) -> {needle, short_loss_rise}, the scores of a
        gates.Gate; called on the stage's mesh.
      observers: a profile and trackers of the metrics.
    Returns:
      (LlamaConfig, Params, summary dict), on the mesh of the last stage, adapters merged, for frozen weights
      in 8 bits into those of params() if it still returns them. The summary's
      seconds are those of the stages, compilation included, over all calls that trained this run.
    Raises:
      stopping.Interrupted: after saving, when a stop was requested.
      gates.GateClosed: after saving, when the gate of a stage did not open and is to stop the run.
      FloatingPointError: after max_skips_in_row skipped steps in a row.
      checkpoint.Unwritable: after max_failed_saves checkpoints in a row that could not be written.
      memory_errors.OutOfMemory: naming stage and step, when a device or the host has no memory left.
    """
    if gate_scores is None and any(stage.gate for stage in run.stages):
        raise ValueError(
            'a stage has a gate but train() was given no gate_scores to measure it by; pass gate_scores')
    observers = observers or Observers()
    after_stage = observers.after_stage
    training = _Training(run, config, params, mixture, workdir, stop_requested, gate_scores, observers)
    try:
        for index, planned in enumerate(training.plan):
            complete = training.is_complete(planned, training.step)
            is_last = planned is training.plan[-1]  # which gives the mesh of the result
            if complete and not (is_last or after_stage and training.step == planned.end):
                continue
            with (located(index, planned.stage.name, lambda: training.step + 1),
                  jax.set_mesh(sharding.make_mesh(planned.stage.mesh))):
                with watchdog.phase('set_up'):
                    training.place_state(planned.stage)
                if not complete:
                    training.run_stage(planned)
                if after_stage and not is_last:
                    after_stage(planned.stage, planned.config, states.model(training.state))
        with watchdog.phase('save', training.step):
            training.warn(training.checkpoints.wait())
        return training.plan[-1].config, training.final_model(), training.summary()
    finally:
        with watchdog.phase('save', training.step):
            training.close()


class _Training:
    """One call of train(): the constants of the run, and its progress.

    step: steps of the schedule taken. state: the TrainState after them, None until place_state.
    cursor: position in the data. seconds: spent in finished stages, over all calls.
    tokens: trained on over all calls, padding included; before: of them those of earlier calls.
    save_due: whether a checkpoint waits for the end of a row of bad steps.
    """

    def __init__(self, run, config, params, mixture, workdir, stop_requested, gate_scores, observers):
        self.run, self.config, self.params, self.mixture = run, config, params, mixture
        self.stop_requested, self.gate_scores = stop_requested, gate_scores
        self.plan = stage_plans.plan(run.stages, config)
        run.check(config)
        self.last_step = self.plan[-1].end
        self.tx, self.schedule = optimizers.make(run.optimizer), optimizers.schedule(run.stages)
        self.checkpoints = Checkpoints(f'{workdir}/checkpoints', run.keep_checkpoints, run.max_failed_saves)
        processes.at_loss(lambda: loss_message(self.checkpoints.folder))
        self.peak = measured_peak(jnp.dtype(run.stages[0].memory.dtype or run.param_dtype))
        self.straggler = StragglerCheck()
        self.gate_log = gates.GateLog(f'{workdir}/gates.json')
        self.step, self.state, self.cursor, self.seconds, self.tokens, self.norms = 0, None, None, 0.0, 0, ()
        self.profile = observers.profile
        self.save_due = False
        with watchdog.phase('set_up'):
            self._restore()
        self.before = self.tokens
        self.metrics = Metrics(f'{workdir}/metrics', self.step, run.line_every_s, observers.trackers)
        self.bad_steps = BadSteps(workdir)

    def _restore(self):
        """Continue after the newest valid checkpoint, whose step decides on the stage and its mesh."""
        restored = self.checkpoints.restore_newest_valid(self._target)
        if restored is None:
            return
        for problem in restored.warnings:
            self.warn(problem)
        self.step, record = restored.step, restored.record
        with jax.set_mesh(sharding.make_mesh(self._stage_after(self.step).mesh)):
            # a remedy gets all its tries
            self.state = restored.state.replace(skipped_in_row=states.scalar(0))
        self.cursor, self.seconds = record['cursor'], record.get('seconds', 0.0)
        self.norms = record.get('norms', ())
        self.tokens = record.get('tokens', self._tokens_of(self.step))
        log(f'continuing after step {self.step} of {self.last_step} from {self.checkpoints.folder}')

    def _tokens_of(self, step):
        """Tokens of the steps up to one, for checkpoints of earlier versions, which do not state them."""
        steps = [max(min(step, planned.end) - planned.start, 0) for planned in self.plan]
        return sum(count * planned.stage.tokens_per_step for count, planned in zip(steps, self.plan))

    def _stage_after(self, step):
        """The stage that continues from a step; the last one if none is left to train."""
        return next((each for each in self.plan if not self.is_complete(each, step)), self.plan[-1]).stage

    def _target(self, step):
        """What a checkpoint of a step is restored onto: no frozen weights, on the mesh to continue on."""
        stage = self._stage_after(step)
        with jax.set_mesh(sharding.make_mesh(stage.mesh)):
            return self._abstract_state(stage).replace(frozen=None)

    def _abstract_state(self, stage):
        return states.abstract(self.config, self.tx, jnp.dtype(self.run.param_dtype), self.run.adapter,
                               stage.memory.offload_state)

    def close(self):
        self.profile.close()
        self.metrics.close()
        self.checkpoints.close()

    def is_complete(self, planned, step):
        """Whether at a step a stage's steps are taken and its gate, if it has one, does not hold the run."""
        stage, row = planned.stage, self.gate_log.at(planned.stage.name, planned.end)
        if step < planned.end or not stage.gate:
            return step >= planned.end
        return row is not None and (stage.gate.opens(row) or stage.gate.otherwise == 'advance')

    def place_state(self, stage):
        """Put the state where a stage needs it, whose mesh is the current one: fresh, or moved from the stage
        before or from a checkpoint."""
        if self.state is None:
            self.state = states.create(self._base(), self.tx, self.config, self.run.adapter,
                                       stage.memory.offload_state)
            return
        if self.run.adapter and self.state.frozen is None:  # restored
            self.state = self.state.replace(frozen=lora.freeze(self._base(), self.run.adapter)[1])
        self.state = states.move(self.state.replace(guard=None), self._abstract_state(stage))

    def _base(self):
        """The base model's weights, those to freeze in 8 bits already quantized."""
        adapter = self.run.adapter
        return self.params(lora.freezer(adapter)) if adapter and adapter.quantized else self.params()

    def final_model(self):
        """The trained model, adapters merged."""
        with jax.set_mesh(sharding.make_mesh(self.plan[-1].stage.mesh)):
            return final_model(self.state, self.run.adapter, self.params)

    def run_stage(self, planned):
        """Train to the end of a stage, or until its gate opens."""
        stage = planned.stage
        if processes.anyone(self.stop_requested):  # between two stages: the one before is saved
            self._interrupt()
        log(f'stage {stage.name}: {stage.num_steps} steps of {stage.tokens_per_step:,} tokens, '
            f'seq_len {stage.seq_len:,}, theta {planned.config.rope.theta:,.0f} ({stage.theta}), '
            f'{planned.config.rope.type} rope, mesh {"x".join(map(str, stage.mesh))} {stage.layout}')
        if self.step == planned.start > 0 and not stage.carry_optimizer:
            self.state = self.state.replace(opt_state=states.fresh_moments(
                self.state.params, self.tx, stage.memory.offload_state))
        if self.run.spike_factor:  # another stage has another level: its history begins anew
            norms = self.norms if self.step > planned.start else ()
            self.state = self.state.replace(
                guard=spikes.create(self.run.spike_factor, self.run.spike_window, norms))
        self.state = states.placed(self.state, stage.memory.offload_state)
        loader = self._open_loader(stage)
        tables = rope.make_tables(planned.config.rope, self.config.head_dim, stage.seq_len)
        started = time.monotonic()
        try:
            gate_open = self._take_steps(planned, loader, tables, started)
        finally:
            waited = loader.waited_s
            with watchdog.phase('data', self.step):
                loader.close()
        reason = self._end_stage(planned, gate_open, started)
        self.seconds += time.monotonic() - started
        log(f'stage {stage.name}: done in {clock(time.monotonic() - started)}, {reason}, input waits '
            f'{waited:.1f}s')

    def _open_loader(self, stage):
        self.mixture.weights = dict(stage.mixture)
        loader = self.mixture.loader(stage.batch_size * stage.accumulation, stage.seq_len, stage.layout,
                                     stage.mesh[2], self.config.vocab_size, held_rows(stage))
        self.cursor = self.cursor or self.mixture.state
        loader.restore(self.cursor)
        if jax.process_count() == 1:  # otherwise all take the same steps, as long as there are data
            loader.stop_requested = self.stop_requested
        return loader

    def _take_steps(self, planned, loader, tables, started):
        """Train to the last step. Returns whether the stage ended early because its gate is open."""
        stage, run, architecture = planned.stage, self.run, self.config.architecture()
        later = [after for after in self.plan if after.end > planned.end]
        progress = StageProgress(planned, later, self.metrics, self.peak, run.max_skips_in_row,
                                 self.bad_steps, run.adapter)
        first = self.step
        while self.step < planned.end:
            if self._gate_due(planned) and self._gate_opens(planned, self.step):
                return True
            rows = functools.partial(loader.describe, self.cursor)
            host_batch = self._next_batch(loader, progress, started)
            # the metrics of the first step are read in the second: until then other processes may compile
            with watchdog.phase('compile' if self.step < first + 2 else 'step', self.step + 1):
                stop = processes.anyone(self.stop_requested)  # started before the step: no wait for it
                batch = place_batch(host_batch, stage)
                with self.profile.step(self.step + 1):
                    self.state, device_metrics = train_step(
                        self.state, batch, tables, architecture, stage.memory, self.tx, self.schedule)
                self.step += 1
                self.tokens += stage.tokens_per_step
                tokens, pairs = loader.counts(host_batch, self.config.window)
                flops = train_flops(self.config, tokens, pairs, run.adapter)
                progress.add(device_metrics, self.step, Work(flops, self.tokens), rows)
                self.profile.taken(self.step, self.state)
                self.warn(self.checkpoints.poll())
                stop = bool(stop)  # read once: a signal between two reads would stop unsaved
            at_checkpoint = self.step % run.checkpoint_every == 0 or self.step == planned.end
            if at_checkpoint or stop or self.save_due or self._gate_due(planned):
                with watchdog.phase('compile' if self.step < first + 2 else 'step', self.step):
                    jax.block_until_ready(self.state)
                    self.warn(self.straggler.measure(self.step, loader.waited_s))
                progress.flush()
                self._save(started)
            if stop:
                self._interrupt()
        return False

    def _next_batch(self, loader, progress, started):
        """The next host batch. If there is none, because the data fail or the run is to stop, a single
        process saves the steps taken; several cannot, as the others have begun the next step."""
        try:
            with watchdog.phase('data', self.step + 1):
                batch, self.cursor = loader.next()
            return batch
        except (OSError, StopRequested) as error:
            if self.step and jax.process_count() == 1:
                progress.flush()
                self._save(started)
            if isinstance(error, StopRequested):
                self._interrupt()
            raise

    def _gate_due(self, planned):
        return planned.stage.gate and planned.stage.gate.due(self.step - planned.start)

    def _gate_opens(self, planned, step):
        """Whether the stage's gate opens at a step of the schedule; logged scores are not measured again."""
        stage, row = planned.stage, self.gate_log.at(planned.stage.name, step)
        if row is None:
            with watchdog.phase('evaluation', step):
                scores = self.gate_scores(stage, planned.config, states.model(self.state))
            row = self.gate_log.add(stage.name, step, step - planned.start, scores)
        opens = bool(processes.from_first(stage.gate.opens(row)))
        log(f'stage {stage.name}: gate {"open" if opens else "closed"} after {row["steps"]} steps: '
            f'{stage.gate.describe(row)}')
        return opens

    def _end_stage(self, planned, gate_open, started):
        """Jump to the end of the stage if its gate is open. Returns as text why the stage is over."""
        stage, steps = planned.stage, self.step - planned.start
        if gate_open:
            self.gate_log.add(stage.name, planned.end, steps, self.gate_log.at(stage.name, self.step))
            self.step, self.state = planned.end, self.state.replace(step=states.scalar(planned.end))
            self._save(started)
            return f'gate open after {steps} of at most {stage.num_steps} steps'
        reason = f'all {stage.num_steps} steps taken'
        if not stage.gate or self._gate_opens(planned, planned.end):
            return reason
        if stage.gate.otherwise == 'stop':
            raise gates.GateClosed(gates.closed_message(stage, self.gate_log.at(stage.name, planned.end)))
        return reason + ', and on although the gate is closed'

    def _save(self, started):
        """Start writing a checkpoint; started: time.monotonic() at the start of the stage.

        Within a row of bad steps it is due as soon as the row ends. If the row ends the run, the newest
        checkpoint is then from before what caused it, and no older one was removed for one from within.
        """
        with watchdog.phase('step', self.step):
            self.save_due = self.step < self.last_step and int(self.state.skipped_in_row) > 0
        if self.save_due:
            return
        record = {'cursor': self.cursor, 'seconds': self.seconds + time.monotonic() - started,
                  'norms': spikes.history(self.state.guard), 'tokens': self.tokens}
        with watchdog.phase('save', self.step):
            self.warn(self.checkpoints.wait())
            self.warn(self.checkpoints.save(self.step, self.state.replace(frozen=None, guard=None), record))

    def _interrupt(self):
        reason = 'no checkpoint is written within a row of bad steps' if self.save_due else ''
        with watchdog.phase('save', self.step):
            raise Interrupted(stop_message(self.checkpoints, self.step, self.last_step, reason))

    def warn(self, problem):
        if problem:
            log(f'WARNING: {problem}')

    def summary(self):
        ends = [self.gate_log.at(planned.stage.name, planned.end) for planned in self.plan]
        steps = [row['steps'] if row else planned.stage.num_steps for planned, row in zip(self.plan, ends)]
        return {
            'steps': sum(steps), 'stage_steps': steps, 'skipped': int(self.state.skipped),
            'seconds': self.seconds, 'tokens_of_this_call': self.tokens - self.before,
            'thetas': [planned.config.rope.theta for planned in self.plan],
        }
