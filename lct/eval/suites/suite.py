"""A suite of evaluations: its prompts, its scores, and its result as CSV, tables, figures and sentences.

A result is what results.json holds under the name of the suite: plain values, with None for what is unknown
or not finite, and text for the keys of dicts.
"""

import abc
import dataclasses
import functools
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lct.eval import answers, data_files, runner, scoring
from lct.eval.report import svg
from lct.eval.suites.plan import Plan
from lct.text import short_length

SHORT = 1024  # tokens; prompts that short are made quickly, and some of a task may not fit
SHARED_FROM = 4096  # tokens: shorter prompts take less time side by side than one after another in one cache
TEXTS = ('group', 'bundle', 'set')  # what meta calls the text that several questions share
MOSTLY = 0.75  # of a given prompt; one that shares less with another is read by itself


class Outcome(NamedTuple):
    """rows: one per sample, those of earlier calls among them. problems: sentences about invalid or missing
    input. result: for results.json."""

    rows: list[dict]
    problems: list[str]
    result: dict


class Cell(NamedTuple):
    """A line of results.csv.

    at: tokens, tokens/depth, shots, or positions. score: 0..1, or nats for the loss. low to high: a 95%
    interval of the score, '' where none is known.
    """

    suite: str
    task: str
    at: int | str
    score: float
    low: float | str
    high: float | str
    count: int


class Table(NamedTuple):
    """Text; the first column names the rows."""

    header: list[str]
    rows: list[list[str]]


class Figure(NamedTuple):
    caption: str
    picture: svg.Picture


class Suite(abc.ABC):
    """A set of evaluations with one result.

    name: in flags, files and results.json. title: its heading in the report. tasks: what --tasks may name.
    takes_data, needs_data: whether its samples may, or must, come from files.
    """

    name: str
    title: str
    tasks: tuple[str, ...] = ()
    takes_data = needs_data = False

    @abc.abstractmethod
    def check(self, model: runner.Model, plan: Plan) -> Iterator[str]:
        """A sentence for everything that would stop run, found before any model runs."""

    @abc.abstractmethod
    def run(self, model: runner.Model, plan: Plan, path: Path,
            progress: Callable[[int, int, float], None] | None = None) -> Outcome:
        """Measure what the JSONL file at path does not hold yet; progress as in runner.run."""

    def with_data(self, plan: Plan, folder: Path, model: runner.Model) -> tuple[Plan, list[Path], list[str]]:
        """(the plan with the samples of the files in a folder, those files, a sentence for each line that
        cannot be used). Raises ValueError where takes_data is not set, or the files do not fit the plan."""
        raise ValueError(f'--data {folder}: the suite {self.name} makes its own samples; leave --data out')

    def inputs(self, plan: Plan) -> dict:
        """What else the answers of this suite depend on, for about.json."""
        return {}

    @abc.abstractmethod
    def cells(self, result: Mapping) -> Iterator[Cell]:
        """The lines of a CSV."""

    @abc.abstractmethod
    def tables(self, result: Mapping) -> Iterator[Table]:
        """The result as text."""

    @abc.abstractmethod
    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        """Figures; trained: the length up to which the model was trained."""

    def sentences(self, result: Mapping) -> list[str]:
        """The conclusions from the numbers."""
        return []

    def outdated(self, result: Mapping) -> str | None:
        """Why a result of an earlier version cannot be kept; None if it can."""
        return None

    def export(self, folder: Path, rows: Sequence[Mapping]) -> None:  # noqa: B027  most suites have none
        """Write files for other programs into the folder of the results."""


