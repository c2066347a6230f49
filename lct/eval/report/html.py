"""The report of experiments/evaluate.py, the contents of results.json, as one self-contained HTML page."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lct.eval import comparison
from lct.eval.report.colors import DARK, VARIABLES
from lct.eval.suites import SUITES
from lct.text import short_length

_variables = lambda values: ''.join(f'--{name}:{color};' for name, color in values.items())
STYLE = f'''
:root{{color-scheme:light dark;--page:#fff;--rule:#D5DAD8;{_variables(VARIABLES)}}}
@media (prefers-color-scheme:dark){{:root{{--page:#12191A;--rule:#3A4547;{_variables(DARK)}}}}}
''' + '''
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:62rem;\
margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid var(--rule)}
td:first-child,th:first-child{text-align:left}
th[scope=row]{font-weight:normal}
td,th{white-space:nowrap}
figure{margin:1rem 0;overflow-x:auto}
figcaption,.note{color:var(--grey);font-size:14px}
td.wide{text-align:left;white-space:normal;word-break:break-all;font-family:ui-monospace,monospace;font-size:12px}'''


def page(report: Mapping) -> str:
    """The report as one HTML document."""
    about, trained = report['about'], report['trained']
    title = f"Long-context evaluation of {about['model']}"
    elements = [
        _element('h1', title),
        '<p class="note">The tasks are worded by us and answered greedily. The colour scale is fixed from 0 '
        f'to 1. Trained length: {short_length(trained)} tokens.</p>']
    for name, result in report['results'].items():
        elements += _section(name, result, trained)
    provenance = [[name, value] for name, value in _flat({**about, 'samples': report['samples']})]
    elements += ['<h2>Provenance</h2>', _table(None, provenance, '<td class="wide">')]
    return _document(title, elements)


def comparison_page(first: str, found: Mapping[str, Sequence[comparison.Difference]]) -> str:
    """Evaluations beside the first one as one HTML document. found: {name: comparison.differences}."""
    title = f'Long-context evaluations beside {first}'
    elements = [_element('h1', title), _element('p class="note"', comparison.NOTE)]
    for name, differences in found.items():
        conclusions = [_element('p', text) for text in comparison.sentences(differences)]
        elements += [_element('h2', name), *conclusions,
                     _table(comparison.HEADER, comparison.table_rows(differences))]
    return _document(title, elements)


def _document(title, elements):
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><body><main>'
            + '\n'.join(elements) + '</main></body></html>\n')


def _section(name, result, trained) -> Iterator[str]:
    suite = SUITES[name]
    yield _element('h2', suite.title)
    for caption, picture in suite.figures(result, trained):
        drawing = picture.text.replace('<svg ', f'<svg role="img" aria-label="{html.escape(caption)}" ', 1)
        yield f"<figure tabindex=\"0\">{drawing}{_element('figcaption', caption)}</figure>"
    for header, rows in suite.tables(result):
        yield _table(header, rows)
    for sentence in suite.sentences(result):
        yield _element('p', sentence)


def _element(tag, text):
    return f'<{tag}>{html.escape(text)}</{tag.split()[0]}>'


def _table(header: Sequence[str] | None, rows: Iterable[Sequence[str]], cell='<td>'):
    lines = [] if header is None else [''.join(_element('th scope="col"', text) for text in header)]
    lines += [_element('th scope="row"', first) + ''.join(f'{cell}{html.escape(text)}</td>' for text in more)
              for first, *more in rows]
    return f"<figure tabindex=\"0\"><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></figure>"


def _flat(values, prefix=''):
    """Iterator of (dotted name, text) of nested dicts, without None."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}.')
        elif value is not None:
            yield f'{prefix}{name}', str(value)
