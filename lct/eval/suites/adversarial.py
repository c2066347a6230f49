"""The suite 'adversarial': needles that mislead."""

import dataclasses
from collections.abc import Mapping, Sequence

from lct import sharding
from lct.eval import answers, runner
from lct.eval.suites.suite import (
    LengthSuite,
    Plan,
    by_task_and_length,
    no_interval_sentences,
    task_items,
    teacher_forced_scores,
)
from lct.eval.tasks import adversarial_needles, adversarial_outcomes

DEFAULT_SHARDS = 8  # boundaries of 'straddling' needles where one device holds the whole sequence


class AdversarialSuite(LengthSuite):
    name, title = 'adversarial', 'Adversarial needles'
    tasks = tuple(adversarial_needles.TASKS)
    layout = 'contiguous'  # 'straddling' needles lie across the boundaries of its shards
    noun, caption = 'needle', 'Right values'

    def items(self, plan: Plan) -> list[runner.Item]:
        """The samples of the tasks; of 'several', counts[length] texts with all their questions each.

        Series of more wrong values, 'latest_0' (the control) to 'latest_8', run only where they are named.
        """
        known = adversarial_needles.TASKS if plan.tasks else adversarial_needles.DEFAULTS
        configs = [known[name] for name in plan.selected(known)]
        items = []
        for length in plan.lengths:
            items += task_items(plan, [_placed(config, length) for config in configs], length, _group)
        return [dataclasses.replace(item, teacher_forced=True) for item in items]

    def inputs(self, plan: Plan) -> dict:
        return {'straddling_shards': _shards()}

    def row_score(self, row: Mapping) -> float:
        return float(adversarial_outcomes.outcome(answers.sample_of(row), row['text']) == 'target')

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """Records are adversarial_outcomes.rates with 'forced': teacher_forced_scores."""
        tasks = {}
        for (task, length), chosen in by_task_and_length(rows).items():
            rates = adversarial_outcomes.rates((answers.sample_of(row), row['text']) for row in chosen)
            tasks.setdefault(task, {})[length] = rates | {'forced': teacher_forced_scores(chosen)}
        return {'tasks': tasks}

    def score(self, record: Mapping) -> float:
        return record['target']

    def interval(self, record: Mapping) -> Sequence[float] | None:
        return record['interval']

    def describe(self, record: Mapping) -> str:
        return f"{100 * record['target']:.0f} right, {100 * record['stale']:.0f} misled"

    def sentences(self, result: Mapping) -> list[str]:
        return no_interval_sentences(result)


def _placed(config, length):
    if not isinstance(config, adversarial_needles.Straddling):
        return config
    return dataclasses.replace(config, shards=_shards(), seq_len=runner.cache_slots(length))


def _shards():
    ring_size = sharding.axis_size('sequence')
    return ring_size if ring_size > 1 else DEFAULT_SHARDS


def _group(config, length, index):
    queries = getattr(config, 'queries', 1)
    return (config.task, length, index // queries) if queries > 1 else None
