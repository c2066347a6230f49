"""RULER (Hsieh et al. 2024, arXiv:2404.06654): 13 tasks at any length, as samples that fill a token budget.

The tasks and their parameters are RULER's, the prompts are our own, so scores of the two do not compare to
the last point. Each sample depends on (task, length, index, seed, tokenizer, texts) alone, so that a suite
can be made, interrupted and extended sample by sample.

A new task is one file with a config (a frozen dataclass with task, max_new_tokens and
generate(material, length, index) -> Sample) and one row of TASKS.
"""

import dataclasses
from typing import Any

from lct.eval.tasks.ruler_common_words import CommonWords
from lct.eval.tasks.ruler_frequent_words import FrequentWords
from lct.eval.tasks.ruler_niah import Niah
from lct.eval.tasks.ruler_qa import QuestionAnswering
from lct.eval.tasks.ruler_variables import VariableTracking

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
TASKS = {config.task: config for config in (
    Niah('niah_single_1', 'noise'),
    Niah('niah_single_2', 'text'),
    Niah('niah_single_3', 'text', value_kind='uuids'),
    Niah('niah_multikey_1', 'text', keys=4),
    Niah('niah_multikey_2', 'needles'),
    Niah('niah_multikey_3', 'needles', name_kind='uuids', value_kind='uuids'),
    Niah('niah_multivalue', 'text', values=4),
    Niah('niah_multiquery', 'text', queries=4),
    VariableTracking(),
    CommonWords(),
    FrequentWords(),
    QuestionAnswering('qa_1', 'one_hop'),
    QuestionAnswering('qa_2', 'two_hop'),
)}


def task(name: str, **changes: Any) -> Any:
    """The config of a task by name, with other parameters where given."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks of RULER are {', '.join(TASKS)}")
    return dataclasses.replace(TASKS[name], **changes)
