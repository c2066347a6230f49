"""Figures as SVG, for notebooks, reports and files. The same numbers give the same bytes."""

import hashlib
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lct import files
from lct.eval.report.colors import GREY, INK, LINE_COLORS, ON_RAMP, RAMP, VARIABLES
from lct.text import short_length

NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
COLORS = (*LINE_COLORS[1:], '#7A5BB5', '#C9A227', LINE_COLORS[0])
STABLE = {'svg.fonttype': 'none', 'svg.hashsalt': 'lct'}  # the same bytes every time
STYLE = {**STABLE, 'font.family': 'sans-serif', 'font.size': 9, 'axes.spines.top': False,
         'axes.spines.right': False, 'savefig.transparent': True,
         **dict.fromkeys(('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color'),
                         INK)}
CELL_WIDTH, CELL_HEIGHT = 0.62, 0.26  # of heat_map, in inches
MARKERS = 'os^Dv'
SQUARE, FULL = 28, (23, 78, 146)  # of ring_schedule: the side of a square, the colour of a full block


class Picture:
    """An SVG, in .text; a notebook displays it through _repr_svg_.

    It names its XML namespace: pages made of a notebook show it as an image, which is empty without.
    """

    def __init__(self, text: str):
        self.text = text

    def _repr_svg_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f'Picture of {len(self.text):,} characters'

    def save(self, path: str | Path) -> None:
        """Write the file atomically."""
        files.write_atomically(path, self.text)


# ---------------------------------------------------------------------------------------------------
# Charts drawn by matplotlib
# ---------------------------------------------------------------------------------------------------


def lines(series: Mapping, x_label: str, y_label: str, title: str = '', log_y: bool = False,
          marks: Iterable = (), lengths: bool = True) -> Picture:
    """Lines over tokens on a logarithmic axis, or over any x on a linear one with lengths=False.

    series: {name: ([x], [y])}, '... (published)' drawn as dots. marks: [(x, text)] of vertical lines.
    """
    def draw(axis):
        for color, (name, (xs, ys)) in zip(itertools.cycle(COLORS), series.items()):
            dots = name.endswith('(published)')
            axis.plot(xs, ys, marker='o' if dots or len(xs) < 20 else '', linestyle='' if dots else '-',
                      color=color, markersize=5 if dots else 3, linewidth=1.8, label=name)
        if log_y:
            axis.set_yscale('log')
        if lengths:
            _length_axis(axis, sorted({x for xs, _ in series.values() for x in xs}))
        for x, text in marks:
            axis.axvline(x, color=INK, linewidth=1, linestyle='--')
            _mark_text(axis, x, text)
        _label(axis, x_label, y_label, title)
        if len(series) > 1:
            axis.legend(frameon=False, fontsize=8)

    return _chart(6.4, 3.4, draw)


def bars(groups: Sequence[str], series: Mapping, y_label: str, title: str = '',
         log_y: bool = False) -> Picture:
    """Bars side by side. groups: names along x; series: {name: [height or None of each group]}."""
    def draw(axis):
        width = 0.8 / len(series)
        for i, (color, (name, heights)) in enumerate(zip(itertools.cycle(COLORS), series.items())):
            offset = (i - (len(series) - 1) / 2) * width
            at = [j + offset for j, height in enumerate(heights) if height is not None]
            axis.bar(at, [height for height in heights if height is not None], width, color=color, label=name)
        slanted = sum(map(len, groups)) > 70
        axis.set_xticks(range(len(groups)), groups, rotation=35 * slanted,
                        ha='right' if slanted else 'center', fontsize=8)
        if log_y:
            axis.set_yscale('log')
        _label(axis, '', y_label, title)
        axis.legend(frameon=False, fontsize=8)

    return _chart(max(5.0, min(9.0, 0.45 * len(groups) * len(series) ** 0.5 + 2)), 3.4, draw)


def stacked(groups: Sequence[str], layers: Mapping, y_label: str, title: str = '') -> Picture:
    """One bar per group, with its layers on top of each other. layers: {name: [height of each group]}."""
    def draw(axis):
        bottom = np.zeros(len(groups))
        for color, (name, heights) in zip(itertools.cycle(COLORS), layers.items()):
            axis.bar(range(len(groups)), heights, 0.7, bottom=bottom, color=color, label=name)
            bottom += heights
        axis.set_xticks(range(len(groups)), groups)
        _label(axis, '', y_label, title)
        axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))

    return _chart(7.6, 3.4, draw)


class Panel(NamedTuple):
    """One chart of panels. series: {name: (lengths, means, errors or None)}; a band is two errors wide."""

    title: str
    y_label: str
    series: Mapping


