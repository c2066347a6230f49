"""Generated passages about buildings of invented towns, with questions that have hard distractors."""

import dataclasses
import random
from collections.abc import Iterator

from lct.eval import samples
from lct.eval.tasks import ruler_text
from lct.eval.tasks.qa_documents import Question

BUILDINGS = 'bridge library theater lighthouse museum hospital station windmill'.split()
# (statement, question) of a building in each of its two passages.
FACTS = (
    (('The {building} opened in {year}.', 'In which year did the {building} begin to receive visitors?'),
     ('The plans of the {building} were drawn by {person}.', 'Who was the architect of the {building}?'),
     ('The money for the {building} came from {person}.', 'Who paid for the {building}?')),
    (('A fire damaged the {building} in {year}.', 'In which year did the {building} burn?'),
     ('The repairs of the {building} were led by {person}.',
      'Who was in charge of restoring the {building}?'),
     ('Today {person} looks after the {building}.', 'Who is the present caretaker of the {building}?')))
LINKS = ('It stands within sight of the {building}.', 'It is often compared with the {building}.',
         'Many visitors prefer the {building}.', 'It is smaller than the {building}.')
YEARS = range(1700, 2000)
OTHER_TOWNS = 8  # whose building of the same kind is a hard distractor


@dataclasses.dataclass(frozen=True)
class GeneratedPassages:
    """Two passages about every building, with three facts each. The seed and the number determine one."""

    seed: int
    is_endless = True
    source = 'generated passages'

    def documents(self) -> Iterator[str]:
        """Endless iterator of texts."""
        number = 0
        while True:
            yield self.text(number)
            number += 1

    def text(self, number: int) -> str:
        """The passage of a number."""
        rng = samples.rng(self.seed, 'passage', number)
        building = number // 2
        neighbor = building // len(BUILDINGS) * len(BUILDINGS) + rng.randrange(len(BUILDINGS))
        link = rng.choice(LINKS).format(building=self.building(neighbor ^ (neighbor == building)))
        facts = [statement.format(building=self.building(building), **{field: value})
                 for (statement, _), field, value in self.facts(number)]
        first, *others = rng.sample(facts, len(facts))
        return ' '.join([first, *rng.sample([link, *others], len(facts))])

    def building(self, number: int) -> str:
        """Its name."""
        town, kind = divmod(number, len(BUILDINGS))
        return f'{self._name(self.seed * 104_729 + town * 7919)} {BUILDINGS[kind]}'

    def facts(self, number: int) -> list[tuple[tuple[str, str], str, str]]:
        """[((statement, question), field, value)] of a passage."""
        rng, out = samples.rng(self.seed, 'facts', number), []
        for fact in FACTS[number % 2]:
            person = f'{self._name(rng.randrange(10**6))} {self._name(rng.randrange(10**6))}'
            value = {'year': str(rng.choice(YEARS)), 'person': person}
            field = 'year' if '{year}' in fact[0] else 'person'
            out.append((fact, field, value[field]))
        return out

    def question(self, index: int, documents: int) -> Question:
        """Question `index` about the first `documents` passages."""
        rng = samples.rng(self.seed, 'passage question', index)
        number, fact = rng.randrange(documents), rng.randrange(len(FACTS[0]))
        (_, text), _, value = self.facts(number)[fact]
        same_facts = self._same_facts(rng, number, documents)
        wrong = {self.facts(other)[fact][2] for other in same_facts} - {value}
        hard = [*same_facts, *[other for other in (number ^ 1,) if other < documents]]
        return Question(text.format(building=self.building(number // 2)), [value], (number,), tuple(hard),
                        tuple(sorted(wrong)))

    def _same_facts(self, rng: random.Random, number, documents):
        """Passages with the same kinds of facts: of other buildings in town, of such buildings elsewhere."""
        of_town = 2 * len(BUILDINGS)
        start, place = number // of_town * of_town, number % of_town
        in_town = range(start + number % 2, start + of_town, 2)
        elsewhere = range(place, documents, of_town)
        found = {*in_town, *rng.sample(elsewhere, min(OTHER_TOWNS, len(elsewhere)))}
        return sorted(one for one in found if one != number and one < documents)

    def _name(self, number):
        invented = ruler_text.InventedWords(self.seed)
        return invented[number % invented.count].title()
