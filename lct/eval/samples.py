"""Samples, prompts with reference answers, in memory and in the JSONL files of RULER."""

import dataclasses
import json
import pathlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lct import files


@dataclasses.dataclass(frozen=True)
class Sample:
    """A question over a long text.

    length: the budget in tokens, for special tokens, prompt, answer_prefix and max_new_tokens together.
    index: the number of the sample within (task, length); these three and a seed determine the other fields.
    prompt, answer_prefix: the model reads both; in a chat the prefix begins the assistant's turn.
    outputs: reference answers. meta: facts for JSON: 'tokens' used of the budget, depths, ...
    messages: a chat, which a model with a chat template reads in place of prompt and answer_prefix; these are
      then its transcript.
    """

    task: str
    length: int
    index: int
    prompt: str
    answer_prefix: str
    outputs: list
    max_new_tokens: int
    meta: dict
    messages: Sequence[Mapping[str, str]] = ()

    @property
    def text(self) -> str:
        """The input of a model without a chat template."""
        return self.prompt + self.answer_prefix

    @property
    def answer(self) -> str:
        """The right continuation of text, for teacher-forced scoring."""
        return ' ' + ', '.join(self.outputs)


class ChatOverhead(NamedTuple):
    """Tokens that a chat template adds to a prompt: in total, and before the prompt. chat_tokens: messages ->
    tokens of a chat up to its answer; None where dialogues are read as transcripts."""

    total: int = 0
    before_prompt: int = 0
    chat_tokens: Callable[[Sequence[Mapping[str, str]]], int] | None = None


def transcript(messages: Iterable[Mapping[str, str]]) -> str:
    """A chat as text."""
    return ''.join(f"{one['role'].capitalize()}: {one['content']}\n" for one in messages)


def rng(*key: Any) -> random.Random:
    """random.Random of a seed and names: equal keys give equal numbers on every machine."""
    return random.Random('/'.join(map(str, key)))


# ---------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------


def to_ruler(sample: Sample) -> dict:
    """A line of RULER's data files; RULER ignores our own fields task, budget, max_new_tokens and meta."""
    tokens = sample.meta.get('tokens', sample.length)
    return {
        'index': sample.index, 'input': sample.prompt, 'outputs': list(sample.outputs), 'length': tokens,
        'length_w_model_temp': tokens, 'answer_prefix': sample.answer_prefix, 'task': sample.task,
        'budget': sample.length, 'max_new_tokens': sample.max_new_tokens, 'meta': sample.meta,
    }


def from_ruler(fields: dict, number: int, task: str, max_new_tokens: int) -> Sample:
    """Sample of a line of RULER's data files, old or new, of one whose input is the messages of a chat, or of
    OpenAI's MRCR.

    RULER's files from before 2025 have no answer_prefix: there it is the end of the input.

    Args:
      number: of the line; it becomes the index, since niah files have character offsets there.
      task, max_new_tokens: for lines without them.
    """
    if 'random_string_to_prepend' in fields:
        fields = _from_mrcr(fields)
    missing = [name for name in ('input', 'outputs') if name not in fields]
    if missing == ['outputs'] and 'output' in fields:
        fields = {**fields, 'outputs': [fields['output']]}
    elif missing:
        raise ValueError(f"has no field {' and no field '.join(missing)}")
    outputs, messages = fields['outputs'], ()
    if isinstance(fields['input'], list):
        messages = _checked_messages(fields['input'])
        fields = {'answer_prefix': 'Assistant:', **fields, 'input': transcript(messages)}
    if not (isinstance(fields['input'], str) and isinstance(outputs, list) and outputs
            and all(isinstance(x, str) for x in outputs)):
        raise ValueError("needs text or messages in 'input' and at least one text in 'outputs'")
    used = fields.get('length')
    meta = fields.get('meta', {'tokens': used, 'source': 'RULER file'})
    if 'metric' in fields:
        meta = {**meta, 'metric': fields['metric']}
    return Sample(
        fields.get('task', task), fields.get('budget', used), number, fields['input'],
        fields.get('answer_prefix', ''), outputs, fields.get('max_new_tokens', max_new_tokens),
        meta, messages,
    )


def _from_mrcr(fields):
    """A line of OpenAI's MRCR in the fields of the others. Its prompt is the JSON of a chat, and its answer
    has to begin with a random string."""
    prefix, answer, prompt = (fields.get(name) for name in ('random_string_to_prepend', 'answer', 'prompt'))
    if not (isinstance(prefix, str) and isinstance(answer, str) and answer.startswith(prefix)):
        raise ValueError("has no text in 'answer' that begins with 'random_string_to_prepend'")
    try:
        messages = json.loads(prompt) if isinstance(prompt, str) else prompt
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a 'prompt' that is not valid JSON ({error})") from None
    return {'input': messages, 'outputs': [answer], 'meta': {'source': 'MRCR file', 'begins_with': prefix}}


def _checked_messages(messages):
    wrong = [one for one in messages if not (isinstance(one, dict) and {*one} == {'role', 'content'}
                                             and all(isinstance(x, str) for x in one.values()))]
    if wrong or not messages:
        raise ValueError("needs messages of a 'role' and a 'content' alone, both text, in 'input'")
    if messages[-1]['role'] != 'user':
        raise ValueError(f"ends with a message of the role {messages[-1]['role']!r}; the last one must be a "
                         "user's, which the model answers")
    return messages


def prediction(sample: Sample, text: str) -> dict:
    """A line of a prediction file that RULER's evaluate.py scores; it needs both others and index."""
    return {
        'index': sample.index, 'pred': text, 'input': sample.prompt, 'outputs': list(sample.outputs),
        'others': {'id': sample.index}, 'truncation': -1, 'length': sample.meta.get('tokens', sample.length),
    }


def write(path: str | pathlib.Path, rows: Iterable[dict]) -> None:
    """JSON objects as ASCII lines, atomically."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as file:
        for row in rows:
            file.write(json.dumps(row) + '\n')


def read(path: str | pathlib.Path) -> tuple[list[tuple[int, dict]], list[str]]:
    """([(line number from 0, dict)], [one sentence for each line that is not a JSON object])."""
    rows, problems = [], []
    with pathlib.Path(path).open('rb') as lines:
        for number, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError too
                problems.append(
                    f'{path} line {number + 1} is not valid JSON ({error}); make that sample again')
                continue
            if isinstance(fields, dict):
                rows.append((number, fields))
            else:
                problems.append(f'{path} line {number + 1} is not an object; make that sample again')
    return rows, problems


def read_ruler(
    path: str | pathlib.Path, max_new_tokens: int, task: str | None = None,
    rows: tuple[list[tuple[int, dict]], list[str]] | None = None,
) -> tuple[list[Sample], list[str]]:
    """([Sample], [one sentence for each line left out]) of a data file <task>/validation.jsonl.

    max_new_tokens: for lines without it, which RULER itself writes. rows: of a file that is not JSONL.
    """
    path = pathlib.Path(path)
    rows, problems = rows or read(path)
    samples = []
    for number, fields in rows:
        try:
            samples.append(from_ruler(fields, number, task or path.parent.name, max_new_tokens))
        except ValueError as error:
            problems.append(f'{path} line {number + 1} {error}; correct or remove it')
    return samples, problems
