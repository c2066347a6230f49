"""A repository in one prompt, with questions whose answers the syntax tree knows: which file defines a function, what
its exact signature is; and the loss on identifiers by the distance to their first use.

The files of a prompt are whole, under their paths and in the order of these (data.bundle).
"""

import ast
import bisect
import dataclasses
import functools
import hashlib
import itertools

import numpy as np

from lct.data.corpus import bundle
from lct.data.detokenizer import Detokenizer
from lct.eval import samples

QUESTIONS = 4  # about every text
RESERVE = 192  # tokens for a question and its answer
JOINTS = 4  # of them, where head, files and question meet
HEAD = 'The files of a repository follow, each under its path. A question about them comes last.\n\n'
MOST_TRIES = 50  # of files to begin a prompt with


@dataclasses.dataclass(frozen=True)
class Function:
    """A function at the top of a file whose def is one line; signature is what follows the name: '(a, b=1) -> int:'."""

    name: str
    signature: str


@dataclasses.dataclass(frozen=True)
class Defines:
    """Which file defines a function."""

    task: str = 'defines'
    max_new_tokens: int = 48

    def ask(self, path, function):
        """-> question, begun answer, reference."""
        return (f'Question: Which file defines the function {function.name}? Answer with its path.\nAnswer:',
                f' The function {function.name} is defined in the file', path)

    def generate(self, material, length, index):
        return sample(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The exact signature of a function that is defined somewhere above."""

    task: str = 'signature'
    max_new_tokens: int = 64

    def ask(self, path, function):
        return (f'Question: How does the definition of the function {function.name} begin? Repeat its first line.\n'
                'Answer:', f' def {function.name}', function.signature)

    def generate(self, material, length, index):
        return sample(material, self, length, index)


TASKS = {config.task: config for config in (Defines(), Signature())}


# ---------------------------------------------------------------------------------------------------
# What the syntax tree says
# ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def parse(text):
    """The syntax tree of a source, None for what is no Python of this interpreter."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def functions(text):
    """[Function] of a source, those with two parameters or more."""
    lines, out = text.split('\n'), []
    for node in (parse(text) or ast.Module([], [])).body:
        if isinstance(node, ast.FunctionDef) and len(ast.unparse(node.args).split(',')) > 1:
            line, head = lines[node.lineno - 1].rstrip(), f'def {node.name}'
            if line.startswith(head + '(') and line.endswith(':') and parse(line + ' pass'):
                out.append(Function(node.name, line[len(head):]))
    return out


def defined(text):
    """[name] of every definition of a function or class in a source, methods too."""
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [node.name for node in ast.walk(parse(text) or ast.Module([], [])) if isinstance(node, kinds)]


def identifiers(text):
    """[(start, name)] of the variables, parameters and attributes of a source, start in characters, in their order."""
    ends = [0, *itertools.accumulate(len(line) + 1 for line in text.split('\n'))]
    found = set()
    for node in ast.walk(parse(text) or ast.Module([], [])):
        if isinstance(node, ast.Name | ast.arg):
            name, line, column = getattr(node, 'id', None) or node.arg, node.lineno, node.col_offset
        elif isinstance(node, ast.Attribute):
            name, line, column = node.attr, node.end_lineno, node.end_col_offset - len(node.attr.encode())
        else:
            continue
        # Columns are bytes of UTF-8.
        source = text[ends[line - 1]:ends[line] - 1]
        start = ends[line - 1] + (column if source.isascii() else len(source.encode()[:column].decode()))
        if text.startswith(name, start):  # not within an f-string of an older Python, whose columns are none
            found.add((start, name))
    return sorted(found)


# ---------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------


def python_files(documents):
    """Those whose names end in .py and that parse, with line ends as the syntax tree counts them."""
    files = [one._replace(text='\n'.join(one.text.splitlines()) + '\n') for one in documents if one.name.endswith('.py')]
    return [one for one in files if parse(one.text) is not None]


def sample(material, config, length, index):
    """Sample: question index % QUESTIONS about text index // QUESTIONS, which all tasks have in common."""
    files, asked = _text(material, length, index // QUESTIONS)
    path, function = asked[index % QUESTIONS]
    question, prefix, answer = config.ask(path, function)
    new = _tokens(material.counter, config, path, function)[1]
    text = HEAD + bundle.text(files)
    used = material.overhead.total + material.counter.bos + material.counter.count(f'{text}\n{question}{prefix}') + new
    before = text[:text.index(f'\ndef {function.name}(')]
    depth = material.counter.count(before) / material.counter.count(text)
    # Texts are the same where the repository hardly fills one.
    meta = {'tokens': used, 'depths': [depth], 'files': len(files), 'path': path, 'function': function.name,
            'bundle': hashlib.sha256(text.encode()).hexdigest()[:16]}
    return samples.Sample(config.task, length, index, f'{text}\n{question}', prefix, [answer], new, meta)


def _tokens(counter, config, path, function):
    """-> tokens of the question with the begun answer, tokens for the answer."""
    question, prefix, answer = config.ask(path, function)
    asked, answered = counter.count_each([question + prefix, ' ' + answer]).tolist()
    return asked, max(config.max_new_tokens, answered + 2)


def _text(material, length, number):
    """-> ([Document], [(path, Function)]): files that fill a length, and QUESTIONS functions of theirs."""
    return material.cached(('repository', length, number), lambda: _make_text(material, length, number))


def _make_text(material, length, number):
    files, sizes = material.cached('repository', lambda: _sized(material))
    rng = samples.rng(material.seed, 'repository', length, number)
    left = length - RESERVE - material.overhead.total - material.counter.bos - material.counter.count_head(HEAD)
    fitting = [i for i in range(len(files)) if sizes[i] <= left]
    for _ in range(MOST_TRIES):
        rng.shuffle(fitting)
        chosen, room = [], left
        for i in fitting:
            if sizes[i] <= room:
                chosen.append(i)
                room -= sizes[i]
        # Where pieces do not add up for this tokenizer the whole is counted, and what is over left out.
        while chosen and material.counter.count(bundle.text([files[i] for i in chosen])) > left:
            chosen.pop()
        picked = sorted((files[i] for i in chosen), key=lambda one: one.name)
        questions = [one for one in _questions(picked) if all(
            sum(_tokens(material.counter, config, *one)) <= RESERVE - JOINTS for config in TASKS.values())]
        if len(questions) >= QUESTIONS:
            return picked, rng.sample(questions, QUESTIONS)
    raise ValueError(f'length {length} has no room for files of the repository with {QUESTIONS} functions of their own; '
                     'use a larger length, or a repository of smaller files (--haystack)')


def _sized(material):
    files = python_files(material.documents)
    if not files:
        raise ValueError('the documents hold no Python file; give a repository, such as --haystack repo/')
    return files, material.counter.count_each([bundle.section(one) for one in files]).tolist()


def _questions(files):
    """[(path, Function)] whose names are defined once, and whose path is no part of another's."""
    homes = {}
    for one in files:
        for name in defined(one.text):
            homes.setdefault(name, []).append(one.name)
    paths = [one.name for one in files]
    return [(one.name, function) for one in files for function in functions(one.text)
            if len(homes[function.name]) == 1 and sum(one.name in path for path in paths) == 1]


# ---------------------------------------------------------------------------------------------------
# Loss on identifiers
# ---------------------------------------------------------------------------------------------------


def overfull(material, length, number):
    """[Document]: files, drawn by (length, number), of at least length tokens with their paths; [] if all are fewer."""
    files, sizes = material.cached('repository', lambda: _sized(material))
    order = samples.rng(material.seed, 'identifiers', length, number).sample(range(len(files)), len(files))
    count = int(np.searchsorted(np.cumsum([sizes[i] for i in order]), length)) + 1
    return sorted((files[i] for i in order[:count]), key=lambda one: one.name) if count <= len(files) else []


def identifier_distances(files, tokenizer):
    """-> (ids, [(first token, last token, distance)]) of a bundle of files: every identifier that occurs again, and how
    many tokens after its first use, in whichever file that was."""
    text, uses, at = bundle.text(files), [], 0
    for one in files:
        part = bundle.section(one)
        body = at + part.index('\n') + 1
        uses += [(body + start, name) for start, name in identifiers(one.text)]
        at += len(part)
    ids = tokenizer.encode(text)
    # The end of every token in characters.
    stream, ends = Detokenizer(tokenizer.decode), []
    for token in ids:
        ends.append((ends[-1] if ends else 0) + len(stream.push(token)))
    if stream.text != text[:len(stream.text)] or ends[-1] != len(text):
        raise ValueError('this tokenizer does not give back the text that it was given, so its tokens cannot be laid on '
                         'the syntax tree; use a byte-level one')
    first_use, out = {}, []
    for start, name in uses:
        first, last = bisect.bisect_right(ends, start), bisect.bisect_left(ends, start + len(name))
        if name in first_use:
            out.append((first, last, first - first_use[name]))
        first_use.setdefault(name, first)
    return ids, out


def identifier_losses(losses, occurrences, edges):
    """(sums, counts) [bins]: nats of whole identifiers by distance, edges[i] <= distance < edges[i + 1].

    losses: [S], entry p the loss of token p of the bundle; occurrences past its end do not count.
    """
    sums, counts = np.zeros(len(edges) - 1), np.zeros(len(edges) - 1, int)
    for first, last, distance in occurrences:
        i = bisect.bisect_right(edges, distance) - 1
        if last < len(losses) and 0 <= i < len(counts):
            sums[i] += losses[first:last + 1].sum(dtype=np.float64)
            counts[i] += 1
    return sums, counts
