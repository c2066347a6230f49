"""Long synthetic chats: questions about evidence that is scattered over a long document, loss on the answers.

Two kinds of evidence, neither of which needs another model: generated statements ('The secret code: amber
falcon 482913.') inserted into the text, and passages of the text itself, of which the question quotes the
beginning and the answer is what follows. The documents are cut and put together again with the questions
behind them, as in Large World Model (Liu et al. 2024, arXiv:2402.08268), whose recipe Gradient took for
Llama-3; there one question a thousand tokens was written by a model.

Of a million tokens a few hundred are answers. LWM's loss is a mean per sequence, so a chat weighs there as much
as a sequence of text; here, where the loss is one sum over all targets of the batch, the weights of the
answers say so: they add up to share * seq_len, each answer the same.
"""

from typing import NamedTuple

import numpy as np

from lct.data.sequence import Sequence

DOCUMENT, QUESTION, ANSWER = '\ue000', '\ue001', '\ue002'  # private characters that stand for the parts of a chat
CONTINUE = 'The text contains the passage below. Which words come right after it?\n'


class ChatDelimiters(NamedTuple):
    """Token ids of what stands around the parts of a chat: before the document, between it and the first question,
    between question and answer, between an answer and the next question, after the last answer."""

    opening: list
    first: list
    answer: list
    next: list
    closing: list


def delimiters(tokenizer, template=None):
    """-> ChatDelimiters, of a chat.ChatTemplate, or of plain lines 'Question:' and 'Answer:' for a base model."""
    if template is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ask, answer = tokenizer.encode('\n\nQuestion:\n'), tokenizer.encode('\nAnswer:\n')
        return ChatDelimiters(bos, ask, answer, ask, tokenizer.encode('\n'))
    turns = ((f'{DOCUMENT}\n\n{QUESTION}', ANSWER), (QUESTION, ANSWER))
    messages = [{'role': role, 'content': text} for turn in turns for role, text in zip(('user', 'assistant'), turn)]
    rest, parts = template.render(messages), []
    for mark in (DOCUMENT, QUESTION, ANSWER, QUESTION, ANSWER):
        before, found, rest = rest.partition(mark)
        if not found:
            raise ValueError(f'{template.name} does not keep the messages in their order; use a template that renders '
                             'user and assistant in turn, or none')
        parts.append(tokenizer.encode_special(before))
    opening, first, answer, following, again = parts
    if again != answer:
        raise ValueError(f'{template.name} opens the second answer otherwise than the first; use a template that treats '
                         'all turns alike, or none')
    return ChatDelimiters(opening, first, answer, following, tokenizer.encode_special(rest))


def answer_weights(counts, total):
    """-> float64 [answers]: weights of a token of answers of counts int [answers] tokens: in all total, each answer
    the same, however long."""
    return total / (len(counts) * np.asarray(counts, np.float64))


def sequence(rng, frame, words, source, documents, seq_len, *, share=1.0, max_questions=32, num_distractors=8,
             passage=24):
    """-> sequences.Sequence of seq_len tokens: one chat, planned without reading a token of the store.

    words: recall.RecallVocabulary, whose held-out keys and values are not used. source: epochs.EpochOrder to draw the
    documents from. max_questions: their number is log-uniform up to it, about half of them for passages.
    num_distractors: statements that nobody asks for. passage: tokens quoted by a question, and of its answer.
    """
    encode = words.tokenizer.encode
    quote = encode(CONTINUE)
    # a question in the two places where it takes room, the statement in the text among them
    longest = len(frame.answer) + len(frame.next) + max(len(quote) + 2 * passage, 4 * words.statement_len)
    fit = (seq_len - len(frame.opening) - len(frame.first) - len(frame.closing)) // (2 * longest)
    if fit < 1:
        raise ValueError(f'seq_len {seq_len} does not hold a chat with one question, which takes {2 * longest} tokens and '
                         "more; use longer sequences, or no 'chat' in the mixture")
    count = int(np.exp(rng.uniform(0, np.log(min(max_questions, fit) + 1))))
    num_facts = int(rng.binomial(count, 0.5))
    facts = []
    for _ in range(num_facts + min(num_distractors, fit - count)):
        facts.append(words.fact(rng, True, {fact.key for fact in facts}))
    statements = [words.statement(fact) for fact in facts]
    asked = [([_literal(encode(f'What is the secret code of the {fact.key}?'))], [_literal(encode(fact.value))])
             for fact in facts[:num_facts]]

    # Everything but the text has a length by now; the text takes what is left.
    num_passages = count - num_facts
    around = [frame.opening, frame.first, frame.closing, *[frame.next] * (count - 1), *[frame.answer] * count]
    fixed = sum(map(len, around + statements)) + num_passages * (len(quote) + 2 * passage)
    fixed += sum(_len(part) for pair in asked for parts in pair for part in parts)
    spans = random_spans(rng, source, documents, seq_len - fixed, 2 * passage)
    passages = _passages(rng, spans, num_passages, passage)
    asked += [([_literal(quote), (document, at, at + passage, 0)], [(document, at + passage, at + 2 * passage, 0)])
              for document, at, _ in passages]

    whole = [(place, place + 2 * passage) for _, _, place in passages]
    parts = [_literal(frame.opening), *_scattered(rng, spans, statements, whole)]
    asked = [asked[i] for i in rng.permutation(count)]
    weights = answer_weights([sum(map(_len, answer)) + 1 for _, answer in asked], share * seq_len)
    before = frame.first
    for i, ((question, answer), weight) in enumerate(zip(asked, weights, strict=True)):
        parts += [_literal(before), *question, _literal(frame.answer), *((*part[:-1], weight) for part in answer)]
        before = frame.closing if i == count - 1 else frame.next
        parts.append(_literal(before[:1], weight))  # to stop is part of the answer
        before = before[1:]
    return _assembled([*parts, _literal(before)])


