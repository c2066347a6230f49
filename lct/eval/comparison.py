"""Two or more finished evaluations side by side: paired differences, and which remain after many comparisons.

The answers of two models to the same samples are paired, which takes the difficulty of the samples out of the
difference. Models with different tokenizers get different samples and are compared unpaired.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from lct import json_files
from lct.eval import answers, provenance
from lct.eval.scoring import Z
from lct.eval.suites import SUITES
from lct.eval.suites.suite import PromptSuite

FEWEST = 6  # samples; with fewer no difference can be significant at 5%
RESAMPLES = 9999  # of the permutation test where there are too many to count them all


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The answers in a work directory. rows: {suite: {(task, length, index): row}}."""

    name: str
    about: Mapping
    rows: Mapping[str, Mapping[tuple, Mapping]]


@dataclasses.dataclass(frozen=True)
class Difference:
    """The score of a model less the first one's, 0..1, of one task at one length.

    low, high: a 95% interval. p: of no difference. adjusted: p after Holm's correction for all differences of
    this model. count: texts that both answered questions about, or answers of each.
    """

    suite: str
    task: str
    length: int
    first: float
    second: float
    low: float
    high: float
    p: float
    count: int
    paired: bool
    adjusted: float = math.nan

    @property
    def value(self) -> float:
        return self.second - self.first


def read(workdir: Path) -> Evaluation:
    """The Evaluation of a folder of evaluate.py.

    Raises:
      ValueError: if it holds no answers.
    """
    path = workdir / 'about.json'
    if not path.is_file():
        raise ValueError(f'{workdir} is no --workdir of evaluate.py: it has no about.json')
    about = json_files.read_json(path)
    identity, rows = provenance.identity_of(about), {}
    for name, suite in SUITES.items():
        if isinstance(suite, PromptSuite) and (workdir / f'{name}.jsonl').is_file():
            rows[name] = answers.read(workdir / f'{name}.jsonl', identity)[0]
    if not any(rows.values()):
        raise ValueError(f'{workdir} holds no scored answers; run evaluate.py with a suite other than loss')
    return Evaluation(str(workdir), about, rows)


def differences(first: Evaluation, second: Evaluation) -> list[Difference]:
    """All tasks and lengths that both have, with p adjusted."""
    found, shared = [], [name for name in first.rows if name in second.rows]
    for name in shared:
        cells = [_cells(SUITES[name], one.rows[name]) for one in (first, second)]
        for key in sorted(cells[0].keys() & cells[1].keys()):
            found.append(_difference((name, *key), cells[0][key], cells[1][key]))
    order, out = holm([one.p for one in found]), []
    for one, adjusted in zip(found, order, strict=True):
        out.append(dataclasses.replace(one, adjusted=adjusted))
    return out


def _cells(suite, rows):
    """{(task, length): {index: (score, sample, text)}}; equal samples have equal references and meta."""
    out = {}
    for (task, length, index), row in rows.items():
        sample = row['outputs'], row['meta']
        out.setdefault((task, length), {})[index] = suite.row_score(row), sample, suite.text_of(row)
    return out


def _difference(key, first, second):
    pairs = {}  # of each text: its questions are correlated
    for i in sorted(first.keys() & second.keys()):
        if first[i][1] == second[i][1]:
            pairs.setdefault(first[i][2], []).append((first[i][0], second[i][0]))
    if pairs:
        a, b = np.array([np.mean(of_text, 0) for of_text in pairs.values()]).T
        low, high = paired_interval(b - a)
        return Difference(*key, a.mean(), b.mean(), low, high, sign_flip_p(b - a), len(pairs), True)
    a, b = (np.array([score for score, *_ in one.values()]) for one in (first, second))
    low, high = unpaired_interval(a, b)
    p = float(stats.permutation_test((a, b), lambda x, y: y.mean() - x.mean(), vectorized=False,
                                     n_resamples=RESAMPLES, rng=0).pvalue) if len({*a, *b}) > 1 else 1.0
    return Difference(*key, a.mean(), b.mean(), low, high, p, min(len(a), len(b)), False)


