"""Retrieval by meaning: the question shares no content word with the line that answers it.

The link is common knowledge, as in NoLiMa (Modarressi et al. 2025, arXiv:2502.05167): whoever stood in front
of the Colosseum has been to Italy. All lines, questions and associations are our own. The text holds lines
about other people with other associations of the same kind, so that finding the lines is not enough.
"""

import dataclasses
from typing import NamedTuple

from lct.eval import samples
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.material import Material, PromptFrame

NAMES = ('Amara Bjarne Chidi Dorota Emre Farida Gustavo Hanneke Ilse Jorik Kaveh Lerato Marit Nuray Oskar '
         'Priya Quentin Rosalind Sunniva Tadeusz Ulrike Vasilis Wanjiru Yusuf Zdenka').split()


class Kind(NamedTuple):
    """Associations of a kind.

    line: with {name} and {clue}. questions: what follows 'Which of these people', with {answer}, for one hop
    and for two. rows: (clue, answer of one hop, answer of two hops or None). A name fits a question if its
    clue has the answer.
    """

    line: str
    questions: tuple[str, str]
    rows: tuple[tuple[str, str, str | None], ...]


def _rows(table):
    """Rows of a table whose lines are 'clue | one hop | two hops', with '-' for none."""
    split = [[cell.strip() for cell in line.split('|')] for line in table.strip().splitlines()]
    return tuple((clue, one, None if two == '-' else two) for clue, one, two in split)


