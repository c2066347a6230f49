"""A repository in one prompt, with questions that the syntax tree answers.

The questions ask for the file that defines a function, or for its exact signature. The loss on identifiers by
the distance to their first use is measured over the same files.

A prompt holds complete files under their paths, sorted by path (data.corpus.bundle).
"""

import ast
import bisect
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lct.data.corpus import bundle
from lct.data.corpus.documents import Document
from lct.data.detokenizer import Detokenizer
from lct.data.tokenizer import Tokenizer
from lct.eval import samples
from lct.eval.tasks.material import Material

QUESTIONS = 4  # about every text
RESERVE = 192  # tokens for a question and its answer
JOINTS = 4  # of them, where head, files and question meet
HEAD = 'The files of a repository follow, each under its path. A question about them comes last.\n\n'
MAX_TRIES = 50  # of sets of files for a prompt


class Function(NamedTuple):
    """A function at the top level of a file whose def is one line.

    signature: all that follows the name, for example '(a, b=1) -> int:'.
    """

    name: str
    signature: str


class Question(NamedTuple):
    """text and answer_prefix as in samples.Sample; answer: the reference."""

    text: str
    answer_prefix: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Defines:
    """Questions for the file that defines a function."""

    task: str = 'defines'
    max_new_tokens: int = 48

    def question(self, path: str, function: Function) -> Question:
        return Question(
            f'Question: Which file defines the function {function.name}? Answer with its path.\nAnswer:',
            f' The function {function.name} is defined in the file', path)

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        return sample(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class Signature:
    """Questions for the exact signature of a function."""

    task: str = 'signature'
    max_new_tokens: int = 64

    def question(self, path: str, function: Function) -> Question:
        return Question(
            f'Question: How does the definition of the function {function.name} begin? '
            'Repeat its first line.\nAnswer:',
            f' def {function.name}', function.signature)

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        return sample(material, self, length, index)


TASKS = {config.task: config for config in (Defines(), Signature())}


# ---------------------------------------------------------------------------------------------------
# The syntax tree
# ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def parse(source: str) -> ast.Module | None:
    """The syntax tree of a source, None if this interpreter cannot parse it."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError):
        return None


def functions(source: str) -> list[Function]:
    """The functions at the top level of a source with two parameters or more and a def on one line."""
    lines, out = source.split('\n'), []
    for node in (parse(source) or ast.Module([], [])).body:
        if isinstance(node, ast.FunctionDef) and len(ast.unparse(node.args).split(',')) > 1:
            line, head = lines[node.lineno - 1].rstrip(), f'def {node.name}'
            if line.startswith(head + '(') and line.endswith(':') and parse(line + ' pass'):
                out.append(Function(node.name, line[len(head):]))
    return out


def defined_names(source: str) -> list[str]:
    """The names of all functions, methods and classes that a source defines."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [node.name for node in ast.walk(parse(source) or ast.Module([], [])) if isinstance(node, kinds)]


def identifiers(source: str) -> list[tuple[int, str]]:
    """[(start, name)] of the variables, parameters and attributes of a source; start in characters."""
    ends = [0, *itertools.accumulate(len(line) + 1 for line in source.split('\n'))]
    found = set()
    for node in ast.walk(parse(source) or ast.Module([], [])):
        if isinstance(node, ast.Name | ast.arg):
            name, line_number, column = getattr(node, 'id', None) or node.arg, node.lineno, node.col_offset
        elif isinstance(node, ast.Attribute):
            name, line_number = node.attr, node.end_lineno
            column = node.end_col_offset - len(node.attr.encode())
        else:
            continue
        # Columns are bytes of UTF-8.
        line = source[ends[line_number - 1]:ends[line_number] - 1]
        start = ends[line_number - 1] + (column if line.isascii() else len(line.encode()[:column].decode()))
        if source.startswith(name, start):  # older Pythons give wrong columns within f-strings
            found.add((start, name))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------


def python_files(documents: Iterable[Document]) -> list[Document]:
    """The documents whose names end in .py and that parse, with line ends as the syntax tree counts them."""
    files = [one._replace(text='\n'.join(one.text.splitlines()) + '\n')
             for one in documents if one.name.endswith('.py')]
    return [one for one in files if parse(one.text) is not None]


def sample(material: Material, config: Any, length: int, index: int) -> samples.Sample:
    """Question index % QUESTIONS about text index // QUESTIONS; all tasks share the texts."""
    files, subjects = _text(material, length, index // QUESTIONS)
    path, function = subjects[index % QUESTIONS]
    question = config.question(path, function)
    answer_tokens = _question_tokens(material, config, path, function)[1]
    text = HEAD + bundle.text(files)
    prompt = f'{text}\n{question.text}'
    used = (material.overhead.total + material.counter.bos
            + material.counter.count(prompt + question.answer_prefix) + answer_tokens)
    before = text[:text.index(f'\ndef {function.name}(')]
    depth = material.counter.count(before) / material.counter.count(text)
    # The hash identifies equal texts, which occur where the repository hardly fills one.
    meta = {'tokens': used, 'depths': [depth], 'files': len(files), 'path': path, 'function': function.name,
            'bundle': hashlib.sha256(text.encode()).hexdigest()[:16]}
    return samples.Sample(
        config.task, length, index, prompt, question.answer_prefix, [question.answer], answer_tokens, meta)


def _question_tokens(material, config, path, function):
    """(tokens of the question with the answer prefix, tokens for the answer)."""
    text, prefix, answer = config.question(path, function)
    asking, answering = material.counter.count_each([text + prefix, ' ' + answer]).tolist()
    return asking, max(config.max_new_tokens, answering + 2)


def _text(material, length, number):
    """([Document], [(path, Function)]): files that fill a length, and QUESTIONS of their functions."""
    return material.cached(('repository', length, number), lambda: _make_text(material, length, number))


def _make_text(material, length, number):
    files, sizes = _sized_files(material)
    rng = samples.rng(material.seed, 'repository', length, number)
    fixed = RESERVE + material.overhead.total + material.counter.bos + material.counter.count_head(HEAD)
    room = length - fixed
    candidates = [i for i in range(len(files)) if sizes[i] <= room]
    for _ in range(MAX_TRIES):
        rng.shuffle(candidates)
        chosen = _fill(candidates, sizes, room)
        # Where sections do not add up for this tokenizer, count the bundle and leave out the excess.
        while chosen and material.counter.count(bundle.text([files[i] for i in chosen])) > room:
            chosen.pop()
        picked = sorted((files[i] for i in chosen), key=lambda one: one.name)
        subjects = [one for one in _question_subjects(picked) if all(
            sum(_question_tokens(material, config, *one)) <= RESERVE - JOINTS for config in TASKS.values())]
        if len(subjects) >= QUESTIONS:
            return picked, rng.sample(subjects, QUESTIONS)
    raise ValueError(f'length {length} has no room for files of the repository with {QUESTIONS} functions of '
                     'their own; use a larger length, or a repository of smaller files (--haystack)')


def _fill(candidates, sizes, room):
    """The candidates that fit into room tokens, each if there is room left for it."""
    chosen = []
    for i in candidates:
        if sizes[i] <= room:
            chosen.append(i)
            room -= sizes[i]
    return chosen


def _sized_files(material):
    """([Document], [tokens of each under its path]) of the Python files."""
    def make():
        files = python_files(material.documents)
        if not files:
            raise ValueError('the documents hold no Python file; give a repository, such as --haystack repo/')
        return files, material.counter.count_each([bundle.section(one) for one in files]).tolist()

    return material.cached('repository', make)


def _question_subjects(files):
    """[(path, Function)] whose names are defined once, and whose path is not within another path."""
    defining_files = {}
    for one in files:
        for name in defined_names(one.text):
            defining_files.setdefault(name, []).append(one.name)
    paths = [one.name for one in files]
    return [(one.name, function) for one in files for function in functions(one.text)
            if len(defining_files[function.name]) == 1 and sum(one.name in path for path in paths) == 1]


# ---------------------------------------------------------------------------------------------------
# Loss on identifiers
# ---------------------------------------------------------------------------------------------------


def oversized_bundle(material: Material, length: int, number: int) -> list[Document]:
    """Files of at least length tokens with their paths, drawn by (length, number); [] if all have fewer."""
    files, sizes = _sized_files(material)
    order = samples.rng(material.seed, 'identifiers', length, number).sample(range(len(files)), len(files))
    count = int(np.searchsorted(np.cumsum([sizes[i] for i in order]), length)) + 1
    return sorted((files[i] for i in order[:count]), key=lambda one: one.name) if count <= len(files) else []


def identifier_distances(
    files: Sequence[Document], tokenizer: Tokenizer,
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """(ids, [(first token, last token, distance)]) of a bundle of files.

    The list has every occurrence of an identifier after its first, wherever in the bundle the first one is;
    distance is in tokens.

    Raises:
      ValueError: if decoding does not restore the text.
    """
    text, uses, start_of_file = bundle.text(files), [], 0
    for one in files:
        section = bundle.section(one)
        body = start_of_file + section.index('\n') + 1
        uses += [(body + start, name) for start, name in identifiers(one.text)]
        start_of_file += len(section)
    ids = tokenizer.encode(text)
    # The end of every token in characters.
    stream, ends = Detokenizer(tokenizer.decode), []
    for token in ids:
        ends.append((ends[-1] if ends else 0) + len(stream.push(token)))
    if stream.text != text[:len(stream.text)] or ends[-1] != len(text):
        raise ValueError('this tokenizer does not restore the text that it encoded, so its tokens cannot be '
                         'aligned with the syntax tree; use a byte-level one')
    first_use, out = {}, []
    for start, name in uses:
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, start + len(name))
        if name in first_use:
            out.append((first, last, first - first_use[name]))
        first_use.setdefault(name, first)
    return ids, out


def identifier_losses(
    losses: np.ndarray, occurrences: Sequence[tuple[int, int, int]], edges: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """(sums, counts) [bins]: nats of complete identifiers by distance, edges[i] <= distance < edges[i + 1].

    losses: [S], entry p the loss of token p of the bundle; occurrences past its end do not count.
    """
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, int)
    for first, last, distance in occurrences:
        i = bisect.bisect_right(edges, distance) - 1
        if last < len(losses) and 0 <= i < len(counts):
            sums[i] += losses[first:last + 1].sum(dtype=np.float64)
            counts[i] += 1
    return sums, counts
