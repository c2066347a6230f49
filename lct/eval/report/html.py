"""The results of experiments/evaluate.py for reading: one HTML page without outside parts, a table for the
terminal, cells for a CSV. A report is what results.json holds.
"""

import html
import math

from lct.eval.report import loss
from lct.eval.report.svg import curves, heat_map
from lct.text import short_length, table

TITLES = {'ruler': 'RULER', 'needle': 'Needles', 'adversarial': 'Adversarial needles', 'icl': 'Learning in context',
          'repository': 'A repository in the prompt', 'loss': 'Loss'}
STYLE = '''body{font:15px/1.5 system-ui,sans-serif;color:#10241F;max-width:62rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #D5DAD8}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto;font:11px system-ui,sans-serif}
figure{margin:1rem 0;overflow-x:auto}
figcaption,.note{color:#5A6462;font-size:13px}
td.wide{text-align:left;word-break:break-all;font-family:ui-monospace,monospace;font-size:12px}'''


def cells(report):
    """Iterator of (suite, task, at, score, low, high, count): at is tokens, tokens/depth, shots, or positions;
    scores are 0..1, of the loss nats; low to high is a 95% interval of the score, '' where none is known."""
    for suite, result in report['results'].items():
        if suite in ('ruler', 'repository'):
            for task, by_length in result['tasks'].items():
                for length, one in by_length.items():
                    interval = one['interval'] and [x / 100 for x in one['interval']]
                    yield suite, task, length, one['mean'] / 100, *(interval or ('', '')), one['count']
        elif suite == 'needle':
            for depth, row in zip(result['depths'], result['scores'], strict=True):
                for length, score, count in zip(result['lengths'], row, result['samples'], strict=True):
                    yield suite, 'needle', f'{length}/{depth:g}', score, '', '', count
        elif suite == 'adversarial':
            for task, by_length in result['tasks'].items():
                for length, one in by_length.items():
                    yield suite, task, length, one['target'], *(one['interval'] or ('', '')), one['count']
        elif suite == 'icl':
            for task, one in result['tasks'].items():
                for name, curve in _icl_curves(task, one):
                    for shots, cell in curve.items():
                        yield suite, name, shots, cell['accuracy'], *(cell['interval'] or ('', '')), cell['count']
        elif suite == 'loss':
            yield from loss.cells(result)


def tables(suite, result):
    """Iterator of (header, rows) of text: a line a task, a column a length."""
    if suite in ('ruler', 'repository'):
        lengths = sorted({length for one in result['tasks'].values() for length in one}, key=int)
        rows = [[task, *(f"{one[length]['mean']:.1f}" for length in lengths)] for task, one in result['tasks'].items()]
        if suite == 'ruler':
            rows.append(['mean ± standard error', *(
                f'{mean:.1f} ± {error:.1f}' if error is not None else f'{mean:.1f}'
                for mean, error in zip(result['means'], result['stderr'], strict=True))])
        counts = [next(iter(result['tasks'].values()))[length]['count'] for length in lengths]
        rows.append(['samples a task', *map(str, counts)])
        yield ['task', *(short_length(int(length)) for length in lengths)], rows
    elif suite == 'needle':
        rows = [[f'depth {100 * depth:.0f}%', *(f'{100 * score:.0f}' for score in row)]
                for depth, row in zip(result['depths'], result['scores'], strict=True)]
        rows.append(['samples a cell', *map(str, result['samples'])])
        yield ['needle', *map(short_length, result['lengths'])], rows
    elif suite == 'adversarial':
        lengths = sorted({length for one in result['tasks'].values() for length in one}, key=int)
        rows = [[task, *(f"{100 * one[length]['target']:.0f} right, {100 * one[length]['stale']:.0f} misled"
                         for length in lengths)] for task, one in result['tasks'].items()]
        yield ['needle', *(short_length(int(length)) for length in lengths)], rows
    elif suite == 'icl':
        shots = sorted({n for one in result['tasks'].values() for n in one['curve']}, key=int)
        rows = [[name, *(f"{100 * curve[n]['accuracy']:.0f}" if n in curve else '' for n in shots)]
                for task, one in result['tasks'].items() for name, curve in _icl_curves(task, one)]
        yield ['task', *(f'{n} shots' for n in shots)], rows
    elif suite == 'loss':
        yield from loss.tables(result)


