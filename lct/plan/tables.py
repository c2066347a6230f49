"""Predictions as text: the policy of a step, its seconds, its memory, and the plans of a search."""

import dataclasses

from lct.plan import timing
from lct.plan.buffers import Buffers
from lct.plan.cost import Step
from lct.plan.hardware import Hardware
from lct.plan.search import USABLE, Plan
from lct.text import table

GiB = 2**30


def policy(step: Step) -> str:
    """The attention strategy and the memory policy of a step."""
    memory, attention = step.memory, step.memory.attention
    node = f' in nodes of {attention.node_size}' if attention.node_size > 1 else ''
    state = '' if memory.offload_state == 'none' else f', offload_state {memory.offload_state}'
    passes = f', query_passes {memory.query_passes}' if memory.query_passes > 1 else ''
    return f'{attention.strategy}{node}, remat {memory.remat}, ffn_chunks {memory.ffn_chunks}{state}{passes}'


def assumptions(hardware: Hardware) -> str:
    """The constants behind a prediction."""
    shares = ', '.join(f'{name} {value}' for name, value in dataclasses.asdict(timing.Efficiency()).items())
    return (f'Assumed shares of nominal peaks (lct/plan/timing.py, Efficiency): {shares}; usable memory '
            f'{USABLE}.\n{hardware.name}: {hardware.flops / 1e12:.3g} TFLOP/s '
            f'{"float32" if hardware.platform == "cpu" else "bfloat16"}, '
            f'{hardware.memory / GiB:.1f} GiB, nodes of {hardware.node_size} with '
            f'{hardware.inside / 1e9:.0f} GB/s between neighbours, {hardware.network / 1e9:,.2f} GB/s from '
            'node to node (sources: lct/plan/hardware.py).')


def seconds_table(seconds: dict[str, float]) -> str:
    """timing.seconds as a table; what takes less than a thousandth of the step is left out."""
    total = sum(seconds.values())
    rows = [(name, f'{s:.2f}', f'{s / total:.1%}') for name, s in seconds.items() if s >= total / 1000]
    return table(('time of a step, predicted', 's', 'share'), [*rows, ('total', f'{total:.2f}', '')],
                 footer=1)


def memory_table(needed: Buffers, hardware: Hardware) -> str:
    """Buffers at their peak as a table; those below 10 MiB are left out."""
    rows = [(name, f'{size / GiB:.2f}') for name, size in needed.at_peak().items() if size >= GiB / 100]
    totals = [(f'peak, in phase {needed.phase!r}', f'{needed.peak / GiB:.2f}'),
              ('capacity of the device', f'{hardware.memory / GiB:.2f}'),
              *((f'host memory: {name}', f'{size / GiB:.2f}') for name, size in needed.host.items())]
    return table(('memory of a device at its peak, predicted', 'GiB'), rows + totals, footer=len(totals))


def plans_table(plans: list[Plan], hardware: Hardware) -> str:
    """Plans as a table, one per row."""
    header = ('s/step', 'MFU', 'GiB', 'mesh', 'rows x times', 'policy')
    return table(header, [
        (f'{plan.seconds:.1f}', f'{timing.utilisation(plan.step, hardware, plan.seconds, plan.adapter):.1%}',
         f'{plan.buffers.peak / GiB:.1f}', plan.step.mesh,
         f'{plan.step.batch_size} x {plan.step.accumulation}',
         policy(plan.step)) for plan in plans], left=(5,))
