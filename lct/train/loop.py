"""The training run: stages in order, checkpoints, metrics, and a stop that loses nothing."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lct import processes, sharding
from lct.models import lora
from lct.ops import rope
from lct.train import gates
from lct.train import optimizer as optimizers
from lct.train import stages as stage_plans
from lct.train import state as states
from lct.train.checkpoint import Checkpoints
from lct.train.metrics import Metrics, Pace, clock, log, measured_peak, train_flops, whole_row_flops
from lct.train.step import train_step
from lct.train.stopping import Interrupted


@dataclasses.dataclass(frozen=True)
class Run:
    """How to train, apart from model and data.

    checkpoint_every: steps between checkpoints (one more is written at the end of each stage and on
      interruption). max_skips_in_row: non-finite steps in a row after which the run gives up.
      line_every_s: seconds between two progress lines, at least.
    adapter: lora.Adapter to train in place of all weights, or None.
    """

    stages: tuple
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    param_dtype: str = 'float32'
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    max_skips_in_row: int = 5
    line_every_s: float = 3.0
    adapter: lora.Adapter | None = None

    def __post_init__(self):
        if self.param_dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"param_dtype {self.param_dtype!r} must be 'float32' or 'bfloat16'")
        for field in ('checkpoint_every', 'keep_checkpoints', 'max_skips_in_row'):
            if getattr(self, field) < 1:
                raise ValueError(f'{field} {getattr(self, field)} must be at least 1')


def train(run, config, params, mixture, workdir, stop_requested=(), gate_scores=None):
    """Train through all stages, continuing from the newest checkpoint under workdir if there is one.

    Args:
      run: Run; config: LlamaConfig of the start; params: callable () -> Params on the current mesh, called
        only when there is no checkpoint, or when the run has an adapter and so no frozen weights in checkpoints.
      mixture: MemorySource or StoreSource, the rows; its cursor is part of every checkpoint.
      stop_requested: a list that is not empty once the run is to stop (stopping.catch_signals).
      gate_scores: callable (Stage, LlamaConfig, Params) -> {needle, short_loss_rise}, see gates.Gate; called on the
        stage's mesh.
    Returns:
      (LlamaConfig, Params, summary dict), on the mesh of the last stage, adapters merged. The summary's seconds are
      those of the stages, compilation included, over all the times that the run was continued.
    Raises:
      stopping.Interrupted: after saving, when a stop was requested.
      gates.GateClosed: after saving, when the gate of a stage did not open and is to stop the run.
      FloatingPointError: after max_skips_in_row non-finite steps in a row.
    """
    if gate_scores is None and any(stage.gate for stage in run.stages):
        raise ValueError('a stage has a gate but train() was given no gate_scores to measure it by; pass them')
    plan = stage_plans.configs(run.stages, config)
    tx, schedule = optimizers.make(run.optimizer), optimizers.schedule(run.stages)
    ends = [sum(s.num_steps for s in run.stages[: i + 1]) for i in range(len(run.stages))]
    checkpoints = Checkpoints(f'{workdir}/checkpoints', run.keep_checkpoints)
    dtype = jnp.dtype(run.param_dtype)
    peak = measured_peak(jnp.dtype(run.stages[0].memory.dtype or dtype))
    gate_log = gates.GateLog(f'{workdir}/gates.json')
    state, cursor, seconds, step = None, None, 0.0, processes.from_first(checkpoints.latest() or 0)
    if step:
        record = checkpoints.record(step)
        cursor, seconds = record['cursor'], record.get('seconds', 0.0)
        log(f'continuing after step {step} of {ends[-1]} from {checkpoints.folder}')
    metrics = Metrics(f'{workdir}/metrics', step, run.line_every_s)
    spent_tokens = 0

    try:
        for stage, stage_config, end in zip(run.stages, plan, ends):
            start = end - stage.num_steps
            complete = step >= end and _settled(gate_log, stage, end)
            if complete and end < ends[-1]:  # of a complete run the last stage still gives the mesh
                continue
            with jax.set_mesh(sharding.make_mesh(stage.mesh)):
                # -- state: restored, fresh, or moved from the mesh of the stage before ----------------
                target = states.abstract(config, tx, dtype, run.adapter)
                if state is not None:
                    state = states.move(state, target)
                elif not step:
                    state = states.create(params(), tx, config, run.adapter)
                else:
                    state = checkpoints.restore(step, target.replace(frozen=None))
                    if run.adapter:
                        state = state.replace(frozen=lora.freeze(params(), run.adapter)[1])
                if complete:
                    break
                if processes.anyone(stop_requested):  # between two stages: the one before is saved
                    raise Interrupted(_stopped(checkpoints, step, ends[-1]))
                log(
                    f'stage {stage.name}: {stage.num_steps} steps of {stage.tokens_per_step:,} tokens, '
                    f'seq_len {stage.seq_len:,}, theta {stage_config.rope.theta:,.0f} ({stage.theta}), '
                    f'{stage_config.rope.type} rope, mesh {"x".join(map(str, stage.mesh))} {stage.layout}'
                )
                if step == start > 0 and not stage.carry_optimizer:
                    state = state.replace(opt_state=states.fresh_moments(state.params, tx))
                mixture.weights = dict(stage.mixture)
                loader = mixture.loader(stage.batch_size * stage.accumulation, stage.seq_len, stage.layout,
                                        stage.mesh[2], config.vocab_size, _held(stage))
                if cursor is not None:
                    loader.restore(cursor)
                tables = rope.make_tables(stage_config.rope, config.head_dim, stage.seq_len)
                # -- steps; metrics are read one step late so that the devices never wait --------------
                pending, opened, stage_start = None, False, time.monotonic()
                later = [s for s, after in zip(run.stages, ends) if after > end]
                report = _Reports(run, config, stage, end, ends[-1], later, metrics, peak)
                look = functools.partial(_look, gate_log, stage, stage_config, gate_scores)
                try:
                    while step < end:
                        if stage.gate and stage.gate.due(step - start):
                            opened = look(step, step - start, state)
                            if opened:
                                break
                        host_batch, cursor = loader.next()
                        stop_now = processes.anyone(stop_requested)  # ahead of the step, so as not to wait for it
                        state, device_metrics = train_step(
                            state, _placed(host_batch, stage), tables, config.architecture(), stage.memory,
                            tx, schedule,
                        )
                        step += 1
                        if pending:
                            report(*pending)
                        pending = (device_metrics, step, train_flops(config, *loader.counts(host_batch), run.adapter))
                        spent_tokens += stage.tokens_per_step
                        stopping = bool(stop_now)  # read once: a signal between two reads would stop unsaved
                        due = stage.gate and stage.gate.due(step - start)
                        if step % run.checkpoint_every == 0 or step == end or stopping or due:
                            jax.block_until_ready(state)
                            report(*pending)
                            pending = None
                            metrics.flush()
                            passed = seconds + time.monotonic() - stage_start
                            _save(checkpoints, step, state, cursor, passed)
                        if stopping:
                            raise Interrupted(_stopped(checkpoints, step, ends[-1]))
                finally:
                    waited = loader.waited_s
                    loader.close()
                # -- the end: all steps taken, or the gate open before --------------------------------
                why = f'all {stage.num_steps} steps taken'
                if opened:
                    why = f'gate open after {step - start} of at most {stage.num_steps} steps'
                    gate_log.add(stage.name, end, step - start, gate_log.at(stage.name, step))
                    step, state = end, state.replace(step=states.scalar(end))
                    _save(checkpoints, step, state, cursor, seconds + time.monotonic() - stage_start)
                elif stage.gate and not look(end, stage.num_steps, state):
                    if stage.gate.otherwise == 'stop':
                        raise gates.GateClosed(gates.closed_message(stage, gate_log.at(stage.name, end)))
                    why += ', and on although the gate is closed'
                seconds += time.monotonic() - stage_start
                log(f'stage {stage.name}: done in {clock(time.monotonic() - stage_start)}, {why}, '
                    f'input waits {waited:.1f}s')
        problem = checkpoints.wait()
        if problem:
            log(f'WARNING: {problem}')
        looked = [gate_log.at(stage.name, end) for stage, end in zip(run.stages, ends)]
        taken = [row['steps'] if row else stage.num_steps for stage, row in zip(run.stages, looked)]
        summary = {
            'steps': sum(taken), 'stage_steps': taken, 'skipped': int(state.skipped), 'seconds': seconds,
            'tokens_of_this_call': spent_tokens, 'thetas': [c.rope.theta for c in plan],
        }
        return plan[-1], states.model(state), summary
    finally:
        metrics.close()
        checkpoints.close()


def _where(stage):
    """-> (sharding of a batch [A, B, T], its shape, the numbers [A, B] of its rows in a host batch [A * B, T])."""
    shape = (stage.accumulation, stage.batch_size, stage.seq_len)
    where = NamedSharding(jax.sharding.get_mesh(), P(None, *sharding.spec('BT')))
    return where, shape, np.arange(shape[0] * shape[1]).reshape(shape[:2])


def _held(stage):
    """[(rows [A, b], slice of columns)] of the host batch that the devices of this process hold."""
    where, shape, rows = _where(stage)
    return [(rows[index[:2]], index[2]) for index in where.addressable_devices_indices_map(shape).values()]


def _placed(batch, stage):
    """The host batch {name: [A * B, T]} on the mesh as [A, B, T]; asked for is only what this process holds."""
    where, shape, rows = _where(stage)
    return {
        name: jax.make_array_from_callback(
            shape, where, lambda index, x=x: x[rows[index[:2]], index[2]], dtype=x.dtype)
        for name, x in batch.items()
    }


def _save(checkpoints, step, state, cursor, seconds):
    problem = checkpoints.save(step, state.replace(frozen=None), {'cursor': cursor, 'seconds': seconds})
    if problem:
        log(f'WARNING: {problem}')


def _look(gate_log, stage, config, gate_scores, step, steps, state):
    """Whether the stage's gate is open after so many of its steps; what was measured before is not measured again."""
    row = gate_log.at(stage.name, step)
    if row is None:
        row = gate_log.add(stage.name, step, steps, gate_scores(stage, config, states.model(state)))
    opened = bool(processes.from_first(stage.gate.opens(row)))
    log(f'stage {stage.name}: gate {"open" if opened else "closed"} after {row["steps"]} steps: {stage.gate.describe(row)}')
    return opened