def _icl_curves(task, one):
    """Iterator of (name, curve): of what the model writes, and of the choice that it finds likeliest."""
    yield task, one['curve']
    if one.get('chosen'):
        yield f'{task}_chosen', one['chosen']


def sentences(suite, result):
    """What the numbers of a suite come to."""
    if suite == 'ruler':
        return effective(result)
    if suite == 'loss':
        return loss.sentences(result)
    if suite == 'needle' and (one := result.get('forced')):
        return [f"right answers that greedy decoding would write token for token: {100 * one['right']:.1f}%, "
                f"{one['nats']:.3f} nats a token of theirs"]
    curves_of = [one['curve'].values() for one in result['tasks'].values()] if suite == 'icl' else []
    if not all(cell['interval'] for curve in curves_of for cell in curve):
        return ['no interval where all samples share one hidden rule: more samples ask of more rules']
    cells_of = [one.values() for one in result['tasks'].values()] if suite in ('repository', 'adversarial') else []
    if not all(one['interval'] for of_task in cells_of for one in of_task):
        return ['no interval where all questions are about one text: more samples ask about more texts']
    return []


def terminal(report):
    """All tables as text."""
    out = []
    for suite, result in report['results'].items():
        out += ['', TITLES[suite]]
        for header, rows in tables(suite, result):
            out += [table(header, rows), '']
        out += sentences(suite, result)
    return '\n'.join(out)


def effective(result):
    """Sentences on what RULER's numbers come to."""
    longest = max(result['lengths'])

    def length(value):
        if value is None:
            return f'below {short_length(min(result["lengths"]))}'
        return short_length(value) + (' or more' if value == longest else '')

    return [
        f"average {result['average']:.1f}, weighted to long {result['weighted_increasing']:.1f}, to short "
        f"{result['weighted_decreasing']:.1f}",
        f"effective length by {result['threshold']} points: {length(result['effective_length'])}; by 85% of its own "
        f"shortest ({result['own_threshold']:.1f}): {length(result['effective_length_of_own'])}",
    ]


# ---------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------


def figures(suite, result, trained):
    """Iterator of (caption, SVG) of a suite."""
    if suite == 'ruler':
        lengths = result['lengths']
        scores = [[one[str(length)]['mean'] / 100 for length in lengths] for one in result['tasks'].values()]
        yield 'Score of every task', heat_map(lengths, list(result['tasks']), scores, trained, 'task')
        band = [[x / 100 for x in pair] for pair in result['intervals']]
        means = {'mean of tasks': (lengths, [mean / 100 for mean in result['means']], band)}
        yield 'Mean of the tasks, 95% band', curves(means, 'context length (tokens)', 'score', trained)
    elif suite == 'needle':
        depths = [f'{100 * depth:.0f}%' for depth in result['depths']]
        low, high = result['interval']
        yield (f"Needles found; {100 * result['mean']:.1f}% in all, 95% interval "
               f'{100 * low:.1f} to {100 * high:.1f}',
               heat_map(result['lengths'], depths, result['scores'], trained, 'depth (0% = top)'))
    elif suite == 'repository':
        lengths = sorted({int(length) for one in result['tasks'].values() for length in one})
        scores = [[one[str(length)]['mean'] / 100 for length in lengths] for one in result['tasks'].values()]
        yield 'Right answers', heat_map(lengths, list(result['tasks']), scores, trained, 'task')
    elif suite == 'adversarial':
        lengths = sorted({int(length) for one in result['tasks'].values() for length in one})
        scores = [[one[str(length)]['target'] for length in lengths] for one in result['tasks'].values()]
        yield 'Right values', heat_map(lengths, list(result['tasks']), scores, trained, 'kind')
    elif suite == 'icl':
        for task, one in result['tasks'].items():
            series = {}
            for name, (_, curve) in zip(('model writes', 'model chooses'), _icl_curves(task, one), strict=False):
                # An unknown interval has no width to see, and the model's line stays solid.
                band = [cell['interval'] or 2 * [cell['accuracy']] for cell in curve.values()]
                series[name] = ([int(n) for n in curve], [cell['accuracy'] for cell in curve.values()], band)
            for learner, curve in one['references'].items():
                series[learner] = ([int(n) for n in curve], list(curve.values()), None)
            *_, last = one['curve'].values()
            known = 'model with 95% band' if last['interval'] else 'model, no band of one rule'
            yield f'{task}: {known}, reference learners dashed{_gains(task, one)}', curves(series, 'shots', 'accuracy')
    elif suite == 'loss':
        of = lambda errors: [(error, result['documents']) for error in errors]
        yield from _loss_curve(
            f"Loss over {result['num_windows']} windows (documents: {result['documents']}), 95% band",
            _middles(result['edges']), result['mean'], of(result['stderr']), 'position (tokens)', trained)
        if one := result.get('growing'):
            yield from _loss_curve(
                f"Loss of the same {one['targets']} tokens a window, with more and more context before them, 95% band",
                one['contexts'], one['mean'], of(one['stderr']), 'context (tokens)', trained)
        if one := result.get('identifiers'):
            known = any(error is not None for error, _ in loss.errors_of(one))
            yield from _loss_curve(
                'Loss of whole identifiers by the distance to their first use' + known * ', 95% band over bundles of this '
                'repository',
                _middles(one['edges']), one['mean'], loss.errors_of(one), 'distance (tokens)', trained)


