"""The longest context that fits the devices of a step."""

import dataclasses
from collections.abc import Callable

from lct.plan.buffers import buffers
from lct.plan.cost import Step
from lct.plan.hardware import Hardware
from lct.plan.search import USABLE

SHORTEST = 1024


def longest_context(step: Step, hardware: Hardware,
                    extra_bytes: Callable[[Step], float] = lambda step: 0) -> int:
    """The longest seq_len = 1024 * 2^n with which a Step fits its devices, 0 if not even 1024 does.

    A lower bound: GPUs hold more where the compiler schedules for memory (buffers.scheduled).
    extra_bytes: per device, what a different program keeps on top of buffers.buffers.
    """
    def fits(seq_len):
        longer = dataclasses.replace(step, seq_len=seq_len)
        return buffers(longer, hardware.platform).peak + extra_bytes(longer) <= USABLE * hardware.memory

    seq_len = SHORTEST
    while fits(seq_len):
        seq_len *= 2
    return seq_len // 2 if seq_len > SHORTEST else 0
