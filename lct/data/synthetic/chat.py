"""Long synthetic chats: questions about evidence scattered over a long document, with loss on answers alone.

There are two kinds of evidence, and neither needs another model: generated statements ('The secret code:
amber falcon 482913.') inserted into the text, and passages of the text itself, of which a question quotes the
beginning and the answer is the continuation. Documents are concatenated with questions after them, as in
Large World Model (Liu et al. 2024, arXiv:2402.08268), whose recipe Gradient used for Llama-3; there a model
wrote one question per thousand tokens.

Of a million tokens a few hundred are answers. The loss of Large World Model is a mean per sequence, so a chat
weighs as much there as a sequence of text. Here the loss is one sum over all targets of the batch, so the
weights of the answers make up for it: they add up to ANSWER_SHARE * seq_len, the same for each answer.
"""

from typing import NamedTuple

import numpy as np

from lct.data.batches.epoch_order import EpochOrder
from lct.data.batches.store_documents import StoreDocuments
from lct.data.chat_template import ChatTemplate
from lct.data.sequence import Sequence
from lct.data.synthetic.over_store import Span, random_spans
from lct.data.synthetic.recall import RecallVocabulary
from lct.data.tokenizer import Tokenizer

DOCUMENT, QUESTION, ANSWER = '\ue000', '\ue001', '\ue002'  # private characters, placeholders in a chat
CONTINUE = 'The text contains the passage below. Which words come right after it?\n'
MAX_QUESTIONS = 32  # the number of questions is log-uniform up to it
NUM_DISTRACTORS = 8  # statements without a question
PASSAGE = 24  # tokens that a question quotes, and tokens of its answer
ANSWER_SHARE = 1.0  # sum of the answers' weights, as a fraction of the sequence


class ChatDelimiters(NamedTuple):
    """The token ids around the contents of a chat.

    In order: before the document, between it and the first question, between question and answer, between an
    answer and the next question, after the last answer.
    """

    opening: list[int]
    first: list[int]
    answer: list[int]
    next: list[int]
    closing: list[int]


class Literal(NamedTuple):
    """Tokens that are not in the store. weight: the loss weight of predicting each."""
    ids: list[int]
    weight: float = 0.0

    @property
    def size(self) -> int:
        return len(self.ids)


class Reference(NamedTuple):
    """Tokens start..stop of a document of the store. weight: the loss weight of predicting each."""
    document: int
    start: int
    stop: int
    weight: float = 0.0

    @property
    def size(self) -> int:
        return self.stop - self.start


Fragments = list[Literal | Reference]


class Turn(NamedTuple):
    """A question and its answer."""
    question: Fragments
    answer: Fragments


class Passage(NamedTuple):
    """2 * PASSAGE tokens of a document from start on, which begin at `place` of the concatenated text."""
    document: int
    start: int
    place: int