def _gains(task, one):
    """What the last of the shots gave since every label could be known, in words."""
    last = [list(curve.values())[-1].get('gain') for _, curve in _icl_curves(task, one)]
    verbs = ('writing', 'choosing')
    said = [f'{verb} {100 * gain:+.0f}' for verb, gain in zip(verbs, last, strict=False) if gain is not None]
    return f"; points since one round of the labels: {', '.join(said)}" if said else ''


def _middles(edges):
    return [math.sqrt(max(low, 1) * high) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _loss_curve(caption, places, means, errors, label, trained):
    """Iterator of the one (caption, SVG) of the means that are numbers, of none where no mean is. errors: [(standard
    error, of how many documents)]."""
    if known := [i for i, mean in enumerate(means) if mean is not None]:
        places, means = [places[i] for i in known], [means[i] for i in known]
        band = [loss.interval(mean, *errors[i]) for mean, i in zip(means, known, strict=True)]
        ends = [*means, *(end for pair in band for end in pair)]
        yield caption, curves({'model': (places, means, band)}, label, 'nats', trained,
                              (math.floor(min(ends)), math.floor(max(ends)) + 1))


# ---------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------


def page(report):
    """The report as one HTML document."""
    about, trained = report['about'], report['trained']
    title = f"What {about['model']} reads"
    parts = [f'<h1>{html.escape(title)}</h1>',
             f'<p class="note">Scores are of our own wording of the tasks and of greedy answers; fixed colour scale from '
             f'0 to 1. Trained length: {short_length(trained)} tokens.</p>']
    for suite, result in report['results'].items():
        parts.append(f'<h2>{html.escape(TITLES[suite])}</h2>')
        parts += [f'<figure>{svg.text}<figcaption>{html.escape(caption)}</figcaption></figure>'
                  for caption, svg in figures(suite, result, trained)]
        parts += [_table(header, rows) for header, rows in tables(suite, result)]
        parts += [f'<p>{html.escape(line)}</p>' for line in sentences(suite, result)]
    rows = [[name, value] for name, value in _flat({**about, 'samples': report['samples']})]
    parts += ['<h2>Where the numbers come from</h2>', _table(['', ''], rows, wide=True)]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><body>'
            + '\n'.join(parts) + '</body></html>\n')


def _table(header, rows, wide=False):
    cell = '<td class="wide">' if wide else '<td>'
    line = lambda row: f'<tr><td>{html.escape(row[0])}</td>' + ''.join(
        f'{cell}{html.escape(x)}</td>' for x in row[1:]) + '</tr>'
    head = '' if wide else '<tr>' + ''.join(f'<th>{html.escape(x)}</th>' for x in header) + '</tr>'
    return f'<figure><table>{head}{"".join(map(line, rows))}</table></figure>'


def _flat(values, prefix=''):
    """(dotted name, text) of nested dicts, without what is not set."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}.')
        elif value is not None:
            yield f'{prefix}{name}', str(value)
