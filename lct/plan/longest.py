"""The longest context that fits into the devices of a step."""

import dataclasses

from lct.plan.buffers import buffers
from lct.plan.search import USABLE

SHORTEST = 1024


def longest_context(step, hardware, besides=lambda step: 0):
    """The longest seq_len = 1024 * 2^n with which a Step fits into its devices, 0 if not even 1024 does.

    besides: Step -> bytes of a device that a program of another kind keeps on top of buffers.buffers.
    """
    def fits(seq_len):
        longer = dataclasses.replace(step, seq_len=seq_len)
        return buffers(longer, hardware.platform).peak + besides(longer) <= USABLE * hardware.memory

    seq_len = SHORTEST
    while fits(seq_len):
        seq_len *= 2
    return seq_len // 2 if seq_len > SHORTEST else 0
