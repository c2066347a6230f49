"""The questions that a batch is asked at once, one of each row, and the rows of their answers."""

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lct.eval import answers
from lct.eval.samples import Sample
from lct.models.session import Session

if TYPE_CHECKING:
    from lct.eval.runner import Item, Model

SMALLEST_ANSWER = 128  # tokens; shorter limits share one compiled program


class Query(NamedTuple):
    """The question of one row. active: False for a row without one left, whose answer is discarded."""

    item: 'Item'
    sample: Sample
    prompt: list[int]
    active: bool

    @property
    def scores_target(self):
        return self.active and self.item.teacher_forced

    @property
    def choices(self):
        return self.sample.meta.get('choices', []) if self.active else []


class Group(NamedTuple):
    """Items of one row, in reading order."""

    items: 'list[Item]'
    samples: list[Sample]
    prompts: list[list[int]]

    def query(self, number: int, finished: Collection) -> Query:
        """The question of a number; a group with fewer repeats its last one."""
        i = min(number, len(self.items) - 1)
        active = number < len(self.items) and self.items[i].key not in finished
        return Query(self.items[i], self.samples[i], self.prompts[i], active)


def answer_queries(model: 'Model', session: Session, queries: Sequence[Query],
                   stop: np.ndarray) -> Iterator[dict]:
    """Iterator of the rows of one question to each row of the session, which holds their prompts.

    stop: bool [V], the tokens that end an answer.
    """
    limits = [query.sample.max_new_tokens * query.active for query in queries]
    bound = max(SMALLEST_ANSWER, 1 << (max(limits) - 1).bit_length())
    generated = session.ask([[]] * len(queries), limits, bound, stop)
    likelihoods = _answer_likelihoods(model, session, queries)
    for query, tokens, fields in zip(queries, generated, likelihoods, strict=True):
        if query.active:
            text = model.tokenizer.decode(tokens)
            yield answers.make_row(query.sample, query.prompt, text, len(tokens)) | fields


def _answer_likelihoods(model, session, queries):
    """The fields of each row about likelihoods.

    'forced' is the likelihood of the right answer where its item is teacher-forced; 'chosen' is the most
    likely of a sample's choices, which are labels scored as whole lines.
    """
    any_forced = any(query.scores_target for query in queries)
    if not any_forced and not any(query.choices for query in queries):
        return [{}] * len(queries)
    targets = [model.answer_ids(query.sample, query.sample.answer) for query in queries]
    alternatives = [targets] * any_forced + _choice_ids(model, queries, targets)
    scored = session.loglikelihood([[]] * len(queries), alternatives)
    out = []
    for j, query in enumerate(queries):
        fields = {}
        if query.scores_target:
            nats, greedy = scored[0][j]
            fields['forced'] = {'nats': nats, 'tokens': len(targets[j]), 'greedy': greedy}
        if query.choices:
            of_choices = zip(query.choices, scored[any_forced:], strict=False)
            fields['chosen'] = _most_likely({name: one[j][0] for name, one in of_choices})
        out.append(fields)
    return out


def _choice_ids(model, queries, targets):
    """Answers of all rows, as many as the most choices of one.

    A row with fewer choices repeats one of them, a row without any its target; both are discarded.
    """
    labels = [[model.answer_ids(query.sample, f' {name}\n') for name in query.choices] for query in queries]
    return [[own[i % len(own)] if own else target for own, target in zip(labels, targets, strict=True)]
            for i in range(max(map(len, labels)))]


def _most_likely(nats):
    """The name of the highest log-likelihood; '' where one is not finite."""
    return max(nats, key=nats.get) if np.isfinite(list(nats.values())).all() else ''
