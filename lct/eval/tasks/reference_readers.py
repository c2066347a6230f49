"""Readers that stand in for a model: functions from a prompt to a text, to check a suite with.

The oracle reads nothing but the prompt: if it scores 100, every answer can be found there and is marked right.
"""

import collections
import re

from lct.eval import samples
from lct.eval.tasks import qa_documents

NEEDLE = re.compile(r'stored under (\S+) is (\S+)\.$', re.M)
ASKED_NEEDLES = re.compile(r'stored under (.+?)\? Read')
SET = re.compile(r'^SET (\w+) TO (\w+)\.$', re.M)
ASKED_VALUE = re.compile(r'have the value (\w+), directly')
ITEM = re.compile(r'^\d+\. (\S+)$', re.M)


def oracle(prompt):
    """Look the answer up in a prompt of RULER's tasks."""
    text, _, question = prompt.rpartition('Question: ')
    if 'stored under' in question:
        return ' '.join(_needles(text, question))
    if 'have the value' in question:
        return ', '.join(_variables(text, ASKED_VALUE.search(question)[1]))
    if 'most common in the list' in question:
        # Behind the example, if there is one: the list begins anew.
        items = ITEM.findall(text.rpartition('Keep count of them.')[2])
        return ' '.join(_most_common(items, int(re.search(r'Which (\d+)', question)[1])))
    if 'coded words' in question:
        coded = text.rpartition('Coded text:')[2].split()[:-1]
        asked = int(re.search(r'Which (\d+)', question)[1])
        return ' '.join(_most_common([word for word in coded if word.strip('.')], asked))
    return _person(text, question)


def _needles(text, question):
    names = re.split(r', | and ', ASKED_NEEDLES.search(question)[1])
    return [value for name, value in NEEDLE.findall(text) if name in names]


def _variables(text, value):
    """Every variable with the value, in one pass: a variable is set before it is used."""
    holds = {}
    for name, source in SET.findall(text):
        holds[name] = holds.get(source, source)
    return [name for name, held in holds.items() if held == value]


def _most_common(items, count):
    return [item for item, _ in collections.Counter(items).most_common(count)]


def _person(text, question):
    for statement, asked in qa_documents.FIELDS.values():
        pattern = re.escape(asked).replace(r'\{who\}', r'(the closest friend of )?([A-Z]\w+ [A-Z]\w+)')
        if match := re.match(pattern, question):
            friend, name = match.groups()
            if friend:
                name = _said(qa_documents.FRIEND, name, text)
            return _said(statement, name, text)
    return ''


def _said(statement, name, text):
    pattern = re.escape(statement.format(name=name, value='@')).replace('@', r'([^.]+)')
    return re.search(pattern, text)[1]


def mute(prompt):
    """Says nothing."""
    return ''


def first_value(prompt):
    """The value of the first needle, whatever is asked for."""
    return NEEDLE.search(prompt)[2]


def last_value(prompt):
    """The value of the last needle."""
    return NEEDLE.findall(prompt)[-1][1]


def half(prompt):
    """The oracle on every other prompt, by a fair coin that depends on the prompt."""
    return oracle(prompt) if samples.rng('half', prompt).random() < 0.5 else mute(prompt)
