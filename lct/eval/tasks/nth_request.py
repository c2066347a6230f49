"""The n-th of several like requests in a dialogue: a needle task without a name to search for.

A user asks an assistant for short texts, and a few times for the same kind of text about the same subject.
The last request is for one of these, by number, word for word, as in OpenAI's MRCR. The score is MRCR's, the
ratio of equal characters; MRCR's random prefix, which an answer has to begin with, is left out, since the
answer prefix of a transcript begins the answer. A model with a chat template reads the dialogue as the turns
of a chat, any other one as a transcript. All requests and texts are our own.
"""

import dataclasses
import random
import re
from typing import NamedTuple

import numpy as np

from lct.data.synthetic import recall
from lct.eval import samples, scoring
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.material import Material, PromptFrame

KINDS = {  # kind of text: how one about {subject} begins
    'letter': 'Dear {subject},', 'poem': 'O {subject},', 'speech': 'Friends of the {subject},',
    'story': 'Once upon a time there was a {subject}:', 'riddle': 'What has a {subject} in it?',
    'prayer': 'Spare the {subject},', 'news report': 'Now about the {subject}:',
    'diary entry': 'Tonight I saw a {subject}:', 'song': 'Sing, {subject},', 'recipe': 'Take one {subject},',
    'toast': 'To the {subject}!', 'notice': 'Lost, a {subject}:'}
CLAUSES = (
    'a {a} {n} waits by the {m}', 'nobody counts the {n} of {m}', 'we gave our {a} {n} to a {m}',
    'under the {m} lies some {a} {n}', 'no {n} is as {a} as this {m}', 'bring back the {a} {n}',
    'it was {a} when the {n} met the {m}', 'keep the {n} and sell the {a} {m}', 'my {n} outran a {a} {m}',
    'every {m} once was a {a} {n}', 'leave the {a} {n} alone', 'they painted a {n} on the {m}',
    'a {n} and a {m} are {a} company', 'the {a} one sleeps in a {n}', 'she traded the {m} for a {n}',
    'who hid this {a} {n}')
A_BEFORE_VOWEL = re.compile(r'\b([Aa]) (?=[aeiou])')
ORDINALS = 'first second third fourth fifth sixth seventh eighth ninth tenth'.split()


class Exchange(NamedTuple):
    """A request for a text of a kind about a subject ('silver', 'lantern'), and the text."""

    kind: str
    subject: tuple
    text: str

    @property
    def messages(self) -> list[dict[str, str]]:
        request = f"Write a {self.kind} about the {' '.join(self.subject)}."
        return [{'role': 'user', 'content': request}, {'role': 'assistant', 'content': self.text}]

    def lines(self) -> str:
        return samples.transcript(self.messages)


@dataclasses.dataclass(frozen=True)
class NthRequest:
    """`like` texts of one kind about one subject among other texts; the question asks for the n-th.

    Sample by sample it is the first, the second, ... near: texts of another kind about the same subject, and
    as many of the same kind about another subject.
    """

    task: str
    like: int = 2
    near: int = 1
    max_new_tokens: int = 64

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if not 2 <= self.like <= len(ORDINALS):
            raise ValueError(f'{self.like} like requests must be 2 to {len(ORDINALS)}')
        rng = material.rng(self, length, index)
        kind, subject, number = rng.choice(list(KINDS)), _subject(rng), index % self.like
        inserts = [_exchange(rng, kind, subject) for _ in range(self.like)]
        target = inserts[number].text
        inserts += [_exchange(rng, rng.choice([one for one in KINDS if one != kind]), subject)
                    for _ in range(self.near)]
        inserts += [_exchange(rng, kind, _near_subject(rng, subject)) for _ in range(self.near)]
        frame, request = _frame(ORDINALS[number], kind, subject)
        is_chat = material.overhead.chat_tokens is not None
        budget = material.budget(self, length, PromptFrame('', request, '') if is_chat else frame,
                                 max((one.text for one in inserts), key=len))
        lines = [one.lines() for one in inserts]
        sizes = int((material.counter.count_each(lines) + _turn_tokens(material)).sum())
        others, tokens = _others(material, rng, length, budget.room(sizes), (kind, subject))
        # The like requests stay in their order; the others are anywhere.
        depths = sorted(rng.random() for _ in range(self.like))
        depths += [rng.random() for _ in inserts[self.like:]]
        context, depths = prompt_fitting.insert_lines(
            others, tokens, list(zip(depths, lines, strict=True)), material.counter)
        # A reader that takes any of the like texts: right for one, alike to some degree for the others.
        chance = np.mean([scoring.similarity(one.text, [target]) for one in inserts[:self.like]])
        meta = {'depths': [depths[number]], 'number': number + 1, 'metric': 'similarity',
                'chance': float(chance), 'exchanges': len(others) + len(inserts)}
        sample = budget.sample(index, context, [target], int(tokens.sum()) + sizes, meta)
        if not is_chat:
            return sample
        prompt = frame.head + context + frame.tail
        return dataclasses.replace(sample, prompt=prompt, answer_prefix=frame.answer_prefix,
                                   messages=_messages(prompt))


