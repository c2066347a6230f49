"""A long story of a village: how often something happens in it, and in which order things happen.

Every line is an event, in the order of the story. All names and lines are our own.
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import numpy as np

from lct.eval import samples
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.material import Material, PromptFrame

PEOPLE = 'Anselm Bettina Cedric Dagmar Edgar Frieda Godwin Hedda Ivo Jutta Konrad Leonie'.split()
PLACES = ('mill bakery harbor chapel quarry tavern orchard market bridge library castle well forge school '
          'cemetery barn').split()
OBJECTS = ('kite drum barrel lantern saddle violin kettle ladder mirror carpet clock anchor basket trumpet '
           'cradle wheelbarrow').split()
DEEDS = 'bought sold lost painted broke hid'.split()
TIMES = ('The next morning', 'Later that day', 'At noon', 'After the rain', 'Some days later',
         'When evening came')
VISIT = '{time} {person} went to the {place}.\n'
OTHER_LINES = (  # about people and places, none of them a visit
    '{time} {person} wrote a letter about the {place}.\n',
    '{time} {person} asked {other} about the {place}.\n',
    '{time} {person} played cards with {other}.\n', '{time} {person} dreamed of the {place}.\n')
MENTION = '{time} {person} talked to {other} about the {thing}.\n'  # of an object, without a deed
VISITS = range(2, 10)


@dataclasses.dataclass(frozen=True)
class Count:
    """How often a person goes to a place: 2 to 9 times, sample by sample.

    near: visits of the person to other places, and as many of other people to the place, at least. The score
    is right for the number in digits or as a word.
    """

    task: str = 'story_count'
    near: int = 3
    max_new_tokens: int = 16

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng = material.rng(self, length, index)
        person, *others = rng.sample(PEOPLE, 1 + self.near)
        place, *other_places = rng.sample(PLACES, 1 + self.near)
        count = VISITS[index % len(VISITS)]
        pairs = [*[(person, place)] * count, *zip(others, itertools.repeat(place), strict=False),
                 *zip(itertools.repeat(person), other_places, strict=False)]
        lines = [VISIT.format(time=rng.choice(TIMES), person=who, place=to) for who, to in pairs]
        frame = _frame(f'How many times did {person} go to the {place}? Answer with the number.',
                       f' The number of times that {person} went to the {place} is')
        problem = _Problem(frame, lines, count, [str(count)],
                           {'metric': 'number', 'chance': 1 / len(VISITS)}, (person, place))
        return problem.sample(material, self, length, index, rng)


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of `events` deeds with different objects, each done once.

    Other lines mention the objects too. The score is right for all objects in the right order.
    """

    task: str = 'story_order'
    events: int = 4
    max_new_tokens: int = 64  # for those who write whole sentences

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if not 2 <= self.events <= len(OBJECTS):
            raise ValueError(f'{self.events} events must be 2 to {len(OBJECTS)}')
        rng = material.rng(self, length, index)
        objects = rng.sample(OBJECTS, self.events)
        deeds = [f'{rng.choice(PEOPLE)} {rng.choice(DEEDS)} the {thing}' for thing in objects]
        lines = [f'{rng.choice(TIMES)} {deed}.\n' for deed in deeds]
        for thing in objects:
            person, other = rng.sample(PEOPLE, 2)
            lines.append(MENTION.format(time=rng.choice(TIMES), person=person, other=other, thing=thing))
        listing = '; '.join(rng.sample(deeds, len(deeds)))
        frame = _frame(f'Each of these things happened once: {listing}. In which order? Name the '
                       f'{self.events} objects, beginning with the earliest, and write nothing else.',
                       ' The objects, from the earliest to the latest:')
        problem = _Problem(frame, lines, self.events, objects,
                           {'metric': 'order', 'chance': 1 / math.factorial(self.events)})
        return problem.sample(material, self, length, index, rng)


def _frame(question, prefix):
    head = ('A story of a village follows, one event on each line, in the order in which they happened. A '
            'question about it comes last.\n\n')
    return PromptFrame(head, f'Question: {question}\nAnswer:', prefix)


class _Problem(NamedTuple):
    """lines: for the story, the first `targets` of them spread evenly and in their order.

    visit: the (person, place) that no other line of the story may have.
    """

    frame: PromptFrame
    lines: list
    targets: int
    outputs: list
    meta: dict
    visit: tuple | None = None

    def sample(self, material, config, length, index, rng):
        budget = material.budget(config, length, self.frame, ', '.join(self.outputs))
        sizes = int(material.counter.count_each(self.lines).sum())
        story = material.cached('story', lambda: _Story.make(material))
        others, tokens = story.excerpt(rng, budget.room(sizes), self.visit)
        first = material.first_depth(config, length, index)
        depths = sorted((first + (i + rng.random()) / self.targets) % 1 for i in range(self.targets))
        depths += [rng.random() for _ in self.lines[self.targets:]]
        context, depths = prompt_fitting.insert_lines(
            others, tokens, list(zip(depths, self.lines, strict=True)), material.counter)
        return budget.sample(
            index, context, self.outputs, int(tokens.sum()) + sizes,
            {'depths': depths[:self.targets], 'events': len(others) + len(self.lines), **self.meta})


class _Story(NamedTuple):
    """All lines that a story may have; tokens [n]; visits [n], the (person, place) of each or None."""

    lines: list
    tokens: np.ndarray
    visits: list

    @classmethod
    def make(cls, material):
        visits = [(person, place) for person in PEOPLE for place in PLACES for _ in TIMES]
        times = itertools.cycle(TIMES)
        lines = [VISIT.format(time=next(times), person=person, place=place) for person, place in visits]
        rng = samples.rng(material.seed, 'story')
        for _ in range(len(lines)):
            person, other = rng.sample(PEOPLE, 2)
            lines.append(rng.choice(OTHER_LINES).format(
                time=rng.choice(TIMES), person=person, other=other, place=rng.choice(PLACES)))
        tokens = material.counter.count_each(lines)
        material.counter.check_additive(lines[:1024])
        return cls(lines, tokens, visits + [None] * (len(lines) - len(visits)))

    def excerpt(self, rng, room, visit):
        """(lines, tokens) in random order that fit into room tokens, none of them the visit."""
        allowed = np.array([i for i, one in enumerate(self.visits) if visit is None or one != visit])
        draws = np.random.default_rng(rng.getrandbits(64)).integers(
            0, len(allowed), room // int(self.tokens.min()) + 1)
        chosen = allowed[draws]
        chosen = chosen[:prompt_fitting.count_fitting(self.tokens[chosen], room)]
        return [self.lines[i] for i in chosen], self.tokens[chosen]
