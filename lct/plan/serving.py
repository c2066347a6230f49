"""What reading a prompt and writing tokens costs: lct.models.decode, reckoned as a training step is."""

import dataclasses

from lct.plan import cost, timing


def cache_bytes(config, length, width=2):
    """Keys and values of a row of length tokens, all layers, all devices."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * length * width


def prefill_seconds(step, hardware, efficiency=timing.Efficiency()):  # noqa: B008
    """Parts in seconds of one forward over the rows of a Step, which writes the cache: no loss, no backward."""
    forward = dataclasses.replace(step, accumulation=1, memory=dataclasses.replace(step.memory, remat='none'))
    flops = cost.work(forward)
    attention = flops.attention_forward / (hardware.flops * efficiency.attention)
    moving = [t for t in cost.transfers(forward) if t.behind == 'forward']
    links = [timing.seconds_on_links(t, hardware, efficiency) for t in moving]
    longest = max((sum(side) for side in zip(*links)), default=0.0)
    # of the others the forward has its share: one pass of an all-to-all's two, two all-reduces of seven, one gather of
    # weights, and of keys (two bytes of five that go and come)
    share = {'all-to-all': 1 / 2, 'partial sums': 2 / 7, 'weights waited for': 1,
             'gather of keys, scatter of their gradients': 1 / 4}
    waited = sum(share.get(t.name, 0) * max(timing.seconds_on_links(t, hardware, efficiency))
                 for t in cost.transfers(forward) if not t.behind)
    return {
        'matmul': flops.matmul / 3 / (hardware.flops * efficiency.matmul), 'attention': attention,
        'transfers beyond attention': timing.together(attention, longest, efficiency.overlap) - attention,
        'collectives waited for': waited,
    }


def decode_seconds(step, hardware, efficiency=timing.Efficiency()):  # noqa: B008
    """Parts in seconds of one more token for every row of a Step: weights gathered to where they are used, weights
    and cache read once from device memory. The latency of collectives is not in it."""
    config, (_, fsdp, ring, tensor) = step.config, step.mesh
    weights = cost.matmul_params(config) * step.width / tensor
    group = fsdp * ring
    gather = cost.Transfer('weights', 'fsdp+sequence', 'collective', tensor, group, weights * (group - 1) / group, '')
    cache = step.rows * cache_bytes(config, step.shard, step.width) / tensor
    speed = hardware.bandwidth * efficiency.memory
    return {'weights gathered': max(timing.seconds_on_links(gather, hardware, efficiency)),
            'weights read': weights / speed, 'cache read': cache / speed}