KINDS = (
    Kind('Last year {name} stood in front of {clue}.\n',
         ('has been to {answer}', 'has been to a country whose main language is {answer}'), _rows("""
        the Colosseum | Italy | Italian
        the Eiffel Tower | France | French
        the Taj Mahal | India | Hindi
        the Great Sphinx | Egypt | Arabic
        Machu Picchu | Peru | Spanish
        Angkor Wat | Cambodia | Khmer
        the Parthenon | Greece | Greek
        the Alhambra | Spain | Spanish
        Stonehenge | England | English
        the Brandenburg Gate | Germany | German
        Mount Fuji | Japan | Japanese
        the Hagia Sophia | Turkey | Turkish
        the Forbidden City | China | Chinese
        the Little Mermaid statue | Denmark | Danish
        Chichen Itza | Mexico | Spanish
        Red Square | Russia | Russian
        the Shwedagon Pagoda | Myanmar | Burmese
        the temple of Borobudur | Indonesia | Indonesian
        the Atomium | Belgium | -
        the rock tombs of Petra | Jordan | Arabic
        the statue of Christ the Redeemer | Brazil | Portuguese
        Table Mountain | South Africa | -
        the Statue of Liberty | the USA | English""")),
    Kind('{name} has rented a flat in {clue}.\n',
         ('keeps a home in {answer}', 'keeps a home on the continent of {answer}'), _rows("""
        Nairobi | Kenya | Africa
        Accra | Ghana | Africa
        Dakar | Senegal | Africa
        Rabat | Morocco | Africa
        Addis Ababa | Ethiopia | Africa
        Lima | Peru | South America
        Bogota | Colombia | South America
        Santiago | Chile | South America
        Quito | Ecuador | South America
        Ottawa | Canada | North America
        Havana | Cuba | North America
        Hanoi | Vietnam | Asia
        Kathmandu | Nepal | Asia
        Tokyo | Japan | Asia
        Manila | the Philippines | Asia
        Tehran | Iran | Asia
        Baghdad | Iraq | Asia
        Oslo | Norway | Europe
        Lisbon | Portugal | Europe
        Warsaw | Poland | Europe
        Dublin | Ireland | Europe
        Vienna | Austria | Europe
        Budapest | Hungary | Europe
        Bucharest | Romania | Europe
        Stockholm | Sweden | Europe""")),
    Kind('{name} cannot do a day of work without a {clue}.\n',
         ('is a {answer} by profession', 'earns a living by {answer}'), _rows("""
        stethoscope | doctor | treating the sick
        forge and an anvil | blacksmith | making horseshoes
        gavel | judge | sending criminals to prison
        sponge and some chalk | teacher | giving lessons to children
        palette and an easel | painter | making portraits
        kiln | potter | making vases
        loom | weaver | making cloth
        plough | farmer | growing wheat
        baton | conductor | leading an orchestra
        trawl net | fisherman | catching herring
        rolling pin and an oven | baker | selling bread
        trowel and mortar | bricklayer | putting up walls
        thimble and a tape measure | tailor | making suits
        telescope | astronomer | observing planets
        workbench and a chisel | carpenter | making furniture
        smoker for the hives | beekeeper | selling honey
        pickaxe and a helmet lamp | miner | digging coal
        chainsaw | lumberjack | felling trees
        pipe wrench | plumber | repairing leaking taps
        milk frother and an espresso machine | barista | serving coffee""")),
    Kind('A print of {clue} hangs above the bed of {name}.\n',
         ('likes something made by {answer}', 'likes something made by an artist from {answer}'), _rows("""
        the Mona Lisa | Leonardo da Vinci | Italy
        The Birth of Venus | Sandro Botticelli | Italy
        The Starry Night | Vincent van Gogh | the Netherlands
        The Night Watch | Rembrandt | the Netherlands
        Girl with a Pearl Earring | Johannes Vermeer | the Netherlands
        Guernica | Pablo Picasso | Spain
        The Persistence of Memory | Salvador Dali | Spain
        Las Meninas | Diego Velazquez | Spain
        The Scream | Edvard Munch | Norway
        Impression at Sunrise | Claude Monet | France
        The Great Wave off Kanagawa | Hokusai | Japan
        American Gothic | Grant Wood | the USA
        Campbell's Soup Cans | Andy Warhol | the USA
        The Hay Wain | John Constable | England
        Wanderer above the Sea of Fog | Caspar David Friedrich | Germany
        the golden portrait of Adele Bloch-Bauer | Gustav Klimt | Austria
        The Son of Man | Rene Magritte | Belgium""")),
    Kind('{name} has read {clue} three times.\n',
         ('knows a work by {answer}', 'knows a book originally written in {answer}'), _rows("""
        War and Peace | Leo Tolstoy | Russian
        Crime and Punishment | Fyodor Dostoevsky | Russian
        The Cherry Orchard | Anton Chekhov | Russian
        Don Quixote | Miguel de Cervantes | Spanish
        One Hundred Years of Solitude | Gabriel Garcia Marquez | Spanish
        Pride and Prejudice | Jane Austen | English
        The Scarlet Letter | Nathaniel Hawthorne | English
        Frankenstein | Mary Shelley | English
        Dracula | Bram Stoker | English
        Oliver Twist | Charles Dickens | English
        Robinson Crusoe | Daniel Defoe | English
        Gulliver's Travels | Jonathan Swift | English
        Faust | Goethe | German
        The Metamorphosis | Kafka | German
        Les Miserables | Victor Hugo | French
        The Count of Monte Cristo | Alexandre Dumas | French
        The Divine Comedy | Dante | Italian
        The Decameron | Giovanni Boccaccio | Italian
        The Odyssey | Homer | Greek
        The Aeneid | Virgil | Latin
        Hedda Gabler | Henrik Ibsen | Norwegian
        Pippi Longstocking | Astrid Lindgren | Swedish""")),
    Kind('{name} hums {clue} in the shower.\n',
         ('enjoys a piece by {answer}', 'enjoys a piece by a composer from {answer}'), _rows("""
        the Moonlight Sonata | Ludwig van Beethoven | Germany
        the Brandenburg Concertos | Johann Sebastian Bach | Germany
        The Four Seasons | Antonio Vivaldi | Italy
        Aida | Giuseppe Verdi | Italy
        Madama Butterfly | Giacomo Puccini | Italy
        Swan Lake | Pyotr Tchaikovsky | Russia
        The Flight of the Bumblebee | Nikolai Rimsky-Korsakov | Russia
        The Magic Flute | Wolfgang Amadeus Mozart | Austria
        The Blue Danube | Johann Strauss | Austria
        Bolero | Maurice Ravel | France
        Carmen | Georges Bizet | France
        Clair de Lune | Claude Debussy | France
        the Peer Gynt suite | Edvard Grieg | Norway
        The Planets | Gustav Holst | England
        the Enigma Variations | Edward Elgar | England
        Rhapsody in Blue | George Gershwin | the USA
        the Valse Triste | Jean Sibelius | Finland""")),
    Kind('In class {name} gave a talk about {clue}.\n',
         ('chose a topic that is linked to {answer}',
          'chose a topic that goes back to somebody born in {answer}'), _rows("""
        penicillin | Alexander Fleming | Scotland
        radium | Marie Curie | -
        dynamite | Alfred Nobel | Sweden
        the Latin names of plants | Carl Linnaeus | Sweden
        natural selection | Charles Darwin | England
        the theory of relativity | Albert Einstein | Germany
        the printing press | Johannes Gutenberg | Germany
        X-rays | Wilhelm Roentgen | Germany
        the first electric battery | Alessandro Volta | Italy
        wireless telegraphy | Guglielmo Marconi | Italy
        the moons of Jupiter | Galileo Galilei | Italy
        the periodic table | Dmitri Mendeleev | Russia
        the rabies vaccine | Louis Pasteur | France
        reading by raised dots | Louis Braille | France
        electrons in shells around the atom | Niels Bohr | Denmark
        inheritance in pea flowers | Gregor Mendel | -""")),
    Kind('{name} left a {clue} on the bus.\n', ('takes part in {answer}', ''), _rows("""
        shuttlecock | badminton | -
        puck | ice hockey | -
        pole vault helmet | athletics | -
        foil and a wire mask | fencing | -
        putter | golf | -
        bow and a quiver | archery | -
        pair of oars | rowing | -
        rope and a set of crampons | mountaineering | -
        saddle | horse riding | -
        snorkel and a pair of flippers | diving | -
        barbell | weightlifting | -""")),
)


