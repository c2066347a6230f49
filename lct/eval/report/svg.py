"""Small drawings as SVG: they show themselves in a notebook and are saved beside the numbers that they show."""

import io
import itertools

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from lct import files
from lct.eval.report.figures import LINE_COLORS
from lct.text import short_length

INK = '#10241F'
DARK, CELL = (23, 78, 146), 28  # of ring_schedule: the colour of a full cell, its side
COLORS = (*LINE_COLORS[1:], '#7A5BB5', '#C9A227', LINE_COLORS[0])
STYLE = {'svg.fonttype': 'none', 'svg.hashsalt': 'lct', 'font.family': 'sans-serif', 'font.size': 9,
         'axes.spines.top': False, 'axes.spines.right': False}


class Picture:
    """An SVG, in .text; a notebook draws it by _repr_svg_."""

    def __init__(self, text):
        self.text = text

    def _repr_svg_(self):
        return self.text

    def __repr__(self):
        return f'Picture of {len(self.text):,} characters'

    def save(self, path):
        """Write the file atomically."""
        files.write_atomically(path, self.text)


def _drawn(width, height, draw):
    """The Picture of draw(axis)."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout='constrained')
        draw(figure.subplots())
        text = io.StringIO()
        figure.savefig(text, format='svg', metadata={'Date': None})
    return Picture(text.getvalue())


def lines(series, x_label, y_label, title='', log_y=False, marks=(), lengths=True):
    """Lines over tokens on a logarithmic axis, 8K to 1M, or with lengths=False over any x on an even one.

    series: {name: ([x], [y])}, a name that ends in '(published)' as dots alone. marks: [(x, text)] of vertical lines.
    """
    def draw(axis):
        for color, (name, (xs, ys)) in zip(itertools.cycle(COLORS), series.items()):
            dots = name.endswith('(published)')
            axis.plot(xs, ys, marker='o' if dots or len(xs) < 20 else '', linestyle='' if dots else '-', color=color,
                      markersize=5 if dots else 3, linewidth=1.8, label=name)
        if log_y:
            axis.set_yscale('log')
        if lengths:
            at = sorted({x for xs, _ in series.values() for x in xs})
            axis.set_xscale('log', base=2)
            axis.set_xticks(at, [short_length(x) for x in at], rotation=45 if len(at) > 10 else 0)
            axis.minorticks_off()
        for x, text in marks:
            axis.axvline(x, color=INK, linewidth=1, linestyle='--')
            axis.annotate(text, (x, 1), xycoords=('data', 'axes fraction'), xytext=(-3, -3), fontsize=8,
                          textcoords='offset points', rotation=90, ha='right', va='top')
        _label(axis, x_label, y_label, title)
        if len(series) > 1:
            axis.legend(frameon=False, fontsize=8)

    return _drawn(6.4, 3.4, draw)


def bars(groups, series, y_label, title='', log_y=False):
    """Bars side by side. groups: names along x; series: {name: [height or None of each group]}."""
    def draw(axis):
        width = 0.8 / len(series)
        for i, (color, (name, heights)) in enumerate(zip(itertools.cycle(COLORS), series.items())):
            at = [j + (i - (len(series) - 1) / 2) * width for j, height in enumerate(heights) if height is not None]
            axis.bar(at, [height for height in heights if height is not None], width, color=color, label=name)
        turned = sum(map(len, groups)) > 70
        axis.set_xticks(range(len(groups)), groups, rotation=35 * turned, ha='right' if turned else 'center', fontsize=8)
        if log_y:
            axis.set_yscale('log')
        _label(axis, '', y_label, title)
        axis.legend(frameon=False, fontsize=8)

    return _drawn(max(5.0, min(9.0, 0.45 * len(groups) * len(series) ** 0.5 + 2)), 3.4, draw)


def stacked(groups, parts, y_label, title=''):
    """One bar a group, its parts upon each other. parts: {name: [height of each group]}."""
    def draw(axis):
        bottom = np.zeros(len(groups))
        for color, (name, heights) in zip(itertools.cycle(COLORS), parts.items()):
            axis.bar(range(len(groups)), heights, 0.7, bottom=bottom, color=color, label=name)
            bottom += heights
        axis.set_xticks(range(len(groups)), groups)
        _label(axis, '', y_label, title)
        axis.legend(frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1.0, 0.5))

    return _drawn(7.6, 3.4, draw)


def ring_schedule(pairs_by_layout):
    """Who holds what when, and how much of it can be seen: a map for each layout, devices downwards, hops rightwards.

    pairs_by_layout: {layout: plan.balance.pairs_by_hop(layout, ...)}. A cell is named after the device whose block it
    holds; its colour is the share of the block's pairs that are visible, dark for all. Below stand the pairs that
    the busiest device of every hop has, in parts of a whole block.
    """
    size = len(next(iter(pairs_by_layout.values())))
    whole = max(pairs.max() for pairs in pairs_by_layout.values())
    words = lambda x, y, text, more='': f'<text x="{x}" y="{y}"{more}>{text}</text>'
    parts, left = [], 44
    for layout, pairs in pairs_by_layout.items():
        share = pairs / whole
        parts.append(words(left + CELL * size // 2, 16, f'{layout}: {share.max(0).sum():.1f} blocks of work'))
        for (device, hop), value in np.ndenumerate(share):
            x, y = left + CELL * hop, 26 + CELL * device
            red, green, blue = (round(255 + value * (full - 255)) for full in DARK)
            light = ' fill="#fff"' if value > 0.6 else ''
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" fill="#{red:02x}{green:02x}{blue:02x}"/>'
                         + words(x + CELL // 2, y + 18, (device - hop) % size, light))
        below = 26 + CELL * size
        for hop in range(size):
            parts += [words(left - 12, 44 + CELL * hop, hop), words(left + CELL * hop + CELL // 2, below + 14, hop),
                      words(left + CELL * hop + CELL // 2, below + 28, f'{share[:, hop].max():.1f}')]
        parts.append(words(left + CELL * size // 2, below + 44, 'hop, and its busiest device'))
        left += CELL * size + 44
    parts.append(words(16, 26 + CELL * size // 2, 'device', f' transform="rotate(-90 16 {26 + CELL * size // 2})"'))
    height = 78 + CELL * size
    return Picture(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left - 20} {height}" width="{left - 20}" '
                   f'height="{height}" font-family="sans-serif" font-size="11" text-anchor="middle" fill="{INK}">'
                   + ''.join(parts) + '</svg>')


def _label(axis, x_label, y_label, title):
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title(title, fontsize=10)
    axis.set_axisbelow(True)
    axis.grid(alpha=0.25, linewidth=0.6)