class PromptSuite(Suite):
    """A suite of prompts that the runner answers. layout: of the cache, if the suite depends on it."""

    layout: str | None = None

    def check(self, model: runner.Model, plan: Plan) -> Iterator[str]:
        """Make the first sample of the shortest and of the longest length of every task, and all where they
        are short: a prompt may be too long for its length, and the material too little to fill it."""
        try:
            items = self.items(plan)
        except ValueError as error:
            yield str(error)
            return
        of_task = {}
        for item in items:
            of_task.setdefault(item.task, {}).setdefault(item.length, []).append(item)
        for by_length in of_task.values():
            for length in sorted({min(by_length), max(by_length)}):
                try:
                    for item in by_length[length][:None if length <= SHORT else 1]:
                        item.make()
                except ValueError as error:
                    yield str(error)

    def run(self, model: runner.Model, plan: Plan, path: Path,
            progress: Callable[[int, int, float], None] | None = None) -> Outcome:
        model = dataclasses.replace(model, layout=self.layout or model.layout)
        _, problems = runner.run(model, self.items(plan), path, progress, plan.identity, plan.run)
        rows = self.in_order(answers.read(path, plan.identity)[0].values())
        return Outcome(rows, problems, {'count': len(rows), **self.scores(plan, rows)})

    def in_order(self, rows: Iterable[Mapping]) -> list[Mapping]:
        """Rows in the order of tasks, lengths and indices, whichever call gave them."""
        order = {task: i for i, task in enumerate(self.tasks)}
        return sorted(rows, key=lambda row: (order.get(row['task'], len(order)), *answers.key_of(row)))

    @abc.abstractmethod
    def row_score(self, row: Mapping) -> float:
        """The score of one answer, 0..1."""

    def text_of(self, row: Mapping) -> Hashable:
        """What the answers about one text have in common among those of a task and length."""
        return next((row['meta'][name] for name in TEXTS if name in row['meta']), row['index'])

    @abc.abstractmethod
    def items(self, plan: Plan) -> list[runner.Item]:
        """The samples to answer."""

    @abc.abstractmethod
    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """The result, without 'count', from the rows of this call and of earlier ones."""


class LengthSuite(PromptSuite):
    """A suite whose result is {'tasks': {task: {length: record}}}. noun: what the report calls a task."""

    noun = 'task'
    caption: str  # of its heat map

    @abc.abstractmethod
    def score(self, record: Mapping) -> float:
        """The score of a record, 0..1."""

    @abc.abstractmethod
    def interval(self, record: Mapping) -> Sequence[float] | None:
        """(low, high) of a 95% interval of the score."""

    @abc.abstractmethod
    def describe(self, record: Mapping) -> str:
        """The cell of a table."""

    def last_rows(self, result: Mapping) -> Iterator[list[str]]:
        """Rows of the table below the tasks."""
        yield from ()

    def cells(self, result: Mapping) -> Iterator[Cell]:
        for task, records in result['tasks'].items():
            for length, record in records.items():
                low, high = self.interval(record) or ('', '')
                yield Cell(self.name, task, length, self.score(record), low, high, record['count'])

    def tables(self, result: Mapping) -> Iterator[Table]:
        lengths = self.lengths(result)
        rows = [[task, *(self.describe(records[length]) if length in records else '' for length in lengths)]
                for task, records in result['tasks'].items()]
        header = [self.noun, *(short_length(int(length)) for length in lengths)]
        yield Table(header, [*rows, *self.last_rows(result)])

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        lengths = self.lengths(result)
        scores = [[self.score(records[length]) if length in records else None for length in lengths]
                  for records in result['tasks'].values()]
        picture = svg.heat_map(list(map(int, lengths)), list(result['tasks']), scores, trained, self.noun)
        yield Figure(self.caption, picture)

    def lengths(self, result: Mapping) -> list[str]:
        """The keys of the records, in increasing order."""
        return sorted({length for records in result['tasks'].values() for length in records}, key=int)


