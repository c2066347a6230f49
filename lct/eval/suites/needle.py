"""The suite 'needle': one needle in a haystack, on a grid of length and depth."""

import copy
import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lct.eval import runner, samples, scoring
from lct.eval.report import svg
from lct.eval.suites.plan import DEPTHS
from lct.eval.suites.suite import (
    SHARED_FROM,
    Cell,
    Figure,
    Plan,
    PromptSuite,
    Table,
    describe_counts,
    teacher_forced_scores,
)
from lct.eval.tasks import needle_placement as placements
from lct.eval.tasks.ruler_niah import Niah
from lct.text import short_length

NEEDLE = Niah('needle', 'text', max_new_tokens=32)


@dataclasses.dataclass(frozen=True)
class Grid(placements.Stratified):
    """Sample i has its needle at depths[i % len(depths)]. All depths of a column, so many consecutive
    samples of a length, lie in one excerpt of the text, which is therefore read once."""

    depths: tuple[float, ...] = DEPTHS
    length: int = 0
    column: int = 0
    name: str = 'grid'

    def depth(self, task: str, length: int, index: int) -> float:
        return self.depths[index % len(self.depths)]

    def start(self, rng: random.Random, lines: int) -> int:
        return samples.rng(self.seed, 'excerpt', self.length, self.column).randrange(lines)

    def needle_depths(
        self, rng: random.Random, first_depth: float, is_target: list[bool], in_text: bool,
    ) -> list[float]:
        return [first_depth if target else rng.random() for target in is_target]


class NeedleSuite(PromptSuite):
    name, title = 'needle', 'Needles'
    tasks = ('needle',)

    def items(self, plan: Plan) -> list[runner.Item]:
        """counts[length] samples of each cell."""
        return [item for length in plan.lengths for column in range(plan.counts[length])
                for item in _column_items(plan, length, column)]

    def row_score(self, row: Mapping) -> float:
        return float(scoring.contains_value(row['text'], row['outputs'][0]))

    def text_of(self, row: Mapping) -> int:
        return row['index'] // len(DEPTHS)

    def scores(self, plan: Plan, rows: Sequence[Mapping]) -> dict:
        """The grid and its means.

        'scores' [depths][lengths], None for a cell without samples; 'samples' [depths][lengths]; 'mean' with
        its 'interval' over 'excerpts', as the depths of a column lie in one; 'records', and 'forced':
        teacher_forced_scores.
        """
        cells, columns, records = {}, {}, []
        for row in rows:
            depth = plan.depths[row['index'] % len(plan.depths)]
            correct = self.row_score(row)
            cells.setdefault((depth, row['length']), []).append(correct)
            columns.setdefault((row['length'], row['index'] // len(plan.depths)), []).append(correct)
            records.append({
                'length': row['length'], 'depth': depth, 'sample': row['index'] // len(plan.depths),
                'answer': row['outputs'][0], 'got': row['text'], 'correct': correct == 1})
        mean, lengths = float(np.mean([record['correct'] for record in records])), sorted(
            {row['length'] for row in rows})
        interval = scoring.clustered_interval([*columns.values()], [length for length, _ in columns])
        of = lambda function: [[function(cells.get((depth, length), [])) for length in lengths]
                               for depth in plan.depths]
        return {'lengths': lengths, 'depths': list(plan.depths),
                'scores': of(lambda cell: float(np.mean(cell)) if cell else None), 'samples': of(len),
                'mean': mean, 'interval': interval and list(interval), 'excerpts': len(columns),
                'records': records, 'forced': teacher_forced_scores(rows)}

    def cells(self, result: Mapping) -> Iterator[Cell]:
        grid = zip(result['depths'], result['scores'], _samples(result), strict=True)
        for depth, scores, counts in grid:
            for length, score, count in zip(result['lengths'], scores, counts, strict=True):
                if count:
                    yield Cell(self.name, 'needle', f'{length}/{depth:g}', score, '', '', count)

    def tables(self, result: Mapping) -> Iterator[Table]:
        rows = [[f'depth {100 * depth:.0f}%', *('' if score is None else f'{100 * score:.0f}'
                                                for score in scores)]
                for depth, scores in zip(result['depths'], result['scores'], strict=True)]
        rows.append(['samples per cell', *map(describe_counts, zip(*_samples(result), strict=True))])
        yield Table(['needle', *map(short_length, result['lengths'])], rows)

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        depths = [f'{100 * depth:.0f}%' for depth in result['depths']]
        picture = svg.heat_map(result['lengths'], depths, result['scores'], trained, 'depth (0% = top)')
        yield Figure(f"Needles found: {100 * result['mean']:.1f}%{_interval(result)}", picture)

    def sentences(self, result: Mapping) -> list[str]:
        out = []
        if result['interval'] is None:
            out = ['no interval of the mean where all needles lie in one excerpt: more samples lie in more']
        elif 'excerpts' in result:
            out = [f"the interval of the mean is over {result['excerpts']} excerpts, about the mean of their "
                   'length: the needles of all depths of an excerpt count together']
        if not (forced := result.get('forced')):
            return out
        return [*out, 'right answers that greedy decoding would write token for token: '
                f"{100 * forced['right']:.1f}%, at {forced['nats']:.3f} nats per token"]


def _interval(result):
    """The interval of the mean for a caption. Earlier versions took needles for independent."""
    if result['interval'] is None:
        return ''
    low, high = (f'{100 * x:.1f}' for x in result['interval'])
    of = f" over {result['excerpts']} excerpts" if 'excerpts' in result else ''
    return f', 95% interval{of} {low} to {high}'


def _samples(result):
    """Samples [depths][lengths]; earlier versions had as many in every cell of a length."""
    counts = result['samples']
    return counts if isinstance(counts[0], list) else [counts] * len(result['depths'])


def _column_items(plan, length, column):
    """An item for each depth."""
    material = copy.copy(plan.material)
    material.placement = Grid(plan.material.seed, depths=plan.depths, length=length, column=column)
    first = column * len(plan.depths)
    group = ('needle', length, column) if length >= SHARED_FROM else None
    return [runner.Item('needle', length, i, functools.partial(material.sample, NEEDLE, length, i),
                        group, teacher_forced=True) for i in range(first, first + len(plan.depths))]
