"""Documents with questions about them: the files of SQuAD and HotpotQA, or any number of generated people."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping

from lct.data.synthetic import recall
from lct.eval import samples
from lct.eval.tasks import ruler_text

TRADES = ('baker brewer carpenter cooper dyer farrier fiddler fletcher gardener glazier hatter joiner mason '
          'miller painter piper potter printer saddler sailor shepherd smith tailor tanner tiler '
          'weaver').split()
# Field of a person: (statement in a document, question).
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
    """A question about documents.

    targets: indices of the documents that hold the answer. hard_distractors: indices of documents that are
    similar to them, which come before other distractors. wrong: answers that these suggest.
    """

    text: str
    answers: list
    targets: tuple
    hard_distractors: tuple = ()
    wrong: tuple = ()


@dataclasses.dataclass(frozen=True)
class GeneratedPeople:
    """Documents about people, who come in pairs of closest friends.

    One-hop questions ask for a field of a person, two-hop questions for a field of that person's closest
    friend.
    """

    seed: int
    hops: int
    is_endless = True

    @property
    def source(self) -> str:
        return f'generated people, {self.hops} hop' + 's' * (self.hops > 1)

    def documents(self) -> Iterator[str]:
        """Endless iterator of texts."""
        number = 0
        while True:
            yield person_text(self.seed, number)
            number += 1

    def question(self, index: int, documents: int) -> Question:
        """Question `index` about the first `documents` texts."""
        rng = samples.rng(self.seed, 'question', self.hops, index)
        number = rng.randrange(documents // 2 * 2)
        friend = number ^ 1
        subject = friend if self.hops == 2 else number
        field, value = rng.choice(sorted(person(self.seed, subject)[1].items()))
        name = person(self.seed, number)[0]
        who = f'the closest friend of {name}' if self.hops == 2 else name
        return Question(FIELDS[field][1].format(who=who), [value], (number, friend)[:self.hops])


def person(seed: int, number: int) -> tuple[str, dict]:
    """(name, {field: value}) of at least one field. Only the number and the seed determine them."""
    rng = samples.rng(seed, 'person', number)
    invented = ruler_text.InventedWords(seed)
    # The first name encodes the number, so no two people share it.
    name = f'{invented[number * 7919 % invented.count]} {invented[rng.randrange(invented.count)]}'.title()
    values = {
        'town': invented[rng.randrange(invented.count)].title(), 'trade': rng.choice(TRADES),
        'year': str(rng.randint(1600, 1999)), 'pet': invented[rng.randrange(invented.count)].title(),
        'house': f'{rng.choice(recall.ADJECTIVES)} {rng.choice(recall.NOUNS)}'.title(),
    }
    kept = rng.sample(sorted(values), rng.randint(1, len(values)))
    return name, {field: values[field] for field in kept}


def person_text(seed: int, number: int) -> str:
    """The document about a person."""
    name, fields = person(seed, number)
    sentences = [FIELDS[field][0].format(name=name, value=value) for field, value in fields.items()]
    sentences.append(FRIEND.format(name=name, value=person(seed, number ^ 1)[0]))
    samples.rng(seed, 'text', number).shuffle(sentences)
    return ' '.join(sentences)


@dataclasses.dataclass(frozen=True)
class FileQuestions:
    """The documents and questions of a file."""

    source: str
    texts: tuple
    questions: tuple
    is_endless = False

    def documents(self) -> Iterator[str]:
        return iter(self.texts)

    def question(self, index: int, documents: int) -> Question:
        """Question `index`; the first follows the last."""
        return self.questions[index % len(self.questions)]


def read_squad(path: pathlib.Path) -> FileQuestions:
    """The answerable questions of SQuAD 1.1 or 2.0; hard distractors are of the same article."""
    def parse(content, indices, questions):
        for article in content['data']:
            in_article = [indices.setdefault(_strip_lines(paragraph['context']), len(indices))
                          for paragraph in article['paragraphs']]
            for paragraph, target in zip(article['paragraphs'], in_article, strict=True):
                questions += [
                    Question(entry['question'].strip(), [answer['text'] for answer in entry['answers']],
                             (target,), tuple(dict.fromkeys(i for i in in_article if i != target)))
                    for entry in paragraph['qas'] if not entry.get('is_impossible') and entry['answers']
                ]
    return _read_questions(path, 'SQuAD', parse)


def read_hotpotqa(path: pathlib.Path) -> FileQuestions:
    """HotpotQA, distractor setting: all documents of a question are targets."""
    def parse(content, indices, questions):
        for entry in content:
            targets = [indices.setdefault(_strip_lines(title + '\n' + ''.join(sentences)), len(indices))
                       for title, sentences in entry['context']]
            questions.append(Question(
                entry['question'].strip(), [entry['answer']], tuple(dict.fromkeys(targets))))
    return _read_questions(path, 'HotpotQA', parse)


def read_nq(path: pathlib.Path) -> FileQuestions:
    """Natural Questions with the passages that DPR retrieved (Karpukhin et al. 2020), such as
    biencoder-nq-dev.json; a question without a positive passage is left out."""
    def parse(content, indices, questions):
        for entry in content:
            positive, hard, _ = (
                [indices.setdefault(_strip_lines(passage['title'] + '\n' + passage['text']), len(indices))
                 for passage in entry[kind]]
                for kind in ('positive_ctxs', 'hard_negative_ctxs', 'negative_ctxs'))
            if positive:
                # Of several positive passages, one is the target: HELMET's tasks have one too.
                questions.append(Question(entry['question'].strip(), entry['answers'], tuple(positive[:1]),
                                          tuple(dict.fromkeys(hard))))
    return _read_questions(path, 'Natural Questions', parse)


FILES = {'squad': read_squad, 'hotpotqa': read_hotpotqa, 'nq': read_nq}  # source: reader of its file
OF_RULER = {'squad': 'one_hop', 'hotpotqa': 'two_hop'}  # the source that takes their place in qa_1 and qa_2


def read_sources(paths: Mapping[str, pathlib.Path]) -> dict[str, FileQuestions]:
    """The sources of a Material from the files {key of FILES: path}, those of RULER's tasks among them."""
    found = {name: FILES[name](path) for name, path in paths.items()}
    return found | {OF_RULER[name]: one for name, one in found.items() if name in OF_RULER}


def _read_questions(path, kind, parse):
    """FileQuestions of a file; parse(content, {text: index}, [Question]) fills the last two."""
    indices, questions = {}, []
    try:
        parse(json.loads(pathlib.Path(path).read_text(encoding='utf-8')), indices, questions)
    except FileNotFoundError:
        raise ValueError(
            f'{path} does not exist; give a file of {kind}, or none for generated questions') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is not a file of {kind} ({error!r}); fetch it again') from error
    if not questions:
        raise ValueError(f'{path} holds no question with an answer; give another file of {kind}')
    return FileQuestions(f'{kind} ({pathlib.Path(path).name})', tuple(indices), tuple(questions))


def _strip_lines(text):
    """The text without blank lines and outer spaces, so that its tokens add up between other texts."""
    return '\n'.join(line.strip() for line in text.splitlines() if line.strip())
