"""Curves over length in panels side by side, one colour for each of an ordered set of settings, as SVG."""

import matplotlib
from matplotlib import colormaps
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from lct import files
from lct.text import short_length

PLAIN = {'color': '#10241F', 'linestyle': '--'}


def draw(panels, path, marks=None, plain=()):
    """Write an SVG, the same bytes for the same numbers.

    Args:
      panels: [(title, label of the y axis, {name: (lengths, means, errors or None)})]; the names of the first panel
        make the legend, in their order of colours. Errors are half the width of a band.
      marks: {length: words}, dashed lines across every panel.
      plain: names drawn in black and dashed, the controls.
    """
    names = [name for name in panels[0][2] if name not in plain]
    colors = dict(zip(names, colormaps['viridis']([0.9 * i / max(len(names) - 1, 1) for i in range(len(names))])))
    figure = Figure(figsize=(4.6 * len(panels) + 1.4, 4.2), layout='constrained')
    FigureCanvasSVG(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, label, lines) in zip(axes, panels, strict=True):
        for name, (lengths, means, errors) in lines.items():
            style = PLAIN if name in plain else {'color': colors[name]}
            axis.plot(lengths, means, marker='o', markersize=3.5, linewidth=1.8, label=name, **style)
            if errors is not None:
                low, high = zip(*((mean - error, mean + error) for mean, error in zip(means, errors, strict=True)))
                axis.fill_between(lengths, low, high, color=style['color'], alpha=0.15, linewidth=0)
        for length, words in (marks or {}).items():
            axis.axvline(length, color='#8A8F98', linewidth=1, linestyle=':')
            axis.annotate(words, (length, 1), xycoords=('data', 'axes fraction'), xytext=(-3, -3), rotation=90,
                          textcoords='offset points', ha='right', va='top', fontsize=8, color='#5A6462')
        axis.set_xscale('log', base=2)
        ticks = sorted({1 << (x.bit_length() - 1) for xs, _, _ in lines.values() for x in map(int, xs)})
        axis.set_xticks(ticks, [short_length(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel('tokens')
        axis.set_ylabel(label)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[['top', 'right']].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside right center', frameon=False)
    with matplotlib.rc_context({'svg.hashsalt': 'lct', 'svg.fonttype': 'none'}), files.atomic_path(path) as partial:
        figure.savefig(partial, format='svg', metadata={'Date': None})
