"""Question answering over retrieved passages, as in the RAG tasks of HELMET (Yen et al. 2024,
arXiv:2410.02694): one passage holds the answer, the others are hard distractors first.

The passages are generated: some share the building or its town with the right passage, others the kind of
building. Files of questions take their place where they are given.
"""

import dataclasses

from lct.eval import samples
from lct.eval.tasks.material import Material
from lct.eval.tasks.ruler_qa import QuestionAnswering


@dataclasses.dataclass(frozen=True)
class RetrievedPassages(QuestionAnswering):
    """A question about one of many passages, which lies at any depth.

    The answer is right if it names the right value before any that a generated hard distractor states in the
    same words; with files of questions, if it contains a reference.
    """

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        sample = super().generate(material, length, index)
        wrong = [value for value in sample.meta.get('wrong', []) if value in sample.prompt]
        meta = {**sample.meta, 'metric': 'any', 'wrong': wrong}
        if wrong:
            meta['chance'] = 1 / (1 + len(wrong))
        return dataclasses.replace(sample, meta=meta)
