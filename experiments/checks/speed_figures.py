"""Lines of the page of results about speed beside transformers, from their files."""

import statistics

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
