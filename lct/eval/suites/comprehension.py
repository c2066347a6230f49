"""The suite 'comprehension': tasks that needles do not predict."""

from collections.abc import Mapping, Sequence

from lct.eval import runner, scoring
from lct.eval.suites.suite import Plan, TaskScoreSuite, mean_chance, task_items
from lct.eval.tasks import comprehension


class ComprehensionSuite(TaskScoreSuite):
    name, title = 'comprehension', 'Comprehension'
    tasks = tuple(comprehension.TASKS)
    caption = 'Score of every task'

    def items(self, plan: Plan) -> list[runner.Item]:
        """The samples of the tasks; those of files of questions where their file is given, or named."""
        given = {name for name, config in comprehension.OF_FILES.items()
                 if config.source in plan.material.sources}
        known = comprehension.TASKS if plan.tasks else [*comprehension.DEFAULTS, *given]
        configs = [comprehension.TASKS[name] for name in plan.selected(known)]
        return [item for length in plan.lengths for item in task_items(plan, configs, length)]

    def row_score(self, row: Mapping) -> float:
        """By the metric of the sample; where wrong values are known, by the value that is named first."""
        text, wrong = scoring.clean(row['text']), row['meta'].get('wrong')
        if wrong:
            return scoring.names_first(text, row['outputs'][0], wrong)
        return scoring.METRICS[row['meta']['metric']](text, row['outputs'])

    def record(self, rows: Sequence[Mapping]) -> dict:
        """A scoring.TaskScore with 'chance', 0..100, of a guess among what the text offers."""
        return {**super().record(rows), 'chance': mean_chance(rows)}

    def sentences(self, result: Mapping) -> list[str]:
        """The chance levels: of an answer guessed among those that the text offers."""
        levels = {task: {record['chance'] for record in records.values()}
                  for task, records in result['tasks'].items()}
        described = [f'{task} {min(one):.1f}' + (f' to {max(one):.1f}' if len(one) > 1 else '')
                     for task, one in levels.items() if max(one)]
        return [f"by chance, guessing among answers of the kind: {', '.join(described)}"] * bool(described)
