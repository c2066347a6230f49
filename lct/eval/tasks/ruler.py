"""RULER (Hsieh et al. 2024, arXiv:2404.06654): 13 tasks at any length, as samples that fill a token budget.

The tasks and their parameters are RULER's, the prompts are our own, so scores of the two do not compare to the
last point. Each sample depends on (task, length, index, seed, tokenizer, texts) alone, so that a suite can be
made, interrupted and extended sample by sample.
"""

import copy
import dataclasses

import numpy as np

from lct.eval import samples
from lct.eval.tasks import needle_placement as placements
from lct.eval.tasks import prompt_fitting, qa_documents, ruler_text
from lct.eval.tasks.ruler_tasks import CommonWords, FrequentWords, Niah, QuestionAnswering, VariableTracking

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


def task(name, **changes):
    """The config of a task by name, with other parameters where given."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks of RULER are {', '.join(TASKS)}")
    return dataclasses.replace(TASKS[name], **changes)


class Material:
    """What samples are made of, encoded once.

    Args:
      documents: data.documents.Document list, the text of the haystacks; text_source names it in the results.
      words: ruler_text.Words; generated ones by default.
      sources: {'one_hop' and 'two_hop': questions.Given}; people are invented where there is none.
      placement: placement.Stratified(seed), or RulerFixed() for RULER's own fixed shuffles.
      overhead: tokens that a chat template adds to a prompt; before: those of them that precede it.
    """

    def __init__(self, tokenizer, documents, *, text_source='embedded', words=None, sources=None, seed=42,
                 placement=None, overhead=0, before=0):
        self.counter = prompt_fitting.Counter(tokenizer)
        self.seed, self.overhead, self.before, self.text_source = seed, overhead, before, text_source
        self.words = words or ruler_text.generated_words(seed)
        self.sources = {'one_hop': qa_documents.People(seed, 1), 'two_hop': qa_documents.People(seed, 2),
                        **(sources or {})}
        self.placement = placement or placements.Stratified(seed)
        self.documents, self._pools = documents, {}
        self._noise = self.counter.pieces([ruler_text.NOISE])
        self.counter.check([ruler_text.NOISE] * 64)

    def sample(self, config, length, index):
        """Sample number index of a task at a length; ValueError where the length is too small for the task."""
        margin = self.counter.margin(length)
        while True:
            tighter = copy.copy(self)
            tighter.overhead = self.overhead + margin
            sample = config.generate(tighter, length, index)
            if self.counter.trusted(length):
                return sample
            # Count the whole: where its pieces did not add up take off what is over.
            used = self.overhead + self.counter.bos + self.counter.text(sample.text) + sample.max_new_tokens
            if used <= length:
                return dataclasses.replace(sample, meta={**sample.meta, 'tokens': used})
            margin += used - length

    def provenance(self):
        """What the samples are made of, for JSON beside the scores."""
        return {
            'tokenizer': self.counter.tokenizer.fingerprint, 'seed': self.seed, 'overhead': self.overhead,
            'haystack': self.text_source, 'words': self.words.source, 'placement': self.placement.name,
            'questions': {name: source.source for name, source in self.sources.items()},
        }

    def rng(self, config, length, index):
        return samples.rng(self.seed, config.task, length, index)

    def fit(self, config, length, head, tail, answer):
        """Fit of a prompt that begins with head and ends in tail."""
        # RULER's allowance is for vocabularies of a hundred thousand; a smaller one may need more.
        new = max(config.max_new_tokens, int(self.counter.pieces([' ' + answer])[0]) + 2)
        fixed = self.overhead + self.counter.bos + self.counter.before(head) + int(self.counter.pieces([tail])[0])
        return Fit(config.task, length, fixed, new)

    def noise(self, room):
        """(lines, tokens) of the filler, with a part of it at the end."""
        count = room // int(self._noise[0])
        return prompt_fitting.with_part(self.counter, [ruler_text.NOISE] * count, self._noise.repeat(count),
                                 ruler_text.NOISE, room)

    @property
    def cycle(self):
        """fitting.Cycle of the documents."""
        return self.once('text', lambda: prompt_fitting.Cycle(self.counter, ruler_text.text_lines(self.documents)))

    def text(self, rng, room):
        """(lines, tokens) of the documents from any line on."""
        return self.cycle.cut(self.placement.start(rng, len(self.cycle.lines)), room)

    def needle_pool(self, name_kind, value_kind, length):
        """(needles, tokens [n], their names and values) of half as many tokens again as the length."""
        def make():
            rng = samples.rng(self.seed, 'needles', name_kind, value_kind)
            noun = ruler_text.noun(value_kind)
            names = []
            pairs = ruler_text.pairs(rng, self.words, name_kind, value_kind)
            lines = (names.append(pair) or ruler_text.needle(noun, *pair) for pair in pairs)
            pool = prompt_fitting.Pool(self.counter, lines)
            self.counter.check(pool.first(prompt_fitting.FIRST_PIECES)[0])
            return pool, names

        pool, names = self.once(('needles', name_kind, value_kind), make)
        lines, tokens = pool.up_to(3 * length // 2)
        taken = self.once(('taken', name_kind, value_kind, len(lines)),
                           lambda: {text for pair in names[:len(lines)] for text in pair})
        return lines, tokens, taken

    def list_pool(self, length):
        """([' word' line], tokens [n]) for a numbered list."""
        def make():
            pool = prompt_fitting.Pool(self.counter, (f' {word}\n' for word in self.words.listed))
            items = pool.first(prompt_fitting.FIRST_PIECES)[0]
            self.counter.check([piece for i, item in enumerate(items, 1) for piece in (f'{i}.', item)])
            return pool

        return self.once('list', make).up_to(length)

    def number_tokens(self, length):
        """int [n + 1]: tokens of the numbers '1.' to 'i.' together, more than a list of length tokens has."""
        return self.once(('numbers', length), lambda: np.concatenate([[0], np.cumsum(
            self.counter.pieces([f'{i}.' for i in range(1, length // 3 + 1)]))]))

    def document_pool(self, name, length):
        """(source, [text], tokens [n]) for question answering."""
        if name not in self.sources:
            raise ValueError(f"unknown source of questions {name!r}; use one of {', '.join(self.sources)}")
        source = self.sources[name]

        def make():
            pool = prompt_fitting.Pool(self.counter, (text + '\n' for text in source.documents()))
            texts = pool.first(64)[0]
            self.counter.check([piece for i, text in enumerate(texts, 1) for piece in (f'Document {i}:\n', text)])
            return pool

        pool = self.once(('documents', name), make)
        return source, *pool.up_to(3 * length // 2 if source.endless else float('inf'))

    def once(self, key, make):
        """What make() gave the first time."""
        if key not in self._pools:
            self._pools[key] = make()
        return self._pools[key]


@dataclasses.dataclass(frozen=True)
class Fit:
    """A budget of `length` tokens, of which `fixed` stand around the context and `new` are for the answer."""

    task: str
    length: int
    fixed: int
    new: int

    def room(self, inserted):
        """Tokens left for the haystack beside `inserted` ones."""
        room = self.length - self.fixed - self.new - inserted
        if room < 0:
            self.too_small(-room)
        return room

    def too_small(self, missing):
        raise ValueError(f'length {self.length} is too small for {self.task}: with this tokenizer a prompt and '
                         f'its answer take {self.length + missing} tokens or more; use a larger length')

    def full(self, enough, what):
        """Refuse a prompt that has to stay short for lack of material."""
        if not enough:
            raise ValueError(f'{what}, too few to fill length {self.length} of {self.task}; give more or use a '
                             'smaller length')

    def sample(self, index, prompt, prefix, outputs, context, meta):
        """Sample whose context has so many tokens."""
        meta = {'tokens': self.fixed + context + self.new, **meta}
        return samples.Sample(self.task, self.length, index, prompt, prefix, list(outputs), self.new, meta)
