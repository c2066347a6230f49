"""Scores of predictions: RULER's metrics, their statistical errors, and effective context lengths."""

import collections
import dataclasses
import difflib
import math
import re
import string
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from lct.eval import samples
from lct.text import short_length

RULER_THRESHOLD = 85.6  # Llama-2-7B-chat at 4K, the bar of RULER's effective length
OWN_BASE_FRACTION = 0.85  # of the model's own score at a short length, as in NoLiMa
ANY_REFERENCE_TASKS = ('qa_1', 'qa_2')  # any reference is right; the other tasks require all of them
CHUNK_SUFFIX = re.compile(r'-\d+$')  # of RULER's prediction files written in chunks
CONTROL = re.compile(r'[\x00-\x1f]')
Z = 1.959963984540054  # of a 95% interval
COUNTS = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen '
          'sixteen seventeen eighteen nineteen twenty').split()
NUMBER = re.compile(r'\d+(?:,\d{3})*|(?<![a-z])(?:' + '|'.join(COUNTS) + ')(?![a-z])')
NAME = re.compile(r'[a-z0-9]+')
LIST_ITEM = re.compile(r'(?:\d+[.)])?\W*\w+\W*')  # a line with a bullet or a number, and one word


def clean(text: str) -> str:
    """A prediction as RULER's evaluate.py reads it."""
    return CONTROL.sub('\n', text.strip()).strip()


def string_match_all(text: str, outputs: Sequence[str]) -> float:
    """The fraction of outputs within text, case-insensitive."""
    return sum(output.lower() in text.lower() for output in outputs) / len(outputs)


def string_match_part(text: str, outputs: Sequence[str]) -> float:
    """1.0 if any of outputs is within text, case-insensitive."""
    return float(any(output.lower() in text.lower() for output in outputs))


def exact_match(text: str, outputs: Sequence[str]) -> float:
    """1.0 if text is one of outputs, apart from case, punctuation, articles and spaces (Rajpurkar et al.
    2016, "SQuAD")."""
    return float(_words(text) in [_words(output) for output in outputs])


def token_f1(text: str, outputs: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the words of text, with the best of outputs, as in
    SQuAD."""
    return max(f1(_words(text), _words(output)) for output in outputs)


def _words(text):
    kept = ''.join(x for x in text.lower() if x not in string.punctuation)
    return [word for word in kept.split() if word not in ('a', 'an', 'the')]


def f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    """The harmonic mean of precision and recall, each element as often as it occurs."""
    shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def similarity(text: str, outputs: Sequence[str]) -> float:
    """The ratio of equal characters, as OpenAI's MRCR scores, to the most alike of outputs.

    An output of one line is compared with the first line of text that is more than half as long, if there is
    one: so a short phrase may precede the answer, and an answer that lists many texts is not right.
    """
    return max(difflib.SequenceMatcher(None, _repeated(text, output), output).ratio() for output in outputs)


def repeated_behind(prefix: str, text: str, outputs: Sequence[str]) -> float:
    """The ratio of equal characters behind a prefix that text has to begin with, as OpenAI grades MRCR."""
    if not text.startswith(prefix):
        return 0.0
    behind = text.removeprefix(prefix)
    return max(difflib.SequenceMatcher(None, behind, output.removeprefix(prefix)).ratio()
               for output in outputs)


def _repeated(text, output):
    lines = [line for line in map(str.strip, text.splitlines()) if 2 * len(line) > len(output)]
    return text.strip() if '\n' in output or not lines else lines[0]


def set_f1(text: str, outputs: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of a set of names, as GraphWalks scores.

    The names in text are its words that are spelled like one of outputs: letters and digits at the same
    places, as in 'qk417'. The first line with a name counts or, if it is an item of a list, the list.
    """
    wanted = {output.lower() for output in outputs}
    shapes, found = {_shape(name) for name in wanted}, set()
    for line in filter(None, map(str.strip, text.lower().splitlines())):
        named = {name for name in NAME.findall(line) if _shape(name) in shapes}
        is_item = len(named) == 1 and LIST_ITEM.fullmatch(line) is not None
        if found and not is_item:
            break
        found |= named
        if named and not is_item:
            break
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def _shape(name):
    return ''.join('0' if x.isdigit() else 'a' for x in name)


def in_order(text: str, outputs: Sequence[str]) -> float:
    """1.0 if text names all outputs, each for the first time after the one before it."""
    starts = [find_value(text, output) for output in outputs]
    return float(min(starts) >= 0 and starts == sorted(starts))


def first_number(text: str, outputs: Sequence[str]) -> float:
    """1.0 if the first number in text, in digits or as a word up to twenty, is one of outputs."""
    found = NUMBER.search(text.lower())
    return float(found is not None and _integer(found[0]) in map(_integer, outputs))


def _integer(number):
    return COUNTS.index(number) if number in COUNTS else int(number.replace(',', ''))


DEFAULT_METRIC = 'all'
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    'all': string_match_all, 'any': string_match_part, 'exact': exact_match, 'f1': token_f1,
    'similarity': similarity, 'set_f1': set_f1, 'order': in_order, 'number': first_number}


