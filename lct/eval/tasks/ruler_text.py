"""What RULER's tasks are made of: haystack lines, names, values, lists of words."""

import pathlib
import re
import uuid

from lct.data.synthetic import recall
from lct.eval import samples

NOISE = 'Clouds drift by. The lamp is lit. A door stands open. On we walk. Then home once more.\n'
# One form of statement, so that needles and distractors differ in nothing but the name.
NOUNS = {'numbers': 'number', 'words': 'word', 'uuids': 'code'}
CONSONANTS, VOWELS = 'bdfghjklmnprstv', 'aeiou'
MAX_TRIES = 1000
PARAGRAPH = 160  # characters of a line above which it is more than a line of wrapped text
SENTENCE_END = re.compile(r'(?<=[.!?])\s+(?=["\'(]?[A-Z])')


def text_lines(documents):
    """[line] of texts, each ending in a line end: their own lines without the blank ones.

    Lines that are whole paragraphs come out a sentence a line; source code and wrapped prose stay as they are.
    """
    lines = []
    for document in documents:
        for line in document.text.splitlines():
            parts = SENTENCE_END.split(line) if len(line) > PARAGRAPH else [line]
            lines += [part.rstrip() + '\n' for part in parts if part.strip()]
    if not lines:
        raise ValueError(f'the {len(documents)} documents of the haystack hold no text; give some that do')
    return lines


class Words:
    """Names, values and lists of words.

    name_parts: tuples of words; a name is one of each, joined by hyphens. listed: an endless or finite
    iterable of distinct words for the counting tasks. source: what the result says of them.
    """

    def __init__(self, name_parts, listed, source):
        self.name_parts, self.listed, self.source = name_parts, listed, source

    def name(self, rng):
        return '-'.join(rng.choice(part) for part in self.name_parts)

    def value(self, rng, kind):
        """A number of seven digits, a name or a version 4 UUID."""
        if kind == 'numbers':
            return str(rng.randint(1_000_000, 9_999_999))
        if kind == 'words':
            return self.name(rng)
        noun(kind)
        return str(uuid.UUID(int=rng.getrandbits(128), version=4))

    def distinct(self, rng, kind, count, taken=()):
        """[value] none of which is within another or within one of taken, so that a match means one of them."""
        values = []
        for _ in range(MAX_TRIES * count):
            value = self.value(rng, kind)
            if value not in taken and not any(value in other or other in value for other in values):
                values.append(value)
            if len(values) == count:
                return values
        raise ValueError(f'{self.source} words give fewer than {count} {kind} that differ from '
                         f'{len(taken)} others; use more words')


def generated_words(seed=0):
    """Words that need no file: names of two adjectives and a noun, lists of six-letter inventions.

    322,560 names and 421,875 words, enough for contexts of five million tokens; no word is within another.
    """
    return Words((recall.ADJECTIVES, recall.ADJECTIVES, recall.NOUNS), Invented(seed), 'generated')


class Invented:
    """All words of the form 'talobi', in an order drawn from the seed; iterating begins anew."""

    def __init__(self, seed):
        self.seed = seed
        self.count = (len(CONSONANTS) * len(VOWELS)) ** 3

    def __iter__(self):
        # A step without a common factor visits every word once; the seed turns and spaces the order.
        step = 154_757 + 30 * (self.seed % 1000)
        return (self[(self.seed + i * step) % self.count] for i in range(self.count))

    def __getitem__(self, i):
        word = ''
        for _ in range(3):
            i, vowel = divmod(i, len(VOWELS))
            i, consonant = divmod(i, len(CONSONANTS))
            word += CONSONANTS[consonant] + VOWELS[vowel]
        return word


def words_of(source, seed=0):
    """Words of 'generated', of 'wonderwords' (RULER's own lists, if that package is installed) or of a file
    with a word a line."""
    if source == 'generated':
        return generated_words(seed)
    if source == 'wonderwords':
        try:
            import wonderwords
        except ImportError:
            raise ValueError("the words 'wonderwords' come with the package of that name, which is not "
                             "installed; run pip install wonderwords, or use 'generated'") from None
        folder = pathlib.Path(wonderwords.__file__).parent / 'assets'
        adjectives, nouns, verbs = (_read_words(folder / f'{name}list.txt')
                                    for name in ('adjective', 'noun', 'verb'))
        listed = sorted({*adjectives, *nouns, *verbs})
        samples.rng(seed, 'words').shuffle(listed)
        return Words((adjectives, nouns), listed, 'wonderwords')
    listed = list(_read_words(pathlib.Path(source)))
    samples.rng(seed, 'words').shuffle(listed)
    return Words(generated_words(seed).name_parts, listed, pathlib.Path(source).name)


def _read_words(path):
    if not path.is_file():
        raise ValueError(f"word list {path} does not exist; give a file with a word a line, 'generated' or "
                         "'wonderwords'")
    lines = path.read_text(encoding='utf-8').splitlines()
    # Items are set apart by spaces: those that hold one would count as two.
    words = tuple(dict.fromkeys(word for word in map(str.strip, lines) if word and ' ' not in word))
    if not words:
        raise ValueError(f'word list {path} holds no words; give a file with a word a line')
    return words


def noun(kind):
    """What a text calls a value of the kind."""
    if kind not in NOUNS:
        raise ValueError(f"unknown kind {kind!r} of names or values; use one of {', '.join(NOUNS)}")
    return NOUNS[kind]


def needle(noun, name, value):
    return f'One {noun} stored under {name} is {value}.\n'


def pairs(rng, words, name_kind, value_kind):
    """Iterator of (name, value), none of them twice; it ends when the words hardly give new ones."""
    names, values, misses = set(), set(), 0
    while misses < MAX_TRIES:
        name, value = words.value(rng, name_kind), words.value(rng, value_kind)
        misses = misses + 1 if name in names or value in values else 0
        if not misses:
            names.add(name)
            values.add(value)
            yield name, value
