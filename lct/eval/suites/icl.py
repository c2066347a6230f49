"""The suite 'icl': learning in context from one shot to thousands."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lct.eval import answers, runner
from lct.eval.report import svg
from lct.eval.suites.suite import Cell, Figure, Plan, PromptSuite, Table
from lct.eval.tasks import icl

STRIDE = 10**6  # between the indices of two numbers of shots: prompts of different shots may be equally long


class InContextSuite(PromptSuite):
    name, title = 'icl', 'Learning in context'
    tasks = tuple(icl.TASKS)

    def items(self, plan: Plan) -> list[runner.Item]:
        """Powers of two of shots up to the longest length; queries of one set share their shots."""
        items, seed, tokenizer = [], plan.material.seed, plan.tokenizer
        overhead = plan.material.overhead.total
        longest = max(plan.lengths)
        for name in plan.selected(icl.TASKS):
            config = icl.task(name)
            for shots in icl.shot_counts(config, seed, tokenizer, longest, overhead):
                length = icl.length(config, shots, seed, tokenizer, overhead)
                for i in range(plan.counts[longest]):
                    make = functools.partial(_sample, plan, name, shots, i)
                    items.append(runner.Item(name, length, _index(shots, i), make,
                                             (name, shots, i // icl.QUERIES), one_line=True))
        return items

    def row_score(self, row: Mapping) -> float:
        return icl.score(row['text'], row['outputs'])

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """{'tasks': {task: {'curve', 'chosen', 'chance', 'references'}}}, all on the same samples.

        'curve' is the icl.curve of what the model writes, 'chosen' the icl.curve of the choice that it finds
        most likely, 'references' {learner: {shots: accuracy}}, 'chance' the accuracy of a choice by lot.
        'chosen' and 'chance' are None for tasks without choices, and 'chosen' is for rows of an earlier
        version.
        """
        tasks = {}
        for task in dict.fromkeys(row['task'] for row in rows):
            own = [row for row in rows if row['task'] == task]
            written = icl.curve((answers.sample_of(row), row['text']) for row in own)
            chosen = None
            if all('chosen' in row for row in own):
                chosen = icl.curve((answers.sample_of(row), row['chosen']) for row in own)
            references = {}
            for shots in written:
                indices = [row['index'] - _index(shots, 0) for row in own if row['meta']['shots'] == shots]
                learned = icl.reference_accuracy(icl.task(task), plan.material.seed, shots, indices)
                for learner, accuracy in learned.items():
                    references.setdefault(learner, {})[shots] = accuracy
            shares = [1 / len(row['meta']['choices']) for row in own if row['meta'].get('choices')]
            chance = float(np.mean(shares)) if len(shares) == len(own) else None
            tasks[task] = {'curve': written, 'chosen': chosen, 'chance': chance, 'references': references}
        return {'tasks': tasks}

    def cells(self, result: Mapping) -> Iterator[Cell]:
        for name, curve in _named_curves(result):
            for shots, record in curve.items():
                low, high = record['interval'] or ('', '')
                yield Cell(self.name, name, shots, record['accuracy'], low, high, record['count'])

    def tables(self, result: Mapping) -> Iterator[Table]:
        shots = sorted({n for one in result['tasks'].values() for n in one['curve']}, key=int)
        rows = [[name, *(f"{100 * curve[n]['accuracy']:.0f}" if n in curve else '' for n in shots)]
                for name, curve in _named_curves(result)]
        yield Table(['task', *(f'{n} shots' for n in shots)], rows)

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        for task, one in result['tasks'].items():
            series = {}
            for name, curve in zip(('model writes', 'model chooses'), _curves(one), strict=False):
                accuracies = [record['accuracy'] for record in curve.values()]
                # An unknown interval is drawn without width, so that the line of the model stays solid.
                band = [record['interval'] or 2 * [record['accuracy']] for record in curve.values()]
                series[name] = [int(n) for n in curve], accuracies, band
            for learner, curve in one['references'].items():
                series[learner] = [int(n) for n in curve], list(curve.values()), None
            if chance := one.get('chance'):
                shots = [int(n) for n in one['curve']]
                series['chance'] = shots, [chance] * len(shots), None
            *_, last = one['curve'].values()
            band = 'model with 95% band' if last['interval'] else 'model, no band for one rule'
            yield Figure(f'{task}: {band}, reference learners dashed{_describe_gains(one)}',
                         svg.curves(series, 'shots', 'accuracy'))

    def sentences(self, result: Mapping) -> list[str]:
        if all(record['interval'] for one in result['tasks'].values() for record in one['curve'].values()):
            return []
        return ['no interval where all samples share one hidden rule: more samples test more rules']


def _index(shots, i):
    return shots * STRIDE + i


def _sample(plan, name, shots, i):
    material = plan.material
    sample = icl.sample(icl.task(name), shots, i, material.seed, plan.tokenizer, material.overhead.total)
    return dataclasses.replace(sample, index=_index(shots, i))


def _curves(one):
    """The curve of what the model writes and, where it is known, of the choice that it finds most likely."""
    return [one['curve'], one['chosen']] if one.get('chosen') else [one['curve']]


def _named_curves(result):
    """Iterator of (name, curve) of all tasks."""
    for task, one in result['tasks'].items():
        yield from zip((task, f'{task}_chosen'), _curves(one), strict=False)


def _describe_gains(one):
    """A phrase for the gain of the most shots over the fewest that can show every label, in points."""
    gains = [list(curve.values())[-1].get('gain') for curve in _curves(one)]
    phrases = [f'{verb} {100 * gain:+.0f}'
               for verb, gain in zip(('writing', 'choosing'), gains, strict=False) if gain is not None]
    return f"; points since one round of the labels: {', '.join(phrases)}" if phrases else ''
