"""Seconds of a training step: the counts of cost.py over the speeds of hardware.py, and what hides behind what."""

import dataclasses

from lct.plan.cost import model_flops, num_params, transfers, work


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """The share of a nominal peak that a real program reaches. One set for all hardware and all rows; every figure
    in seconds rests on it.

    All seven are assumptions. They lie in ranges that others measured and were chosen, together with the network of
    an L40S node in hardware.py, so that Gradient's nine stages come within a factor of two of the published minutes.
    There is little room: of 7,200 combinations tried 557 do, none closer than 1.95 in every row. Runs that were not
    used for the choice: EasyContext's tokens/s on eight A100 come out at 0.95 to 1.52 of the published.

    matmul: large products alone reach 0.8 on H100 and A100 (stas00/ml-engineering, measured); whole runs 0.38 to
      0.43 (Llama Team 2024, table 4). attention: a fused kernel.
    inside, ring, collective: of the nominal speed of links in a node, of a ring's flow between nodes, of all-gathers
      and their like between nodes.
    memory: of the bandwidth of device memory.
    overlap: of the shorter of two things that run at the same time, the share that is hidden: what moves data takes
      cores and memory bandwidth from what multiplies.
    """

    matmul: float = 0.5
    attention: float = 0.55
    inside: float = 0.6
    ring: float = 0.95
    collective: float = 0.55
    memory: float = 0.8
    overlap: float = 0.9


def seconds_on_links(transfer, hardware, efficiency):
    """(seconds inside the node, seconds between nodes) of one Transfer.

    Devices of a group lie stride apart. A ring goes at the speed of its slowest hop; where hops leave the node, all
    rings that do so share its network. A collective brings each byte into a node once, whatever the number of its
    devices there.
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


def together(work, moving, overlap):
    """Seconds of two things at a time."""
    return max(work, moving) + (1 - overlap) * min(work, moving)


def seconds(step, hardware, efficiency=Efficiency()):  # noqa: B008
    """Parts of a step in seconds, {name: seconds}; their sum is the step.

    'attention' and 'matmul' are computation; what follows is time in which links are waited for.

    Raises:
      ValueError: for computing in float32, whose products run at another peak.
    """
    if step.width != 2:
        raise ValueError('times are reckoned for computing in bfloat16, of which alone the table has peaks; set '
                         "memory.dtype to 'bfloat16'")
    flops = work(step)
    parts = {'matmul': flops.matmul / (hardware.flops * efficiency.matmul)}
    peak = hardware.flops * efficiency.attention
    attend = {'forward': flops.attention_forward / peak, 'backward': flops.attention_backward / peak}
    parts['attention'] = sum(attend.values())
    moving = transfers(step)
    for behind in ('forward', 'backward'):
        links = [seconds_on_links(t, hardware, efficiency) for t in moving if t.behind == behind]
        longest = max((sum(side) for side in zip(*links)), default=0.0)
        parts[f'transfers beyond {behind} attention'] = (
            together(attend[behind], longest, efficiency.overlap) - attend[behind])
    for t in moving:
        if not t.behind:
            parts[t.name] = max(seconds_on_links(t, hardware, efficiency))
    config = step.config
    if step.memory.remat == 'offload':  # out and back, behind the layer
        moved = 2 * step.local * config.embed_dim * step.width * config.num_layers * step.accumulation
        parts['offload'] = max(0.0, moved / (hardware.host * efficiency.inside) - sum(parts.values()))
    # AdamW reads and writes weights and two moments, reads gradients and writes updates
    state = 8 * num_params(config) * step.stored_width / (step.devices / step.mesh[0])
    parts['optimizer'] = state / (hardware.bandwidth * efficiency.memory)
    return parts


def least_block(flops, link, group=1, causal=False):
    """Tokens of a device behind whose attention a forward hop hides, at peak flops and link speed (Ring Attention,
    section 3.1): F / B; fewer with group query heads to a key/value head, twice as many where causal work is shared
    evenly."""
    return (2 if causal else 1) * flops / (group * link)


def utilisation(step, hardware, total):
    """Model FLOPs utilisation of a step of total seconds."""
    return model_flops(step) / (step.devices * hardware.flops * total)
