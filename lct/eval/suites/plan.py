"""The plan of an evaluation: its texts, lengths, samples, and other models."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from lct.data.tokenizer import Tokenizer
from lct.eval import runner
from lct.eval.published.question import Question
from lct.eval.samples import Sample
from lct.eval.tasks.material import Material

DEPTHS = tuple(i / 10 for i in range(11))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to run.

    material: the text that prompts are made of.
    lengths: tokens of prompt and answer.
    counts: {length: samples of each task; of each cell for needles, of each number of shots in context}.
    tasks: names from all suites; None for all of them.
    depths: of the needle grid.
    given: {task: [Sample]} of RULER's data files, in place of generated samples.
    questions: of the files of a published benchmark.
    load_base: () -> the Model before its extension, whose loss on short windows is compared, if given.
    evaluator: the model that chooses the key tokens of LongPPL, if it is given.
    identity: of model and inputs; answers of another one are not kept.
    run: the number of this call in about.json, which every answer names.
    """

    material: Material
    lengths: tuple[int, ...]
    counts: Mapping[int, int]
    tasks: tuple[str, ...] | None = None
    depths: tuple[float, ...] = DEPTHS
    given: Mapping[str, Sequence[Sample]] | None = None
    questions: 'Questions | None' = None
    load_base: Callable[[], runner.Model] | None = None
    evaluator: 'Evaluator | None' = None
    identity: str = ''
    run: int = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return self.material.counter.tokenizer

    def selected(self, names: Iterable[str]) -> list[str]:
        """The names that are to run."""
        return [name for name in names if self.tasks is None or name in self.tasks]


@dataclasses.dataclass(frozen=True)
class Questions:
    """{task: [Question]} of the files of a published benchmark, and the model that they are fitted to.

    counted: {(place, length): tokens} of texts that are not cut, which are long and counted once.
    """

    of_task: Mapping[str, Sequence[Question]]
    model: runner.Model
    counted: dict[tuple[str, int], int] = dataclasses.field(default_factory=dict)

    def tokens(self, question: Question, length: int, index: int) -> int:
        """Tokens of a question with its whole text and its answer."""
        key = question.place, length
        if key not in self.counted:
            self.counted[key] = question.sample(self.model, length, index).meta['tokens']
        return self.counted[key]


class Evaluator(NamedTuple):
    """A model that chooses tokens for others. name: in results. is_model: whether its weights are those of
    the model that is evaluated."""

    name: str
    load: Callable[[], runner.Model]
    is_model: bool


def make_material(model: runner.Model, documents: Sequence, text_source: str, seed: int,
                  sources: Mapping | None = None) -> Material:
    """The material of a Plan for a model. text_source: the name of the documents in the results."""
    return Material(model.tokenizer, documents, text_source=text_source, seed=seed, sources=sources,
                    overhead=model.chat_overhead())