class TaskScoreSuite(LengthSuite):
    """A LengthSuite whose records are scoring.TaskScore as dicts, in percent."""

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        tasks = {}
        for (task, length), chosen in by_task_and_length(rows).items():
            tasks.setdefault(task, {})[length] = self.record(chosen)
        return {'tasks': tasks}

    def record(self, rows: Sequence[Mapping]) -> dict:
        """The record of some rows."""
        return dataclasses.asdict(scoring.task_score(
            [self.row_score(row) for row in rows], [row['text'] for row in rows]))

    def score(self, record: Mapping) -> float:
        return record['mean'] / 100

    def interval(self, record: Mapping) -> Sequence[float] | None:
        return record['interval'] and [x / 100 for x in record['interval']]

    def describe(self, record: Mapping) -> str:
        return f"{record['mean']:.1f}"

    def last_rows(self, result: Mapping) -> Iterator[list[str]]:
        yield ['samples per task', *(
            describe_counts(records[length]['count'] for records in result['tasks'].values()
                            if length in records) for length in self.lengths(result))]


def mean_chance(rows: Sequence[Mapping]) -> float:
    """0..100: the score of guesses, where the samples state it."""
    return round(100 * float(np.mean([row['meta'].get('chance', 0) for row in rows])), 2)


def describe_counts(counts: Iterable[int]) -> str:
    """'6', or '1 to 6' where they differ."""
    low, *_, high = sorted([*counts] * 2)
    return str(low) if low == high else f'{low} to {high}'


def task_items(plan: Plan, configs: Sequence, length: int,
               group: Callable | None = None) -> list[runner.Item]:
    """Items of task configs at a length, all tasks of an index before the next index.

    group: (config, length, index) -> what items that share their text have in common.
    """
    return [
        runner.Item(config.task, length, i, functools.partial(plan.material.sample, config, length, i),
                    group and group(config, length, i))
        for i in range(plan.counts[length]) for config in configs
    ]


def with_given(plan: Plan, folder: Path, model: runner.Model, names: Sequence[str],
               limits: Mapping[str, int] | None = None) -> tuple[Plan, list[Path], list[str]]:
    """Suite.with_data for the folders of tasks; limits: {task: tokens of an answer}."""
    if len(plan.lengths) != 1:
        raise ValueError(f"--data {folder} holds samples of one length; give one of --lengths, not "
                         f"{','.join(map(str, plan.lengths))}")
    (length,) = plan.lengths
    given, problems = data_files.read(
        folder, plan.selected(names), length, plan.counts[length], model, limits)
    return dataclasses.replace(plan, given=given), data_files.paths(folder), problems


def given_items(plan: Plan) -> list[runner.Item]:
    """Items of the samples that the plan gives. Long ones that begin mostly alike share their text."""
    given = [sample for samples in plan.given.values() for sample in samples]
    groups, number, before = {}, 0, ''
    for sample in sorted(given, key=lambda one: one.text):
        shared = len(os.path.commonprefix([before, sample.text]))
        number, before = number + (shared < MOSTLY * len(sample.text)), sample.text
        groups[sample.task, sample.index] = number if sample.meta['tokens'] >= SHARED_FROM else None
    return [runner.Item(one.task, one.length, one.index, functools.partial(_itself, one),
                        groups[one.task, one.index], tokens=one.meta['tokens']) for one in given]


def _itself(sample):
    return sample


def by_task_and_length(rows: Iterable[Mapping]) -> dict[tuple[str, int], list[Mapping]]:
    """{(task, length): rows}, in the order in which they first occur."""
    out = {}
    for row in rows:
        out.setdefault((row['task'], row['length']), []).append(row)
    return out


def teacher_forced_scores(rows: Iterable[Mapping]) -> dict | None:
    """{'right', 'nats'} of the right answers; None where rows of an earlier version lack likelihoods.

    'right' is the fraction that greedy decoding would write, token for token; 'nats' is their loss per token.
    """
    forced = [row.get('forced') for row in rows]
    if not all(forced):
        return None
    return {'right': float(np.mean([one['greedy'] for one in forced])),
            'nats': sum(one['nats'] for one in forced) / -sum(one['tokens'] for one in forced)}


def no_interval_sentences(result: Mapping) -> list[str]:
    """A sentence where the samples of a task share one text."""
    if all(record['interval'] for records in result['tasks'].values() for record in records.values()):
        return []
    return ['no interval where all questions are about one text: more samples ask about more texts']
