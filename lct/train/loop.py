"""The training run: stages in order, checkpoints, metrics, and a stop that loses nothing."""

import contextlib
import dataclasses
import signal
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
from lct.train.metrics import Metrics, clock, measured_peak, say, step_flops
from lct.train.step import train_step


@dataclasses.dataclass(frozen=True)
class Run:
    """How to train, apart from model and data.

    checkpoint_every: steps between checkpoints (one more is written at the end of each stage and on
      interruption). max_skips_in_row: non-finite steps in a row after which the run gives up.
    """

    stages: tuple
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    param_dtype: str = 'float32'
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    max_skips_in_row: int = 5


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


@contextlib.contextmanager
def stop_requests():
    """Yields a list that receives the name of the first Ctrl-C or SIGTERM; a second one stops at once."""
    asked = []

    def handle(number, _frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
        say(f'{asked[0]}: stopping after this step and saving (once more to stop at once)')

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


def train(run, config, params, mixture, workdir, asked=(), on_stage_end=None):
    """Train through all stages, continuing from the newest checkpoint under workdir if there is one.

    Args:
      run: Run; config: LlamaConfig of the start; params: callable () -> Params on the current mesh, called
        only when there is no checkpoint.
      mixture: data.mixture.Mixture, the stream of rows; its cursor is part of every checkpoint.
      asked: list of stop_requests.
      on_stage_end: called with (stage, LlamaConfig, params) under the stage's mesh.
    Returns:
      (LlamaConfig, Params, summary dict), on the mesh of the last stage.
    Raises:
      Interrupted: after saving, when a stop was asked for.
      FloatingPointError: after max_skips_in_row non-finite steps in a row.
    """
    plan = stage_plans.configs(run.stages, config)
    tx = optimizers.make(run.optimizer, run.stages)
    ends = [sum(s.num_steps for s in run.stages[: i + 1]) for i in range(len(run.stages))]
    checkpoints = Checkpoints(f'{workdir}/checkpoints', run.keep_checkpoints)
    dtype = jnp.dtype(run.param_dtype)
    peak = measured_peak(dtype)
    state, cursor, step = None, None, checkpoints.latest() or 0
    if step:
        cursor = checkpoints.record(step)['cursor']
        say(f'continuing after step {step} of {ends[-1]} from {checkpoints.folder}')
    metrics = Metrics(f'{workdir}/metrics', step)
    began, spent_tokens = time.monotonic(), 0

    try:
        for stage, stage_config, end in zip(run.stages, plan, ends):
            if step >= end and not (step == ends[-1] and stage is run.stages[-1]):
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
                pending, stage_start, first = None, time.monotonic(), step
                try:
                    while step < end:
                        host_batch, cursor = loader.next()
                        state, device_metrics = train_step(
                            state, _placed(host_batch, stage), tables, config.architecture(), stage.memory, tx
                        )
                        step += 1
                        if pending:
                            _report(*pending, metrics, run)
                        flops = step_flops(config, host_batch)
                        pending = (device_metrics, step, ends[-1], end, first, stage, stage_start, flops, peak)
                        spent_tokens += stage.tokens_per_step
                        if step % run.checkpoint_every == 0 or step == end or asked:
                            jax.block_until_ready(state)
                            _report(*pending, metrics, run)
                            pending = None
                            problem = checkpoints.save(step, state, {'cursor': cursor, 'stage': stage.name})
                            if problem:
                                say(f'WARNING: {problem}')
                        if asked:
                            checkpoints.wait()
                            raise Interrupted(
                                f'saved step {step} of {ends[-1]} under {checkpoints.folder}; '
                                'run the same command to continue'
                            )
                finally:
                    waited = loader.waited_s
                    loader.close()
                say(f'stage {stage.name}: done in {clock(time.monotonic() - stage_start)}, '
                    f'input waits {waited:.1f}s')
                if on_stage_end:
                    on_stage_end(stage, stage_config, state.params)
        checkpoints.wait()
        summary = {
            'steps': step, 'skipped': int(state.skipped), 'seconds': time.monotonic() - began,
            'tokens_this_session': spent_tokens, 'thetas': [c.rope.theta for c in plan],
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


def _report(device_metrics, step, last, end, first, stage, stage_start, flops, peak, metrics, run):
    """Write the metrics of a finished step; stop the run after too many non-finite steps."""
    values = {name: x.item() for name, x in jax.device_get(device_metrics).items()}
    elapsed = time.monotonic() - stage_start
    per_step = elapsed / (step - first)
    values['tokens_per_second'] = stage.tokens_per_step / per_step
    values['matmul_peak_fraction'] = flops / per_step / peak
    values['seq_len'] = stage.seq_len
    metrics.write(step, values)
    bad = values['skipped_in_row']
    note = f' | not finite, skipped ({values["skipped"]} so far)' if bad else ''
    metrics.progress(
        f'{stage.name} | step {step}/{last} | loss {values["loss"]:.3f} | grad {values["grad_norm"]:.2f} | '
        f'{values["tokens_per_second"]:,.0f} tok/s | {100 * values["matmul_peak_fraction"]:.0f}% of peak | '
        f'stage ends in {clock((end - step) * per_step)}{note}', force=bool(bad) or step == end,
    )
    if bad >= run.max_skips_in_row:
        raise FloatingPointError(
            f'loss or gradient was not finite in {bad} steps in a row, up to step {step}; the last checkpoint '
            'holds only finite weights: lower the learning rate, or look at the data of these steps'
        )
