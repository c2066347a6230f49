"""Seconds of a training step: the counts of cost.py over the speeds of hardware.py, with overlap."""

import dataclasses

from lct.models.lora import Adapter
from lct.plan.buffers import saved
from lct.plan.cost import Step, Transfer, Work, model_flops, num_params, num_trained, transfers, work
from lct.plan.hardware import Hardware
from lct.plan.offloaded import moved


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The share of a nominal peak that a real program reaches: one set for all hardware and all recipes, on
    which every figure in seconds rests.

    All seven are assumptions within ranges that others measured. They were chosen, together with the network
    of an L40S node in hardware.py, so that Gradient's nine stages come within a factor of two of the
    published minutes. There is little freedom: 557 of 7,200 combinations do, and none comes within 1.95 in
    every row. Held-out check: EasyContext's tokens/s on eight A100 are predicted at 0.95 to 1.50 of the
    published figures.

    matmul: large products alone reach 0.8 on H100 and A100 (stas00/ml-engineering, measured), whole runs 0.38
      to 0.43 (Llama Team 2024, table 4).
    attention: a fused kernel.
    inside: of the nominal speed of links in a node. ring: of the flow of a ring between nodes. collective: of
      all-gathers and other collectives between nodes.
    memory: of the bandwidth of device memory.
    overlap: the hidden share of the shorter of two concurrent activities. Data movement takes cores and
      memory bandwidth from computation.
    """

    matmul: float = 0.5
    attention: float = 0.55
    inside: float = 0.6
    ring: float = 0.95
    collective: float = 0.55
    memory: float = 0.8
    overlap: float = 0.9


def seconds_on_links(transfer: Transfer, hardware: Hardware, efficiency: Efficiency) -> tuple[float, float]:
    """(seconds inside the node, seconds between nodes) of one Transfer.

    Devices of a group are stride apart. A ring runs at the speed of its slowest link; rings that leave the
    node side by side share its network. A collective brings each byte into a node once, whatever the number
    of its devices there.
    """
    sent, stride, group = transfer.bytes, transfer.stride, transfer.group
    within = max(min(hardware.node_size // stride, group), 1)
    ring = transfer.flow == 'ring'
    inside = hardware.inside if ring else hardware.inside_all
    local = sent / (inside * efficiency.inside) if within > 1 else 0.0
    if within == group:
        return local, 0.0
    flows = min(stride, hardware.node_size)  # rings, or groups, that leave a node side by side
    if ring:
        return local, sent / (min(hardware.between, hardware.network / flows) * efficiency.ring)
    speed = min(within * hardware.between, hardware.network * within / hardware.node_size)
    return local, sent / (speed * efficiency.collective)


def overlapped(compute: float, communication: float, overlap: float) -> float:
    """Seconds of two concurrent activities."""
    return max(compute, communication) + (1 - overlap) * min(compute, communication)


def exposed(attention: float, hidden: list[Transfer], hardware: Hardware, efficiency: Efficiency) -> float:
    """Seconds of transfers that attention, which takes so many seconds, does not hide."""
    links = [seconds_on_links(t, hardware, efficiency) for t in hidden]
    longest = max((sum(side) for side in zip(*links)), default=0.0)
    return overlapped(attention, longest, efficiency.overlap) - attention


def seconds(step: Step, hardware: Hardware, efficiency: Efficiency = Efficiency(),
            adapter: Adapter | None = None) -> dict[str, float]:
    """Seconds of a step by name; their sum is the step. adapter: trained in place of all weights.

    'attention' and 'matmul' are computation, all others exposed communication and the optimizer.

    Raises:
      ValueError: for a computation in float32, whose products have another peak.
    """
    if step.width != 2 and hardware.platform != 'cpu':
        raise ValueError('times are predicted for computing in bfloat16, the only dtype whose peak is in the '
                         "table; set memory.dtype to 'bfloat16'")
    flops, sent = work(step, adapter=adapter), transfers(step, adapter)
    times = {'matmul': flops.matmul / (hardware.flops * efficiency.matmul)}
    attention = _attention_seconds(flops, hardware, efficiency)
    times['attention'] = sum(attention.values())
    for direction, attend in attention.items():
        hidden = [t for t in sent if t.behind == direction]
        times[f'transfers beyond {direction} attention'] = exposed(attend, hidden, hardware, efficiency)
    for t in sent:
        if not t.behind:
            times[t.name] = max(seconds_on_links(t, hardware, efficiency))
    if host := sum(saved(step)[1].values()):
        # compiled programs write it behind the forward of a layer, but wait for it before the backward
        copying = host * step.accumulation / (hardware.host * efficiency.inside)
        forward = times['matmul'] / 4 + attention['forward'] / (2 - step.keeps_attention)
        times['copies to and from the host'] = copying + max(0.0, copying - forward)
    if state := moved(step):
        times['state to and from the host'] = state / (hardware.host * efficiency.inside)
    # AdamW reads and writes weights and two moments, reads gradients and writes updates
    updated = num_trained(step.config, adapter) if adapter else num_params(step.config)
    state = 8 * updated * step.stored_width / (step.devices / step.mesh[0])
    times['optimizer'] = state / (hardware.bandwidth * efficiency.memory)
    return times


def _attention_seconds(flops: Work, hardware, efficiency):
    peak = hardware.flops * efficiency.attention
    return {'forward': flops.attention_forward / peak, 'backward': flops.attention_backward / peak}


def least_block(flops: float, link: float, group: int = 1, causal: bool = False) -> float:
    """The smallest number of tokens per device with which the attention of one block hides its transfer, at
    peak FLOP/s and peak link speed in bytes/s: F / B (Ring Attention, section 3.1).

    group: query heads per key/value head, which divide the bytes. causal: balanced causal work needs twice
    the tokens.
    """
    return (2 if causal else 1) * flops / (group * link)


def utilisation(step: Step, hardware: Hardware, total: float, adapter: Adapter | None = None) -> float:
    """Model FLOPs utilisation of a step that takes total seconds."""
    return model_flops(step, adapter) / (step.devices * hardware.flops * total)
