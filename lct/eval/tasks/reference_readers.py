"""Reference readers stand in for a model to check a suite: functions from a prompt to an answer.

The oracle reads nothing but the prompt. If it scores 100, every answer is in its prompt and scored right.
"""

import collections
import re

from lct.eval import samples
from lct.eval.tasks import qa_documents

NEEDLE = re.compile(r'stored under (\S+) is (\S+)\.$', re.M)
NEEDLE_QUESTION = re.compile(r'stored under (.+?)\? Read')
ASSIGNMENT = re.compile(r'^SET (\w+) TO (\w+)\.$', re.M)
VARIABLE_QUESTION = re.compile(r'have the value (\w+), directly')
COUNT_QUESTION = re.compile(r'Which (\d+)')
CODE_FILE = re.compile(r'^======== (.+) ========$', re.M)
LIST_ITEM = re.compile(r'^\d+\. (\S+)$', re.M)


def oracle(prompt: str) -> str:
    """The answer to a prompt of one of RULER's tasks."""
    text, _, question = prompt.rpartition('Question: ')
    if 'stored under' in question:
        return ' '.join(_needle_values(text, question))
    if 'have the value' in question:
        return ', '.join(_variables(text, VARIABLE_QUESTION.search(question)[1]))
    if 'most common in the list' in question:
        # After the example, if there is one: a new list begins there.
        items = LIST_ITEM.findall(text.rpartition('Keep count of them.')[2])
        return ' '.join(_most_common(items, question))
    if 'coded words' in question:
        coded = text.rpartition('Coded text:')[2].split()[:-1]
        return ' '.join(_most_common([word for word in coded if word.strip('.')], question))
    return _person_field(text, question)


def _needle_values(text, question):
    names = re.split(r', | and ', NEEDLE_QUESTION.search(question)[1])
    return [value for name, value in NEEDLE.findall(text) if name in names]


def _variables(text, value):
    """Every variable with the value, in one pass: a variable is set before it is used."""
    values = {}
    for name, source in ASSIGNMENT.findall(text):
        values[name] = values.get(source, source)
    return [name for name, own in values.items() if own == value]


def _most_common(items, question):
    count = int(COUNT_QUESTION.search(question)[1])
    return [item for item, _ in collections.Counter(items).most_common(count)]


def _person_field(text, question):
    for statement, question_pattern in qa_documents.FIELDS.values():
        pattern = re.escape(question_pattern).replace(
            r'\{who\}', r'(the closest friend of )?([A-Z]\w+ [A-Z]\w+)')
        if match := re.match(pattern, question):
            friend, name = match.groups()
            if friend:
                name = _stated_value(qa_documents.FRIEND, name, text)
            return _stated_value(statement, name, text)
    return ''


def _stated_value(statement, name, text):
    pattern = re.escape(statement.format(name=name, value='@')).replace('@', r'([^.]+)')
    return re.search(pattern, text)[1]


def silent(prompt: str) -> str:
    """No answer."""
    return ''


def first_value(prompt: str) -> str:
    """The value of the first needle, whatever the question."""
    return NEEDLE.search(prompt)[2]


def last_value(prompt: str) -> str:
    """The value of the last needle, whatever the question."""
    return NEEDLE.findall(prompt)[-1][1]


def coin_flip(prompt: str) -> bool:
    """A fair coin that depends on the prompt."""
    return samples.rng('half', prompt).random() < 0.5


def coin_flip_oracle(prompt: str) -> str:
    """The oracle on one prompt in two."""
    return oracle(prompt) if coin_flip(prompt) else silent(prompt)


def rule_reader(prompt: str) -> str:
    """The answer to a prompt of the adversarial needles."""
    instruction = prompt.rpartition('Question: ')[0].rpartition('\n')[2]
    name = NEEDLE_QUESTION.search(prompt.rpartition('Question: ')[2])[1]
    statements = [(line, value) for line, value in re.findall(
        rf'^(.*)stored under {re.escape(name)} is (\S+)\.$', prompt, re.M)]
    void = re.findall(r'The entry (\S+) under', prompt)
    if 'stores no' in instruction:
        return statements[0][1] if statements else 'unknown'
    if 'first in the text' in instruction:
        return statements[0][1]
    if 'void' in instruction:
        return next(value for _, value in statements if value not in void)
    if 'latest day' in instruction:
        return max(statements, key=lambda pair: int(re.search(r'day (\d+)', pair[0])[1]))[1]
    for word in ('Correction', 'register'):
        if word.lower() in instruction.lower():
            return next(value for line, value in statements if word in line)
    return statements[-1][1]


def code_reader(prompt: str) -> str:
    """The answer to a question about a repository."""
    text, _, question = prompt.rpartition('Question: ')
    name = re.search(r'the function (\w+)', question)[1]
    definition = re.search(rf'^def {name}(\(.+)$', text, re.M)
    if 'Which file' in question:
        return re.findall(CODE_FILE, text[:definition.start()])[-1]
    return definition[1]