def score(task: str, text: str, outputs: Sequence[str]) -> float:
    """0..1: RULER's score of one prediction."""
    return (string_match_part if task in ANY_REFERENCE_TASKS else string_match_all)(clean(text), outputs)


def names_first(text: str, value: str, others: Iterable[str]) -> float:
    """1.0 if text names value before it names any of others.

    So an answer that lists everything is not right, and one that goes on to another question stays right.
    """
    start = find_value(text, value)
    return float(start >= 0 and not any(0 <= find_value(text, other) < start for other in others))


def contains_value(text: str, value: str) -> bool:
    """Whether text contains value, case-insensitive, but not as a part of a longer number or word.

    RULER counts any substring. Here a digit next to a digit, or a cased letter next to one, does not count;
    everything else may touch the value: underscores, units, scripts without spaces.
    """
    return find_value(text, value) >= 0


def find_value(text: str, value: str) -> int:
    """Where the cleaned text first contains value, as contains_value counts it; -1 if nowhere."""
    text, value = clean(text).lower(), value.lower()
    for match in re.finditer(f'(?={re.escape(value)})', text):
        start = match.start()
        if not (_continues(text[max(start - 1, 0):start], value[:1])
                or _continues(value[-1:], text[start + len(value):][:1])):
            return start
    return -1


def _continues(left, right):
    """Whether two neighbouring characters belong to one number or one word."""
    is_cased = lambda x: x.lower() != x.upper()
    return left.isdigit() and right.isdigit() or is_cased(left) and is_cased(right)


# ---------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------