def _literal(ids, weight=0.0):
    return (ids, weight)


def _len(part):
    """part: (ids, weight), or (document, start, stop, weight)."""
    return len(part[0]) if len(part) == 2 else part[2] - part[1]


def random_spans(rng, source, documents, length, least):
    """[(document, start, stop)] of length tokens in all, from documents of at least `least`, the longest of every 64
    drawn first; of one that alone would do, a random stretch."""
    spans, left, misses = [], length, 0
    while left:
        drawn, sizes = source.draw(rng, 64)
        sizes = sizes - documents.num_bos
        drawn, sizes = drawn[sizes >= least], sizes[sizes >= least]
        misses = 0 if len(drawn) else misses + 1
        if misses == 100:
            raise ValueError(f'chats and recall need documents of {least} tokens or more, and none of 6,400 drawn from '
                             f'{source.name!r} is that long; leave them out of the mixture')
        for i in np.argsort(-sizes, kind='stable'):
            n = min(int(sizes[i]), left)
            at = documents.num_bos + int(rng.integers(sizes[i] - n + 1))
            spans += [(int(drawn[i]), at, at + n)] if n else []
            left -= n
    return spans


def _passages(rng, spans, count, passage):
    """count times (document, start, place in the text), each with 2 * passage tokens in one span."""
    sizes = np.array([stop - start for _, start, stop in spans])
    begins = np.cumsum(sizes) - sizes
    room = np.maximum(sizes - 2 * passage + 1, 0)
    found = []
    for i in rng.choice(len(spans), count, p=room / room.sum()):
        at = int(rng.integers(room[i]))
        found.append((spans[i][0], spans[i][1] + at, int(begins[i]) + at))
    return found


def _scattered(rng, spans, statements, whole):
    """The parts of spans with the statements between them, at random places, but inside none of whole
    [(start, stop)]."""
    places = []
    for at in rng.integers(sum(stop - start for _, start, stop in spans) + 1, size=len(statements)).tolist():
        while inside := [start for start, stop in whole if start < at < stop]:
            at = min(inside)
        places.append(at)
    waiting = sorted(zip(places, statements), key=lambda pair: pair[0], reverse=True)
    parts, at = [], 0
    for document, start, stop in spans:
        while waiting and waiting[-1][0] <= at + stop - start:
            place, statement = waiting.pop()
            cut = start + place - at
            parts += [(document, start, cut, 0.0), _literal(statement)]
            start, at = cut, place
        parts.append((document, start, stop, 0.0))
        at += stop - start
    return parts


def _assembled(parts):
    """The Sequence of one segment that parts are, one after the other."""
    parts = [part for part in parts if _len(part)]
    count = len(parts)
    ids = np.array([i for part in parts if len(part) == 2 for i in part[0]], np.int32)
    literal = np.array([len(part) == 2 for part in parts])
    n = np.array([_len(part) for part in parts], np.int64)
    stop = np.cumsum(np.where(literal, n, 0))
    stop[~literal] = [part[2] for part in parts if len(part) == 4]
    document = np.full(count, -1, np.int64)
    document[~literal] = [part[0] for part in parts if len(part) == 4]
    return Sequence(
        document=document, start=stop - n, stop=stop, segment=np.ones(count, np.int32), position=np.cumsum(n) - n,
        weight=np.array([part[-1] for part in parts], np.float32), follows=np.arange(count) > 0,
        continues=np.zeros(count, bool), ids=ids,
    )
