"""A paper's claims beside the results here, and the files that record them; shared by the scripts here."""

import argparse
import dataclasses
import json
import os
import pathlib

from lct.text import table

# predictions need no accelerator
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

RESULTS = pathlib.Path(__file__).resolve().parents[1] / 'results' / 'papers'
KINDS = ('counted', 'predicted', 'compiled', 'measured')
AGREES = ('yes', 'in part', 'no', 'not published')


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement of a paper and its reproduction.

    text: the statement. kind: the way of the reproduction: counted from the program, predicted by lct.plan,
    compiled or measured. published, found: the figures, as text. agrees: one of AGREES. why: the explanation.
    """

    text: str
    kind: str
    published: str
    found: str
    agrees: str
    why: str

    def __post_init__(self):
        if self.kind not in KINDS or self.agrees not in AGREES:
            raise ValueError(f'claim {self.text!r}: kind {self.kind!r} must be one of {KINDS} and agrees '
                             f'{self.agrees!r} one of {AGREES}')


def flags(doc, argv, **more):
    """The flags of a script: --output and those in more, {name: keywords of add_argument}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=pathlib.Path, default=RESULTS,
                        help='folder of the JSON and the figures')
    for name, keywords in more.items():
        parser.add_argument('--' + name, **keywords)
    return parser.parse_args(argv)


def within(pairs, factor):
    """Number of pairs (found, published) that lie within a factor of each other."""
    return sum(max(a / b, b / a) <= factor for a, b in pairs)


def ordered(pairs):
    """(pairs of rows in the published order, all pairs of rows), without rows published as equal.

    pairs: [(found, published)].
    """
    both = [(a, b) for i, a in enumerate(pairs) for b in pairs[i + 1:] if a[1] != b[1]]
    return sum((a[0] - b[0]) * (a[1] - b[1]) > 0 for a, b in both), len(both)


def earlier(out, name, table):
    """A table of the existing results, [] if there is none: slow measurements are not repeated."""
    path = out / f'{name}.json'
    return json.loads(path.read_text())['tables'].get(table, []) if path.exists() else []


def report(out, name, paper, tables, claims, **pictures):
    """Print tables and claims, and write OUT/NAME.json and OUT/NAME_PICTURE.svg.

    tables: {title: [row as a dict]}; pictures: svg.Picture by name.
    """
    for title, rows in tables.items():
        header = list(dict.fromkeys(key for row in rows for key in row))
        print(f'\n{title}\n' + table(header, [[_text(row.get(key)) for key in header] for row in rows]))
    for claim in claims:
        print(f'\n{claim.text}\n    published: {claim.published}\n    {claim.kind}: {claim.found}\n'
              f'    agrees: {claim.agrees}. {claim.why}')
    out.mkdir(parents=True, exist_ok=True)
    result = {'paper': paper, 'command': f'python experiments/papers/{name}.py', 'tables': tables,
              'claims': [dataclasses.asdict(claim) for claim in claims]}
    (out / f'{name}.json').write_text(json.dumps(_plain(result), indent=1) + '\n')
    for picture, drawing in pictures.items():
        drawing.save(out / f'{name}_{picture}.svg')
    print(f'\nwritten: {out}/{name}.json and {", ".join(f"{name}_{picture}.svg" for picture in pictures)}')


def _text(value):
    return '-' if value is None else f'{value:,.4g}' if isinstance(value, float) else str(value)


def _plain(value):
    """value with floats of five digits, so that the last bits of another machine change no file."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return float(f'{value:.5g}') if isinstance(value, float) else value
