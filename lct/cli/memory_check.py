"""The plan of a run's memory against the memory of the devices: before it starts, and when it runs out."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator

import jax

from lct.cli.config import MEMORY_SHARE
from lct.cli.host_memory import host_memory
from lct.models.llama import LlamaConfig
from lct.models.lora import Adapter
from lct.plan import hardware, remedies, search
from lct.plan.buffers import Buffers
from lct.plan.cost import Step
from lct.plan.search import USABLE
from lct.plan.tables import GiB, memory_table
from lct.train.loop import Run
from lct.train.memory_errors import OutOfMemory
from lct.train.metrics import log

# experiments/checks/check_plan_memory.py: all but two programs, which need less, compile to within 15%.
ERROR = 1.15
# Programs for CPUs, to which nothing was fitted, need less than is predicted, down to a factor of 1.8.
CPU_ERROR = 1.8
SPEEDS = 'a100'  # of devices that the table of hardware lacks: only ratios of times are used
COUNT = 3  # remedies that are named


class TooLarge(ValueError):
    """A stage cannot fit its devices; the message names the remedies."""


def check(run: Run, config: LlamaConfig, kind: hardware.Hardware | None = None) -> None:
    """Compare the predicted memory of every stage with the memory of a device.

    config: the LlamaConfig that is trained. kind: of the devices; None for those of this process. A stage
    that is close to the limit is a WARNING; so is one beyond it by less than the predictions may be wrong.

    Raises:
      TooLarge: for a stage that does not fit even if the prediction is as much too large as it ever was.
    """
    limit, refused = USABLE * kind.memory if kind else device_memory(), []
    kind = kind or device_hardware()
    for index in range(len(run.stages)) if limit else ():
        step = step_of(run, index, config)
        peak = needed_by(run, step, kind).peak
        if peak > (CPU_ERROR if kind.platform == 'cpu' else ERROR) * limit:
            refused.append(index)
        elif peak * ERROR > limit:
            log(f'WARNING: {_comparison(run, index, peak, limit)}; predictions are within 15%, and for CPUs '
                f'up to {CPU_ERROR} times too large')
    if refused:
        raise _refusal(run, config, refused, dataclasses.replace(kind, memory=limit))


def _refusal(run, config, refused, kind):
    """The TooLarge of the stages with the indices `refused`; prints the table of the first."""
    index, *others = refused
    step = step_of(run, index, config)
    needed = needed_by(run, step, kind)
    log(memory_table(needed, kind))
    more = f', nor do {", ".join(run.stages[i].name for i in others)}' if others else ''
    return TooLarge(f'{_comparison(run, index, needed.peak, kind.memory)} and does not fit'
                    f'{more}; {advice(run, index, step, kind.memory / ERROR, kind)}; '
                    'experiments/plan.py --config plans all stages anew, and --set check_memory=false '
                    'starts the run as it is')


def _comparison(run, index, peak, limit):
    return (f'stage {run.stages[index].name} is predicted to need {peak / GiB:,.1f} GiB of a device that has '
            f'{limit / GiB:,.1f}{_reserve(peak, limit)}')


@contextlib.contextmanager
def explained(run: Run, config: LlamaConfig) -> Iterator[None]:
    """Around loop.train: memory that runs out ends in the plan's table of the step and in the remedies.

    Raises:
      TooLarge: in place of OutOfMemory.
    """
    try:
        yield
    except OutOfMemory as error:
        step = step_of(run, error.stage, config)
        kind, limit = device_hardware(), device_memory() or float('inf')
        needed = needed_by(run, step, kind)
        log(memory_table(needed, dataclasses.replace(kind, memory=limit)))
        less = min(limit, needed.peak) / ERROR  # what was predicted was not enough
        raise TooLarge(f'{error}; {advice(run, error.stage, step, less, kind)}; with one of them the same '
                       'command continues from the last checkpoint') from error


def advice(run: Run, index: int, step: Step, limit: float, kind: hardware.Hardware | None = None) -> str:
    """The cheapest remedies for a step that is to need at most limit bytes, as flags of extend.py.

    kind: of the devices; None for those of this process.
    """
    kind = dataclasses.replace(kind or device_hardware(), memory=limit)
    found = remedies.find(
        step, kind, lambda changed: needed_by(run, changed, kind).peak, limit, search.policies(kind))
    texts = [f'{_flags(index, remedy.changes)} ({remedy.times:.2g}x the time)' for remedy in found[:COUNT]]
    texts += _last_resorts(run, step, kind)[:COUNT - len(texts)]
    return f'remedies, cheapest first: {", or ".join(texts)}' if texts else 'no single change suffices'


def _flags(index, changes):
    show = lambda value: ','.join(map(str, value)) if isinstance(value, tuple) else value
    return ' '.join(f'--set stages.{index}.{name}={show(value)}' for name, value in changes.items())


def _last_resorts(run, step, kind):
    """Changes of the devices or of the training, as text: a ring of more devices, adapters, fewer tokens."""
    data, fsdp, ring, tensor = step.mesh
    sizes, limit = lambda changed: needed_by(run, changed, kind).peak, kind.memory
    out = []
    for factor in (2, 4, 8, 16, 32, 64):
        longer = dataclasses.replace(step, mesh=(data, fsdp, factor * ring, tensor))
        unit = 2 * factor * ring * step.memory.ffn_chunks * step.memory.query_passes
        if step.seq_len % unit == 0 and sizes(longer) <= limit:
            out.append(f'a ring of {factor * ring} devices (mesh {",".join(map(str, longer.mesh))})')
            break
    for adapter in () if run.adapter else (Adapter(frozen_dtype='bfloat16'), Adapter(frozen_dtype='int8')):
        if search.needed_by(step, kind, adapter).peak <= limit and search.allowed(step, adapter):
            frozen = " with frozen_dtype 'int8'" if adapter.quantized else ''
            out.append(f'adapters{frozen} in place of full training (config.adapter; another run)')
            break
    for shift in range(1, 12):
        shorter = dataclasses.replace(step, seq_len=step.seq_len >> shift)
        if sizes(shorter) <= limit:
            out.append(f'a seq_len of {shorter.seq_len:,}')
            break
    return out


def step_of(run: Run, index: int, config: LlamaConfig) -> Step:
    """The planner's Step of a stage of a run."""
    stage = run.stages[index]
    return Step(config, stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, stage.memory,
                run.param_dtype, stage.layout)


