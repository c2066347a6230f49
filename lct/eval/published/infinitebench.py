"""InfiniteBench (Zhang et al. 2024, arXiv:2402.13718): twelve tasks on texts of 100K tokens and more.

Its files are TASK.jsonl with the fields context, input, answer and options. The prompts are worded here.
"""

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lct.eval.published.question import Question, data_files, parsed, texts

LAYOUT = 'give the folder of its TASK.jsonl, such as passkey.jsonl'
OPTIONS = '\nA. {}\nB. {}\nC. {}\nD. {}\n\n'
LETTER = 'The letter of the right option alone is the answer.\n'
WITH_NAME = 'The answer is the letter and the name of the right option, in the form "A. name".\n'  # as scored
ANSWER = 'Answer:'


class Task(NamedTuple):
    """head and tail of its prompts, with {input} in the tail; answer_prefix; new tokens; metric."""

    head: str
    tail: str
    prefix: str
    new_tokens: int
    metric: str


TASKS = {
    'passkey': Task('Find the pass key that is hidden in this text.\n\n', '\n\n{input}\n', 'The pass key is',
                    6, 'first_integer'),
    'number_string': Task('Find the sequence of digits that is hidden in this text.\n\n', '\n\n{input}\n',
                          'The sequence of digits is', 12, 'first_integer'),
    'kv_retrieval': Task('Here is a JSON object. Find the value of a key.\n\n', '\n\n{input}\n', '', 50,
                         'word'),
    'longbook_sum_eng': Task('Here is a book to summarize.\n\n', '\n\nWrite a summary of the book.\n',
                             'Summary:', 1200, 'rouge_lsum'),
    'longbook_choice_eng': Task('Here is a book. A question follows.\n\n',
                                '\n\nQuestion: {input}' + OPTIONS + LETTER, ANSWER, 40, 'choice'),
    'longbook_qa_eng': Task('Here is a book. A question follows.\n\n',
                            '\n\nQuestion: {input}\nAnswer in a few words.\n', ANSWER, 40, 'f1'),
    'longbook_qa_chn': Task('下面是一本书，后面有一个问题。\n\n', '\n\n问题：{input}\n用几个字回答。\n',
                            '回答：', 40, 'f1_characters'),
    'longdialogue_qa_eng': Task(
        'In this script the name of one character is replaced by $$MASK$$ in one place.\n\n',
        '\n\nWhich character is it? The name alone, as the script writes it, is the answer.\n', ANSWER, 40,
        'name'),
    'math_find': Task('Here is a list of numbers.\n\n', '\n\n{input}\n', ANSWER, 3, 'first_number'),
    'math_calc': Task('Calculate from left to right, and give the value after each number as a list. For '
                      'example, 2 + 3 - 1 has the values [2, 5, 4].\n\n', '\n\n', 'Values:', 30000,
                      'leading_numbers'),
    'code_run': Task('Here are Python functions.\n\n', '\n\n{input}\nThe number alone is the answer.\n',
                     ANSWER, 5, 'last_integer'),
    'code_debug': Task('One function of this project has an error that was put there on purpose.\n\n',
                       '\n\nWhich function is it?' + OPTIONS + WITH_NAME, ANSWER, 5, 'option'),
}
CHOICES = ('longbook_choice_eng', 'code_debug')


def files(folder: Path) -> list[Path]:
    return sorted({path for task in TASKS for path in data_files(folder, f'{task}.*')})


def read(folder: Path) -> tuple[dict[str, list[Question]], list[str]]:
    """({task: questions}, problems)."""
    out, problems = {}, []
    for task in TASKS:
        paths = data_files(folder, f'{task}.*')
        questions = list(parsed(paths, functools.partial(_question, task), problems))
        if questions:
            out[task] = questions
    return out, problems


def _question(name: str, row: Mapping, place: str) -> Question:
    context, question = texts(row, ('context', 'input'))
    task, answers, options = TASKS[name], row.get('answer'), row.get('options') or []
    answers = [str(one) for one in (answers if isinstance(answers, list) else [answers]) if one is not None]
    if not answers:
        raise ValueError("has no 'answer'")
    if name in CHOICES:
        if len(options) != 4 or answers[0] not in options:
            raise ValueError("does not have four 'options' with the answer among them")
        answers = ['ABCD'[options.index(answers[0])], answers[0]]
    if name == 'math_find':
        answers = [answers[0]]
    if name in ('passkey', 'number_string', 'code_run') and not re.fullmatch(r'-?\d+', answers[0]):
        raise ValueError(f'has the answer {answers[0]!r}, which is not a number')
    tail = task.tail.format(*options, input=question.strip())
    return Question(name, place, task.head, context, tail, task.prefix, answers, task.new_tokens, task.metric,
                    chance=0.25 * (name in CHOICES))
