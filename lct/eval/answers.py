"""The file of answers: JSON lines, one per sample, named by (task, length, index)."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from lct.eval import samples
from lct.eval.samples import Sample

FIELDS = {'task': str, 'length': int, 'index': int, 'text': str, 'outputs': list, 'meta': dict}


def make_row(sample: Sample, prompt: Sequence[int], text: str, new_tokens: int) -> dict:
    """A line of the file: what scoring needs, and the prompt as a hash of its token ids."""
    return {'task': sample.task, 'length': sample.length, 'index': sample.index, 'text': text,
            'outputs': list(sample.outputs), 'meta': sample.meta, 'prompt': digest(prompt),
            'prompt_tokens': len(prompt), 'new_tokens': new_tokens}


def digest(ids: Sequence[int]) -> str:
    """A short hash of token ids."""
    return hashlib.sha256(np.asarray(ids, '<i4').tobytes()).hexdigest()[:16]


def sample_of(row: Mapping) -> Sample:
    """The Sample of a row, without its prompt."""
    return Sample(row['task'], row['length'], row['index'], '', '', row['outputs'], 0, row['meta'])


def key_of(row: Mapping) -> tuple[str, int, int]:
    return row['task'], row['length'], row['index']


def read(path: Path) -> tuple[dict[tuple, dict], list[str]]:
    """({key: row}, [a sentence for each invalid line]) of a file, which need not exist."""
    if not path.is_file():
        return {}, []
    rows = {}
    lines, problems = samples.read(path)
    for number, fields in lines:
        wrong = [name for name, kind in FIELDS.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            problems.append(f"{path} line {number + 1} has no {' and no '.join(wrong)}; "
                            'that sample is made again')
        else:
            rows[key_of(fields)] = fields
    return rows, problems


def append(file: IO[str], row: Mapping) -> None:
    """Write a row to an open file so that an interrupted run keeps it."""
    file.write(json.dumps(row) + '\n')
    file.flush()
    os.fsync(file.fileno())


def write(path: Path, rows: Mapping[tuple, Mapping]) -> None:
    """Write all rows atomically, in the order of their keys."""
    samples.write(path, [rows[key] for key in sorted(rows)])
