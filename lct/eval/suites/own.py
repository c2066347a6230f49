"""The suite 'own': one's own tasks, from files FOLDER/TASK/*.jsonl or *.parquet.

A line is {"input": ..., "outputs": [...]}, and may have "answer_prefix", "max_new_tokens" and "metric", one
of scoring.METRICS. The input is text, or the messages of a chat. Lines of OpenAI's MRCR are read too.
"""

from collections.abc import Mapping
from pathlib import Path

from lct.eval import data_files, runner, scoring
from lct.eval.suites.suite import Plan, TaskScoreSuite, given_items, with_given


class OwnSuite(TaskScoreSuite):
    name, title = 'own', 'Own tasks'
    caption = 'Score of every task'
    takes_data = needs_data = True

    def with_data(self, plan: Plan, folder: Path, model: runner.Model) -> tuple[Plan, list[Path], list[str]]:
        return with_given(plan, folder, model, data_files.task_names(folder))

    def items(self, plan: Plan) -> list[runner.Item]:
        return given_items(plan)

    def row_score(self, row: Mapping) -> float:
        if begins_with := row['meta'].get('begins_with'):
            return scoring.repeated_behind(begins_with, scoring.clean(row['text']), row['outputs'])
        metric = scoring.METRICS[row['meta'].get('metric', scoring.DEFAULT_METRIC)]
        return metric(scoring.clean(row['text']), row['outputs'])
