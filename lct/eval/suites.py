"""What a suite asks, as items for the runner, and what its answers are worth, as plain values for JSON."""

import copy
import dataclasses
import functools

import numpy as np

from lct import sharding
from lct.eval import runner, samples, scoring
from lct.eval.tasks import adversarial_needles, adversarial_outcomes, code_questions, icl, ruler
from lct.eval.tasks import needle_placement as placements
from lct.eval.tasks.material import Material
from lct.eval.tasks.ruler_niah import Niah

DEPTHS = tuple(i / 10 for i in range(11))
NEEDLE = Niah('needle', 'text', max_new_tokens=32)


@dataclasses.dataclass(frozen=True)
class Grid(placements.Stratified):
    """Sample i has its needle at depths[i % len(depths)]."""

    depths: tuple = DEPTHS
    name: str = 'grid'

    def depth(self, task, length, index):
        return self.depths[index % len(self.depths)]

    def needle_depths(self, rng, first_depth, is_target, in_text):
        return [first_depth if target else rng.random() for target in is_target]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run. lengths: tokens with the answer; counts: {length: samples of each task there, of each cell for
    needles, of each number of shots in context}; tasks: names out of all suites, None for all of them; given: {task:
    [Sample]} of RULER, in place of generated ones."""

    material: Material
    lengths: tuple
    counts: dict
    tasks: tuple | None = None
    depths: tuple = DEPTHS
    given: dict | None = None

    @property
    def tokenizer(self):
        return self.material.counter.tokenizer

    def chosen(self, known):
        """The names of known that are wanted."""
        return [name for name in known if self.tasks is None or name in self.tasks]


def check_tasks(suites, tasks):
    """Refuse names that no chosen suite knows, or a suite without any of the tasks."""
    for suite in suites:
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}; the suites are {', '.join(SUITES)} and loss")
    if tasks and not suites:
        raise ValueError(f"the suite loss has no tasks such as {', '.join(tasks)}; leave them out")
    known = {task: suite for suite in suites for task in SUITES[suite].tasks}
    for task in tasks or ():
        if task not in known:
            raise ValueError(f"unknown task {task!r}; the tasks of {', '.join(suites)} are {', '.join(known)}")
    for suite in suites:
        if tasks and not set(tasks) & set(SUITES[suite].tasks):
            raise ValueError(f"suite {suite} has none of the tasks {', '.join(tasks)}; leave it out or name one of "
                             f"{', '.join(SUITES[suite].tasks)}")


# ---------------------------------------------------------------------------------------------------
# RULER
# ---------------------------------------------------------------------------------------------------


def _items(plan, configs, length, group=None):
    """Items of configs at a length, all tasks of an index before the next index."""
    return [
        runner.Item(config.task, length, i, functools.partial(plan.material.sample, config, length, i),
                    group and group(config, length, i))
        for i in range(plan.counts[length]) for config in configs
    ]


def ruler_items(plan):
    if plan.given is not None:
        return [runner.Item(task, one.length, one.index, functools.partial(_itself, one))
                for task, given in plan.given.items() for one in given]
    configs = [ruler.task(name) for name in plan.chosen(ruler.TASKS)]
    return [item for length in plan.lengths for item in _items(plan, configs, length)]


def _itself(sample):
    return sample


def read_ruler(folder, length, count, tasks=None):
    """-> ({task: [Sample]}, problems): the first `count` samples of each of RULER's data files FOLDER/TASK/*.jsonl, all
    under one nominal length."""
    given, problems = {}, []
    for name in (name for name in ruler.TASKS if tasks is None or name in tasks):
        found = []
        for path in sorted((folder / name).glob('*.jsonl')):
            more, wrong = samples.read_ruler(path, ruler.task(name).max_new_tokens)
            found += more
            problems += wrong
        if found:
            given[name] = [dataclasses.replace(one, task=name, length=length, index=i)
                           for i, one in enumerate(found[:count])]
    if not given:
        raise ValueError(f"{folder} has no TASK/*.jsonl of RULER's tasks {', '.join(tasks or ruler.TASKS)}; give the folder "
                         'that holds theirs')
    return given, problems


def ruler_scores(plan, rows):
    lengths = scoring.by_length((runner.sample_of(row), row['text']) for row in rows)
    tasks = {task: {length: dataclasses.asdict(lengths[length].tasks[task]) for length in lengths}
             for task in next(iter(lengths.values())).tasks}
    return {**scoring.summary(lengths), 'intervals': [lengths[length].interval for length in lengths],
            'tasks': tasks}


# ---------------------------------------------------------------------------------------------------
# Needles
# ---------------------------------------------------------------------------------------------------


def needle_items(plan):
    """A grid over length and depth, counts[length] samples a cell."""
    placed = copy.copy(plan.material)
    placed.placement = Grid(plan.material.seed, depths=plan.depths)
    return [
        runner.Item('needle', length, i, functools.partial(placed.sample, NEEDLE, length, i), forced=True)
        for length in plan.lengths for i in range(plan.counts[length] * len(plan.depths))
    ]


def needle_scores(plan, rows):
    """The fields of needle.NeedleResult, with the interval of the mean; samples: of a cell, for each length; forced:
    of the right answers, not of the model's own."""
    cells, records = {}, []
    for row in rows:
        depth = plan.depths[row['index'] % len(plan.depths)]
        correct = float(scoring.contains_value(row['text'], row['outputs'][0]))
        cells.setdefault((depth, row['length']), []).append(correct)
        records.append({'length': row['length'], 'depth': depth, 'sample': row['index'] // len(plan.depths),
                        'answer': row['outputs'][0], 'got': row['text'], 'correct': correct == 1})
    scores = [[float(np.mean(cells[depth, length])) for length in plan.lengths] for depth in plan.depths]
    every = [record['correct'] for record in records]
    return {'lengths': list(plan.lengths), 'depths': list(plan.depths), 'scores': scores,
            'samples': [len(cells[plan.depths[0], length]) for length in plan.lengths], 'mean': float(np.mean(every)),
            'interval': list(scoring.wilson(float(np.mean(every)), len(every))), 'records': records,
            'forced': forced_scores(rows)}


