"""The file of answers: JSON lines, one per sample, named by (task, length, index).

Every line has a checksum, so that an edited line, or one of another evaluation, is not taken for an answer.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

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


def checksum(value: Any, identity: str = '') -> str:
    """A short hash of a JSON value and of the evaluation that it belongs to."""
    return hashlib.sha256(f'{identity}\n{json.dumps(value)}'.encode()).hexdigest()[:16]


def _sealed(row: Mapping, identity: str) -> dict:
    return {**row, 'checksum': checksum(row, identity)}


def read(path: Path, identity: str = '') -> tuple[dict[tuple, dict], list[str]]:
    """({key: row}, [a sentence for each invalid line]) of a file, which need not exist.

    identity: of the evaluation, as append and write got it. Lines without a checksum are valid where no line
    has one: an earlier version wrote them.
    """
    if not path.is_file():
        return {}, []
    rows = {}
    lines, problems = samples.read(path)
    sealed = any('checksum' in fields for _, fields in lines)
    for number, fields in lines:
        stated = fields.pop('checksum', None)
        wrong = [name for name, kind in FIELDS.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            problems.append(f"{path} line {number + 1} has no {' and no '.join(wrong)}; "
                            'that sample is made again')
        elif sealed and stated != checksum(fields, identity):
            problems.append(f'{path} line {number + 1} was edited, or belongs to another evaluation: its '
                            'checksum differs; that sample is made again')
        else:
            rows[key_of(fields)] = fields
    if rows and not sealed:
        problems.append(f'{path} holds {len(rows)} answers without checksums, as earlier versions wrote '
                        'them; they are kept, and edits would not have been noticed')
    return rows, problems


def append(file: IO[str], row: Mapping, identity: str = '') -> None:
    """Write a row to an open file so that an interrupted run keeps it.

    Raises:
      ValueError: if the file was deleted.
    """
    if not os.fstat(file.fileno()).st_nlink:
        raise _vanished(file.name)
    file.write(json.dumps(_sealed(row, identity)) + '\n')
    file.flush()
    os.fsync(file.fileno())


def write(path: Path, rows: Mapping[tuple, Mapping], identity: str = '') -> None:
    """Write all rows atomically, in the order of their keys.

    Raises:
      ValueError: if the folder does not exist.
    """
    if not path.parent.is_dir():
        raise _vanished(path)
    samples.write(path, [_sealed(rows[key], identity) for key in sorted(rows)])


def _vanished(path):
    return ValueError(f'{path} vanished while answers were written to it; the same command measures again '
                      'what is lost')
