"""Needle placement: target depths spread evenly over the samples, or RULER's fixed shuffles.

A target is what a question asks for: a needle or a document.
"""

import dataclasses
import random

from lct.eval import samples

GOLDEN = (5 ** 0.5 - 1) / 2
RULER_DEPTHS = [round(100 * i / 39) / 100 for i in range(40)]


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Every order is random, and the depths of targets are spread evenly over the samples of a cell.

    Steps of the golden ratio are close to evenly spaced for any number of samples.
    """

    seed: int
    name: str = 'stratified'

    def depth(self, task: str, length: int, index: int) -> float:
        """0..1: the depth of the first target of sample `index`."""
        return (samples.rng(self.seed, 'depth', task, length).random() + index * GOLDEN) % 1

    def start(self, rng: random.Random, lines: int) -> int:
        """The line at which an excerpt begins of a text of `lines` lines."""
        return rng.randrange(lines)

    def shuffle(self, rng: random.Random, items: list) -> None:
        rng.shuffle(items)

    def needle_depths(
        self, rng: random.Random, first_depth: float, is_target: list[bool], in_text: bool,
    ) -> list[float]:
        """Depths of needles: targets at even distances from first_depth on, in random order, others anywhere.

        in_text: whether the haystack is text.
        """
        count = sum(is_target)
        even = [(first_depth + i / count) % 1 for i in range(count)]
        rng.shuffle(even)
        return [even.pop() if target else rng.random() for target in is_target]

    def place_documents(self, rng: random.Random, first_depth: float, targets: list, others: list) -> list:
        """One list of both: others in random order, targets at even distances from first_depth on.

        Shuffles its arguments in place.
        """
        rng.shuffle(others)
        rng.shuffle(targets)
        out, count = list(others), len(others) + len(targets)
        indices = sorted({int((first_depth + i / len(targets)) % 1 * count) for i in range(len(targets))})
        indices += [i for i in range(count) if i not in indices][:len(targets) - len(indices)]
        for i, item in sorted(zip(indices, targets, strict=True), key=lambda pair: pair[0]):
            out.insert(i, item)
        return out


@dataclasses.dataclass(frozen=True)
class RulerFixed:
    """RULER's own rule: one shuffle with the same seed for every sample.

    Equal numbers of items are therefore always permuted alike (under seed 42 the target of 12 documents is
    always the tenth). Texts and prompt lengths stay ours.
    """

    seed: int = 42
    name: str = 'ruler_compat'

    def depth(self, task: str, length: int, index: int) -> float:
        return 0.0

    def start(self, rng: random.Random, lines: int) -> int:
        return 0

    def shuffle(self, rng: random.Random, items: list) -> None:
        random.Random(self.seed).shuffle(items)

    def needle_depths(
        self, rng: random.Random, first_depth: float, is_target: list[bool], in_text: bool,
    ) -> list[float]:
        """In text, shuffled ones of 40 depths from the top; otherwise random ones from the bottom."""
        count = len(is_target)
        order = list(range(count))
        self.shuffle(rng, order)
        if in_text:
            if count > len(RULER_DEPTHS):
                raise ValueError(f'{count} needles in text are more than the {len(RULER_DEPTHS)} depths of '
                                 'RULER; use fewer or stratified depths')
            depths = sorted(rng.sample(RULER_DEPTHS, count))
        else:
            depths = sorted((rng.random() for _ in is_target), reverse=True)
        return [depth for _, depth in sorted(zip(order, depths, strict=True))]

    def place_documents(self, rng: random.Random, first_depth: float, targets: list, others: list) -> list:
        out = targets + others
        self.shuffle(rng, out)
        return out
