"""Samples, prompts with reference answers, in memory and in the JSONL files of RULER."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Iterable
from typing import Any

from lct import files


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question over a long text.

    length: the budget in tokens, for special tokens, prompt, answer_prefix and max_new_tokens together.
    index: the number of the sample within (task, length); these three and a seed determine the other fields.
    prompt, answer_prefix: the model reads both; in a chat the prefix begins the assistant's turn.
    outputs: reference answers. meta: facts for JSON: 'tokens' used of the budget, depths, ...
    """

    task: str
    length: int
    index: int
    prompt: str
    answer_prefix: str
    outputs: list
    max_new_tokens: int
    meta: dict

    @property
    def text(self) -> str:
        """The input of a model without a chat template."""
        return self.prompt + self.answer_prefix

    @property
    def answer(self) -> str:
        """The right continuation of text, for teacher-forced scoring."""
        return ' ' + ', '.join(self.outputs)


def rng(*key: Any) -> random.Random:
    """random.Random of a seed and names: equal keys give equal numbers on every machine."""
    return random.Random('/'.join(map(str, key)))


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def to_ruler(sample: Sample) -> dict:
    """A line of RULER's data files; RULER ignores our own fields task, budget, max_new_tokens and meta."""
    tokens = sample.meta.get('tokens', sample.length)
    return {
        'index': sample.index, 'input': sample.prompt, 'outputs': list(sample.outputs), 'length': tokens,
        'length_w_model_temp': tokens, 'answer_prefix': sample.answer_prefix, 'task': sample.task,
        'budget': sample.length, 'max_new_tokens': sample.max_new_tokens, 'meta': sample.meta,
    }


def from_ruler(fields: dict, number: int, task: str, max_new_tokens: int) -> Sample:
    """Sample of a line of RULER's data files, old or new.

    Files from before 2025 have no answer_prefix: there it is the end of the input.

    Args:
      number: of the line; it becomes the index, since niah files have character offsets there.
      task, max_new_tokens: for lines without them.
    """
    missing = [name for name in ('input', 'outputs') if name not in fields]
    if missing == ['outputs'] and 'output' in fields:
        fields = {**fields, 'outputs': [fields['output']]}
    elif missing:
        raise ValueError(f"has no field {' and no field '.join(missing)}")
    outputs = fields['outputs']
    if not (isinstance(fields['input'], str) and isinstance(outputs, list) and outputs
            and all(isinstance(x, str) for x in outputs)):
        raise ValueError("needs text in 'input' and at least one text in 'outputs'")
    used = fields.get('length')
    meta = fields.get('meta', {'tokens': used, 'source': 'RULER file'})
    if 'metric' in fields:
        meta = {**meta, 'metric': fields['metric']}
    return Sample(
        fields.get('task', task), fields.get('budget', used), number, fields['input'],
        fields.get('answer_prefix', ''), outputs, fields.get('max_new_tokens', max_new_tokens),
        meta,
    )


def prediction(sample: Sample, text: str) -> dict:
    """A line of a prediction file that RULER's evaluate.py scores; it needs both others and index."""
    return {
        'index': sample.index, 'pred': text, 'input': sample.prompt, 'outputs': list(sample.outputs),
        'others': {'id': sample.index}, 'truncation': -1, 'length': sample.meta.get('tokens', sample.length),
    }


def write(path: str | pathlib.Path, rows: Iterable[dict]) -> None:
    """JSON objects as ASCII lines, atomically."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row) + '\n')


def read(path: str | pathlib.Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """([(line number from 0, dict)], [one sentence for each line that is not a JSON object])."""
    rows, problems = [], []
    with pathlib.Path(path).open('rb') as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
                problems.append(
                    f'{path} line {number + 1} is not valid JSON ({error}); make that sample again')
                continue
            if isinstance(fields, dict):
                rows.append((number, fields))
            else:
                problems.append(f'{path} line {number + 1} is not an object; make that sample again')
    return rows, problems


def read_ruler(
    path: str | pathlib.Path, max_new_tokens: int, task: str | None = None,
) -> tuple[list[Sample], list[str]]:
    """([Sample], [one sentence for each line left out]) of a data file <task>/validation.jsonl.

    max_new_tokens: for lines without it, which RULER itself writes.
    """
    path = pathlib.Path(path)
    rows, problems = read(path)
    samples = []
    for number, fields in rows:
        try:
            samples.append(from_ruler(fields, number, task or path.parent.name, max_new_tokens))
        except ValueError as error:
            problems.append(f'{path} line {number + 1} {error}; correct or remove it')
    return samples, problems
