"""The suite 'repository': questions about source files whose answers the syntax tree knows."""

from collections.abc import Mapping, Sequence

from lct.eval import runner, scoring
from lct.eval.suites.suite import Plan, TaskScoreSuite, no_interval_sentences, task_items
from lct.eval.tasks import code_questions


class RepositorySuite(TaskScoreSuite):
    name, title = 'repository', 'A repository in the prompt'
    tasks = tuple(code_questions.TASKS)
    caption = 'Right answers'

    def items(self, plan: Plan) -> list[runner.Item]:
        """The questions of all tasks about one text share it."""
        configs = [code_questions.TASKS[name] for name in plan.selected(code_questions.TASKS)]
        group = lambda config, length, i: ('repository', length, i // code_questions.QUESTIONS)
        return [item for length in plan.lengths for item in task_items(plan, configs, length, group)]

    def row_score(self, row: Mapping) -> float:
        return scoring.score(row['task'], row['text'], row['outputs'])

    def record(self, rows: Sequence[Mapping]) -> dict:
        """A scoring.TaskScore without stderr; interval: over texts, None for one."""
        by_text = {}
        for row in rows:
            # Rows of an earlier version have no bundle.
            text = row['meta'].get('bundle', row['index'] // code_questions.QUESTIONS)
            by_text.setdefault(text, []).append(self.row_score(row))
        record = super().record(rows)
        del record['stderr']  # of questions as if they were independent
        interval = scoring.clustered_interval(list(by_text.values()))
        record['interval'] = interval and [100 * x for x in interval]
        return record

    def sentences(self, result: Mapping) -> list[str]:
        return no_interval_sentences(result)