def wilson(mean: float, count: float) -> tuple[float, float]:
    """(low, high) of a 95% interval (Wilson 1927) for a mean of count scores in 0..1.

    It is meant for scores of 0 and 1, and conservative for fractions, which vary less.
    """
    center = (mean + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half_width = Z * math.sqrt(mean * (1 - mean) / count + Z * Z / (4 * count * count)) / (1 + Z * Z / count)
    return max(center - half_width, 0.0), min(center + half_width, 1.0)


def clustered_interval(clusters: Sequence[Sequence[float]],
                       strata: Sequence[Hashable] | None = None) -> tuple[float, float] | None:
    """(low, high) of a 95% interval for a mean of scores that are correlated within clusters; None for one.

    clusters: scores in 0..1 of each. strata: the case that each cluster belongs to, such as a length, where
    the cases are fixed and their means may differ: clusters vary about the mean of their stratum.

    The result is Wilson's interval for the effective number of independent scores, the number that gives the
    variance over clusters. The observed variance of n clusters in s strata has weight n - s beside weight s
    for the worst case, in which a cluster counts as one score. Otherwise few clusters that agree by chance
    would get almost no interval; Student's t makes the same correction.
    """
    if len(clusters) < 2:
        return None
    sums, sizes = np.array([sum(one) for one in clusters]), np.array([len(one) for one in clusters])
    n, count, mean = len(clusters), int(sizes.sum()), float(sums.sum() / sizes.sum())
    if mean in (0, 1):
        return wilson(mean, n)
    _, stratum = np.unique([0] * n if strata is None else strata, return_inverse=True)
    members, totals, all_sizes = (np.bincount(stratum, x) for x in (np.ones(n), sums, sizes))
    residuals = (sums - (totals / all_sizes)[stratum] * sizes) ** 2
    squares = np.bincount(stratum, residuals) * members / np.maximum(members - 1, 1)
    observed, worst = float(squares.sum()) / count ** 2, mean * (1 - mean) / n
    free = n - len(members)
    return wilson(mean, min(mean * (1 - mean) * n / (free * observed + len(members) * worst), count))


# ---------------------------------------------------------------------------------------------------
# Tasks and lengths
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TaskScore:
    """Mean of a task at a length in 0..100, rounded as RULER rounds; stderr and interval in the same units.

    stderr is NaN for a single sample. nulls: number of empty predictions.
    """

    mean: float
    stderr: float
    interval: tuple
    count: int
    nulls: int


def task_score(scores: Sequence[float], texts: Iterable[str] = ()) -> TaskScore:
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
    """Unweighted mean over tasks: each has the same weight however many samples it has."""

    mean: float
    stderr: float
    interval: tuple
    tasks: dict


def length_score(tasks: dict[str, TaskScore]) -> LengthScore:
    """LengthScore of {task: TaskScore}."""
    tasks = dict(tasks)
    mean = sum(score.mean for score in tasks.values()) / len(tasks)
    stderr = math.sqrt(sum(score.stderr ** 2 for score in tasks.values())) / len(tasks)
    # The distances to each end of an interval add in quadrature, as standard errors do.
    below = math.sqrt(sum((score.mean - score.interval[0]) ** 2 for score in tasks.values())) / len(tasks)
    above = math.sqrt(sum((score.interval[1] - score.mean) ** 2 for score in tasks.values())) / len(tasks)
    return LengthScore(mean, stderr, (mean - below, mean + above), tasks)


def weighted_average(means: Sequence[float], increasing: bool = True) -> float:
    """RULER's wAvg of means from the shortest length to the longest: weights 1..n, or n..1."""
    weights = np.arange(1, len(means) + 1)
    return float(np.average(means, weights=weights if increasing else weights[::-1]))


def effective_length(means: dict[int, float], threshold: float = RULER_THRESHOLD) -> int | None:
    """The largest length up to which every tested one is above threshold; None if the shortest is not.

    means: {length: mean}. RULER judges each length alone; here a length above a failed one does not count.
    """
    best = None
    for length in sorted(means):
        if means[length] <= threshold:
            break
        best = length
    return best


def own_threshold(means: dict[int, float], base_length: int | None = None) -> float:
    """85% of the model's own base score: the best at lengths up to base_length (default: the shortest)."""
    base_length = min(means) if base_length is None else base_length
    base = [mean for length, mean in means.items() if length <= base_length]
    if not base:
        raise ValueError(f'no tested length is up to base_length {base_length}; use {min(means)} or more')
    return OWN_BASE_FRACTION * max(base)


def summary(lengths: dict[int, LengthScore], base_length: int | None = None) -> dict:
    """The rows of RULER's table for {length: LengthScore}, for JSON.

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


def effective_length_label(length: int | None, means: dict[int, float]) -> str:
    """'32K', '>128K' if the longest tested length passes, '<4K' if the shortest fails."""
    if length is None:
        return f'<{short_length(min(means))}'
    return f"{'>' if length == max(means) else ''}{short_length(length)}"


def read_predictions(path: str) -> tuple[list[tuple[str, str, list[str]]], list[str]]:
    """([(task, text, outputs)], problems) of a RULER prediction file <task>.jsonl."""
    rows, problems = samples.read(path)
    task = CHUNK_SUFFIX.sub('', str(path).rsplit('/', 1)[-1].removesuffix('.jsonl'))
    out = []
    for number, fields in rows:
        outputs = fields.get('outputs') or [fields.get('output')]
        if isinstance(fields.get('pred'), str) and all(isinstance(one, str) for one in outputs):
            out.append((task, fields['pred'], outputs))
        else:
            problems.append(f"{path} line {number + 1} has no text 'pred' or no 'outputs'; make it again")
    return out, problems
