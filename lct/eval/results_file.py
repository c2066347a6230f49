"""The results of a work directory: results.json, results.csv and report.html."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lct import json_files
from lct.eval import answers
from lct.eval.report import html, tables
from lct.eval.suites import SUITES
from lct.files import write_atomically

MAX_BYTES = 10**9  # of results.json; the records of every needle are among them


def earlier(path: Path, identity: str = '') -> tuple[dict, list[str]]:
    """({'samples', 'results'} of earlier calls, problems), without results that were edited or that a suite
    cannot keep."""
    nothing, problems = {'samples': {}, 'results': {}}, []
    try:
        before = nothing | (json_files.read_json(path, MAX_BYTES) if path.is_file() else {})
        if not all(isinstance(before[name], dict) for name in nothing):
            raise ValueError(f'{path} lacks results')
    except ValueError as error:
        return nothing, [f'{error}; its earlier results are left out, so run their suites again']
    for name, result in list(before['results'].items()):
        if reason := _why_not_kept(name, result, before.get('checksums'), identity):
            del before['results'][name]
            problems.append(f'the results of the suite {name} in {path} {reason}, and are left out; '
                            f'run the suite {name} again')
    return before, problems


def _why_not_kept(name, result, checksums, identity):
    """Why the result of an earlier call is left out; None if it is kept. checksums: None in older files."""
    if checksums is not None:
        stated = checksums.get(name) if isinstance(checksums, dict) else None
        if stated != answers.checksum(result, identity):
            return 'were edited, or belong to another evaluation: their checksum differs'
    if name not in SUITES or not isinstance(result, dict):
        return 'are not of a suite'
    return SUITES[name].outdated(result)


def lost_answers(workdir: Path, results: Mapping, identity: str) -> Iterator[str]:
    """A sentence for each file that holds fewer answers than the results count."""
    for name, result in results.items():
        path, count = workdir / f'{name}.jsonl', int(result.get('count', 0))
        kept = len(answers.read(path, identity)[0])
        if kept < count:
            yield (f'{path} holds {kept} of the {count} answers that results.json counts; the others are '
                   f'measured again when the suite {name} runs')


def write(workdir: Path, report: Mapping, identity: str) -> dict:
    """Write all three files. Returns the report as it is in results.json."""
    report = json.loads(json.dumps(strict(report)))
    report['checksums'] = {name: answers.checksum(one, identity) for name, one in report['results'].items()}
    write_atomically(workdir / 'results.json', json.dumps(report, indent=1) + '\n')
    tables.write_csv(workdir / 'results.csv', report)
    write_atomically(workdir / 'report.html', html.page(report))
    return report


def strict(value: Any) -> Any:
    """value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