def needed_by(run: Run, step: Step, kind: hardware.Hardware | None = None) -> Buffers:
    """The predicted Buffers of a step of a run, with its adapter if it has one.

    kind: of the devices; None for those of this process.
    """
    return search.needed_by(step, kind or device_hardware(), run.adapter)


def device_hardware() -> hardware.Hardware:
    """The row of the planner's table for this process's devices, or one whose speeds stand in for theirs."""
    kind, backend = jax.local_devices()[0].device_kind, jax.default_backend()
    stand_in = {'tpu': 'v5p', 'cpu': 'cpu'}.get(backend, SPEEDS)
    return hardware.of_device(kind, backend) or hardware.TABLE[stand_in]


def device_memory() -> float | None:
    """Bytes that a device of this process has for the run, or None if they are not known.

    Virtual CPU devices share what their host, its container or its limits still have.
    """
    device = jax.local_devices()[0]
    if stats := device.memory_stats():
        return stats.get('bytes_limit')
    if device.platform != 'cpu':
        return None
    return host_memory() / jax.local_device_count()


def _reserve(peak, limit):
    """Whether jax leaves memory of a GPU unused that a setting would give to it, as text."""
    share = float(next(filter(None, map(os.environ.get, MEMORY_SHARE)), 0.75))
    if jax.default_backend() != 'gpu' or share >= USABLE or peak > USABLE * limit / share:
        return ''
    return (f' (jax takes {share:.0%} of its memory; {MEMORY_SHARE[1]}={USABLE} in the environment gives it '
            'more)')
