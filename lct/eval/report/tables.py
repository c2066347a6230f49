"""The report of experiments/evaluate.py, the contents of results.json, as text and as CSV."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

from lct import files
from lct.eval.suites import SUITES
from lct.eval.suites.suite import Cell
from lct.text import table


def terminal(report: Mapping) -> str:
    """All tables as text."""
    out = []
    for name, result in report['results'].items():
        out += ['', SUITES[name].title]
        for header, rows in SUITES[name].tables(result):
            out += [table(header, rows), '']
        out += SUITES[name].sentences(result)
    return '\n'.join(out)


def cells(report: Mapping) -> Iterator[Cell]:
    """The lines of results.csv."""
    for name, result in report['results'].items():
        yield from SUITES[name].cells(result)


def write_csv(path: str | Path, report: Mapping) -> None:
    with files.atomic_file(path) as file:
        writer = csv.writer(file)
        writer.writerow(Cell._fields)
        writer.writerows(cells(report))
