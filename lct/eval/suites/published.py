"""The suites 'longbench_v2', 'babilong' and 'infinitebench': benchmarks from the files that a user has."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

from lct.eval import runner
from lct.eval.published import babilong, infinitebench, longbench_v2, metrics
from lct.eval.published.question import Question
from lct.eval.suites.plan import Plan, Questions
from lct.eval.suites.suite import SHARED_FROM, TaskScoreSuite, mean_chance


class PublishedSuite(TaskScoreSuite):
    """A benchmark of questions about long texts. module: its reader. cuts: whether a text that is too long
    for a length loses its middle, as the benchmark does it."""

    caption = 'Score of every task'
    cuts = takes_data = needs_data = True

    def __init__(self, module: ModuleType):
        self.module, self.tasks = module, tuple(module.TASKS)

    def with_data(self, plan: Plan, folder: Path, model: runner.Model) -> tuple[Plan, list[Path], list[str]]:
        paths = self.module.files(folder)
        if not paths:
            raise ValueError(f'--data {folder} has no file of {self.title}; {self.module.LAYOUT}')
        of_task, problems = self.read(folder, plan.lengths)
        return dataclasses.replace(plan, questions=Questions(of_task, model)), paths, problems

    def read(self, folder: Path, lengths: Sequence[int]) -> tuple[dict[str, list[Question]], list[str]]:
        """({task: questions}, a sentence for each row that cannot be used)."""
        return self.module.read(folder)

    def check(self, model: runner.Model, plan: Plan) -> Iterator[str]:
        """Look at all questions: one may be too long without its text, or a text that is not cut too long."""
        chosen = list(self._chosen(plan))
        if not chosen:
            yield (f"the files of {self.title} have no questions of {', '.join(plan.tasks or self.tasks)} at "
                   f"lengths {', '.join(map(str, plan.lengths))}; name other ones")
        for question, length, i in chosen:
            tokens = (question.sample(model, length, i, '').meta['tokens'] if self.cuts else
                      plan.questions.tokens(question, length, i))
            limit = length - 2 if self.cuts else model.config.max_position_embeddings
            if tokens > limit:
                yield f'{question.place} takes {tokens} tokens with its answer' + (
                    f', without its text, too many for length {length}; use a larger length' if self.cuts else
                    f', more than the {limit} positions of the model; use shorter lengths or fewer samples')

    def items(self, plan: Plan) -> list[runner.Item]:
        """The first questions of each task."""
        return [self._item(plan.questions, *one) for one in self._chosen(plan)]

    def _chosen(self, plan):
        """Iterator of (question, length, index)."""
        for length in plan.lengths:
            for task in plan.selected(plan.questions.of_task):
                of_length = [one for one in plan.questions.of_task[task] if one.length in (None, length)]
                for i, question in enumerate(of_length[:plan.counts[length]]):
                    yield question, length, i

    def _item(self, questions, question, length, i):
        # A benchmark asks several questions about a text; of one that is cut they share the first half.
        group = (length, question.head, hash(question.text)) if length >= SHARED_FROM else None
        if self.cuts:
            make, tokens = functools.partial(question.fitted, questions.model, length, i), None
        else:
            tokens = questions.tokens(question, length, i)
            make = functools.partial(question.sample, questions.model, length, i, tokens=tokens)
        return runner.Item(question.task, length, i, make, group, tokens=tokens)

    def row_score(self, row: Mapping) -> float:
        return metrics.score(row['meta']['metric'], row['text'], row['outputs'], row['meta'])

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """'groups' are the columns of the benchmark's own table, {group: {length: record}}."""
        groups = {}
        for name in ('overall', *getattr(self.module, 'GROUPS', ())):
            members = [row for row in rows if name in ('overall', *row['meta']['groups'])]
            for length in sorted({row['length'] for row in members}):
                groups.setdefault(name, {})[length] = self.record(
                    [row for row in members if row['length'] == length])
        return {**super().scores(plan, rows), 'groups': groups}

    def record(self, rows: Sequence[Mapping]) -> dict:
        """A scoring.TaskScore with 'chance', 0..100, of a guess, and 'cut', how many texts lost their
        middle."""
        cut = sum(row['meta']['cut'] for row in rows)
        return {**super().record(rows), 'chance': mean_chance(rows), 'cut': cut}

    def last_rows(self, result: Mapping) -> Iterator[list[str]]:
        lengths = self.lengths(result)
        for name, records in result['groups'].items():
            yield ['all questions' if name == 'overall' else name, *(
                self.describe(records[length]) if length in records else '' for length in lengths)]
        yield from super().last_rows(result)

    def sentences(self, result: Mapping) -> list[str]:
        """The chance level, how many texts were cut, and how the prompts differ from the benchmark's."""
        out, overall = [], result['groups']['overall']
        guessed = sorted({(record['chance'], task) for task, records in result['tasks'].items()
                          for record in records.values() if record['chance']})
        by_level = {level: [task for _, task in group]
                    for level, group in itertools.groupby(guessed, key=lambda one: one[0])}
        if len(guessed) == len(result['tasks']) and len(by_level) == 1:
            out.append(f'by chance {guessed[0][0]:.3g}%')
        elif guessed:
            described = [f"{level:.3g}% on {', '.join(tasks)}" for level, tasks in by_level.items()]
            others = ['the other tasks 0'] * (len(guessed) < len(result['tasks']))
            out.append(f"by chance {'; '.join(described + others)}")
        if cut := sum(record['cut'] for record in overall.values()):
            count = sum(record['count'] for record in overall.values())
            out.append(f'{cut} of {count} texts lost their middle to fit into their length')
        return [*out, 'the metrics follow those of the benchmark; the prompts are worded by this library, so '
                'scores compare only roughly with published ones']


class LongBenchV2Suite(PublishedSuite):
    name, title = 'longbench_v2', 'LongBench v2'

    def __init__(self):
        super().__init__(longbench_v2)


class BABILongSuite(PublishedSuite):
    name, title, cuts = 'babilong', 'BABILong', False

    def __init__(self):
        super().__init__(babilong)

    def read(self, folder: Path, lengths: Sequence[int]) -> tuple[dict[str, list[Question]], list[str]]:
        unknown = [length for length in lengths if length not in babilong.LABELS]
        if unknown:
            raise ValueError(f"length {unknown[0]} is not one of BABILong's files; use 512 for 0k, or 1024 "
                             'for 1k and its doubles')
        return babilong.read(folder, lengths)


class InfiniteBenchSuite(PublishedSuite):
    name, title = 'infinitebench', 'InfiniteBench'

    def __init__(self):
        super().__init__(infinitebench)