def forced_scores(rows):
    """'right': the fraction of right answers that greedy decoding would write, token for token; 'nats' of a token of
    theirs; None where rows of an earlier version do not know."""
    forced = [row.get('forced') for row in rows]
    if not all(forced):
        return None
    return {'right': float(np.mean([one['greedy'] for one in forced])),
            'nats': sum(one['nats'] for one in forced) / -sum(one['tokens'] for one in forced)}


def adversarial_items(plan):
    """Of 'several', counts[length] texts with all their questions each. 'straddling' needles lie across the borders
    of devices in the contiguous layout; a device alone has none, and they lie where eight would have theirs. Ladders of
    wrong values, such as 'latest_0' (the control) to 'latest_8', are asked where they are named."""
    items = []
    for length in plan.lengths:
        ring_size = sharding.axis_size('sequence')
        known = adversarial_needles.TASKS if plan.tasks else adversarial_needles.DEFAULTS
        configs = [known[name] for name in plan.chosen(known)]
        configs = [
            dataclasses.replace(config, shards=ring_size if ring_size > 1 else 8, seq_len=runner.slots(length))
            if isinstance(config, adversarial_needles.Straddling) else config for config in configs
        ]

        def group(config, length, i):
            queries = getattr(config, 'queries', 1)
            return (config.task, length, i // queries) if queries > 1 else None

        items += [dataclasses.replace(one, forced=True) for one in _items(plan, configs, length, group)]
    return items


def adversarial_scores(plan, rows):
    """{task: {length: adversarial_outcomes.rates with 'forced': forced_scores}}."""
    out = {}
    for task, length in dict.fromkeys((row['task'], row['length']) for row in rows):
        mine = [row for row in rows if (row['task'], row['length']) == (task, length)]
        rates = adversarial_outcomes.rates((runner.sample_of(row), row['text']) for row in mine)
        out.setdefault(task, {})[length] = rates | {'forced': forced_scores(mine)}
    return out


# ---------------------------------------------------------------------------------------------------
# Learning in context
# ---------------------------------------------------------------------------------------------------


def icl_items(plan):
    """Powers of two of shots, as many as fit into the longest length; queries of one set share their shots."""
    items, seed, tokenizer, overhead = [], plan.material.seed, plan.tokenizer, plan.material.overhead.total
    longest = max(plan.lengths)
    for name in plan.chosen(icl.TASKS):
        config = icl.task(name)
        for shots in icl.shot_counts(config, seed, tokenizer, longest, overhead):
            length = icl.length(config, shots, seed, tokenizer, overhead)
            for i in range(plan.counts[longest]):
                make = functools.partial(_icl_sample, plan, name, shots, i)
                items.append(runner.Item(name, length, _icl_index(shots, i), make, (name, shots, i // icl.QUERIES),
                                         one_line=True))
    return items


def _icl_index(shots, i):
    """A number that says the shots too: prompts of several may be equally long."""
    return shots * 10**6 + i


def _icl_sample(plan, name, shots, i):
    one = icl.sample(icl.task(name), shots, i, plan.material.seed, plan.tokenizer, plan.material.overhead.total)
    return dataclasses.replace(one, index=_icl_index(shots, i))


def icl_scores(plan, rows):
    """{task: {'curve': icl.curve of what the model wrote, 'chosen': that of the choice it finds likeliest, None where
    there is none to make and where rows of an earlier version do not know, 'references': {learner: {shots: accuracy}}}},
    all of the same samples."""
    out = {}
    for task in dict.fromkeys(row['task'] for row in rows):
        mine = [row for row in rows if row['task'] == task]
        curve = icl.curve((runner.sample_of(row), row['text']) for row in mine)
        known = all('chosen' in row for row in mine)
        chosen = icl.curve((runner.sample_of(row), row['chosen']) for row in mine) if known else None
        references = {}
        for shots in curve:
            asked = [row['index'] - _icl_index(shots, 0) for row in mine if row['meta']['shots'] == shots]
            for learner, accuracy in icl.reference_accuracy(icl.task(task), plan.material.seed, shots, asked).items():
                references.setdefault(learner, {})[shots] = accuracy
        out[task] = {'curve': curve, 'chosen': chosen, 'references': references}
    return out


# ---------------------------------------------------------------------------------------------------
# Repositories
# ---------------------------------------------------------------------------------------------------


def repository_items(plan):
    """The questions of all tasks about one text share it."""
    configs = [code_questions.TASKS[name] for name in plan.chosen(code_questions.TASKS)]
    group = lambda config, length, i: ('repository', length, i // code_questions.QUESTIONS)
    return [item for length in plan.lengths for item in _items(plan, configs, length, group)]


def repository_scores(plan, rows):
    """{task: {length: scoring.TaskScore as a dict, without stderr}}; interval: over texts of this repository, None of
    one."""
    out = {}
    for task, length in dict.fromkeys((row['task'], row['length']) for row in rows):
        mine = [row for row in rows if (row['task'], row['length']) == (task, length)]
        scores, by_text = [scoring.score(task, row['text'], row['outputs']) for row in mine], {}
        for row, score in zip(mine, scores, strict=True):
            text = row['meta'].get('bundle', row['index'] // code_questions.QUESTIONS)  # rows of an earlier version have none
            by_text.setdefault(text, []).append(score)
        scored = dataclasses.asdict(scoring.task_score(scores, [row['text'] for row in mine]))
        del scored['stderr']  # of questions as if they were independent
        interval = scoring.clustered_interval(list(by_text.values()))
        out.setdefault(task, {})[length] = scored | {'interval': interval and [100 * x for x in interval]}
    return out


@dataclasses.dataclass(frozen=True)
class Suite:
    """layout: of the cache, where the suite depends on it."""

    items: object
    scores: object
    tasks: tuple
    layout: str | None = None


SUITES = {
    'ruler': Suite(ruler_items, ruler_scores, tuple(ruler.TASKS)),
    'needle': Suite(needle_items, needle_scores, ('needle',)),
    'adversarial': Suite(adversarial_items, adversarial_scores, tuple(adversarial_needles.TASKS), 'contiguous'),
    'icl': Suite(icl_items, icl_scores, tuple(icl.TASKS)),
    'repository': Suite(repository_items, repository_scores, tuple(code_questions.TASKS)),
}


def write_predictions(folder, rows):
    """folder/LENGTH/TASK.jsonl, as RULER's evaluate.py reads them."""
    for length, task in dict.fromkeys((row['length'], row['task']) for row in rows):
        samples.write(folder / str(length) / f'{task}.jsonl', [
            samples.prediction(runner.sample_of(row), row['text']) for row in rows
            if (row['length'], row['task']) == (length, task)])
