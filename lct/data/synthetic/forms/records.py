"""Records of people and things with several attributes; a question names one attribute of one of them, or of
the
one that it points to."""

from typing import NamedTuple

import numpy as np

from lct.data.synthetic.forms import strings, wordings
from lct.data.synthetic.forms.passages import ANSWER, FRAME, NOVEL, Fragment, Passage, Problem
from lct.data.synthetic.forms.strings import chance, log_uniform, pick
from lct.data.synthetic.forms.wordings import Wording, merge

COLOURS = ('red', 'green', 'blue', 'white', 'black', 'brown', 'pink', 'grey', 'yellow', 'purple', 'orange')
JOBS = ('pilot', 'nurse', 'judge', 'cook', 'clerk', 'guard', 'singer', 'editor', 'porter', 'lawyer',
        'dentist',
        'actor', 'banker', 'barber', 'farmer', 'driver', 'teacher', 'doctor')


class Attribute(NamedTuple):
    """statements: templates with {k} the person and {v} the value. questions: with {k}. kind: of the
    value."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    kind: str


ATTRIBUTES = (
    Attribute(('{k} lives in {v}.', 'The home of {k} is in {v}.'), ('Where does {k} live?',
                                                                    'Where is the home of {k}?'),
              'title'),
    Attribute(('{k} works as a {v}.', 'The job of {k} is {v}.'), ('What does {k} work as?',
                                                                  'What is the job of {k}?'),
              'job'),
    Attribute(('{k} likes the colour {v}.', 'The colour of {k} is {v}.'), ('Which colour does {k} like?',),
              'colour'),
    Attribute(('{k} moved in {v}.', 'It was in {v} that {k} moved.'), ('When did {k} move?',
                                                                       'In what year did {k} move?'),
              'year'),
    Attribute(('{k} is {v} years old.', 'The age of {k} is {v}.'), ('How old is {k}?',
                                                                    'What is the age of {k}?'), 'age'),
    Attribute(('{k} rides a horse named {v}.', 'The horse of {k} is {v}.'),
              ('What is the horse of {k} named?',
                                                                            'Which horse does {k} ride?'),
                                                                            'title'),
    Attribute(('{k} owns the ship {v}.', 'The ship of {k} bears the name {v}.'), ('Which ship does {k} own?',
                                                                                 'Name the ship of {k}.'),
                                                                                 'spaced'),
    Attribute(('{k} has the phone number {v}.', 'You can phone {k} on {v}.'),
              ('What is the phone number of {k}?',),
              'number'),
    Attribute(('{k} plays for {v}.', 'The team of {k} is {v}.'), ('Which team does {k} play for?',),
              'invented'),
    Attribute(('{k} grew up near {v}.', 'Near {v} is where {k} grew up.'),
              ('Near which place did {k} grow up?',), 'title'),
    Attribute(('{k} studied in {v}.', 'In {v} {k} studied.'), ('Where did {k} study?',), 'title'),
    Attribute(('{k} wears a {v} hat.', 'The hat of {k} is {v}.'), ('What is the hat of {k} like?',),
              'colour'),
)
POINTERS = (('{k} reports to {v}.', 'the boss of {k}', ''), ('The neighbour of {k} is {v}.',
                                                             'the neighbour of {k}', ''),
            ('{k} is married to {v}.', 'the partner of {k}', ''), ('{k} has a sister, {v}.',
                                                                   'the sister of {k}', ''),
            ('The teacher of {k} is {v}.', 'the teacher of {k}', ''))
TITLES = ('', '', '--- {i}\n', 'Page {i}\n', 'File {i}:\n', '({i}) ', '== {i} ==\n', 'Entry {i}. ')
PLAIN = Wording('', '', '', '')
REMARKS = ('', '', ' Give the answer only.', ' One word.', ' Answer briefly.', ' It is in one of the pages.')


def records(rng: np.random.Generator, size: int) -> Problem:
    """A Problem of about `size` tokens at most."""
    most = max((size - 30) // 55, 2)
    names = strings.distinct(rng, pick(rng, ('title', 'title', 'title', 'plain', 'hyphened')),
                             log_uniform(rng, 2, min(most, 100)))
    attributes = [_draw_attribute(rng) for _ in range(3)]
    attributes += [ATTRIBUTES[i] for i in rng.permutation(len(ATTRIBUTES))[:4]]
    people, title = [], pick(rng, TITLES)
    pointer = pick(rng, POINTERS)
    order = rng.permutation(len(names))
    next_of = {names[order[i]]: names[order[i - 1]] for i in range(len(names))}
    statements = []
    for i, name in enumerate(names, 1):
        chosen = rng.permutation(len(attributes))[:int(rng.integers(1, 5 if size > 160 else 2))]
        person = {int(j): _draw_value(rng, attributes[j].kind) for j in chosen}
        people.append(person)
        statements.append(_text(rng, attributes, name, person, (pointer[0], next_of[name]),
                                title.format(i=i)))
    tail = []
    for _ in range(log_uniform(rng, 1, min(5, size // 120))):
        tail.append(_question(rng, attributes, dict(zip(names, people, strict=True)), pointer[1], next_of))
    return Problem([], statements, tail)


def _text(rng: np.random.Generator, attributes: list[Attribute], name: str, person: dict[int, str],
          pointer: tuple[str, str], title: str) -> Passage:
    """The sentences about a person, in random order."""
    sentences = [PLAIN.fill(pick(rng, attributes[j].statements), name, value, weights=(FRAME, 0.05, NOVEL))
                 for j, value in person.items()]
    sentences.append(PLAIN.fill(pointer[0], name, pointer[1], weights=(FRAME, 0.05, NOVEL)))
    fragments = [Fragment(title, FRAME)]
    for i in rng.permutation(len(sentences)):
        fragments += [*sentences[i], Fragment(' ', FRAME)]
    return merge([*fragments[:-1], Fragment('\n', FRAME)])


def _question(rng: np.random.Generator, attributes: list[Attribute], people: dict[str, dict[int, str]],
              whose: str,
              next_of: dict[str, str]) -> Passage:
    name = pick(rng, list(people))
    subject, queried = name, name
    if chance(rng, 0.2):
        subject, queried = next_of[name], whose.format(k=name)
    attribute = pick(rng, list(people[subject]))
    value = people[subject][attribute]
    question = pick(rng, attributes[attribute].questions) + pick(rng, REMARKS)
    start = wordings.ask(rng, PLAIN, question, pick(rng, ('', '', '', ' It is')), queried)
    return merge([*start, Fragment(f' {value}', ANSWER), wordings.end(rng)])


def _draw_attribute(rng: np.random.Generator) -> Attribute:
    """An attribute of a random name, which statements and questions share."""
    name = pick(rng, strings.ALL_WORDS) + (' ' + pick(rng, strings.ALL_WORDS) if chance(rng, 0.3) else '')
    statements = (f'The {name} of {{k}} is {{v}}.', f'{{k}} has the {name} {{v}}.',
                  f'{{v}} is the {name} of {{k}}.',
                  f'For {name} {{k}} has {{v}}.', f'{{k}} calls the {name} {{v}}.')
    questions = (f'What is the {name} of {{k}}?', f'Which {name} does {{k}} have?', f'The {name} of {{k}}?',
                 f'{{k}}, {name}?', f'What {name} has {{k}}?')
    first = int(rng.integers(len(statements)))
    kind = pick(rng, ('title', 'plain', 'number', 'spaced', 'invented', 'year', 'colour', 'job'))
    return Attribute((statements[first], statements[(first + 1) % len(statements)]), questions, kind)


def _draw_value(rng: np.random.Generator, kind: str) -> str:
    if kind == 'colour':
        return pick(rng, COLOURS)
    if kind == 'job':
        return pick(rng, JOBS)
    if kind == 'year':
        return str(rng.integers(1500, 2100))
    if kind == 'age':
        return str(rng.integers(5, 100))
    return strings.draw(rng, kind)
