"""The report of experiments/evaluate.py, the contents of results.json, as one self-contained HTML page."""

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence

from lct.eval.suites import SUITES
from lct.text import short_length

STYLE = '''body{font:15px/1.5 system-ui,sans-serif;color:#10241F;max-width:62rem;margin:2rem auto;\
padding:0 1rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:14px}
td,th{padding:.15rem .7rem;text-align:right;border-bottom:1px solid #D5DAD8}
td:first-child,th:first-child{text-align:left}
svg{max-width:100%;height:auto;font:11px system-ui,sans-serif}
figure{margin:1rem 0;overflow-x:auto}
figcaption,.note{color:#5A6462;font-size:13px}
td.wide{text-align:left;word-break:break-all;font-family:ui-monospace,monospace;font-size:12px}'''


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
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style><body>'
            + '\n'.join(elements) + '</body></html>\n')


def _section(name, result, trained) -> Iterator[str]:
    suite = SUITES[name]
    yield _element('h2', suite.title)
    for caption, picture in suite.figures(result, trained):
        yield f"<figure>{picture.text}{_element('figcaption', caption)}</figure>"
    for header, rows in suite.tables(result):
        yield _table(header, rows)
    for sentence in suite.sentences(result):
        yield _element('p', sentence)


def _element(tag, text):
    return f'<{tag}>{html.escape(text)}</{tag}>'


def _table(header: Sequence[str] | None, rows: Iterable[Sequence[str]], cell='<td>'):
    lines = [] if header is None else [''.join(_element('th', text) for text in header)]
    lines += [_element('td', first) + ''.join(f'{cell}{html.escape(text)}</td>' for text in more)
              for first, *more in rows]
    return f"<figure><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></figure>"


def _flat(values, prefix=''):
    """Iterator of (dotted name, text) of nested dicts, without None."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}.')
        elif value is not None:
            yield f'{prefix}{name}', str(value)
