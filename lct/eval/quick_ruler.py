"""A few tasks of RULER, small enough to be measured before and after an extension."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from lct.data.corpus.documents import Document
from lct.data.tokenizer import Tokenizer
from lct.eval import runner
from lct.eval.recall_probe import RecallResult
from lct.eval.suites.ruler import RulerSuite
from lct.eval.suites.suite import Plan, task_items
from lct.eval.tasks import ruler
from lct.eval.tasks.material import Material

DESCRIPTION = "suite 'ruler' of evaluate.py: wordings that no training row has"
TASKS = ('niah_single_1', 'niah_single_3', 'niah_multikey_1', 'niah_multivalue', 'vt')
LENGTHS, SAMPLES = (512, 2048, 8192), 2
ANSWER_TOKENS = 40  # at most, of an answer for which RULER allows more


class QuickRuler(RulerSuite):
    """The suite 'ruler' with TASKS alone and short answers."""

    def items(self, plan: Plan) -> list[runner.Item]:
        configs = [_config(name) for name in TASKS]
        return [item for length in plan.lengths for item in task_items(plan, configs, length)]


def _config(name):
    config = ruler.task(name)
    return dataclasses.replace(config, max_new_tokens=min(config.max_new_tokens, ANSWER_TOKENS))


def make_plan(tokenizer: Tokenizer, haystack: np.ndarray, longest: int, seed: int) -> Plan | None:
    """Prompts over held-out text, haystack int [n], up to `longest` tokens; None if none fits all tasks."""
    text = tokenizer.decode(haystack[:4 * max(LENGTHS)].tolist())
    material = Material(tokenizer, [Document('held out', text)], text_source='held-out documents', seed=seed)

    def fits(length):
        try:
            return length <= longest and all(material.sample(_config(name), length, 0) for name in TASKS)
        except ValueError:  # a tokenizer that makes many tokens of a short text
            return False

    lengths = tuple(filter(fits, LENGTHS))
    return Plan(material, lengths, dict.fromkeys(lengths, SAMPLES), tasks=TASKS) if lengths else None


def grid(result: Mapping) -> RecallResult:
    """The scores of a result as a grid like the one of the recall probe, with tasks in place of depths."""
    tasks, lengths = result['tasks'], [int(length) for length in result['lengths']]
    scores = np.array([[_score(records, length) for length in lengths] for records in tasks.values()])
    records = tuple({'task': task, 'length': length, 'sample': i} for task in tasks for length in lengths
                    for i in range(SAMPLES))
    return RecallResult(tuple(lengths), tuple(tasks), scores, records)


def _score(records, length):
    """0..1. JSON has text for the lengths."""
    return (records[length] if length in records else records[str(length)])['mean'] / 100


def describe(result: Mapping) -> str:
    """The mean of the tasks at each length, in one line."""
    measured = grid(result)
    means = dict(zip(measured.lengths, measured.scores.mean(0), strict=True))
    return 'mean of tasks ' + ', '.join(f'{100 * mean:.0f} at {length:,}' for length, mean in means.items())
