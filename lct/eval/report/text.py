"""Results as text for the terminal, and phrases that figures and cards share."""

from collections.abc import Iterable, Mapping

from lct.eval.loss.by_position import LossBins
from lct.eval.recall_probe import RecallResult
from lct.text import short_length, table


def recall_table(result: RecallResult) -> str:
    """Percent of numbers recalled, as a heat map for the terminal: depth downwards, length rightwards."""
    header = ['depth', *(short_length(length) for length in result.lengths)]
    rows = [[f'{100 * depth:.0f}%', *(f'{100 * score:.0f}' for score in scores)]
            for depth, scores in zip(result.depths, result.scores, strict=True)]
    rows.append(['mean', *(f'{100 * score:.0f}' for score in result.scores.mean(0))])
    total = f'{100 * result.scores.mean():.1f}% of {len(result.records)} numbers recalled'
    return f'{table(header, rows, left=(), footer=1)}\n{total}'


def describe_windows(curves: Mapping[str, LossBins]) -> str:
    """'16 windows (documents: 4)' of the losses of one or more models."""
    windows = compare_counts(curve.num_windows for curve in curves.values())
    documents = compare_counts(curve.documents for curve in curves.values())
    return f'{windows} windows (documents: {documents})'


def compare_counts(counts: Iterable[int]) -> str:
    """'11', or '5/11' where models differ."""
    return '/'.join(map(str, sorted(set(counts))))
