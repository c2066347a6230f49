"""Prediction of prefill and decoding (lct.models.decode), in the terms of a training step."""

import dataclasses

from lct.models import kv_cache
from lct.models.flops import matmul_params
from lct.plan import cost, timing
from lct.plan.cost import Step
from lct.plan.hardware import Hardware

# The forward's share of the exposed transfers of a training step: one of two passes of all-to-alls, two of
# seven all-reduces, one gather of weights, and one gather of keys (a quarter of the bytes of all of them).
FORWARD_SHARE = {'all-to-all': 1 / 2, 'partial sums': 2 / 7, 'weights, exposed': 1,
                 'gather of keys, scatter of their gradients': 1 / 4}


def cache_bytes(step: Step) -> float:
    """Bytes of keys and values on each device for the rows of a Step, in its memory.cache_dtype."""
    dtype = step.memory.cache_dtype or step.memory.dtype or step.dtype
    return step.rows * step.shard * kv_cache.bytes_of(step.config, dtype) / step.mesh[3]


def prefill_seconds(step: Step, hardware: Hardware,
                    efficiency: timing.Efficiency = timing.Efficiency()) -> dict[str, float]:  # noqa: B008
    """Seconds by name of one forward over the rows of a Step that writes the cache, without a loss."""
    memory = dataclasses.replace(step.memory.in_inference, remat='none')
    forward = dataclasses.replace(step, accumulation=1, memory=memory)
    flops, moved = cost.work(forward), cost.transfers(forward)
    attention = flops.attention_forward / (hardware.flops * efficiency.attention)
    hidden = [t for t in moved if t.behind == 'forward']
    return {
        'matmul': flops.matmul / 3 / (hardware.flops * efficiency.matmul), 'attention': attention,
        'transfers beyond attention': timing.exposed(attention, hidden, hardware, efficiency),
        'exposed collectives': sum(
            FORWARD_SHARE.get(t.name, 0) * max(timing.seconds_on_links(t, hardware, efficiency))
            for t in moved if not t.behind),
    }


def decode_seconds(step: Step, hardware: Hardware,
                   efficiency: timing.Efficiency = timing.Efficiency()) -> dict[str, float]:  # noqa: B008
    """Seconds by name of one more token for every row of a Step. Each device reads its share of the weights,
    which stay split over tensor and sequence (models.row_linear), and of the cache, once from its memory. The
    latency of collectives is not included."""
    _, _, ring, tensor = step.mesh
    weights = matmul_params(step.config) * step.width / (ring * tensor)
    speed = hardware.bandwidth * efficiency.memory
    return {'weights read': weights / speed, 'cache read': cache_bytes(step) / speed}
