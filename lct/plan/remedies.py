"""What to change in a step that needs too much memory: the changes that fit, cheapest first.

Every remedy trains the same tokens of the same sequences on the same devices, so a run can go on with it.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from lct.models.memory import OFFLOAD_STATE, REMAT
from lct.plan import timing
from lct.plan.cost import Step
from lct.plan.hardware import Hardware
from lct.plan.search import FFN_CHUNKS, LONG_SHARD, QUERY_PASSES, divisors


class Remedy(NamedTuple):
    """changes: {field of a stage of a config: value}. times: the predicted seconds of a step as a multiple of
    those without the changes."""

    changes: dict[str, Any]
    times: float


def find(step: Step, hardware: Hardware, needed: Callable[[Step], float], limit: float,
         remats: Collection[str] = REMAT) -> list[Remedy]:
    """The remedies after which needed(step) bytes are at most limit, the least predicted time first.

    Of equal sets of fields only the fastest values are kept, and no set that contains another that suffices.
    needed: peak bytes of a device. remats: the policies that the devices support.
    """
    now, fastest = _seconds(step, hardware), {}
    for changes, changed in _variants(step, remats):
        try:
            changed.check()
        except ValueError:
            continue
        if not changes or needed(changed) > limit:
            continue
        remedy = Remedy(changes, _seconds(changed, hardware) / now)
        fields = frozenset(changes)
        if fields not in fastest or remedy.times < fastest[fields].times:
            fastest[fields] = remedy
    smallest = [fields for fields in fastest if not any(other < fields for other in fastest)]
    return sorted((fastest[fields] for fields in smallest), key=lambda remedy: remedy.times)


def _variants(step: Step, remats: Collection[str]) -> Iterator[tuple[dict[str, Any], Step]]:
    """({changed field: value}, Step) of every combination of changes that save memory."""
    axes = [_remats(step, remats), _states(step, remats), _ffn_chunks(step), _passes(step), _splits(step),
            _meshes(step), _strategies(step)]
    for combination in itertools.product(*([{}, *axis] for axis in axes)):
        changes = {name: value for part in combination for name, value in part.items()}
        memory = {name.removeprefix('memory.'): value for name, value in changes.items()
                  if name.startswith('memory.')}
        attention = step.memory.attention
        if 'strategy' in memory:
            attention = dataclasses.replace(attention, strategy=memory.pop('strategy'), node_size=1)
        fields = {name: value for name, value in changes.items() if not name.startswith('memory.')}
        try:
            memory = dataclasses.replace(step.memory, attention=attention, **memory)
        except ValueError:  # a policy without passes, or chunks that do not divide over them
            continue
        yield changes, dataclasses.replace(step, **fields, memory=memory)


def _remats(step, remats):
    later = list(REMAT)[list(REMAT).index(step.memory.remat) + 1:]
    return [{'memory.remat': remat} for remat in later if remat in remats]


def _states(step, remats):
    later = OFFLOAD_STATE[OFFLOAD_STATE.index(step.memory.offload_state) + 1:]
    return [{'memory.offload_state': state} for state in later if any(REMAT[name].on_host for name in remats)]


def _ffn_chunks(step):
    return [{'memory.ffn_chunks': count} for count in FFN_CHUNKS if count > step.memory.ffn_chunks]


def _passes(step):
    more = [{'memory.query_passes': count} for count in QUERY_PASSES if count > step.memory.query_passes]
    return more[-1:] if step.shard >= LONG_SHARD else []


def _splits(step):
    """Fewer rows at a time, the same rows per step."""
    smaller = [rows for rows in divisors(step.batch_size) if rows < step.batch_size]
    return [{'batch_size': rows, 'accumulation': step.accumulation * step.batch_size // rows}
            for rows in smaller]


def _meshes(step):
    """The same devices with a longer ring, or with weights split over more of them."""
    data, fsdp, ring, tensor = step.mesh
    for rings in divisors(data * fsdp):
        longer = ring * (data * fsdp // rings)
        for replicas in divisors(rings):
            mesh = (replicas, rings // replicas, longer, tensor)
            if mesh != step.mesh and replicas <= data:
                yield {'mesh': mesh}


def _strategies(step):
    return [{'memory.strategy': 'ring'}] if step.memory.attention.facts.gathers else []


def _seconds(step, hardware):
    """Predicted seconds; those of a computation in float32 are not, but stand in the same ratios."""
    memory = dataclasses.replace(step.memory, dtype='bfloat16')
    return sum(timing.seconds(dataclasses.replace(step, memory=memory), hardware).values())
