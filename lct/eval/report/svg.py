"""Figures as SVG, for notebooks, reports and files. The same numbers give the same bytes."""

import html
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lct import files
from lct.eval.report.colors import FAINT, GREY, INK, LINE_COLORS, RAMP
from lct.text import short_length

NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'
COLORS = (*LINE_COLORS[1:], '#7A5BB5', '#C9A227', LINE_COLORS[0])
STABLE = {'svg.fonttype': 'none', 'svg.hashsalt': 'lct'}  # the same bytes every time
STYLE = {**STABLE, 'font.family': 'sans-serif', 'font.size': 9, 'axes.spines.top': False,
         'axes.spines.right': False}
CELL_WIDTH, CELL_HEIGHT = 58, 22  # of heat_map, in pixels
PLOT_WIDTH, PLOT_HEIGHT = 560, 300  # of curves
SQUARE, FULL = 28, (23, 78, 146)  # of ring_schedule: the side of a square, the colour of a full block


class Picture:
    """An SVG, in .text; a notebook displays it through _repr_svg_."""

    def __init__(self, text: str):
        self.text = text

    def _repr_svg_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return f'Picture of {len(self.text):,} characters'

    def save(self, path: str | Path) -> None:
        """Write the file atomically, with the XML namespace that an SVG within HTML does without."""
        text = self.text if NAMESPACE in self.text else self.text.replace('<svg ', f'<svg {NAMESPACE} ', 1)
        files.write_atomically(path, text)


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
    text = io.StringIO()
    figure.savefig(text, format='svg', metadata={'Date': None})
    return Picture(text.getvalue())


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
# Figures of a report, within HTML
# ---------------------------------------------------------------------------------------------------


def heat_map(lengths: Sequence[int], rows: Sequence[str], scores: Sequence, trained: int,
             side: str) -> Picture:
    """Scores 0..1 [rows][lengths] on a fixed scale: an automatic one hides a uniformly wrong map.

    trained: the length up to which the model was trained. side: what the rows are.
    """
    left, top = 150, 34
    bottom = top + CELL_HEIGHT * len(rows)
    elements = [_text(left - 8, top - 8, side, 'end')]
    for i, (name, row) in enumerate(zip(rows, scores, strict=True)):
        y = top + i * CELL_HEIGHT
        elements.append(_text(left - 8, y + 15, name, 'end'))
        for j, score in enumerate(row):
            if score is None:  # a cell without samples
                continue
            x = left + j * CELL_WIDTH
            elements.append(f'<rect x="{x}" y="{y}" width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" '
                            f'fill="{_hex(*RAMP(score, bytes=True)[:3])}"/>')
            elements.append(_text(x + CELL_WIDTH / 2, y + 15, f'{score:.2f}'))
    for j, length in enumerate(lengths):
        elements.append(_text(left + (j + 0.5) * CELL_WIDTH, bottom + 15, short_length(length)))
    elements.append(_text(left + len(lengths) * CELL_WIDTH / 2, bottom + 32, 'context length (tokens)'))
    edge = left + CELL_WIDTH * sum(length <= trained for length in lengths) - 0.5
    elements.append(f'<line x1="{edge}" x2="{edge}" y1="{top - 6}" y2="{bottom}" stroke="{INK}" '
                    'stroke-width="2" stroke-dasharray="5 3"/>')
    elements.append(_text(edge, top - 12, f'trained to {short_length(trained)}'))
    return _inline(left + CELL_WIDTH * len(lengths) + 90, bottom + 40, elements)


def curves(series: Mapping, x_label: str, y_label: str, trained: int | None = None,
           y_range: tuple[float, float] = (0.0, 1.0)) -> Picture:
    """Lines over a logarithmic axis.

    series: {name: ([x], [y], [(low, high)] or None)}, dashed without a band. trained: as in heat_map.
    """
    ticks = sorted({x for xs, _, _ in series.values() for x in xs} | ({trained} if trained else set()))
    plot = _Plot(ticks[0], ticks[-1], *y_range)
    right, bottom = plot.LEFT + PLOT_WIDTH, plot.TOP + PLOT_HEIGHT
    elements = []
    for i in range(6):
        value = plot.low + (plot.high - plot.low) * i / 5
        y = plot.y(value)
        elements.append(f'<line x1="{plot.LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="{FAINT}"/>'
                        + _text(plot.LEFT - 6, y + 4, f'{value:.3g}', 'end'))
    elements += [_text(plot.x(tick), bottom + 16, short_length(tick)) for tick in ticks]
    if trained:
        x = plot.x(trained)
        elements.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{plot.TOP}" y2="{bottom}" stroke="{INK}" '
                        'stroke-dasharray="5 3"/>'
                        + _text(x - 4, plot.TOP + 10, f'trained to {short_length(trained)}', 'end'))
    for i, (name, line) in enumerate(series.items()):
        color, y = LINE_COLORS[(i + 1) % len(LINE_COLORS)], plot.TOP + 18 * i
        elements += plot.line(*line, color)
        elements.append(f'<rect x="{right + 10}" y="{y}" width="10" height="10" fill="{color}"/>'
                        + _text(right + 25, y + 9, name, 'start'))
    elements.append(_text(plot.LEFT + PLOT_WIDTH / 2, bottom + 36, x_label))
    elements.append(_text(plot.LEFT - 44, plot.TOP - 4, y_label, 'start'))
    return _inline(right + 150, bottom + 44, elements)


class _Plot(NamedTuple):
    """The area of curves: x is logarithmic from first to last, y linear from low to high."""

    first: float
    last: float
    low: float
    high: float

    LEFT, TOP = 52, 14

    def x(self, value):
        first = math.log2(self.first)
        last = max(math.log2(self.last), first + 1e-9)
        return self.LEFT + (math.log2(value) - first) / (last - first) * PLOT_WIDTH

    def y(self, value):
        return self.TOP + (self.high - value) / (self.high - self.low) * PLOT_HEIGHT

    def points(self, xs, ys):
        return ' '.join(f'{self.x(x):.1f},{self.y(y):.1f}' for x, y in zip(xs, ys, strict=True))

    def line(self, xs, ys, band, color):
        """Iterator of the elements of a line with its band."""
        if band:
            low, high = zip(*band, strict=True)
            outline = self.points([*xs, *reversed(xs)], [*high, *reversed(low)])
            yield f'<polygon points="{outline}" fill="{color}" fill-opacity=".15"/>'
        dash = '' if band else ' stroke-dasharray="4 3"'
        yield (f'<polyline points="{self.points(xs, ys)}" fill="none" stroke="{color}" '
               f'stroke-width="2"{dash}/>')
        for x, y in zip(xs, ys, strict=True):
            yield f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3" fill="{color}"/>'


def _inline(width, height, elements) -> Picture:
    return Picture(f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" role="img">'
                   + ''.join(elements) + '</svg>')


def _text(x, y, text, anchor='middle'):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{INK}" >{html.escape(text)}</text>'


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
