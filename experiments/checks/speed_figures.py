"""Lines of the page of results about speed, measured beside transformers and compiled, from their files."""

import collections
import statistics

from result_figures import RESULTS, read

from lct.text import short_length


def beside_transformers(d: dict) -> str:
    rows = {length: one['ratios'] for length, one in d.items() if length.isdigit()}
    return '; '.join(f'{short_length(int(length))} {one["first"]:.2f}x and {one["token"]:.2f}x'
                     for length, one in rows.items())


def training_step(d: dict) -> str:
    """Seconds of the ring of two over those of each of the others; below 1 where it is faster."""
    out = []
    for length, sides in d.items():
        seconds = {side: statistics.median(one['s']) for side, one in sides.items()}
        ring = seconds.pop('ring 2')
        out.append(f'{short_length(int(length))}: ' + ', '.join(
            f'{ring / other:.2f}x of {side}' for side, other in seconds.items()))
    return '; '.join(out)


def matmul_types(_: None) -> str:
    """Of the training steps compiled for GPUs: FLOPs of a device by the types that it multiplies."""
    steps = [program['matmul_flops'] for path in sorted(RESULTS.glob('compile_*.json'))
             for name, program in read(path.name)['programs'].items() if 'step' in name]
    total = collections.Counter()
    for one in steps:
        total.update(one)
    return f'{len(steps)} programs: ' + ', '.join(
        f'{flops / total.total():.0%} {types}' for types, flops in sorted(total.items()))
