"""The suite 'ruler': RULER's 13 tasks (Hsieh et al. 2024, arXiv:2404.06654), generated or read."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lct.eval import answers, runner, samples, scoring
from lct.eval.report import svg
from lct.eval.samples import Sample
from lct.eval.suites.suite import Figure, Plan, TaskScoreSuite, task_items
from lct.eval.tasks import ruler
from lct.text import short_length


class RulerSuite(TaskScoreSuite):
    name, title = 'ruler', 'RULER'
    tasks = tuple(ruler.TASKS)
    caption = 'Score of every task'

    def items(self, plan: Plan) -> list[runner.Item]:
        if plan.given is not None:
            return [runner.Item(task, sample.length, sample.index, functools.partial(_itself, sample))
                    for task, given in plan.given.items() for sample in given]
        configs = [ruler.task(name) for name in plan.selected(ruler.TASKS)]
        return [item for length in plan.lengths for item in task_items(plan, configs, length)]

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        lengths = scoring.by_length((answers.sample_of(row), row['text']) for row in rows)
        tasks = {task: {length: dataclasses.asdict(lengths[length].tasks[task]) for length in lengths}
                 for task in next(iter(lengths.values())).tasks}
        return {**scoring.summary(lengths), 'intervals': [lengths[length].interval for length in lengths],
                'tasks': tasks}

    def last_rows(self, result: Mapping) -> Iterator[list[str]]:
        yield ['mean ± standard error', *(
            f'{mean:.1f} ± {error:.1f}' if error is not None else f'{mean:.1f}'
            for mean, error in zip(result['means'], result['stderr'], strict=True))]
        yield from super().last_rows(result)

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        yield from super().figures(result, trained)
        band = [[x / 100 for x in interval] for interval in result['intervals']]
        means = {'mean of tasks': (result['lengths'], [mean / 100 for mean in result['means']], band)}
        yield Figure('Mean of the tasks, 95% band',
                     svg.curves(means, 'context length (tokens)', 'score', trained))

    def sentences(self, result: Mapping) -> list[str]:
        shortest, longest = min(result['lengths']), max(result['lengths'])

        def describe_length(length):
            if length is None:
                return f'below {short_length(shortest)}'
            return short_length(length) + (' or more' if length == longest else '')

        return [
            f"average {result['average']:.1f}, weighted to long {result['weighted_increasing']:.1f}, "
            f"to short {result['weighted_decreasing']:.1f}",
            f"effective length by {result['threshold']} points: "
            f"{describe_length(result['effective_length'])}; "
            f"by 85% of its own shortest ({result['own_threshold']:.1f}): "
            f"{describe_length(result['effective_length_of_own'])}",
        ]

    def export(self, folder: Path, rows: Sequence[Mapping]) -> None:
        """folder/predictions/LENGTH/TASK.jsonl, as RULER's own evaluate.py reads them."""
        for length, task in dict.fromkeys((row['length'], row['task']) for row in rows):
            samples.write(folder / 'predictions' / str(length) / f'{task}.jsonl', [
                samples.prediction(answers.sample_of(row), row['text']) for row in rows
                if (row['length'], row['task']) == (length, task)])


def _itself(sample):
    return sample


def read_data(folder: Path, length: int, count: int,
              tasks: Sequence[str] | None = None) -> tuple[dict[str, list[Sample]], list[str]]:
    """({task: [Sample]}, problems): the first `count` samples of RULER's files FOLDER/TASK/*.jsonl.

    All of them get one nominal length.

    Raises:
      ValueError: if there is no such file.
    """
    given, problems = {}, []
    for name in (name for name in ruler.TASKS if tasks is None or name in tasks):
        found = []
        for path in sorted((folder / name).glob('*.jsonl')):
            more, invalid = samples.read_ruler(path, ruler.task(name).max_new_tokens)
            found += more
            problems += invalid
        if found:
            given[name] = [dataclasses.replace(one, task=name, length=length, index=i)
                           for i, one in enumerate(found[:count])]
    if not given:
        names = ', '.join(tasks or ruler.TASKS)
        raise ValueError(f"{folder} has no TASK/*.jsonl of RULER's tasks {names}; "
                         'give the folder that holds theirs')
    return given, problems
