"""Wordings of statements, questions and answers: templates of {k} key, {v} value, {n} the name of the value,
{r} relation and {c} copula.

They are composed at random, and the text of some is random too, so that a model learns to look for the key
and not for a phrase. No wording of an evaluation (lct.eval.tasks) is among them: tests/test_forms.py.
"""

import re
from typing import NamedTuple

import numpy as np

from lct.data.synthetic.forms.passages import ANSWER, END, FRAME, PREFIX, QUERY, Fragment, Passage
from lct.data.synthetic.forms.strings import ALL_WORDS, chance, pick

RELATIONS = (
    'of', 'for', 'at', 'behind', 'assigned to', 'given to', 'linked to', 'filed for', 'kept at',
    'that belongs to',
    'that goes with', 'registered to', 'tied to', 'of unit', 'in slot', 'beside', 'written on', 'noted for',
    'held by', 'owned by', 'reported by', 'listed for', 'marked', 'called', 'reserved for', 'from', 'near',
    'matching', 'attached to', 'inside', 'that opens', 'saved as', 'under the name', 'filed under',
    'known to',
    'used by', 'on the desk of', 'sent to', 'placed at', 'with the key')
COPULAS = ('is', 'was', 'equals', 'reads', '=', 'will be', 'has been set to', 'turned out to be', 'is now',
           'came out as', 'must be', '->', 'comes to', 'remains', 'is', 'is')
DETERMINERS = ('The', 'The', 'Our', 'A', 'One', 'Today the', 'Note: the', 'Remember: the', 'Their', 'My',
               'Fact: the',
               'Every', 'Here the')
STATEMENTS = (
    *['{d} {n} {r} {k} {c} {v}.'] * 12,
    'For {k} the {n} {c} {v}.', 'For {k}, the {n} {c} {v}.', "{k}'s {n} {c} {v}.", '{k} has the {n} {v}.',
    '{k} {c} {v}.', '{k} got {n} {v} today.', 'Remember that {k} uses {v} as its {n}.',
    'Write down: {k}, {v}.',
    '({k}) {n} {v}', '{v} is the {n} {r} {k}.', 'We gave {v} to {k} as its {n}.', 'If you meet {k}, say {v}.',
    'Whoever asks for {k} gets {v}.', 'At {k} they use {v}.', 'Someone noted that the {n} {r} {k} {c} {v}.',
    '[{k}] {v}', '{n} {k} = {v}', 'On arrival {k} received {v}.', 'The door of {k} opens with {v}.',
    'Call {k} on {v}.', 'Both {k} and {v} were in the same box.', 'To reach {k}, dial {v}.',
    'She answered: the {n} {r} {k} {c} {v}.', 'In the file, {k} stands next to {v}.',
    '{k}, meanwhile, {c} {v}.',
)
STRUCTURED = (
    '- {k}: {v}', '* {k} = {v}', '{k}: {v}', '{k} = {v}', '{k}={v}', '"{k}": "{v}",', "'{k}': '{v}',",
    '| {k} | {v} |',
    '{k},{v}', '{k}\t{v}', '{k} -> {v}', 'entry["{k}"] = "{v}"', 'put("{k}", "{v}")',
    '<item key="{k}">{v}</item>',
    'let {k} = {v};', '{{"key": "{k}", "value": "{v}"}}', 'insert into t values (\'{k}\', \'{v}\');',
    '# {k}: {v}',
    '<{k}>{v}</{k}>', 'export {k}={v}', '{k} | {n} | {v}', 'Ann: what about {k}? Ben: {v}.',
    'Ann: I put {v} down for {k}.', '>>> lookup("{k}")  # {v}', '{v} <- {k}', '({k} . {v})', '{k};{v};',
)
QUESTIONS = (
    'What is the {n} {r} {k}?', 'What is the {n} {r} {k}?', 'Which {n} is {r} {k}?',
    'Which {n} do we know {r} {k}?',
    'Do you know the {n} {r} {k}?', 'What did we say about {k}?', 'And {k}?', 'Tell me the {n} {r} {k}.',
    'Find the {n} {r} {k}.', 'Look up {k}.', '{k}?', 'What goes with {k}?', 'Name the {n} {r} {k}.',
    'I need the {n} {r} {k}, please.', 'What was the {n} {r} {k} again?', 'Recall the {n} {r} {k}.',
    'How about {k}?',
    'Complete the line for {k}.', 'Going by the lines above, what is the {n} {r} {k}?', "What is {k}'s {n}?",
    'Which {n} does {k} have?', 'Which {n} was given for {k}?', 'For {k}, which {n} applies?',
    'Give the {n} {r} {k}.',
    'Can you find {k} in the notes?', 'The notes mention {k}; with which {n}?', 'Of {k}, what is the {n}?',
    'Someone wants the {n} {r} {k}.',
)
REMARKS = ('', '', '', ' Answer from the notes.', ' Give only the {n}.', ' It was mentioned earlier.',
           ' Be brief.',
           ' The lines above say it.', ' Look carefully.', ' Use nothing else.',
           ' Check everything above first.')
