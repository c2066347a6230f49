"""Which types a compiled program multiplies: float32 takes a GPU at least twice as long as bfloat16."""

import collections
import math
import re

from lct.plan.hlo import Program

CONTRACTED = re.compile(r'lhs_contracting_dims=\{([\d,]*)\}')


def flops_by_type(program: Program) -> dict[str, int]:
    """{'bf16 x bf16': FLOPs, ...} of the dots of a program on one device, each as often as it runs, or at
    least runs. Kernels and the library calls of TPUs are not dots."""
    flops = collections.Counter()
    for name, lines in program.computations.items():
        results = {i.name: i.shapes for i in lines}
        for dot in lines:
            if dot.opcode != 'dot' or name not in program.times:
                continue
            (a,), (b,) = (results[operand] for operand in dot.operands)
            contracted = [int(d) for d in CONTRACTED.search(dot.rest)[1].split(',') if d]
            work = 2 * math.prod(dot.shapes[0].dims) * math.prod(a.dims[d] for d in contracted)
            flops[f'{a.dtype} x {b.dtype}'] += work * program.times[name][0]
    return dict(sorted(flops.items()))
