"""The training run: stages in order, checkpoints, metrics, and a stop that loses nothing."""

import contextlib
import dataclasses
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.data.loader import Loader
from lct.ops import rope
from lct.train import optimizer as optimizers
from lct.train import stages as stage_plans
from lct.train import state as states
from lct.train.checkpoint import Checkpoints
from lct.train.metrics import Metrics, Pace, clock, measured_peak, say, step_flops, whole_row_flops
from lct.train.step import train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """How to train, apart from model and data.

    checkpoint_every: steps between checkpoints (one more is written at the end of each stage and on
      interruption). max_skips_in_row: non-finite steps in a row after which the run gives up.
      line_every_s: seconds between two progress lines, at least.
    """

    stages: tuple
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    param_dtype: str = 'float32'
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    max_skips_in_row: int = 5
    line_every_s: float = 3.0


class Interrupted(Exception):
    """The run was asked to stop and has saved what it could; the message says what that is."""


@contextlib.contextmanager
def stop_requests():
    """Yields a list that receives the name of the first Ctrl-C or SIGTERM; a second one stops at once.

    Outside the main thread, where Python takes no handlers, the list stays empty.
    """
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(number, _frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        # not print: the signal may have come in the middle of one, and a buffered stream cannot be re-entered
        with contextlib.suppress(OSError):
            text = f'{asked[0]}: stopping after this step and saving (once more to stop at once)\n'
            os.write(2, text.encode())

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check(asked):
    """Raise Interrupted if a stop was asked for, where nothing is left to save."""
    if asked:
        raise Interrupted(f'{asked[0]}: stopped; what is finished is kept, run the same command to continue')


def train(run, config, params, mixture, workdir, asked=()):
    """Train through all stages, continuing from the newest checkpoint under workdir if there is one.

    Args:
      run: Run; config: LlamaConfig of the start; params: callable () -> Params on the current mesh, called
        only when there is no checkpoint.
      mixture: data.mixture.Mixture, the stream of rows; its cursor is part of every checkpoint.
      asked: list of stop_requests.
    Returns:
      (LlamaConfig, Params, summary dict), on the mesh of the last stage. The summary's seconds are those of
      the stages, compilation included, over all the times that the run was continued.
    Raises:
      Interrupted: after saving, when a stop was asked for.
      FloatingPointError: after max_skips_in_row non-finite steps in a row.
    """
    plan = stage_plans.configs(run.stages, config)
    tx, schedule = optimizers.make(run.optimizer), optimizers.schedule(run.stages)
    ends = [sum(s.num_steps for s in run.stages[: i + 1]) for i in range(len(run.stages))]
    checkpoints = Checkpoints(f'{workdir}/checkpoints', run.keep_checkpoints)
    dtype = jnp.dtype(run.param_dtype)
    peak = measured_peak(dtype)
    state, cursor, seconds, step = None, None, 0.0, checkpoints.latest() or 0
    if step:
        record = checkpoints.record(step)
        cursor, seconds = record['cursor'], record.get('seconds', 0.0)
        say(f'continuing after step {step} of {ends[-1]} from {checkpoints.folder}')
    metrics = Metrics(f'{workdir}/metrics', step, run.line_every_s)
    spent_tokens = 0

    try:
        for stage, stage_config, end in zip(run.stages, plan, ends):
            if step >= end and end < ends[-1]:  # of a complete run the last stage still gives the mesh
                continue
            with jax.set_mesh(sharding.make_mesh(stage.mesh)):
                # -- state: restored, fresh, or moved from the mesh of the stage before ----------------
                target = states.abstract(config, tx, dtype)
                if state is None:
                    state = checkpoints.restore(step, target) if step else states.create(params(), tx)
                else:
                    state = states.move(state, target)
                if step >= end:  # the run was already complete
                    break
                if asked:  # between two stages: the one before is saved
                    raise Interrupted(_stopped(checkpoints, step, ends[-1]))
                say(
                    f'stage {stage.name}: {stage.num_steps} steps of {stage.tokens_per_step:,} tokens, '
                    f'seq_len {stage.seq_len:,}, theta {stage_config.rope.theta:,.0f} ({stage.theta}), '
                    f'mesh {"x".join(map(str, stage.mesh))} {stage.layout}'
                )
                mixture.weights = dict(stage.mixture)
                loader = Loader(mixture, stage.batch_size * stage.accumulation, stage.seq_len, stage.layout,
                                stage.mesh[2], config.vocab_size)
                if cursor is not None:
                    loader.restore(cursor)
                tables = rope.make_tables(stage_config.rope, config.head_dim, stage.seq_len)
                # -- steps; metrics are read one step late so that the devices never wait --------------
                pending, stage_start = None, time.monotonic()
                later = [s for s, after in zip(run.stages, ends) if after > end]
                report = _Reports(run, config, stage, end, ends[-1], later, metrics, peak)
                try:
                    while step < end:
                        host_batch, cursor = loader.next()
                        state, device_metrics = train_step(
                            state, _placed(host_batch, stage), tables, config.architecture(), stage.memory,
                            tx, schedule,
                        )
                        step += 1
                        if pending:
                            report(*pending)
                        pending = (device_metrics, step, step_flops(config, host_batch))
                        spent_tokens += stage.tokens_per_step
                        stopping = bool(asked)  # read once: a signal between two reads would stop unsaved
                        if step % run.checkpoint_every == 0 or step == end or stopping:
                            jax.block_until_ready(state)
                            report(*pending)
                            pending = None
                            metrics.flush()
                            passed = seconds + time.monotonic() - stage_start
                            problem = checkpoints.save(step, state, {'cursor': cursor, 'seconds': passed})
                            if problem:
                                say(f'WARNING: {problem}')
                        if stopping:
                            raise Interrupted(_stopped(checkpoints, step, ends[-1]))
                finally:
                    waited = loader.waited_s
                    loader.close()
                seconds += time.monotonic() - stage_start
                say(f'stage {stage.name}: done in {clock(time.monotonic() - stage_start)}, '
                    f'input waits {waited:.1f}s')
        problem = checkpoints.wait()
        if problem:
            say(f'WARNING: {problem}')
        summary = {
            'steps': step, 'skipped': int(state.skipped), 'seconds': seconds,
            'tokens_of_this_call': spent_tokens, 'thetas': [c.rope.theta for c in plan],
        }
        return plan[-1], state.params, summary
    finally:
        metrics.close()
        checkpoints.close()


def _placed(batch, stage):
    """The host batch [A * B, T] on the mesh as [A, B, T]."""
    spec = P(None, *sharding.spec('BT'))
    shape = (stage.accumulation, stage.batch_size, stage.seq_len)
    return {name: sharding.put(x.reshape(shape), spec) for name, x in batch.items()}


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
        cost = sum(s.num_steps * whole_row_flops(config, s) for s in later)
        self._later_steps = cost / whole_row_flops(config, stage)

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