@dataclasses.dataclass(frozen=True)
class Association:
    """One line about a person among lines about `others`; the question asks for the person by association.

    hops: facts between the line and the question, 1 (Colosseum, Italy) or 2 (Colosseum, Italy, Italian).
    The answer is right if it names this person first.
    """

    task: str
    hops: int = 1
    others: int = 7
    max_new_tokens: int = 16

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if self.hops not in (1, 2):
            raise ValueError(f'{self.hops} hops are not among the associations; use 1 or 2')
        rng = material.rng(self, length, index)
        kind, row = rng.choice([(kind, row) for kind in KINDS for row in kind.rows if row[self.hops]])
        wrong = [other for other in kind.rows if other[self.hops] not in (None, row[self.hops])]
        if self.others > min(len(wrong), len(NAMES) - 1):
            raise ValueError(f'{self.others} other people are more than the {len(wrong)} associations of a '
                             'kind; use fewer')
        name, *names = rng.sample(NAMES, 1 + self.others)
        lines = [kind.line.format(name=name, clue=other[0]) for name, other in
                 zip([name, *names], [row, *rng.sample(wrong, self.others)], strict=True)]
        frame = _frame(kind.questions[self.hops - 1].format(answer=row[self.hops]))
        budget = material.budget(self, length, frame, name)
        sizes = int(material.counter.count_each(lines).sum())
        text, tokens = material.excerpt(rng, budget.room(sizes))
        depths = [material.first_depth(self, length, index), *(rng.random() for _ in names)]
        context, depths = prompt_fitting.insert_lines(
            text, tokens, list(zip(depths, lines, strict=True)), material.counter)
        meta = {'depths': depths[:1], 'wrong': names, 'chance': 1 / (1 + self.others),
                'haystack': material.text_source}
        return budget.sample(index, context, [name], int(tokens.sum()) + sizes, meta)


def _frame(predicate):
    head = ('Between the lines of the text below are single remarks about people, who are called by their '
            'first names. A question about them follows it.\n\n')
    tail = (f'Question: Which of these people {predicate}? Use the remarks and common knowledge, and answer '
            'with one first name.\nAnswer:')
    return PromptFrame(head, tail, f' The person who {predicate} is')
