"""The material of all tasks: a tokenizer, a haystack, names and values, documents with questions."""

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lct.data.tokenizer import Tokenizer
from lct.eval import samples
from lct.eval.samples import ChatOverhead
from lct.eval.tasks import generated_passages, needle_placement, prompt_fitting, qa_documents, ruler_text

NO_OVERHEAD = ChatOverhead()


class PromptFrame(NamedTuple):
    """The text around the context of a prompt: head, context, tail. answer_prefix begins the answer."""

    head: str
    tail: str
    answer_prefix: str


class Material:
    """What samples are made of, tokenized once.

    Args:
      documents: list of data.corpus.documents.Document, the text of the haystacks.
      text_source: the name of the documents in results.
      lexicon: names, values and word lists; generated ones by default.
      sources: {'one_hop', 'two_hop' or a key of qa_documents.FILES: qa_documents.FileQuestions}; the first
        two are generated people by default.
      placement: needle_placement.Stratified(seed) by default, or RulerFixed() for RULER's own fixed shuffles.
      overhead: of the chat template that the prompts will be put into.
    """

    def __init__(
        self, tokenizer: Tokenizer, documents: list, *, text_source: str = 'embedded',
        lexicon: ruler_text.Lexicon | None = None, sources: dict | None = None, seed: int = 42,
        placement: Any = None, overhead: ChatOverhead = NO_OVERHEAD,
    ):
        self.counter = prompt_fitting.TokenCounter(tokenizer)
        self.seed, self.overhead, self.text_source = seed, overhead, text_source
        self.lexicon = lexicon or ruler_text.generated_lexicon(seed)
        self.sources = {'one_hop': qa_documents.GeneratedPeople(seed, 1),
                        'two_hop': qa_documents.GeneratedPeople(seed, 2), **(sources or {})}
        self._generated = {'passages': generated_passages.GeneratedPassages(seed)}
        self.placement = placement or needle_placement.Stratified(seed)
        self.documents, self._cache = documents, {}
        self._noise = self.counter.count_each([ruler_text.NOISE])
        self.counter.check_additive([ruler_text.NOISE] * 64)

    def sample(self, config: Any, length: int, index: int) -> samples.Sample:
        """Sample `index` of a task at a length in tokens.

        Args:
          config: the config of a task, with generate(material, length, index) -> Sample.
        Raises:
          ValueError: if the length is too small for the task.
        """
        margin = self.counter.margin(length)
        while True:
            tighter = copy.copy(self)
            tighter.overhead = self.overhead._replace(total=self.overhead.total + margin)
            sample = config.generate(tighter, length, index)
            if self.counter.trusts_sums(length) and not sample.messages:
                return sample
            # Count the complete prompt. Where its fragments did not add up, remove the excess.
            used = self.tokens_used(sample)
            if used <= length:
                return dataclasses.replace(sample, meta={**sample.meta, 'tokens': used})
            margin += used - length

    def tokens_used(self, sample: samples.Sample) -> int:
        """Tokens of a sample's budget that its prompt and answer take, counted as a whole."""
        if sample.messages:
            return self.overhead.chat_tokens(sample.messages) + sample.max_new_tokens
        return (self.overhead.total + self.counter.bos + self.counter.count(sample.text)
                + sample.max_new_tokens)

    def provenance(self) -> dict:
        """What the samples are made of, for JSON beside the scores."""
        return {
            'tokenizer': self.counter.tokenizer.fingerprint, 'seed': self.seed,
            'overhead': self.overhead.total, 'haystack': self.text_source, 'words': self.lexicon.source,
            'placement': self.placement.name,
            'questions': {name: source.source for name, source in self.sources.items()},
        }

    def rng(self, config: Any, length: int, index: int | str) -> random.Random:
        """The random numbers of one sample."""
        return samples.rng(self.seed, config.task, length, index)

    def first_depth(self, config: Any, length: int, index: int) -> float:
        """0..1: the depth of the first target of one sample."""
        return self.placement.depth(config.task, length, index)

    def budget(self, config: Any, length: int, frame: PromptFrame, answer: str) -> 'Budget':
        """The token budget of a prompt; answer: the longest text that the model may have to write."""
        # RULER's allowance is for vocabularies of a hundred thousand; a smaller one may need more.
        answer_tokens = max(config.max_new_tokens, self.counter.count_one(' ' + answer) + 2)
        fixed = (self.overhead.total + self.counter.bos + self.counter.count_head(frame.head)
                 + self.counter.count_one(frame.tail + frame.answer_prefix))
        return Budget(config.task, length, frame, fixed, answer_tokens)

    def noise(self, room: int) -> tuple[list[str], np.ndarray]:
        """(lines, tokens) of RULER's repeated filler that fit into room tokens."""
        count = room // int(self._noise[0])
        return prompt_fitting.append_partial_line(
            self.counter, [ruler_text.NOISE] * count, self._noise.repeat(count), ruler_text.NOISE, room)

    @property
    def text(self) -> prompt_fitting.CyclicText:
        """The lines of the documents."""
        return self.cached('text', lambda: prompt_fitting.CyclicText(
            self.counter, ruler_text.text_lines(self.documents)))

    def excerpt(self, rng: random.Random, room: int) -> tuple[list[str], np.ndarray]:
        """(lines, tokens) of the documents from some line on that fit into room tokens."""
        return self.text.excerpt(self.placement.start(rng, len(self.text.lines)), room)

    def needle_pool(self, name_kind: str, value_kind: str, length: int) -> tuple[list[str], np.ndarray, set]:
        """(needles, their tokens [n], their names and values): 1.5 * length tokens of distractors or more."""
        def make():
            rng = samples.rng(self.seed, 'needles', name_kind, value_kind)
            type_name = ruler_text.type_name(value_kind)
            made = []
            pairs = ruler_text.pairs(rng, self.lexicon, name_kind, value_kind)
            lines = (made.append(pair) or ruler_text.needle(type_name, *pair) for pair in pairs)
            pool = prompt_fitting.FragmentPool(self.counter, lines)
            self.counter.check_additive(pool.first(prompt_fitting.FIRST_FRAGMENTS))
            return pool, made

        pool, made = self.cached(('needles', name_kind, value_kind), make)
        lines, tokens = pool.at_least(3 * length // 2)
        taken = self.cached(('taken', name_kind, value_kind, len(lines)),
                            lambda: {text for pair in made[:len(lines)] for text in pair})
        return lines, tokens, taken

    def list_pool(self, length: int) -> tuple[list[str], np.ndarray]:
        """([' word' line], tokens [n]) of at least length tokens for a numbered list."""
        def make():
            pool = prompt_fitting.FragmentPool(
                self.counter, (f' {word}\n' for word in self.lexicon.word_list))
            items = pool.first(prompt_fitting.FIRST_FRAGMENTS)
            self.counter.check_additive(
                [fragment for i, item in enumerate(items, 1) for fragment in (f'{i}.', item)])
            return pool

        return self.cached('list', make).at_least(length)

    def number_tokens(self, length: int) -> np.ndarray:
        """int [n + 1]: tokens of the numbers '1.' to 'i.' together, for a list of length tokens or more."""
        return self.cached(('numbers', length), lambda: np.concatenate([[0], np.cumsum(
            self.counter.count_each([f'{i}.' for i in range(1, length // 3 + 1)]))]))

    def document_pool(self, name: str, length: int) -> tuple[Any, list[str], np.ndarray]:
        """(source, [text], tokens [n]) of documents for question answering."""
        sources = self._generated | self.sources
        if name in qa_documents.FILES and name not in sources:
            raise ValueError(f'no file of the questions of {name} is given; name it with --{name}')
        if name not in sources:
            raise ValueError(f"unknown source of questions {name!r}; use one of {', '.join(sources)}")
        source = sources[name]

        def make():
            pool = prompt_fitting.FragmentPool(self.counter, (text + '\n' for text in source.documents()))
            self.counter.check_additive([fragment for i, text in enumerate(pool.first(64), 1)
                                         for fragment in (f'Document {i}:\n', text)])
            return pool

        pool = self.cached(('documents', name), make)
        return source, *pool.at_least(3 * length // 2 if source.is_endless else float('inf'))

    def cached(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of make(), which is called once for each key."""
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


@dataclasses.dataclass(frozen=True)
class Budget:
    """A budget of `length` tokens: `fixed` of them around the context, `answer_tokens` for the answer."""

    task: str
    length: int
    frame: PromptFrame
    fixed: int
    answer_tokens: int

    def room(self, inserted: int = 0) -> int:
        """Tokens left for the haystack beside `inserted` ones; ValueError if there are none."""
        room = self.length - self.fixed - self.answer_tokens - inserted
        if room < 0:
            self.raise_too_small(-room)
        return room

    def raise_too_small(self, missing: int) -> None:
        """Raise ValueError for a length that is `missing` tokens too short."""
        raise ValueError(f'length {self.length} is too small for {self.task}: with this tokenizer a prompt '
                         f'and its answer take {self.length + missing} tokens or more; use a larger length')

    def check_filled(self, is_filled: bool, supply: str) -> None:
        """Raise ValueError for a prompt that stays short for lack of material; supply: what there is."""
        if not is_filled:
            raise ValueError(f'{supply}, too few to fill length {self.length} of {self.task}; give more or '
                             'use a smaller length')

    def sample(
        self, index: int, context: str, outputs: Sequence[str], context_tokens: int, meta: dict,
    ) -> samples.Sample:
        """The sample with this context, which has so many tokens."""
        meta = {'tokens': self.fixed + context_tokens + self.answer_tokens, **meta}
        prompt = self.frame.head + context + self.frame.tail
        return samples.Sample(self.task, self.length, index, prompt, self.frame.answer_prefix, list(outputs),
                              self.answer_tokens, meta)