def panels(charts: Sequence[Panel], marks: Mapping | None = None, controls: Iterable[str] = ()) -> Picture:
    """Curves over length in panels side by side, one colour for each of an ordered set of settings.

    Args:
      charts: the names of the first one make the legend, in the order of the colours.
      marks: {length: text} of dotted vertical lines across every panel.
      controls: names drawn dashed, in the colour of the text.
    """
    names = [name for name in charts[0].series if name not in controls]
    colors = colormaps['viridis']([0.9 * i / max(len(names) - 1, 1) for i in range(len(names))])
    styles = {name: {'color': color} for name, color in zip(names, colors, strict=True)}
    styles |= {name: {'color': INK, 'linestyle': '--'} for name in controls}
    figure = Figure(figsize=(4.6 * len(charts) + 1.4, 4.2), layout='constrained')
    axes = figure.subplots(1, len(charts), squeeze=False)[0]
    for axis, chart in zip(axes, charts, strict=True):
        _panel(axis, chart, styles, marks or {})
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False)
    with matplotlib.rc_context(STABLE):
        return _saved(figure)


def _panel(axis, chart, styles, marks):
    for name, (lengths, means, errors) in chart.series.items():
        axis.plot(lengths, means, marker='o', markersize=3.5, linewidth=1.8, label=name, **styles[name])
        if errors is not None:
            low, high = np.subtract(means, errors), np.add(means, errors)
            axis.fill_between(lengths, low, high, color=styles[name]['color'], alpha=0.15, linewidth=0)
    for length, text in marks.items():
        axis.axvline(length, color=LINE_COLORS[0], linewidth=1, linestyle=':')
        _mark_text(axis, length, text, color=GREY)
    powers = {1 << (int(x).bit_length() - 1) for lengths, _, _ in chart.series.values() for x in lengths}
    _length_axis(axis, sorted(powers))
    axis.set_title(chart.title)
    axis.set_xlabel('tokens')
    axis.set_ylabel(chart.y_label)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)


