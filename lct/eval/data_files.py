"""Samples from files FOLDER/TASK/*.jsonl or *.parquet: RULER's own, or one's own tasks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lct.eval import runner, samples, scoring
from lct.eval.published import question
from lct.eval.samples import Sample

NEW_TOKENS = 128  # of an answer, where neither the line nor the task says
ROOM = 16  # tokens of an answer beside the text that it has to repeat
PATTERNS = '*.jsonl', '*.parquet'


def paths(folder: Path, task: str = '*') -> list[Path]:
    """The files of a task, or of all."""
    return sorted(path for pattern in PATTERNS for path in folder.glob(f'{task}/{pattern}'))


def task_names(folder: Path) -> list[str]:
    """The folders in it that hold files of samples."""
    return sorted({path.parent.name for path in paths(folder)})


def read(folder: Path, names: Sequence[str], length: int, count: int, model: runner.Model,
         new_tokens: Mapping[str, int] | None = None) -> tuple[dict[str, list[Sample]], list[str]]:
    """({task: [Sample]}, problems): the first `count` samples of each task.

    All of them get one nominal length, which the tokens of a chat template may exceed.

    Args:
      new_tokens: of an answer, {task: tokens}, for lines without max_new_tokens.
    Raises:
      ValueError: if there is no such file, or a sample does not fit into the positions of the model.
    """
    given, problems, too_long, positions = {}, [], [], model.config.max_position_embeddings
    for name in names:
        found, limit = [], (new_tokens or {}).get(name, NEW_TOKENS)
        for path in paths(folder, name):
            more, invalid = samples.read_ruler(path, limit, rows=_parquet_rows(path))
            found += [(path, one) for one in more]
            problems += invalid
        for i, (path, one) in enumerate(found[:count]):
            metric = one.meta.get('metric', scoring.DEFAULT_METRIC)
            if metric not in scoring.METRICS:
                raise ValueError(f'{path} line {one.index + 1} has the metric {metric!r}, which is not one '
                                 f"of {', '.join(scoring.METRICS)}")
            one = _with_room(one, model.tokenizer)
            tokens = len(_prompt_ids(model, one, path)) + one.max_new_tokens
            if tokens > positions:
                too_long.append(f'{path} line {one.index + 1} takes {tokens} tokens with its answer')
            given.setdefault(name, []).append(dataclasses.replace(
                one, task=name, length=length, index=i, meta={**one.meta, 'tokens': tokens}))
    if too_long:
        more = f', and {len(too_long) - 1} more lines are too long' if too_long[1:] else ''
        raise ValueError(f'{too_long[0]}, more than the {positions} positions of the model{more}; remove '
                         'them, or make the files with a smaller length')
    if not given:
        raise ValueError(f"{folder} has no TASK/*.jsonl of the tasks {', '.join(names) or 'of any name'}; "
                         'give the folder that holds theirs')
    return given, problems


def _parquet_rows(path):
    """The rows of a parquet file as samples.read gives those of others; None for another file."""
    if path.suffix != '.parquet':
        return None
    found = [row for _, row in question.rows(path)]
    problems = [f'{path} {row}' for row in found if isinstance(row, str)]
    return [(i, row) for i, row in enumerate(found) if isinstance(row, dict)], problems


def _with_room(sample, tokenizer):
    """The sample with tokens for the whole of a text to repeat."""
    if 'begins_with' not in sample.meta:
        return sample
    needed = max(len(tokenizer.encode(text)) for text in sample.outputs) + ROOM
    return dataclasses.replace(sample, max_new_tokens=max(sample.max_new_tokens, needed))


def _prompt_ids(model, sample, path):
    try:
        return model.prompt_ids(sample)
    except ValueError as error:
        raise ValueError(f'{path} line {sample.index + 1}: {error}') from None
