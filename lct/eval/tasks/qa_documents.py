"""Documents with questions about them: SQuAD's and HotpotQA's files, or invented people without end."""

import dataclasses
import json
import pathlib

from lct.data.synthetic import recall
from lct.eval import samples
from lct.eval.tasks import ruler_text

TRADES = ('baker brewer carpenter cooper dyer farrier fiddler fletcher gardener glazier hatter joiner mason miller '
          'painter piper potter printer saddler sailor shepherd smith tailor tanner tiler weaver').split()
# Field of a person: (what a document says, what a question asks).
FIELDS = {
    'town': ('{name} was born in {value}.', 'In which town was {who} born?'),
    'trade': ('By trade {name} is a {value}.', 'What is the trade of {who}?'),
    'year': ('The year of birth of {name} is {value}.', 'In which year was {who} born?'),
    'pet': ('{name} keeps a pet called {value}.', 'What is the pet of {who} called?'),
    'house': ('The house of {name} is known as {value}.', 'What is the house of {who} known as?'),
}
FRIEND = 'The closest friend of {name} is {value}.'


@dataclasses.dataclass(frozen=True)
class Question:
    """gold: indices of the documents that hold the answer; near: of those to take as distractors first."""

    text: str
    answers: list
    gold: tuple
    near: tuple = ()


@dataclasses.dataclass(frozen=True)
class People:
    """Invented people: every two are each other's closest friends. hops 1 asks for a field of a person, 2 for
    that of a person's friend."""

    seed: int
    hops: int
    endless = True

    @property
    def source(self):
        return f'generated people, {self.hops} hop' + 's' * (self.hops > 1)

    def documents(self):
        """Endless iterator of texts."""
        number = 0
        while True:
            yield person_text(self.seed, number)
            number += 1

    def question(self, index, documents):
        """Question number index about the first `documents` texts."""
        rng = samples.rng(self.seed, 'question', self.hops, index)
        number = rng.randrange(documents // 2 * 2)
        friend = number ^ 1
        asked = friend if self.hops == 2 else number
        field, value = rng.choice(sorted(person(self.seed, asked)[1].items()))
        name = person(self.seed, number)[0]
        who = f'the closest friend of {name}' if self.hops == 2 else name
        return Question(FIELDS[field][1].format(who=who), [value], (number, friend)[:self.hops])


def person(seed, number):
    """-> (name, {field: value}): at least one field, names and values of equal numbers alone."""
    rng = samples.rng(seed, 'person', number)
    invented = ruler_text.Invented(seed)
    # The first name carries the number: no two people share it.
    name = f'{invented[number * 7919 % invented.count]} {invented[rng.randrange(invented.count)]}'.title()
    values = {
        'town': invented[rng.randrange(invented.count)].title(), 'trade': rng.choice(TRADES),
        'year': str(rng.randint(1600, 1999)), 'pet': invented[rng.randrange(invented.count)].title(),
        'house': f'{rng.choice(recall.ADJECTIVES)} {rng.choice(recall.NOUNS)}'.title(),
    }
    kept = rng.sample(sorted(values), rng.randint(1, len(values)))
    return name, {field: values[field] for field in kept}


def person_text(seed, number):
    name, fields = person(seed, number)
    sentences = [FIELDS[field][0].format(name=name, value=value) for field, value in fields.items()]
    sentences.append(FRIEND.format(name=name, value=person(seed, number ^ 1)[0]))
    samples.rng(seed, 'text', number).shuffle(sentences)
    return ' '.join(sentences)


@dataclasses.dataclass(frozen=True)
class Given:
    """The documents and questions of a file."""

    source: str
    texts: tuple
    questions: tuple
    endless = False

    def documents(self):
        return iter(self.texts)

    def question(self, index, documents):
        """Question number index, from the beginning again after the last."""
        return self.questions[index % len(self.questions)]


def read_squad(path):
    """SQuAD 1.1 or 2.0: the questions that have an answer; near are the paragraphs of the same article."""
    def parse(content, place, asked):
        for article in content['data']:
            here = [place.setdefault(_tidy(p['context']), len(place)) for p in article['paragraphs']]
            for paragraph, gold in zip(article['paragraphs'], here, strict=True):
                asked += [
                    Question(entry['question'].strip(), [answer['text'] for answer in entry['answers']], (gold,),
                             tuple(dict.fromkeys(other for other in here if other != gold)))
                    for entry in paragraph['qas'] if not entry.get('is_impossible') and entry['answers']
                ]
    return _given(path, 'SQuAD', parse)


def read_hotpotqa(path):
    """HotpotQA, distractor setting: all documents of a question count as its gold."""
    def parse(content, place, asked):
        for entry in content:
            gold = [place.setdefault(_tidy(title + '\n' + ''.join(sentences)), len(place))
                    for title, sentences in entry['context']]
            asked.append(Question(entry['question'].strip(), [entry['answer']], tuple(dict.fromkeys(gold))))
    return _given(path, 'HotpotQA', parse)


def _given(path, kind, parse):
    place, asked = {}, []
    try:
        parse(json.loads(pathlib.Path(path).read_text(encoding='utf-8')), place, asked)
    except FileNotFoundError:
        raise ValueError(f'{path} does not exist; give a file of {kind}, or none for generated questions') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a file of {kind} ({error!r}); fetch it again') from error
    if not asked:
        raise ValueError(f'{path} holds no question with an answer; give another file of {kind}')
    return Given(f'{kind} ({pathlib.Path(path).name})', tuple(place), tuple(asked))


def _tidy(text):
    """Lines without blank ones between: so its tokens add up where it is put between others."""
    return '\n'.join(line.strip() for line in text.splitlines() if line.strip())