def _messages(transcript):
    """The turns of a transcript, of one line each."""
    return [{'role': role.lower(), 'content': content}
            for role, content in re.findall(r'^(User|Assistant): (.+)$', transcript, re.MULTILINE)]


def _turn_tokens(material):
    """Tokens that an exchange takes as two turns of a chat beyond its transcript: those of a template, about
    the same for all; 0 without one."""
    chat_tokens = material.overhead.chat_tokens
    if chat_tokens is None:
        return 0

    def measure():
        made = Exchange('letter', ('silver', 'lantern'), 'Dear silver lantern, keep the sand.')
        one, two = (chat_tokens([*made.messages * count, made.messages[0]]) for count in (1, 2))
        return two - one - material.counter.count_one(made.lines())

    return material.cached('turn_tokens', measure)


def _frame(ordinal, kind, subject):
    """(the frame of a transcript, its last request)"""
    head = 'A dialogue between a user and an assistant follows. One more request comes last.\n\n'
    request = (f"Of the texts that I asked for above, repeat the {ordinal} {kind} about the "
               f"{' '.join(subject)}. Repeat it word for word and write nothing else.")
    tail = samples.transcript([{'role': 'user', 'content': request}])
    return PromptFrame(head, tail, 'Assistant:'), request


def _subject(rng):
    return rng.choice(recall.ADJECTIVES), rng.choice(recall.NOUNS)


def _near_subject(rng, subject):
    """A subject with the same adjective or the same noun."""
    while True:
        other = _subject(rng)
        near = rng.choice([(subject[0], other[1]), (other[0], subject[1])])
        if near != subject:
            return near


def _exchange(rng: random.Random, kind: str, subject: tuple) -> Exchange:
    opening, clauses = KINDS[kind].format(subject=' '.join(subject)), rng.sample(CLAUSES, 3)
    chosen = [clause.format(a=rng.choice(recall.ADJECTIVES), n=rng.choice(recall.NOUNS),
                            m=rng.choice(recall.NOUNS)) for clause in clauses]
    return Exchange(kind, subject, A_BEFORE_VOWEL.sub(r'\1n ', f"{opening} {', '.join(chosen)}."))


def _others(material, rng, length, room, request):
    """([exchange], tokens [n]) in random order that fit into room tokens, none for a (kind, subject)."""
    pool, made = material.cached('dialogue', lambda: _pool(material))
    lines, tokens = pool.at_least(3 * length // 2)
    tokens = tokens + _turn_tokens(material)
    order = np.array(rng.sample(range(len(lines)), len(lines)))
    order = order[[made[i][:2] != request for i in order]]
    chosen = order[:prompt_fitting.count_fitting(tokens[order], room)]
    return [lines[i] for i in chosen], tokens[chosen]


def _pool(material):
    rng, made = samples.rng(material.seed, 'dialogue'), []

    def lines():
        while True:
            made.append(_exchange(rng, rng.choice(list(KINDS)), _subject(rng)))
            yield made[-1].lines()

    pool = prompt_fitting.FragmentPool(material.counter, lines())
    material.counter.check_additive(pool.first(prompt_fitting.FIRST_FRAGMENTS))
    return pool, made
