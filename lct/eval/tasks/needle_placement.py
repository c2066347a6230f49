"""Where gold goes: evenly over all places from sample to sample, or as RULER's fixed shuffles put it."""

import dataclasses
import random

from lct.eval import samples

GOLDEN = (5 ** 0.5 - 1) / 2
RULER_DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Every order is drawn anew, and the depths of gold are spread evenly over the samples of a cell:
    steps of the golden ratio are near to evenly spaced for any number of samples."""

    seed: int
    name: str = 'stratified'

    def depth(self, task, length, index):
        """0..1: where the first gold of sample index goes."""
        return (samples.rng(self.seed, 'depth', task, length).random() + index * GOLDEN) % 1

    def start(self, rng, lines):
        """The line of a text to begin with."""
        return rng.randrange(lines)

    def shuffle(self, rng, items):
        rng.shuffle(items)

    def needle_depths(self, rng, first, gold, in_text):
        """Depths of needles, of which gold[i] says whether it is asked for: gold at even distances from
        first on, in any order, the others anywhere."""
        count = sum(gold)
        even = [(first + i / count) % 1 for i in range(count)]
        rng.shuffle(even)
        return [even.pop() if asked else rng.random() for asked in gold]

    def put_gold(self, rng, first, gold, others):
        """A list of both: others in any order, gold at even distances from the fraction first on."""
        rng.shuffle(others)
        rng.shuffle(gold)
        out, count = list(others), len(others) + len(gold)
        places = sorted({int((first + i / len(gold)) % 1 * count) for i in range(len(gold))})
        places += [i for i in range(count) if i not in places][:len(gold) - len(places)]
        for place, item in sorted(zip(places, gold, strict=True), key=lambda pair: pair[0]):
            out.insert(place, item)
        return out


@dataclasses.dataclass(frozen=True)
class RulerFixed:
    """RULER's own rule: one shuffle with the same seed for every sample, so that equal numbers of items are
    always permuted alike (the gold of 12 documents is always the tenth under seed 42). The texts and the fitting of
    lengths stay ours."""

    seed: int = 42
    name: str = 'ruler_compat'

    def depth(self, task, length, index):
        return 0.0

    def start(self, rng, lines):
        return 0

    def shuffle(self, rng, items):
        random.Random(self.seed).shuffle(items)

    def needle_depths(self, rng, first, gold, in_text):
        """In text some of 40 depths from the top in the shuffled order, between lines random ones from the
        bottom."""
        order = list(range(len(gold)))
        self.shuffle(rng, order)
        if in_text:
            if len(gold) > len(RULER_DEPTHS):
                raise ValueError(f'{len(gold)} needles in text are more than the {len(RULER_DEPTHS)} depths of '
                                 'RULER; use fewer or stratified depths')
            depths = sorted(rng.sample(RULER_DEPTHS, len(gold)))
        else:
            depths = sorted((rng.random() for _ in gold), reverse=True)
        return [depth for _, depth in sorted(zip(order, depths, strict=True))]

    def put_gold(self, rng, first, gold, others):
        out = gold + others
        self.shuffle(rng, out)
        return out
