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
# Told apart in grey by marker and by how dark the color is.
MARKERS, LINES = 'os^DvPX*<>hpd', ('-', '--', ':', '-.', (0, (5, 1)))
COLORS = ('#12386F', '#C2573A', '#3DBB93')


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
    return {'native': one['native'], 'target': one['target'], 'base': measures_of(one, 'base'),
            'base_curves': _curves([one], 'base'), 'rows': rows,
            'runs': {f'{arm}, seed {seed}': {**values, 'thetas': results[arm, seed]['summary']['thetas']}
                     for (arm, seed), values in numbers.items()}}


def _curves(runs, model='extended'):
    """{kind: (xs, means over the runs, least, most)}: loss by position, the others by length."""
    def spread(rows):
        rows = np.array(rows)
        return rows.mean(0).tolist(), rows.min(0).tolist(), rows.max(0).tolist()

    loss = [run['loss_by_position'][model] for run in runs]
    out = {'loss': (loss[0]['edges'], *spread([one['mean'] for one in loss]))}
    for name, key in (('recall', 'needle'), ('needle', 'needle_suite')):
        grids = [run[key][model] for run in runs]
        out[name] = grids[0]['lengths'], *spread([np.mean(grid['scores'], 0) for grid in grids])
    ruler = [run['ruler_suite'][model] for run in runs]
    out['ruler'] = ruler[0]['lengths'], *spread([np.array(one['means']) / 100 for one in ruler])
    return out


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
    """Loss by position, recall probe, needle and RULER by length: for each arm a line of the means over its
    seeds, with bars from the least to the most."""
    fig = Figure(figsize=(12, 8), layout='constrained')
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, 2).flat
    kinds = (('loss', 'loss, nats per token', 'position in the text (tokens)'),
             ('recall', 'recall probe, share right', 'context length (tokens)'),
             ('needle', 'needle, share right', 'context length (tokens)'),
             ('ruler', 'RULER, mean of tasks', 'context length (tokens)'))
    for axis, (kind, y_label, x_label) in zip(axes, kinds, strict=True):
        _draw(axis, kind, summary['base_curves'], label='base, not extended', color='#5A6462', linewidth=1)
        for i, row in enumerate(summary['rows']):
            _draw(axis, kind, row['curves'], label=row['arm'].replace('_', ' '), color=COLORS[i % 3],
                  linestyle=LINES[i // 3], marker=MARKERS[i], markersize=5, capsize=2)
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


def _draw(axis, kind, curves, **style):
    """A line of a kind with bars from the least to the most."""
    xs, *values = curves[kind]
    mean, least, most = np.array(values)
    if kind == 'loss':  # bins, without the first, whose tokens have hardly any context
        xs, mean, least, most = np.sqrt(np.array(xs[1:-1], float) * xs[2:]), mean[1:], least[1:], most[1:]
    bars = np.maximum([mean - least, most - mean], 0)  # a mean of equal values may round beyond them
    axis.errorbar(xs, mean, bars, elinewidth=1, **style)
