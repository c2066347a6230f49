"""The suite 'ruler': RULER's 13 tasks (Hsieh et al. 2024, arXiv:2404.06654), generated or read."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lct.eval import answers, runner, samples, scoring
from lct.eval.report import svg
from lct.eval.suites.suite import (
    Figure,
    Plan,
    TaskScoreSuite,
    by_task_and_length,
    given_items,
    task_items,
    with_given,
)
from lct.eval.tasks import ruler
from lct.text import short_length


class RulerSuite(TaskScoreSuite):
    name, title = 'ruler', 'RULER'
    tasks = tuple(ruler.TASKS)
    caption = 'Score of every task'
    takes_data = True

    def with_data(self, plan: Plan, folder: Path, model: runner.Model) -> tuple[Plan, list[Path], list[str]]:
        limits = {name: ruler.task(name).max_new_tokens for name in ruler.TASKS}
        return with_given(plan, folder, model, list(limits), limits)

    def items(self, plan: Plan) -> list[runner.Item]:
        if plan.given is not None:
            return given_items(plan)
        configs = [ruler.task(name) for name in plan.selected(ruler.TASKS)]
        return [item for length in plan.lengths for item in task_items(plan, configs, length)]

    def row_score(self, row: Mapping) -> float:
        return scoring.score(row['task'], row['text'], row['outputs'])

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """scoring.summary of the tasks in 'averaged', those with answers at every length; all 'tasks'."""
        tasks = {}
        for (task, length), cell in by_task_and_length(rows).items():
            scores = [self.row_score(row) for row in cell]
            record = scoring.task_score(scores, [row['text'] for row in cell])
            tasks.setdefault(task, {})[length] = record
        lengths = sorted({length for records in tasks.values() for length in records})
        averaged = [task for task, records in tasks.items() if len(records) == len(lengths)]
        records = {task: {length: dataclasses.asdict(record) for length, record in sorted(one.items())}
                   for task, one in tasks.items()}
        if not averaged:
            return {'lengths': lengths, 'averaged': [], 'tasks': records}
        means = {length: scoring.length_score({task: tasks[task][length] for task in averaged})
                 for length in lengths}
        return {**scoring.summary(means), 'intervals': [means[length].interval for length in lengths],
                'averaged': averaged, 'tasks': records}

    def last_rows(self, result: Mapping) -> Iterator[list[str]]:
        if averaged := _averaged(result):
            yield [f'mean of {len(averaged)}, 95% interval', *(
                f'{mean:.1f} ({low:.1f} to {high:.1f})'
                for mean, (low, high) in zip(result['means'], result['intervals'], strict=True))]
        yield from super().last_rows(result)

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        yield from super().figures(result, trained)
        if averaged := _averaged(result):
            band = [[x / 100 for x in interval] for interval in result['intervals']]
            means = {'mean of tasks': (result['lengths'], [mean / 100 for mean in result['means']], band)}
            yield Figure(f'Mean of {len(averaged)} of {len(self.tasks)} tasks, 95% band',
                         svg.curves(means, 'context length (tokens)', 'score', trained))

    def sentences(self, result: Mapping) -> list[str]:
        averaged, number = _averaged(result), len(self.tasks)
        if not averaged:
            return ['no mean: no task has answers at every length']
        shortest, longest = min(result['lengths']), max(result['lengths'])

        def describe_length(length):
            if length is None:
                return f'below {short_length(shortest)}'
            return short_length(length) + (' or more' if length == longest else '')

        out = [f"average of {len(averaged)} of {number} tasks {result['average']:.1f}, weighted to long "
               f"{result['weighted_increasing']:.1f}, to short {result['weighted_decreasing']:.1f}"]
        if len(averaged) < number:
            return [*out, f"no effective length: RULER's is of all {number} tasks, "
                          f'{number - len(averaged)} of them without answers at some length']
        return [*out, f"effective length by {result['threshold']} points: "
                      f"{describe_length(result['effective_length'])}; "
                      f"by 85% of its own shortest ({result['own_threshold']:.1f}): "
                      f"{describe_length(result['effective_length_of_own'])}"]

    def export(self, folder: Path, rows: Sequence[Mapping]) -> None:
        """folder/predictions/LENGTH/TASK.jsonl, as RULER's own evaluate.py reads them."""
        for length, task in dict.fromkeys((row['length'], row['task']) for row in rows):
            samples.write(folder / 'predictions' / str(length) / f'{task}.jsonl', [
                samples.prediction(answers.sample_of(row), row['text']) for row in rows
                if (row['length'], row['task']) == (length, task)])


def _averaged(result):
    """The tasks of the means; earlier versions had the same tasks at every length."""
    return result.get('averaged', list(result['tasks']))
