"""BABILong (Kuratov et al. 2024, arXiv:2406.10149): facts of bAbI's 20 tasks scattered over books.

Its files are data/qa1/4k.json, 4k/qa1-*.parquet or qa1/4k-*.parquet, with the fields input, question and
target. Their texts have their length already, so nothing is cut. The prompts are worded here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from lct.eval.published import metrics
from lct.eval.published.question import Question, data_files, parsed, texts

TASKS = tuple(f'qa{i}' for i in range(1, 21))
# Nominal lengths in tokens; 0k, the facts alone, counts as 512.
LABELS = {512: '0k', **{1024 << i: f'{1 << i}k' for i in range(10)}, 2**20: '1M', 10 * 2**20: '10M'}
PLACES = ('bathroom', 'bedroom', 'garden', 'hallway', 'kitchen', 'office')
# Answers of a task as its metric knows them; those of other tasks are the targets of their files.
ANSWERS = {**{f'qa{i}': PLACES for i in range(1, 5)},
           'qa5': ('bill', 'fred', 'jeff', 'mary', 'apple', 'football', 'milk')}
NEW_TOKENS = 20
LAYOUT = 'give the folder of data/qa1/4k.json, of 4k/qa1-*.parquet or of qa1/4k-*.parquet'
HEAD = ('Some facts are scattered over the text below. Answer the question about them from the facts alone; '
        'of facts about the same thing the last one holds. Write the answer in a word or two and nothing '
        'else.\n\n<context>\n')
TAIL = '\n</context>\n\nQuestion: {}\n'
PREFIX = 'Answer:'


def files(folder: Path) -> list[Path]:
    return sorted({path for task in TASKS for label in LABELS.values()
                   for path in _files(folder, task, label)})


def _files(folder: Path, task: str, label: str) -> list[Path]:
    found = [*data_files(folder, f'{task}/{label}.*'), *data_files(folder, f'{task}/{label}-*'),
             *data_files(folder, f'{label}/{task}.*'), *data_files(folder, f'{label}/{task}-*')]
    return sorted(set(found))


def read(folder: Path, lengths: Iterable[int]) -> tuple[dict[str, list[Question]], list[str]]:
    """({task: questions of all lengths}, problems)."""
    out, problems = {}, []
    for task in TASKS:
        found = [(length, *fields) for length in lengths
                 for fields in parsed(_files(folder, task, LABELS[length]), _fields, problems)]
        answers = ANSWERS.get(task) or sorted(
            {one for *_, target in found for one in metrics.target_names(target)})
        if found:
            out[task] = [_question(task, answers, *one) for one in found]
    return out, problems


def _fields(row, place):
    return place, *texts(row, ('input', 'question', 'target'))


def _question(task, answers, length, place, text, question, target) -> Question:
    meta: Mapping = {'question': question, 'answers': list(answers)}
    return Question(task, place, HEAD, text.strip(), TAIL.format(question.strip()), PREFIX, [target],
                    NEW_TOKENS, 'only_answer', length, chance=1 / len(answers), meta=meta)
