"""Samples from files FOLDER/TASK/*.jsonl: RULER's own, or one's own tasks."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from lct.eval import runner, samples, scoring
from lct.eval.samples import Sample

NEW_TOKENS = 128  # of an answer, where neither the line nor the task says


def task_names(folder: Path) -> list[str]:
    """The folders in it that hold .jsonl files."""
    return sorted({path.parent.name for path in folder.glob('*/*.jsonl')})


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
        for path in sorted((folder / name).glob('*.jsonl')):
            more, invalid = samples.read_ruler(path, limit)
            found += [(path, one) for one in more]
            problems += invalid
        for i, (path, one) in enumerate(found[:count]):
            metric = one.meta.get('metric', scoring.DEFAULT_METRIC)
            if metric not in scoring.METRICS:
                raise ValueError(f'{path} line {one.index + 1} has the metric {metric!r}, which is not one '
                                 f"of {', '.join(scoring.METRICS)}")
            tokens = len(model.prompt_ids(one)) + one.max_new_tokens
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
