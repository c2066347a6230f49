"""Scores of predictions: RULER's metrics, what they are worth statistically, and the length a model can use."""

import dataclasses
import math
import re

import numpy as np

from lct.eval import samples

RULER_THRESHOLD = 85.6  # Llama-2-7B-chat at 4K, the bar of RULER's effective length
OF_OWN_BASE = 0.85  # NoLiMa's: of the model's own score where it is good
PART_TASKS = ('qa_1', 'qa_2')  # any reference will do; the other tasks want them all
CHUNK = re.compile(r'-\d+$')  # of a prediction file that RULER wrote in parts
CONTROL = re.compile(r'[\x00-\x1f]')
Z = 1.959963984540054  # of a 95% interval


def clean(text):
    """A prediction as RULER's evaluate.py reads it."""
    return CONTROL.sub('\n', text.strip()).strip()


def match_all(text, outputs):
    """The fraction of outputs within text, whatever their case."""
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def match_part(text, outputs):
    """1.0 if any of outputs is within text, whatever its case."""
    return float(any(output.lower() in text.lower() for output in outputs))


def score(task, text, outputs):
    """0..1: RULER's score of one prediction."""
    return (match_part if task in PART_TASKS else match_all)(clean(text), outputs)


def says(text, value):
    """Whether value is said in text as a word of its own, whatever its case: of digits, no part of a longer number."""
    return bool(re.search(rf'(?<!\w){re.escape(value)}(?!\w)', clean(text), re.IGNORECASE))


def wilson(mean, count):
    """(low, high) of a 95% interval (Wilson 1927) for a mean of count scores in 0..1.

    Exact in spirit for scores of 0 and 1, on the safe side for fractions, which vary less.
    """
    center = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return max(center - half, 0.0), min(center + half, 1.0)


def interval_of_sets(sets):
    """(low, high) of a 95% interval for the mean of scores that hang together within sets; None of one set.

    sets: [[score in 0..1]]. Wilson's, of as many independent scores as would vary like the sets do. What n sets show of
    that is weighed n - 1 to 1 against the worst, that a set counts as one score: else sets that agree by chance would
    have hardly an interval, as by Student's t.
    """
    if len(sets) < 2:
        return None
    sums, sizes = np.array([sum(one) for one in sets]), np.array([len(one) for one in sets])
    n, count, mean = len(sets), int(sizes.sum()), float(sums.sum() / sizes.sum())
    if mean in (0, 1):
        return wilson(mean, n)
    shown = n / (n - 1) * float(((sums - mean * sizes) ** 2).sum()) / count ** 2
    worst = mean * (1 - mean) / n
    return wilson(mean, min(mean * (1 - mean) * n / ((n - 1) * shown + worst), count))


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """mean of a task at a length in 0..100, rounded as RULER rounds; stderr and interval in the same units.

    stderr is NaN for a single sample. nulls: empty predictions.
    """

    mean: float
    stderr: float
    interval: tuple
    count: int
    nulls: int


def task_score(scores, texts=()):
    """TaskScore of scores in 0..1; texts: the predictions, for nulls."""
    if not len(scores):
        raise ValueError('a task has no scores; run at least one sample of it')
    mean, count = sum(scores) / len(scores), len(scores)
    stderr = float(np.std(scores, ddof=1) / math.sqrt(count)) if count > 1 else math.nan
    low, high = wilson(mean, count)
    return TaskScore(round(100 * mean, 2), 100 * stderr, (100 * low, 100 * high), count,
                     sum(not clean(text) for text in texts))


@dataclasses.dataclass(frozen=True)
class LengthScore:
    """Unweighted mean over tasks, each worth the same however many samples it has."""

    mean: float
    stderr: float
    interval: tuple
    tasks: dict