# How a question and its answer are set off: {q} the question. The answer follows.
EXCHANGES = (
    *['Question: {q}\nAnswer:'] * 6, *['Q: {q}\nA:'] * 2, 'User: {q}\nAssistant:', '{q}\n=>', '> {q}\n<',
    'Task: {q}\nReply:', '### {q}\n###', 'Ask: {q}\nTell:', '{q} Answer:', 'Question: {q} Answer:',
    'Problem: {q}\nSolution:', 'Reader: {q}\nWriter:', '{q}', '{q}\n-',
)
ANSWERS = (
    '', '', ' The {n} {r} {k} {c}', ' The {n} {r} {k} {c}', ' the {n} {r} {k} {c}', ' {k}:', ' {k} {c}',
    ' It is',
    ' For {k} the {n} {c}', ' Sure: {k} ->', ' The answer for {k} is', ' {n}:', ' That would be',
    ' The {n} is',
    " {k}'s {n} {c}", ' I found {k} with',
)
HEADS = (
    'Below are some {n}s.', 'Notes about many {n}s follow.',
    'Read carefully; there will be questions about a {n}.',
    'The following lines hold entries. Afterwards they are needed.', 'List of {n}s', 'Remember each {n}.',
    'Here are notes, and then a question.', 'File of {n}s:', 'Keep the entries in mind.', 'Context:', 'Text:',
)
MARKS = re.compile(r'\{(\w)\}')


class Wording(NamedTuple):
    """One way to state and to ask: fields that templates share. name: what a value is called."""

    name: str
    relation: str
    copula: str
    determiner: str

    def fill(self, template: str, key: str = '', value: str = '', weights: tuple[float, float, float] = (
            FRAME, QUERY, ANSWER)) -> Passage:
        """The template as fragments. weights: of its own text, of the key, and of the value."""
        fields = {'k': (key, weights[1]), 'v': (value, weights[2]), 'n': (self.name, weights[0]),
                  'r': (self.relation, weights[0]), 'c': (self.copula, weights[0]), 'd': (self.determiner,
                                                                                          weights[0])}
        fragments = []
        for i, text in enumerate(MARKS.split(template)):
            text, weight = fields[text] if i % 2 else (text.replace('{{', '{').replace('}}', '}'), weights[0])
            fragments.append(Fragment(text, weight))
        return merge(fragments)


def merge(fragments: list[Fragment]) -> Passage:
    """Fragments without empty ones; neighbours of one weight become one.

    A space before a key or a value belongs to it, since tokens begin with spaces.
    """
    merged = []
    for text, weight in fragments:
        if merged and merged[-1].text.endswith(' ') and text and weight != merged[-1].weight:
            merged[-1] = Fragment(merged[-1].text[:-1], merged[-1].weight)
            text = ' ' + text
        if merged and (merged[-1].weight == weight or not merged[-1].text):
            last = merged.pop()
            merged.append(Fragment(last.text + text, weight))
        elif text:
            merged.append(Fragment(text, weight))
    return merged


def random_phrase(rng: np.random.Generator) -> str:
    return ' '.join(pick(rng, ALL_WORDS) for _ in range(int(rng.integers(1, 4))))


def draw_wording(rng: np.random.Generator, name: str) -> Wording:
    """A wording; in one of five its words are random."""
    if chance(rng, 0.2):
        name = name if chance(rng, 0.5) else pick(rng, ALL_WORDS)
        return Wording(name, random_phrase(rng), random_phrase(rng) if chance(rng, 0.4) else pick(rng,
                                                                                                  COPULAS),
                       random_phrase(rng).title() if chance(rng, 0.3) else pick(rng, DETERMINERS))
    return Wording(name, pick(rng, RELATIONS), pick(rng, COPULAS), pick(rng, DETERMINERS))


def draw_statement(rng: np.random.Generator) -> str:
    """A template of a statement with key and value."""
    if chance(rng, 0.2):
        return pick(rng, STRUCTURED) + '\n'
    if chance(rng, 0.15):
        before = random_phrase(rng).capitalize() + ' ' if chance(rng, 0.7) else ''
        after = pick(rng, ('', '.', f' {pick(rng, ALL_WORDS)}.'))
        return f'{before}{{k}} {random_phrase(rng)} {{v}}{after}\n'
    return pick(rng, STATEMENTS) + '\n'


def statement_prefix(template: str) -> str | None:
    """What precedes the value in a template of a statement; None if the key does not."""
    before, _, _ = template.partition('{v}')
    return before if '{k}' in before else None


def ask(rng: np.random.Generator, wording: Wording, question: str, answer: str, key: str) -> Passage:
    """A question in some exchange, and the words before its answer. question, answer: templates.

    The passage ends without a space; the value follows after one.
    """
    before, after = pick(rng, EXCHANGES).split('{q}')
    return merge([Fragment(before, FRAME), *wording.fill(question, key), Fragment(after, FRAME),
                  *wording.fill(answer, key, weights=(PREFIX, PREFIX, ANSWER))])


def end(rng: np.random.Generator) -> Fragment:
    """What ends an answer."""
    return Fragment(pick(rng, ('.\n', '\n', '\n', '\n\n')), END)