def delimiters(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> ChatDelimiters:
    """The delimiters of a chat template, or the plain lines 'Question:' and 'Answer:' for a base model.

    Raises:
      ValueError: for a template that reorders the messages or renders answers in different ways.
    """
    if template is None:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        question, answer = tokenizer.encode('\n\nQuestion:\n'), tokenizer.encode('\nAnswer:\n')
        return ChatDelimiters(bos, question, answer, question, tokenizer.encode('\n'))
    turns = ((f'{DOCUMENT}\n\n{QUESTION}', ANSWER), (QUESTION, ANSWER))
    messages = [{'role': role, 'content': text}
                for turn in turns for role, text in zip(('user', 'assistant'), turn)]
    rest, found = template.render(messages), []
    for mark in (DOCUMENT, QUESTION, ANSWER, QUESTION, ANSWER):
        before, separator, rest = rest.partition(mark)
        if not separator:
            raise ValueError(f'{template.name} does not keep the messages in their order; use a template '
                             'that renders user and assistant in turn, or none')
        found.append(tokenizer.encode_special(before))
    opening, first, answer, following, second_answer = found
    if second_answer != answer:
        raise ValueError(f'{template.name} opens the second answer differently than the first; use a '
                         'template that renders all turns alike, or none')
    return ChatDelimiters(opening, first, answer, following, tokenizer.encode_special(rest))


def answer_weights(counts: list[int], total: float) -> np.ndarray:
    """float64 [answers]: the weight of one token of each answer, from the answers' numbers of tokens.

    All weights add up to total, and each answer has the same share, however long it is.
    """
    return total / (len(counts) * np.asarray(counts, np.float64))


def sequence(rng: np.random.Generator, delimiters: ChatDelimiters, vocabulary: RecallVocabulary,
             source: EpochOrder, documents: StoreDocuments, seq_len: int) -> Sequence:
    """A chat of seq_len tokens, planned without reading a token of the store.

    vocabulary: its held-out keys and values are not used. source: where documents are drawn from. About half
    of the questions are about passages.

    Raises:
      ValueError: if seq_len does not hold a chat with one question.
    """
    encode = vocabulary.tokenizer.encode
    instruction = encode(CONTINUE)
    most = _most_questions(delimiters, vocabulary, len(instruction), seq_len)
    count = int(np.exp(rng.uniform(0, np.log(min(MAX_QUESTIONS, most) + 1))))
    num_facts = int(rng.binomial(count, 0.5))
    facts = vocabulary.facts(rng, num_facts + min(NUM_DISTRACTORS, most - count))
    statements = [vocabulary.statement(fact) for fact in facts]
    turns = [Turn([Literal(encode(f'What is the secret code of the {fact.key}?'))],
                  [Literal(encode(fact.value))]) for fact in facts[:num_facts]]

    # Everything but the text has a length by now; the text takes what is left.
    num_passages = count - num_facts
    fixed = [delimiters.opening, delimiters.first, delimiters.closing, *[delimiters.next] * (count - 1),
             *[delimiters.answer] * count, *statements]
    fixed_len = sum(map(len, fixed)) + num_passages * (len(instruction) + 2 * PASSAGE)
    fixed_len += sum(_size(turn.question) + _size(turn.answer) for turn in turns)
    spans = random_spans(rng, source, documents, seq_len - fixed_len, 2 * PASSAGE)
    passages = _passages(rng, spans, num_passages)
    turns += [_passage_turn(passage, instruction) for passage in passages]
    text = _scatter(rng, spans, statements, passages)
    turns = [turns[i] for i in rng.permutation(count)]
    return _assemble([Literal(delimiters.opening), *text, *_dialogue(delimiters, turns, seq_len)])


def _most_questions(delimiters: ChatDelimiters, vocabulary: RecallVocabulary, instruction_len: int,
                    seq_len: int) -> int:
    """Number of questions that fit into half of a sequence together with their statements."""
    longest = (len(delimiters.answer) + len(delimiters.next)
               + max(instruction_len + 2 * PASSAGE, 4 * vocabulary.statement_len))
    room = seq_len - len(delimiters.opening) - len(delimiters.first) - len(delimiters.closing)
    most = room // (2 * longest)
    if most < 1:
        raise ValueError(f'seq_len {seq_len} does not hold a chat with one question, which takes '
                         f'{2 * longest} tokens and more; '
                         "use longer sequences, or no 'chat' in the mixture")
    return most


def _size(fragments: Fragments) -> int:
    return sum(fragment.size for fragment in fragments)


def _passage_turn(passage: Passage, instruction: list[int]) -> Turn:
    document, start, _ = passage
    middle = start + PASSAGE
    return Turn([Literal(instruction), Reference(document, start, middle)],
                [Reference(document, middle, middle + PASSAGE)])


def _dialogue(delimiters: ChatDelimiters, turns: list[Turn], seq_len: int) -> Fragments:
    """What follows the document: questions and answers with the delimiters around them."""
    weights = answer_weights([_size(turn.answer) + 1 for turn in turns], ANSWER_SHARE * seq_len)
    fragments, before = [], delimiters.first
    for i, (turn, weight) in enumerate(zip(turns, weights, strict=True)):
        fragments += [Literal(before), *turn.question, Literal(delimiters.answer)]
        fragments += [fragment._replace(weight=weight) for fragment in turn.answer]
        after = delimiters.closing if i == len(turns) - 1 else delimiters.next
        fragments.append(Literal(after[:1], weight))  # the model must also learn to stop
        before = after[1:]
    return [*fragments, Literal(before)]


def _passages(rng: np.random.Generator, spans: list[Span], count: int) -> list[Passage]:
    """Passages that lie within one span each; every place is equally likely."""
    sizes = np.array([stop - start for _, start, stop in spans])
    begins = np.cumsum(sizes) - sizes
    starts = np.maximum(sizes - 2 * PASSAGE + 1, 0)
    passages = []
    for i in rng.choice(len(spans), count, p=starts / starts.sum()):
        offset = int(rng.integers(starts[i]))
        passages.append(Passage(spans[i].document, spans[i].start + offset, int(begins[i]) + offset))
    return passages


def _scatter(rng: np.random.Generator, spans: list[Span], statements: list[list[int]],
             passages: list[Passage]) -> Fragments:
    """The text of spans with the statements at random places, but within no passage."""
    places = []
    text_len = sum(stop - start for _, start, stop in spans)
    for at in rng.integers(text_len + 1, size=len(statements)).tolist():
        while inside := [place for _, _, place in passages if place < at < place + 2 * PASSAGE]:
            at = min(inside)
        places.append(at)
    pending = sorted(zip(places, statements), key=lambda pair: pair[0], reverse=True)
    fragments, at = [], 0
    for document, start, stop in spans:
        while pending and pending[-1][0] <= at + stop - start:
            place, statement = pending.pop()
            cut = start + place - at
            fragments += [Reference(document, start, cut), Literal(statement)]
            start, at = cut, place
        fragments.append(Reference(document, start, stop))
        at += stop - start
    return fragments


def _assemble(fragments: Fragments) -> Sequence:
    """The Sequence of one segment with these fragments, one after the other."""
    fragments = [fragment for fragment in fragments if fragment.size]
    references = [fragment for fragment in fragments if isinstance(fragment, Reference)]
    literal = np.array([isinstance(fragment, Literal) for fragment in fragments])
    sizes = np.array([fragment.size for fragment in fragments], np.int64)
    stop = np.cumsum(np.where(literal, sizes, 0))
    stop[~literal] = [reference.stop for reference in references]
    document = np.full(len(fragments), -1, np.int64)
    document[~literal] = [reference.document for reference in references]
    ids = [i for fragment in fragments if isinstance(fragment, Literal) for i in fragment.ids]
    return Sequence(
        document=document, start=stop - sizes, stop=stop, segment=np.ones(len(fragments), np.int32),
        position=np.cumsum(sizes) - sizes,
        weight=np.array([fragment.weight for fragment in fragments], np.float32),
        follows=np.arange(len(fragments)) > 0, continues=np.zeros(len(fragments), bool),
        ids=np.array(ids, np.int32),
    )