def paired_interval(values: Sequence[float]) -> tuple[float, float]:
    """(low, high) of a 95% interval for the mean of paired differences in -1..1.

    Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based
    on Paired Data": one pair is added in favour of each, so that few pairs that agree do not give an interval
    of no width.
    """
    n = len(values) + 2
    mean, square = sum(values) / n, (sum(x * x for x in values) + 2) / n
    half = Z * math.sqrt((square - mean * mean) / n)
    return max(mean - half, -1.0), min(mean + half, 1.0)


def unpaired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """(low, high) for the difference of two means of scores in 0..1.

    Agresti and Caffo 2000: one right and one wrong answer are added to each.
    """
    mean, variance = [], 0.0
    for scores in (first, second):
        n = len(scores) + 2
        center = (sum(scores) + 1) / n
        mean.append(center)
        variance += ((sum(x * x for x in scores) + 1) / n - center * center) / n
    half = Z * math.sqrt(variance)
    return max(mean[1] - mean[0] - half, -1.0), min(mean[1] - mean[0] + half, 1.0)


def sign_flip_p(values: Sequence[float]) -> float:
    """The two-sided p of no difference: how often random signs give a mean as far from 0 (Fisher 1935)."""
    values = np.array([x for x in values if x])
    if len(values) < 2:
        return 1.0
    return float(stats.permutation_test((values,), np.mean, permutation_type='samples', vectorized=False,
                                        n_resamples=RESAMPLES, rng=0).pvalue)


def holm(ps: Sequence[float]) -> list[float]:
    """p adjusted for as many comparisons (Holm 1979)."""
    out, largest = [1.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = largest
    return out


def table_rows(found: Iterable[Difference]) -> list[list[str]]:
    """[suite and task, length, samples, first, second, difference with interval, verdict] as text."""
    return [[f'{one.suite} {one.task}', f'{one.length:,}', f"{one.count}{'' if one.paired else ' unpaired'}",
             f'{100 * one.first:.1f}', f'{100 * one.second:.1f}',
             f'{100 * one.value:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f})', verdict(one)]
            for one in found]


NOTE = ('Scores are 0 to 100. The questions about one text count as one sample. Intervals are of single '
        'comparisons; the last column is corrected for all comparisons with the same evaluation.')
HEADER = ['task', 'length', 'samples', 'first', 'second', 'difference, 95% interval', 'after Holm']


def verdict(one: Difference) -> str:
    """What can be said of a difference."""
    if one.count < FEWEST:
        return f'too few samples: {FEWEST} or more can tell'
    if one.adjusted < 0.05:
        return f'different, p {one.adjusted:.2g}'
    return f'no difference shown, p {one.adjusted:.2g}'


def sentences(found: Sequence[Difference]) -> list[str]:
    """The conclusions: how many differ, and what became of the shortest length."""
    better = [one for one in found if one.adjusted < 0.05 and one.value > 0]
    worse = [one for one in found if one.adjusted < 0.05 and one.value < 0]
    out = [f"of {len(found)} comparisons {len(better)} are better and {len(worse)} worse at 5% after Holm's "
           'correction for all of them; the others show no difference, which is no proof of equality']
    if unpaired := sum(not one.paired for one in found):
        out.append(f'{unpaired} comparisons are of different samples (another tokenizer, text or seed), so '
                   'their intervals are wide')
    shortest = min((one.length for one in found), default=0)
    if short := [one for one in found if one.length == shortest]:
        mean = sum(one.value for one in short) / len(short)
        out.append(f'at the shortest length, {shortest:,} tokens, the mean over {len(short)} tasks changes '
                   f'by {100 * mean:+.1f} points')
    return out
