"""Outcomes of adversarial needles: the right value, a wrong one, both or none."""

from collections.abc import Iterable

from lct.eval import scoring
from lct.eval.samples import Sample

OUTCOMES = ('target', 'stale', 'mixed', 'none')


def outcome(sample: Sample, text: str) -> str:
    """'target', 'stale' (a value that is wrong for this question), 'mixed' (both) or 'none'."""
    has_target = scoring.contains_value(text, sample.outputs[0])
    has_stale = any(scoring.contains_value(text, value) for value in sample.meta['stale'])
    return {(True, False): 'target', (False, True): 'stale', (True, True): 'mixed', (False, False): 'none'}[
        has_target, has_stale]


def rates(pairs: Iterable[tuple[Sample, str]]) -> dict:
    """Outcome rates of (Sample, predicted text) pairs, for JSON.

    Returns:
      {outcome: rate} of the four outcomes, which sum to 1, and
      'interval': 95% of the target rate, None where all questions are about one text;
      'count': number of samples;
      'position_bias': the target rate where the right statement comes first less the rate where it comes
      last, None where its position is always the same.
    """
    pairs = list(pairs)
    if not pairs:
        raise ValueError('no predictions to rate; run at least one sample')
    outcomes = [outcome(sample, text) for sample, text in pairs]
    out = {kind: outcomes.count(kind) / len(outcomes) for kind in OUTCOMES}
    # Questions about one text are correlated.
    by_position, by_text = {'first': [], 'last': []}, {}
    for kind, (sample, _) in zip(outcomes, pairs, strict=True):
        is_right = kind == 'target'
        by_text.setdefault(sample.meta.get('group'), []).append(float(is_right))
        if sample.meta.get('right_is') in by_position:
            by_position[sample.meta['right_is']].append(is_right)
    independent = None in by_text
    interval = (scoring.wilson(out['target'], len(outcomes)) if independent
                else scoring.clustered_interval(list(by_text.values())))
    first, last = by_position.values()
    bias = sum(first) / len(first) - sum(last) / len(last) if first and last else None
    return {**out, 'interval': interval and list(interval), 'count': len(outcomes), 'position_bias': bias}
