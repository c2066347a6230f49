"""Text for terminals and model cards: tables, token counts and durations as people write them."""

import re
from collections.abc import Collection, Iterable, Sequence

UNITS = {'M': 2**20, 'K': 2**10}


def table(header: Sequence, rows: Iterable[Sequence], left: Collection[int] = (0,), footer: int = 0) -> str:
    """Aligned columns with a rule under the header.

    Args:
      rows: cells of any type, written as str() writes them.
      left: numbers of the columns that are aligned to the left; all others are aligned to the right.
      footer: number of last rows (totals, means) set apart by a second rule.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [aligned(row, widths, left) for row in cells]
    rule = '-' * (sum(widths) + 2 * (len(widths) - 1))
    lines.insert(1, rule)
    if footer:
        lines.insert(len(lines) - footer, rule)
    return '\n'.join(lines)


def aligned(cells: Iterable, widths: Sequence[int], left: Collection[int] = (0,)) -> str:
    """One row of a table, for tables whose rows are printed as they are measured."""
    columns = enumerate(zip(map(str, cells), widths, strict=True))
    return '  '.join(cell.ljust(width) if i in left else cell.rjust(width) for i,
                     (cell, width) in columns).rstrip()


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    """The first column aligned to the left, all others to the right."""
    lines = ['| ' + ' | '.join(map(str, row)) + ' |' for row in (header, *rows)]
    lines.insert(1, '|' + '|'.join([':--', *['--:'] * (len(header) - 1)]) + '|')
    return '\n'.join(lines)


def short_length(length: float) -> str:
    """1024 -> '1K', 1536 -> '1.5K', 1048576 -> '1M'."""
    for unit, size in UNITS.items():
        if length >= size:
            return f'{length / size:{".3g" if length < 1000 * size else ".0f"}}{unit}'
    return f'{length:g}'


def parse_length(text: str) -> int:
    """'1M' -> 1048576, '64K' -> 65536, '1000' -> 1000.

    Raises:
      ValueError: for any other text.
    """
    match = re.fullmatch(r'([1-9][0-9]*)([KM]?)', text.upper())
    if not match:
        raise ValueError(f'{text!r} is not a number of tokens; write 1048576, 1M or 64K')
    return int(match[1]) * UNITS.get(match[2], 1)


def multiples_near(number: int, unit: int) -> str:
    """The multiples of unit around a number: 1000, 16 -> '992 or 1008'."""
    below = number // unit * unit
    return ' or '.join(str(n) for n in (below, below + unit) if n)


def divisors_near(number: int, divisor: int) -> str:
    """The divisors of number around one that does not divide it: 128, 3 -> '2 or 4'."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    around = max(n for n in divisors if n < divisor), min((n for n in divisors if n > divisor), default=0)
    return ' or '.join(str(n) for n in around if n)


def clock(seconds: float) -> str:
    """A duration as '1h02m', '3m05s' or '12s'."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f'{seconds // 3600}h{seconds % 3600 // 60:02d}m'
    return f'{seconds // 60}m{seconds % 60:02d}s' if seconds >= 60 else f'{seconds}s'
