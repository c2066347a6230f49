"""The texts of RULER's tasks: haystack lines, needles, names, values and word lists."""

import pathlib
import random
import re
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence

from lct.data.synthetic import recall
from lct.eval import samples

NOISE = 'Clouds drift by. The lamp is lit. A door stands open. On we walk. Then home once more.\n'
# One sentence pattern, so that needles and distractors differ in nothing but the name and the value.
TYPE_NAMES = {'numbers': 'number', 'words': 'word', 'uuids': 'code'}
CONSONANTS, VOWELS = 'bdfghjklmnprstv', 'aeiou'
MAX_TRIES = 1000
PARAGRAPH = 160  # characters; longer lines are paragraphs rather than lines of wrapped text
SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["\'(]?[A-Z])')


def text_lines(documents: Iterable) -> list[str]:
    """The lines of documents without the blank ones, each ending in a line end.

    Paragraphs on one line are split into one sentence a line; code and wrapped prose keep their lines.
    """
    lines = []
    for document in documents:
        for line in document.text.splitlines():
            sentences = SENTENCE_END.split(line) if len(line) > PARAGRAPH else [line]
            lines += [sentence.rstrip() + '\n' for sentence in sentences if sentence.strip()]
    if not lines:
        raise ValueError(f'the {len(documents)} documents of the haystack hold no text; give some that do')
    return lines


def type_name(kind: str) -> str:
    """The word for a value of this kind in a prompt."""
    if kind not in TYPE_NAMES:
        raise ValueError(f"unknown kind {kind!r} of names or values; use one of {', '.join(TYPE_NAMES)}")
    return TYPE_NAMES[kind]


def needle(type_name: str, name: str, value: str) -> str:
    """The statement of a value."""
    return f'One {type_name} stored under {name} is {value}.\n'


def enumeration(items: Sequence[str]) -> str:
    """'a, b and c'."""
    return ' and '.join([', '.join(items[:-1]), items[-1]] if len(items) > 1 else items)


# ---------------------------------------------------------------------------------------------------
# Names, values and word lists
# ---------------------------------------------------------------------------------------------------


class Lexicon:
    """Where names, values and word lists come from.

    Args:
      name_words: tuples of words; a name is one word of each, joined by hyphens.
      word_list: an endless or finite iterable of distinct words for the counting tasks.
      source: its name in results.
    """

    def __init__(self, name_words: tuple, word_list: Iterable[str], source: str):
        self.name_words, self.word_list, self.source = name_words, word_list, source

    def name(self, rng: random.Random) -> str:
        return '-'.join(rng.choice(words) for words in self.name_words)

    def value(self, rng: random.Random, kind: str) -> str:
        """A number of seven digits, a name or a version 4 UUID."""
        if kind == 'numbers':
            return str(rng.randint(1_000_000, 9_999_999))
        if kind == 'words':
            return self.name(rng)
        type_name(kind)
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def distinct(self, rng: random.Random, kind: str, count: int, taken: Collection[str] = ()) -> list[str]:
        """Values none of which is within another or one of `taken`, so that a match identifies one."""
        values = []
        for _ in range(MAX_TRIES * count):
            value = self.value(rng, kind)
            if value not in taken and not any(value in other or other in value for other in values):
                values.append(value)
            if len(values) == count:
                return values
        raise ValueError(f'{self.source} words give fewer than {count} {kind} that differ from '
                         f'{len(taken)} others; use more words')


def pairs(rng: random.Random, lexicon: Lexicon, name_kind: str, value_kind: str) -> Iterator[tuple[str, str]]:
    """(name, value) without repetition; it ends when the lexicon hardly gives new ones."""
    names, values, misses = set(), set(), 0
    while misses < MAX_TRIES:
        name, value = lexicon.value(rng, name_kind), lexicon.value(rng, value_kind)
        misses = misses + 1 if name in names or value in values else 0
        if not misses:
            names.add(name)
            values.add(value)
            yield name, value


def near_names(
    rng: random.Random, lexicon: Lexicon, kind: str, name: str, count: int,
) -> list[str]:
    """`count` names that differ from `name` in one word, digit or letter, and from each other."""
    names = []
    for _ in range(MAX_TRIES * count):
        if kind == 'words':
            words = name.split('-')
            i = rng.randrange(len(words))
            words[i] = rng.choice(lexicon.name_words[i])
            other = '-'.join(words)
        else:
            i = rng.choice([i for i, letter in enumerate(name) if letter.isalnum()])
            other = name[:i] + rng.choice('123456789') + name[i + 1:]
        # A match of a name must not match another name within it.
        if other not in names and other not in name and name not in other:
            names.append(other)
        if len(names) == count:
            return names
    raise ValueError(f'{name!r} has fewer than {count} near names; use fewer')


class InventedWords:
    """All words of the form 'talobi', in an order of the seed; each iteration starts over."""

    def __init__(self, seed: int):
        self.seed = seed
        self.count = (len(CONSONANTS) * len(VOWELS)) ** 3

    def __iter__(self) -> Iterator[str]:
        # A step without a common factor visits every word once; the seed sets the first word and the step.
        step = 154_757 + 30 * (self.seed % 1000)
        return (self[(self.seed + i * step) % self.count] for i in range(self.count))

    def __getitem__(self, i: int) -> str:
        word = ''
        for _ in range(3):
            i, vowel = divmod(i, len(VOWELS))
            i, consonant = divmod(i, len(CONSONANTS))
            word += CONSONANTS[consonant] + VOWELS[vowel]
        return word


def generated_lexicon(seed: int = 0) -> Lexicon:
    """A lexicon that needs no file: names of two adjectives and a noun, invented six-letter words.

    322,560 names and 421,875 words, enough for contexts of five million tokens; no word is within another.
    """
    return Lexicon((recall.ADJECTIVES, recall.ADJECTIVES, recall.NOUNS), InventedWords(seed), 'generated')


def load_lexicon(source: str | pathlib.Path, seed: int = 0) -> Lexicon:
    """The lexicon of 'generated', of 'wonderwords', or of a file with one word on each line.

    'wonderwords' are RULER's own lists, if that package is installed.
    """
    if source == 'generated':
        return generated_lexicon(seed)
    if source == 'wonderwords':
        try:
            import wonderwords
        except ImportError:
            raise ValueError("the words 'wonderwords' come with the package of that name, which is not "
                             "installed; run pip install wonderwords, or use 'generated'") from None
        folder = pathlib.Path(wonderwords.__file__).parent / 'assets'
        adjectives, nouns, verbs = (_read_words(folder / f'{name}list.txt')
                                    for name in ('adjective', 'noun', 'verb'))
        word_list = sorted({*adjectives, *nouns, *verbs})
        samples.rng(seed, 'words').shuffle(word_list)
        return Lexicon((adjectives, nouns), word_list, 'wonderwords')
    word_list = list(_read_words(pathlib.Path(source)))
    samples.rng(seed, 'words').shuffle(word_list)
    return Lexicon(generated_lexicon(seed).name_words, word_list, pathlib.Path(source).name)


def _read_words(path):
    if not path.is_file():
        raise ValueError(f"word list {path} does not exist; give a file with one word on each line, "
                         "'generated' or 'wonderwords'")
    lines = path.read_text(encoding='utf-8').splitlines()
    # Items are separated by spaces: an item with a space would count as two.
    words = tuple(dict.fromkeys(word for word in map(str.strip, lines) if word and ' ' not in word))
    if not words:
        raise ValueError(f'word list {path} holds no words; give a file with one word on each line')
    return words
