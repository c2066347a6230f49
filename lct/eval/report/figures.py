"""Figures as PNG files: heat maps of the recall probe, loss by position, learning curves in context."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lct import files
from lct.eval.loss.by_position import LossBins
from lct.eval.recall_probe import RecallResult
from lct.eval.report.colors import INK, LINE_COLORS, RAMP
from lct.eval.report.text import describe_windows
from lct.text import short_length


def _new_figure(width, height):
    """A figure without pyplot, which would set the backend of the notebook that imports this."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Write a PNG atomically."""
    with files.atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format='png')


def recall_figure(rows: Mapping[str, Sequence[RecallResult]], native: int, path: str | Path,
                  names: Sequence[str] = ('before', 'after')) -> None:
    """Heat maps of one colour scale, a row for each test.

    rows: {title: results of the models side by side}; a result may have tasks in place of depths.
    native: the trained length before extension.
    """
    results = [result for row in rows.values() for result in row]
    width = min(max(5.0, 0.62 * max(len(result.lengths) for result in results) + 1.5), 9.5)
    heights = [2.3 + 0.42 * max(len(result.depths) for result in row) for row in rows.values()]
    figure = _new_figure(len(names) * width, sum(heights))
    panels = figure.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (title, row) in zip(panels, rows.items(), strict=True):
        panel.suptitle(title)
        axes = panel.subplots(1, len(names), squeeze=False)[0]
        for axis, result, name in zip(axes, row, names, strict=True):
            image = _heat_map(axis, result, native, name)
        axes[0].set_ylabel('task' if isinstance(row[0].depths[0], str) else 'depth of the fact (0% = top)')
        panel.colorbar(image, ax=axes, label='share of prompts right', fraction=0.03, pad=0.015)
    _save(figure, path)


def _heat_map(axis, result, native, name):
    scores = np.asarray(result.scores, float)
    # A fixed scale: with an automatic one a uniformly wrong map looks like any other.
    image = axis.pcolormesh(scores, cmap=RAMP, vmin=0, vmax=1, edgecolors='white', linewidth=1)
    axis.invert_yaxis()
    lengths = [short_length(length) for length in result.lengths]
    axis.set_xticks(np.arange(len(lengths)) + 0.5, lengths, rotation=45)
    names = [d if isinstance(d, str) else f'{100 * d:.0f}%' for d in result.depths]
    axis.set_yticks(np.arange(len(names)) + 0.5, names)
    axis.tick_params(length=0)
    axis.set_xlabel('context length (tokens)')
    size = 9 if len(result.lengths) <= 12 else 7
    for (row, column), score in np.ndenumerate(scores):
        axis.text(column + 0.5, row + 0.5, f'{score:.2f}'.replace('0.', '.') if score < 1 else '1',
                  ha='center', va='center', fontsize=size, color=INK)
    within = sum(length <= native for length in result.lengths)
    # A boundary between columns: lengths on its left were trained on before the extension.
    axis.axvline(within, color=INK, linewidth=2, linestyle='--', clip_on=False)
    axis.annotate(f'trained to {short_length(native)}', (within, 0), xytext=(3 if within == 0 else -3, 3),
                  textcoords='offset points', ha='left' if within == 0 else 'right', va='bottom', fontsize=8)
    axis.set_title(f'{name}: mean {scores.mean():.2f}, n = {result.samples} per cell', pad=18)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image


def loss_figure(curves: Mapping[str, LossBins], native: int, path: str | Path) -> None:
    """Loss by position of each model, with bands of one standard error over documents.

    native: the trained length before extension.
    """
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        middles = _middles(curve.edges)
        axis.plot(middles, curve.mean, color=color, marker='o', markersize=4, linewidth=2, label=name)
        error = np.nan_to_num(curve.stderr)
        axis.fill_between(middles, curve.mean - error, curve.mean + error, color=color, alpha=0.18,
                          linewidth=0)
    edges = sorted({edge for curve in curves.values() for edge in curve.edges if edge > 0})
    _log_axis(axis, edges)
    axis.axvline(native, color=INK, linewidth=1.2, linestyle='--')
    axis.annotate(f'trained to {short_length(native)}', (native, 1), xycoords=('data', 'axes fraction'),
                  xytext=(-4, -4), textcoords='offset points', ha='right', va='top', fontsize=8, rotation=90)
    _label(axis, 'position in the text (tokens)', 'loss (nats per token)',
           f'loss by position, {describe_windows(curves)}')
    _save(figure, path)


def shots_figure(curves: Mapping[str, Mapping], path: str | Path,
                 references: Mapping[str, Mapping] | None = None, title: str = 'learning in context') -> None:
    """Accuracy over the number of shots on a log axis, with 95% bands where they are known.

    curves: {name: tasks.icl.curve(...)}; references: {learner: {shots: accuracy}}, dashed.
    """
    references = references or {}
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        color = LINE_COLORS[(i + 1) % len(LINE_COLORS)]
        shots, cells = list(curve), list(curve.values())
        axis.plot(shots, [cell['accuracy'] for cell in cells], color=color, marker='o', markersize=4,
                  linewidth=2, label=name)
        low, high = zip(*(cell['interval'] or 2 * [cell['accuracy']] for cell in cells), strict=True)
        axis.fill_between(shots, low, high, color=color, alpha=0.18, linewidth=0)
    for i, (learner, curve) in enumerate(references.items()):
        axis.plot(list(curve), list(curve.values()), color=LINE_COLORS[0], linewidth=1.4,
                  linestyle=('--', ':', '-.')[i % 3], label=learner)
    _log_axis(axis, sorted({shots for curve in (*curves.values(), *references.values()) for shots in curve}))
    axis.set_ylim(-0.02, 1.02)
    _label(axis, 'shots', 'accuracy', title)
    _save(figure, path)


def _log_axis(axis, ticks):
    axis.set_xscale('log', base=2)
    axis.set_xticks(ticks, [short_length(tick) for tick in ticks], rotation=45 if len(ticks) > 10 else 0)
    axis.minorticks_off()


def _label(axis, x_label, y_label, title):
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.set_title(title)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False)


def _middles(edges):
    """The geometric middle of every bin; of the first, which starts at 0, the arithmetic one."""
    low, high = np.array(edges[:-1], float), np.array(edges[1:], float)
    return np.where(low > 0, np.sqrt(low * high), high / 2)
