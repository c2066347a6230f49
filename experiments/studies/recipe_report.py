"""The numbers, the table and the figure of recipe_study.py."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats

from lct import files
from lct.text import short_length, table

MEASURES = {  # of a run: heading, digits
    'loss beyond': ('loss beyond the native length, nats', 3),
    'loss inside': ('loss within it, nats', 3),
    'recall': ('recall probe beyond, %', 0),
    'needle': ('needle beyond, %', 0),
    'ruler': ('RULER beyond, %', 0),
}
STYLES = [(color, line, marker) for line, marker in (('-', 'o'), ('--', 's'), (':', '^'))
          for color in ('#1F5FBF', '#C2573A', '#0B9E74')]  # told apart in grey by line and marker


def interval(values: Sequence[float]) -> list[float | None]:
    """[mean of the values of several seeds, half the width of its 95% interval (Student's t)]."""
    if len(values) < 2:
        return [float(np.mean(values)), None]
    width = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [float(np.mean(values)), float(width)]


def measures_of(result: Mapping[str, Any], model: str = 'extended') -> dict[str, float]:
    """The numbers of one run by which arms are compared, from its results.json. 'beyond' and 'inside': of the
    native length."""
    native, loss = result['native'], result['loss_by_position'][model]
    edges, mean = np.array(loss['edges']), np.array(loss['mean'])
    sizes, beyond = np.diff(edges), edges[:-1] >= native
    out = {'loss beyond': _mean(mean, sizes * beyond), 'loss inside': _mean(mean, sizes * ~beyond)}
    out |= {'recall': _beyond(result['needle'][model], native),
            'needle': _beyond(result['needle_suite'][model], native)}
    ruler = result['ruler_suite'][model]
    return out | {'ruler': float(np.mean([score for length, score in zip(
        ruler['lengths'], ruler['means'], strict=True) if length > native]))}


def _mean(values, weights):
    return float(values @ weights / weights.sum())


def _beyond(grid, native):
    """Percent right of a grid [depths, lengths] at the lengths beyond the native one."""
    columns = np.array(grid['lengths']) > native
    return 100 * float(np.array(grid['scores'])[:, columns].mean())


def summarise(results: Mapping[tuple[str, int], Mapping[str, Any]],
              controls: Mapping[str, str]) -> dict[str, Any]:
    """The JSON of a study: a row for each arm with means, half-widths of 95% intervals over seeds, and the
    differences from its control, paired by seed.

    results: {(arm, seed): results.json of a run}. controls: {arm: arm that it is compared with}.
    """
    numbers = {key: measures_of(result) for key, result in results.items()}
    by_arm = {arm: {seed: numbers[arm, seed] for name, seed in numbers if name == arm} for arm in controls}
    rows = []
    for arm, control in controls.items():
        if not by_arm[arm]:
            continue
        row = {'arm': arm, 'control': control, 'seeds': sorted(by_arm[arm]),
               'means': {name: interval([run[name] for run in by_arm[arm].values()]) for name in MEASURES}}
        paired = sorted(set(by_arm[arm]) & set(by_arm[control]))
        if control != arm and paired:
            row['differences'] = {
                name: interval([by_arm[arm][seed][name] - by_arm[control][seed][name] for seed in paired])
                for name in MEASURES}
        rows.append({**row, 'curves': _curves([results[arm, seed] for seed in row['seeds']])})
    one = next(iter(results.values()))
    return {'native': one['native'], 'target': one['target'], 'base': measures_of(one, 'base'), 'rows': rows,
            'runs': {f'{arm}, seed {seed}': {**values, 'thetas': results[arm, seed]['summary']['thetas']}
                     for (arm, seed), values in numbers.items()}}


def _curves(runs):
    """Means over the seeds of an arm: loss by position, the others by length."""
    average = lambda lists: np.mean(lists, 0).tolist()
    grids = {name: (runs[0][key]['extended']['lengths'],
                    average([np.mean(run[key]['extended']['scores'], 0) for run in runs]))
             for name, key in (('recall', 'needle'), ('needle', 'needle_suite'))}
    ruler = [run['ruler_suite']['extended'] for run in runs]
    loss = [run['loss_by_position']['extended'] for run in runs]
    return {'loss': (loss[0]['edges'], average([one['mean'] for one in loss])), **grids,
            'ruler': (ruler[0]['lengths'], average([np.array(one['means']) / 100 for one in ruler]))}


def summary_table(summary: Mapping[str, Any]) -> str:
    """Means and differences from the control as text; * marks a difference whose interval leaves out 0."""
    rows = [('base, not extended', '', '', *(f'{summary["base"][name]:.{digits}f}'
                                             for name, (_, digits) in MEASURES.items()))]
    for row in summary['rows']:
        cells = []
        for name, (_, digits) in MEASURES.items():
            difference, half = row.get('differences', {}).get(name, (None, None))
            cell = f'{row["means"][name][0]:.{digits}f}'
            if difference is not None:
                star = '*' if half is not None and abs(difference) > half else ''
                cell += f' ({difference:+.{digits}f}' + (f' ± {half:.{digits}f}' if half is not None else '')
                cell += f'){star}'
            cells.append(cell)
        rows.append((row['arm'], row['control'] if row['control'] != row['arm'] else '', len(row['seeds']),
                     *cells))
    header = 'arm', 'control', 'seeds', *(heading for heading, _ in MEASURES.values())
    return table(header, rows, left=(0, 1))


def figure(summary: Mapping[str, Any], path: str | Path) -> None:
    """Loss by position, recall probe, needle and RULER by length, a line for each arm."""
    fig = Figure(figsize=(12, 8), layout='constrained')
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, 2).flat
    kinds = (('loss', 'loss, nats per token', 'position in the text (tokens)'),
             ('recall', 'recall probe, share right', 'context length (tokens)'),
             ('needle', 'needle, share right', 'context length (tokens)'),
             ('ruler', 'RULER, mean of tasks', 'context length (tokens)'))
    for axis, (kind, y_label, x_label) in zip(axes, kinds, strict=True):
        for row, (color, line, marker) in zip(summary['rows'], STYLES, strict=False):
            xs, ys = row['curves'][kind]
            if kind == 'loss':
                xs, ys = np.sqrt(np.array(xs[1:-1], float) * xs[2:]), ys[1:]
            axis.plot(xs, ys, color=color, linestyle=line, marker=marker, markersize=4, label=row['arm'])
        axis.axvline(summary['native'], color='#5A6462', linewidth=1, linestyle='--')
        axis.set_xscale('log', base=2)
        ticks = {2 ** round(np.log2(x)) for x in axis.get_lines()[0].get_xdata()} | {summary['native']}
        ticks = sorted(ticks)
        axis.set_xticks(ticks, [short_length(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(x_label)
        axis.set_ylabel(y_label)
        axis.grid(alpha=0.25)
        if kind != 'loss':
            axis.set_ylim(-0.03, 1.03)
    fig.legend(*axis.get_legend_handles_labels(), loc='outside lower center', ncols=5, frameon=False)
    with files.atomic_path(Path(path)) as partial:
        fig.savefig(partial, dpi=120, format='png')