def length_score(tasks):
    """LengthScore of {task: TaskScore}."""
    tasks = dict(tasks)
    mean = sum(score.mean for score in tasks.values()) / len(tasks)
    stderr = math.sqrt(sum(score.stderr ** 2 for score in tasks.values())) / len(tasks)
    # Half widths add like standard errors, each side for itself.
    below = math.sqrt(sum((score.mean - score.interval[0]) ** 2 for score in tasks.values())) / len(tasks)
    above = math.sqrt(sum((score.interval[1] - score.mean) ** 2 for score in tasks.values())) / len(tasks)
    return LengthScore(mean, stderr, (mean - below, mean + above), tasks)


def by_length(pairs):
    """{length: LengthScore} of (Sample, predicted text) pairs.

    Every length must have the same tasks: means over different tasks do not compare.
    """
    cells = {}
    for sample, text in pairs:
        cells.setdefault(sample.length, {}).setdefault(sample.task, []).append(
            (score(sample.task, text, sample.outputs), text))
    tasks = {task for cell in cells.values() for task in cell}
    for length, cell in sorted(cells.items()):
        if missing := sorted(tasks - set(cell)):
            raise ValueError(f"length {length} lacks {', '.join(missing)}, which other lengths have; run them "
                             'there too or leave that length out')
    return {length: length_score({task: task_score(*zip(*rows, strict=True))
                                  for task, rows in sorted(cells[length].items())})
            for length in sorted(cells)}


def weighted_average(means, increasing=True):
    """RULER's wAvg of means from the shortest length to the longest: weights 1..n, or n..1."""
    weights = np.arange(1, len(means) + 1)
    return float(np.average(means, weights=weights if increasing else weights[::-1]))


def effective_length(means, threshold=RULER_THRESHOLD):
    """The largest length up to which every tested one is above threshold; None if the shortest is not.

    means: {length: mean}. RULER marks lengths one by one; a model that fails in between is not helped by it here.
    """
    best = None
    for length in sorted(means):
        if means[length] <= threshold:
            break
        best = length
    return best


def own_threshold(means, base_length=None):
    """85% of the model's own base score: the best at lengths up to base_length (default: the shortest)."""
    base_length = min(means) if base_length is None else base_length
    base = [mean for length, mean in means.items() if length <= base_length]
    if not base:
        raise ValueError(f'no tested length is up to base_length {base_length}; use {min(means)} or more')
    return OF_OWN_BASE * max(base)


def summary(lengths, base_length=None):
    """What RULER's table says of {length: LengthScore}, for JSON.

    Effective lengths are None where the shortest length fails.
    """
    means = {length: result.mean for length, result in lengths.items()}
    ordered = [means[length] for length in sorted(means)]
    own = own_threshold(means, base_length)
    return {
        'lengths': sorted(means), 'means': ordered,
        'stderr': [lengths[length].stderr for length in sorted(means)],
        'average': sum(ordered) / len(ordered),
        'weighted_increasing': weighted_average(ordered),
        'weighted_decreasing': weighted_average(ordered, increasing=False),
        'threshold': RULER_THRESHOLD, 'effective_length': effective_length(means),
        'own_threshold': own, 'effective_length_of_own': effective_length(means, own),
    }


def label(length, means):
    """'32K', '>128K' if the longest tested length passes, '<4K' if the shortest fails."""
    if length is None:
        return f'<{min(means) / 1024:g}K'
    return f"{'>' if length == max(means) else ''}{length / 1024:g}K"


def read_predictions(path):
    """-> ([(task, text, outputs)], problems) of a RULER prediction file <task>.jsonl."""
    rows, problems = samples.read(path)
    task = CHUNK.sub('', str(path).rsplit('/', 1)[-1].removesuffix('.jsonl'))
    out = []
    for number, fields in rows:
        outputs = fields.get('outputs') or [fields.get('output')]
        if isinstance(fields.get('pred'), str) and all(isinstance(one, str) for one in outputs):
            out.append((task, fields['pred'], outputs))
        else:
            problems.append(f"{path} line {number + 1} has no text 'pred' or no 'outputs'; make it again")
    return out, problems
