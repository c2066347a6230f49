"""Questions about texts from the files of a benchmark, and prompts of them that fit into a length."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lct.data.corpus.compression import optional
from lct.eval import runner
from lct.eval.samples import Sample


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a text.

    place: the file and line that it comes from. head, tail: the prompt before and after the text.
    answer_prefix: begins the answer. new_tokens: of the answer; as many as the right answer takes where that
    is more, and a quarter of the length at most. metric: of published.metrics.METRICS.
    length: the nominal length in tokens, where the benchmark has one. chance: the score of a guess, 0..1.
    groups: of the benchmark's own table. meta: what else the metric needs, for JSON.
    """

    task: str
    place: str
    head: str
    text: str
    tail: str
    answer_prefix: str
    outputs: Sequence[str]
    new_tokens: int
    metric: str
    length: int | None = None
    chance: float = 0.0
    groups: tuple[str, ...] = ()
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def sample(self, model: runner.Model, length: int, index: int, text: str | None = None,
               tokens: int | None = None) -> Sample:
        """The sample with the text, or with another one in its place. tokens: that it takes with its answer,
        where they were counted before."""
        meta = {**self.meta, 'metric': self.metric, 'chance': self.chance, 'groups': list(self.groups),
                'cut': text is not None}
        answer = max(len(model.tokenizer.encode(f' {one}')) for one in self.outputs) + 2
        limit = min(max(self.new_tokens, answer), length // 4)
        text = self.text if text is None else text
        sample = Sample(self.task, length, index, self.head + text + self.tail, self.answer_prefix,
                        list(self.outputs), limit, meta)
        tokens = len(model.prompt_ids(sample)) + limit if tokens is None else tokens
        return dataclasses.replace(sample, meta={**meta, 'tokens': tokens})

    def fitted(self, model: runner.Model, length: int, index: int) -> Sample:
        """The sample with as much of the text as fits into a length.

        As the benchmarks do it, a prompt that is too long loses its middle, and both ends stay equally long.
        The question itself must fit.
        """
        whole = self.sample(model, length, index)
        if whole.meta['tokens'] <= length:
            return whole
        ids, bare = model.tokenizer.encode(self.text), self.sample(model, length, index, '')
        room = length - bare.meta['tokens']
        head, tail = (len(model.tokenizer.encode(part))
                      for part in (self.head, self.tail + self.answer_prefix))
        while room > 0:
            left = min(max((room + head + tail) // 2 - head, 1), room - 1)
            cut = model.tokenizer.decode(ids[:left]) + model.tokenizer.decode(ids[left - room:])
            sample = self.sample(model, length, index, cut)
            if sample.meta['tokens'] <= length:
                return sample
            room -= sample.meta['tokens'] - length  # tokens do not quite add up where texts meet
        return bare


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Iterator of (place, row) of a .jsonl or .parquet file, or of a .json file with a list.

    A row that is not a dict is a sentence about it instead.
    """
    if path.suffix == '.parquet':
        found = ((f'row {i}', row) for i, row in enumerate(_parquet_rows(path), 1))
    elif path.suffix == '.jsonl' or not _starts_a_list(path):
        found = _lines(path)
    else:
        try:
            values = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            yield str(path), f'is not valid JSON ({error})'
            return
        found = ((f'entry {i}', value) for i, value in enumerate(values, 1))
    for place, row in found:
        yield f'{path} {place}', row if isinstance(row, (dict, str)) else 'is not a JSON object'


def _parquet_rows(path):
    parquet = optional('pyarrow.parquet', str(path))
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=16):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        yield f'cannot be read as parquet ({error})'


def _starts_a_list(path):
    with path.open('rb') as file:
        return file.read(64).lstrip().startswith(b'[')


def _lines(path):
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f'line {number}', json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield f'line {number}', f'is not valid JSON ({error})'


def parsed(paths: Iterable[Path], parse: Callable[[dict, str], Any], problems: list[str]) -> Iterator:
    """Iterator of parse(row, place) of all rows. One that it refuses with a ValueError becomes a problem."""
    for path in paths:
        for place, row in rows(path):
            try:
                if isinstance(row, str):
                    raise ValueError(row)
                yield parse(row, place)
            except ValueError as error:
                problems.append(f'{place} {error}; it is left out')


def texts(row: Mapping, names: Iterable[str]) -> list[str]:
    """The fields of a row. Raises ValueError naming those that are missing or not text."""
    wrong = [name for name in names if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"has no text in {', '.join(map(repr, wrong))}")
    return [row[name] for name in names]


def data_files(folder: Path, pattern: str) -> list[Path]:
    """The files of a name without its suffix in a folder, which is searched two levels deep."""
    found = [path for depth in ('', '*/', '*/*/') for path in folder.glob(depth + pattern)]
    return sorted(path for path in found if path.suffix in ('.json', '.jsonl', '.parquet') and path.is_file())