def _settled(gate_log, stage, end):
    """Whether a stage whose steps are taken leaves nothing to be looked at."""
    row = gate_log.at(stage.name, end)
    return not stage.gate or (row is not None and (stage.gate.opens(row) or stage.gate.otherwise == 'advance'))


def _stopped(checkpoints, step, last):
    """What a run that was asked to stop after step may claim: only what lies on the disk."""
    problem = checkpoints.wait()
    saved = checkpoints.latest() or 0
    if not step:
        return f'stopped before the first step of {last}; run the same command to start again'
    if saved == step:
        return f'saved step {step} of {last} under {checkpoints.folder}; run the same command to continue'
    why = f' ({problem})' if problem else ''
    start = f'after step {saved}' if saved else 'from the start'
    return f'stopped after step {step} of {last}, not saved{why}; the same command continues {start}'


class _Reports:
    """Writes the metrics of a stage's steps, and stops the run after too many non-finite ones."""

    def __init__(self, run, config, stage, end, last, later, metrics, peak):
        self._run, self._stage, self._end, self._last = run, stage, end, last
        self._metrics, self._peak, self._pace, self._start = metrics, peak, Pace(), time.monotonic()
        # what the later stages cost, in steps of this one: model FLOPs are what is known of them beforehand
        cost = sum(s.num_steps * whole_row_flops(config, s, run.adapter) for s in later)
        self._later_steps = cost / whole_row_flops(config, stage, run.adapter)

    def __call__(self, device_metrics, step, flops):
        values = {name: x.item() for name, x in jax.device_get(device_metrics).items()}
        values['seq_len'] = self._stage.seq_len
        now = time.monotonic()
        pace = self._pace.ended(flops, now)
        if pace:
            per_step, flops_per_second = pace
            values['tokens_per_second'] = self._stage.tokens_per_step / per_step
            values['matmul_peak_fraction'] = flops_per_second / self._peak
            speed = (
                f'{values["tokens_per_second"]:,.0f} tok/s | '
                f'{100 * values["matmul_peak_fraction"]:.0f}% of peak | '
                f'stage ends in {clock((self._end - step) * per_step)}'
            )
            if self._later_steps:
                speed += f', run in about {clock((self._end - step + self._later_steps) * per_step)}'
        else:
            speed = f'first step after {clock(now - self._start)}, compilation included'
        self._metrics.write(step, values)
        bad = values['skipped_in_row']
        note = f' | not finite, skipped ({values["skipped"]} so far)' if bad else ''
        self._metrics.progress(
            f'{self._stage.name} | step {step}/{self._last} | loss {values["loss"]:.3f} | '
            f'grad {values["grad_norm"]:.2f} | {speed}{note}',
            force=bool(bad) or not pace or step == self._end,
        )
        if bad >= self._run.max_skips_in_row:
            raise FloatingPointError(
                f'loss or gradient was not finite in {bad} steps in a row, up to step {step}; the last '
                'checkpoint holds only finite weights: lower the learning rate, or look at the data of these '
                'steps'
            )
