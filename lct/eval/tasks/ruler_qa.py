"""RULER's question answering tasks (Hsieh et al. 2024, section 3)."""

import dataclasses

import numpy as np

from lct.eval import samples
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.material import Material, PromptFrame


@dataclasses.dataclass(frozen=True)
class QuestionAnswering:
    """A question about one or more of many numbered documents.

    source: a key of Material.sources. documents: how many at most, None for as many as fit.
    """

    task: str
    source: str
    documents: int | None = None
    max_new_tokens: int = 32

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng = material.rng(self, length, index)
        source, texts, tokens = material.document_pool(self.source, length)
        question = source.question(index, len(texts))
        targets = list(question.targets)
        frame = PromptFrame(
            'Answer the question that follows the documents below. Reply with the answer alone.\n\n',
            f'Question: {question.text} Reply with the answer alone.\n', 'Answer:')
        budget = material.budget(self, length, frame, max(question.answers, key=len))
        candidates = _distractors(rng, question, len(texts))
        # A title with the highest number is the longest, so the real titles fit too.
        title = material.counter.count_one(_title(len(texts)))
        room = budget.room(int(tokens[targets].sum()) + title * len(targets))
        most = (self.documents or len(texts)) - len(targets)
        chosen, left = _fill(candidates, tokens[candidates] + title, room, most)
        if self.documents is None and len(chosen) + len(targets) == len(texts):
            budget.check_filled(left < length // 10, f'{source.source} holds {len(texts)} documents')
        order = material.placement.place_documents(
            rng, material.first_depth(self, length, index), targets, chosen)
        titles = [_title(i) for i in range(1, len(order) + 1)]
        context = ''.join(title + texts[i] for title, i in zip(titles, order, strict=True))
        used = int(tokens[order].sum() + material.counter.count_each(titles).sum())
        meta = {'depths': [order.index(i) / len(order) for i in question.targets], 'documents': len(order),
                'source': source.source}
        if question.wrong:
            meta['wrong'] = list(question.wrong)
        return budget.sample(index, context, question.answers, used, meta)


def _distractors(rng, question, count):
    """int [n]: the documents that do not hold the answer in random order, the hard distractors first."""
    hard = [i for i in question.hard_distractors if i not in question.targets]
    other = [i for i in range(count) if i not in {*question.targets, *hard}]
    rng.shuffle(hard)
    rng.shuffle(other)
    return np.array(hard + other, int)


def _fill(candidates, sizes, room, most):
    """([document], tokens left): candidates [n], of sizes [n], that fit into room tokens, `most` of them."""
    chosen, left = [], room
    while len(candidates) and len(chosen) < most:
        count = max(min(prompt_fitting.count_fitting(sizes, left), most - len(chosen)), 0)
        chosen += candidates[:count].tolist()
        left -= int(sizes[:count].sum())
        candidates, sizes = candidates[count:], sizes[count:]
        fits = sizes <= left  # one that does not fit does not keep smaller ones out
        candidates, sizes = candidates[fits], sizes[fits]
    return chosen, left


def _title(number):
    return f'Document {number}:\n'
