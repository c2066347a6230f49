"""LongBench v2 (Bai et al. 2024, arXiv:2412.15204): 503 questions with four choices, about texts of 8K to 2M
words.

Its file is data.json, a list, or the same rows as .jsonl or .parquet.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lct.eval.published.question import Question, data_files, parsed, texts

TASKS = ('single_document_qa', 'multi_document_qa', 'long_in_context_learning',
         'long_dialogue_history_understanding', 'code_repository_understanding',
         'long_structured_data_understanding')
GROUPS = ('easy', 'hard', 'short', 'medium', 'long')  # the columns of its table, beside the overall score
FIELDS = ('context', 'question', 'choice_A', 'choice_B', 'choice_C', 'choice_D', 'answer', 'domain')
NEW_TOKENS = 128
LAYOUT = 'give the folder of its data.json, or of the same rows as .jsonl or .parquet'
HEAD = 'Here is a long text. A question about it follows.\n\n<text>\n'
TAIL = ('\n</text>\n\nQuestion: {question}\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n'
        'Choose one of them, and answer in this form: "The correct answer is (letter)".')


def files(folder: Path) -> list[Path]:
    return data_files(folder, 'data*') + data_files(folder, 'train*')


def read(folder: Path) -> tuple[dict[str, list[Question]], list[str]]:
    """({task: questions}, problems): tasks are the six domains."""
    out, problems = {}, []
    for one in parsed(files(folder), _question, problems):
        out.setdefault(one.task, []).append(one)
    return out, problems


def _question(row: Mapping, place: str) -> Question:
    context, question, *choices, answer, domain = texts(row, FIELDS)
    task = re.sub(r'[^a-z]+', '_', domain.lower())
    if answer not in 'ABCD' or len(answer) != 1:
        raise ValueError(f"has the answer {answer!r}, which is not one of A, B, C and D")
    if task not in TASKS:
        raise ValueError(f'has the domain {domain!r}, which is not one of the six')
    groups = tuple(row[name] for name in ('difficulty', 'length') if row.get(name) in GROUPS)
    named = dict(zip('ABCD', (choice.strip() for choice in choices), strict=True))
    tail = TAIL.format(question=question.strip(), **named)
    return Question(task, place, HEAD, context.strip(), tail, '', [answer], NEW_TOKENS, 'stated_letter',
                    chance=0.25, groups=groups)