def _chart(width, height, draw: Callable[[Axes], None]) -> Picture:
    """The Picture of draw(axis); width and height in inches."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout='constrained')
        draw(figure.subplots())
        return _saved(figure)


def _saved(figure) -> Picture:
    """The figure as SVG within HTML: several may stand on one page, which may give the colours of VARIABLES
    other values."""
    file = io.StringIO()
    figure.savefig(file, format='svg', metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type')))
    text = file.getvalue()
    text = text[text.index('<svg'):]
    used = {*re.findall(r'url\(#([^)]+)\)', text), *re.findall(r'href="#([^"]+)"', text)}
    own = hashlib.sha256(text.encode()).hexdigest()[:6]
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{own}{m[1]}"' if m[1] in used else '', text)
    text = re.sub(r'(url\(#|href="#)', rf'\g<1>{own}', text)
    for name, color in VARIABLES.items():
        text = re.sub(f': {color}', f': var(--{name}, {color})', text, flags=re.IGNORECASE)
    return Picture(text)


def _length_axis(axis, ticks):
    axis.set_xscale('log', base=2)
    axis.set_xticks(ticks, [short_length(x) for x in ticks], rotation=45 if len(ticks) > 10 else 0)
    axis.minorticks_off()


def _mark_text(axis, x, text, **style):
    """Text beside a vertical line, from the top downwards."""
    axis.annotate(text, (x, 1), xycoords=('data', 'axes fraction'), xytext=(-3, -3),
                  textcoords='offset points', rotation=90, ha='right', va='top', fontsize=8, **style)


def _label(axis, x_label, y_label, title):
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title(title, fontsize=10)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, linewidth=0.6)


# ---------------------------------------------------------------------------------------------------
# Figures of a report
# ---------------------------------------------------------------------------------------------------


def heat_map(lengths: Sequence[int], rows: Sequence[str], scores: Sequence, trained: int,
             side: str) -> Picture:
    """Scores 0..1 [rows][lengths] on a fixed scale: an automatic one hides a uniformly wrong map.

    None for a cell without samples. trained: the length up to which the model was trained. side: what the
    rows are.
    """
    values = np.array([[math.nan if score is None else score for score in row] for row in scores])

    def draw(axis):
        axis.pcolormesh(np.ma.masked_invalid(values), cmap=RAMP, vmin=0, vmax=1, edgecolors='none',
                        linewidth=0)
        for (i, j), score in np.ndenumerate(values):
            if math.isfinite(score):
                axis.text(j + 0.5, i + 0.5, f'{score:.2f}', ha='center', va='center', color=ON_RAMP)
        axis.set_xticks(np.arange(len(lengths)) + 0.5, map(short_length, lengths))
        axis.set_yticks(np.arange(len(rows)) + 0.5, rows)
        axis.invert_yaxis()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel('context length (tokens)')
        axis.set_ylabel(side)
        edge = sum(length <= trained for length in lengths)
        axis.axvline(edge, color=INK, linewidth=1.5, linestyle=(0, (5, 3)))
        axis.set_title(f'trained to {short_length(trained)}', fontsize=9,
                       loc='right' if edge == len(lengths) else 'left')

    width = CELL_WIDTH * max(len(lengths), 3) + 0.075 * max(map(len, rows)) + 0.9
    return _chart(width, CELL_HEIGHT * len(rows) + 0.9, draw)


def curves(series: Mapping, x_label: str, y_label: str, trained: int | None = None,
           y_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
    """Lines over a logarithmic axis.

    series: {name: ([x], [y], [(low, high)] or None)}, dashed without a band; each has a dash, a marker and a
    width of its own, so that equal lines show beside each other. trained: as in heat_map.
    """
    def draw(axis):
        dashes = itertools.cycle([(0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2))])
        for i, (name, (xs, ys, band)) in enumerate(series.items()):
            color = COLORS[i % len(COLORS)]
            if band:
                axis.fill_between(xs, *zip(*band, strict=True), color=color, alpha=0.18, linewidth=0)
            axis.plot(xs, ys, color=color, label=name, marker=MARKERS[i % len(MARKERS)], markersize=4.5,
                      linewidth=max(3.2 - 0.6 * i, 1.2), linestyle='-' if band else next(dashes))
        axis.set_ylim(*y_range)
        points = [x for xs, _, _ in series.values() for x in xs] + [trained] * (trained is not None)
        _length_axis(axis, powers_of_two(min(points), max(points)))
        if trained:
            axis.axvline(trained, color=INK, linewidth=1, linestyle=(0, (5, 3)))
            _mark_text(axis, trained, f'trained to {short_length(trained)}', color=INK)
        _label(axis, x_label, y_label, '')
        if len(series) > 1:
            axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))

    return _chart(7.6 if len(series) > 1 else 6.4, 3.6, draw)


def powers_of_two(low: float, high: float) -> list[int]:
    """The powers of two from low to high, at most 12 of them, evenly left out; low, rounded, if there is
    none."""
    found = [1 << i for i in range(max(math.ceil(math.log2(low)), 0), math.floor(math.log2(high)) + 1)]
    return found[::-(-len(found) // 12)] if found else [round(low)]


def _hex(red, green, blue):
    return f'#{red:02x}{green:02x}{blue:02x}'


# ---------------------------------------------------------------------------------------------------
# Ring schedule
# ---------------------------------------------------------------------------------------------------


def ring_schedule(pairs_by_layout: Mapping) -> Picture:
    """Which block each device holds at every ring step, and how much of the block it attends to.

    Each layout has a map, devices downwards and ring steps rightwards. A square is labelled with the device
    that owns its block; its colour is the fraction of the block's pairs that the mask admits, dark for all of
    them. The row below has the pairs of the busiest device at every ring step, in whole blocks.
    pairs_by_layout: {layout: plan.balance.pairs_by_step(layout, ...)}.
    """
    size = len(next(iter(pairs_by_layout.values())))
    block = max(pairs.max() for pairs in pairs_by_layout.values())
    elements, left, bottom = [], 44, 26 + SQUARE * size
    for layout, pairs in pairs_by_layout.items():
        share = pairs / block
        middle = left + SQUARE * size // 2
        elements.append(_label_at(middle, 16, f'{layout}: {share.max(0).sum():.1f} blocks of work'))
        elements += [_square(left, device, step, value, size)
                     for (device, step), value in np.ndenumerate(share)]
        for step in range(size):
            x = left + SQUARE * step + SQUARE // 2
            elements += [_label_at(left - 12, 44 + SQUARE * step, step), _label_at(x, bottom + 14, step),
                         _label_at(x, bottom + 28, f'{share[:, step].max():.1f}')]
        elements.append(_label_at(middle, bottom + 44, 'ring step, and its busiest device'))
        left += SQUARE * size + 44
    y = 26 + SQUARE * size // 2
    elements.append(_label_at(16, y, 'device', f' transform="rotate(-90 16 {y})"'))
    width, height = left - 20, bottom + 52
    return Picture(f'<svg {NAMESPACE} viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                   f'font-family="sans-serif" font-size="11" text-anchor="middle" fill="{INK}">'
                   + ''.join(elements) + '</svg>')


def _square(left, device, step, share, size):
    x, y = left + SQUARE * step, 26 + SQUARE * device
    color = _hex(*(round(255 + share * (full - 255)) for full in FULL))
    light = ' fill="#fff"' if share > 0.6 else ''
    return (f'<rect x="{x}" y="{y}" width="{SQUARE - 1}" height="{SQUARE - 1}" fill="{color}"/>'
            + _label_at(x + SQUARE // 2, y + 18, (device - step) % size, light))


def _label_at(x, y, text, attributes=''):
    return f'<text x="{x}" y="{y}"{attributes}>{text}</text>'
