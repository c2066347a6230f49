"""The longest context that fits the devices of a step and their hosts."""

import dataclasses
from collections.abc import Callable

from lct.plan.buffers import buffers
from lct.plan.cost import Step
from lct.plan.hardware import Hardware
from lct.plan.search import USABLE, host_excess

SHORTEST = 1024


def longest_context(step: Step, hardware: Hardware,
                    extra_bytes: Callable[[Step], float] = lambda step: 0) -> int:
    """The longest seq_len = 1024 * 2^n with which a Step fits its devices and the memory of their hosts, 0 if
    not even 1024 does.

    A lower bound: GPUs hold more where the compiler schedules for memory (buffers.scheduled).
    extra_bytes: per device, what a different program keeps on top of buffers.buffers.
    """
    def fits(seq_len):
        longer = dataclasses.replace(step, seq_len=seq_len)
        needed = buffers(longer, hardware.platform)
        on_device = needed.peak + extra_bytes(longer) <= USABLE * hardware.memory
        return on_device and host_excess(needed, longer, hardware) <= 0

    seq_len = SHORTEST
    while fits(seq_len):
        seq_len *= 2
    return seq_len // 2 if seq_len > SHORTEST else 0
