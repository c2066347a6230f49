"""The metrics of the published benchmarks, as their papers' programs compute them, written anew.

Each is a function of the answer and of the outputs of a question.
"""

import collections
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lct.eval import scoring

PUNCTUATION = '\n:"\'.,?!{}'
# string.punctuation, and what a Chinese text uses beside it
WIDE_PUNCTUATION = string.punctuation + (
    '！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》《「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰–—‘’‛“”„‟…‧﹏')
CHOICE_PHRASES = ('answer is:', 'answer:', 'answer is', 'option is')
OPTION_PHRASES = ('answer is:', 'is:', 'answer:')


def score(metric: str, text: str, outputs: Sequence[str], meta: Mapping[str, Any]) -> float:
    """0..1: the score of an answer; meta: of its sample."""
    text = scoring.clean(text)
    if metric == 'only_answer':
        return only_answer(text, outputs[0], meta['question'], meta['answers'])
    return float(METRICS[metric](text, outputs))


def _words(text: str, separators: str = PUNCTUATION) -> list[str]:
    return text.translate(str.maketrans(dict.fromkeys(separators, ' '))).split()


# ---------------------------------------------------------------------------------------------------
# LongBench v2
# ---------------------------------------------------------------------------------------------------


def stated_letter(text: str, outputs: Sequence[str]) -> bool:
    """Whether the answer says "The correct answer is (X)", or without brackets, of the right letter."""
    text = text.replace('*', '')
    found = (re.search(r'The correct answer is \(([A-D])\)', text)
             or re.search(r'The correct answer is ([A-D])', text))
    return bool(found) and found.group(1) == outputs[0]


# ---------------------------------------------------------------------------------------------------
# BABILong
# ---------------------------------------------------------------------------------------------------


def target_names(target: str) -> set[str]:
    """What an answer must name: 'apple,milk' is two objects, but 's,e' one way, whose order counts."""
    target = target.lower().strip()
    return {one.strip() for one in target.split(',')} if len(target) > 3 else {target}


def only_answer(text: str, target: str, question: str, answers: Sequence[str]) -> float:
    """1.0 if the first sentence names the target and no other possible answer, apart from those that the
    question names; a target of several, such as 'apple,milk', takes all of them.

    A question that the model goes on to ask is not read: the benchmark's program means to cut it off too, but
    looks for a capital after it has lowered the case.
    """
    sentence = re.split(r'\.|<context>|<example>|question', text.lower(), maxsplit=1)[0]
    targets = target_names(target)
    mentioned = {one for one in answers if one in question.lower()} - targets
    return float({one for one in answers if one in sentence} - mentioned == targets)


# ---------------------------------------------------------------------------------------------------
# InfiniteBench
# ---------------------------------------------------------------------------------------------------


def first_integer(text: str, outputs: Sequence[str]) -> bool:
    found = re.search('[0-9]+', text)
    return bool(found) and found.group() == outputs[0]


def word(text: str, outputs: Sequence[str]) -> bool:
    return outputs[0] in _words(text)


def name(text: str, outputs: Sequence[str]) -> bool:
    """The name is one word in capitals, as scripts write it."""
    return outputs[0] in [one.upper() for one in _words(text)]


def last_integer(text: str, outputs: Sequence[str]) -> bool:
    found = _words(text, '\n.`\'":')
    return bool(found) and bool(re.fullmatch(r'[+-]?\d+', found[-1])) and int(found[-1]) == int(outputs[0])


def first_number(text: str, outputs: Sequence[str]) -> bool:
    """The first number without its sign; a whole one where the right one is whole."""
    found = re.search(r'\d+\.\d+|\d+', text)
    if not found or ('.' in found.group() and '.' not in outputs[0]):
        return False
    return float(found.group()) == float(outputs[0])


def leading_numbers(text: str, outputs: Sequence[str]) -> float:
    """The fraction of the numbers that are right before the first wrong one."""
    right = 0
    for got, wanted in zip(re.findall('[0-9]+', text), outputs, strict=False):
        if int(got) != int(wanted):
            break
        right += 1
    return right / len(outputs)


def choice(text: str, outputs: Sequence[str]) -> bool:
    """By the letter that the answer begins with, that follows a phrase such as "answer is", or that comes
    first as a word."""
    letter = outputs[0]
    if text[:1] and text[0] in 'ABCD':
        return text[0] == letter
    text = re.sub('[\n"\'.,?!{} ]+', ' ', text)
    for phrase in CHOICE_PHRASES:
        if phrase in text:
            return text.partition(phrase)[2][1:].startswith(letter)
    return next((one for one in text.split() if one in 'ABCD'), '') == letter


def option(text: str, outputs: Sequence[str]) -> bool:
    """Like choice, but the answer may also name the function, outputs[1], and must follow a phrase."""
    if text[:2] in (f'{outputs[0]}.', f'{outputs[0]}:'):
        return True
    text = re.sub('(?:[Oo]ption|[\n`\'"* -])+', ' ', text)
    for phrase in OPTION_PHRASES:
        if phrase in text:
            return text.partition(phrase)[2][1:].startswith(tuple(outputs[:2]))
    return False


def f1_characters(text: str, outputs: Sequence[str]) -> float:
    """As scoring.token_f1, over the characters of a Chinese answer."""
    kept = lambda one: ''.join(x for x in one.lower() if x not in WIDE_PUNCTUATION and not x.isspace())
    return max(scoring.f1(kept(text), kept(output)) for output in outputs)


def rouge_lsum(text: str, outputs: Sequence[str]) -> float:
    """ROUGE-Lsum (Lin 2004): the F-measure of the union of longest common subsequences of lines."""
    wanted, found = ([re.findall('[a-z0-9]+', line.lower()) for line in one.split('\n')]
                     for one in (outputs[0], text))
    left_wanted, left_found = (collections.Counter(x for line in one for x in line)
                               for one in (wanted, found))
    total = left_wanted.total(), left_found.total()
    hits = 0
    for line in wanted:
        union = {i for other in found for i in _common_subsequence(line, other)}
        for i in sorted(union):
            if left_wanted[line[i]] > 0 and left_found[line[i]] > 0:
                hits += 1
                left_wanted[line[i]] -= 1
                left_found[line[i]] -= 1
    return 2 * hits / sum(total) if hits else 0.0


def _common_subsequence(line, other):
    """Indices into line of one longest common subsequence."""
    table = [[0] * (len(other) + 1)]
    for one in line:
        row = [0]
        for j, two in enumerate(other):
            row.append(table[-1][j] + 1 if one == two else max(table[-1][j + 1], row[j]))
        table.append(row)
    i, j, out = len(line), len(other), []
    while i and j:
        if line[i - 1] == other[j - 1]:
            out.append(i - 1)
            i, j = i - 1, j - 1
        elif table[i][j - 1] > table[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return out


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {one.__name__: one for one in (
    stated_letter, first_integer, word, name, last_integer, first_number, leading_numbers, choice, option,
    f1_characters, rouge_lsum)} | {'f1': scoring.token_f1}
