"""The five generators behind RULER's 13 tasks (Hsieh et al. 2024), in our own words.

A config's generate(material, length, index) gives a Sample that fills the budget; material is ruler.Material.
"""

import dataclasses
import string

import numpy as np

from lct.eval.tasks import prompt_fitting, ruler_text


@dataclasses.dataclass(frozen=True)
class Niah:
    """Needles. haystack: noise (one unit again and again), text, or needles (of other names). keys: names in
    the text, each with `values` values; the values of `queries` of them are asked for."""

    task: str
    haystack: str
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    keys: int = 1
    values: int = 1
    queries: int = 1
    max_new_tokens: int = 128

    def generate(self, material, length, index):
        return niah(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments; the names of the first are asked for. haystack: noise or text. name_len: letters
    of a name; example: whether a small solved one precedes."""

    task: str = 'vt'
    chains: int = 1
    hops: int = 4
    haystack: str = 'noise'
    name_len: int = 5
    example: bool = True
    max_new_tokens: int = 30

    def generate(self, material, length, index):
        return variable_tracking(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in which `common` words stand out. levels: (least length, repeats of a common word, of
    another, words of the example and its two repeats); all samples of a length are of the first that fits."""

    task: str = 'cwe'
    common: int = 10
    levels: tuple = ((4096, 30, 3, 40, 10, 3), (0, 6, 1, 20, 3, 1), (0, 3, 1, 15, 2, 1))
    example: bool = True
    max_new_tokens: int = 120

    def generate(self, material, length, index):
        return common_words(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall as rank ** -alpha; dots are the most frequent, the `asked` next are asked
    for. vocab_size: None for a fiftieth of the length."""

    task: str = 'fwe'
    alpha: float = 2.0
    word_len: int = 6
    vocab_size: int | None = None
    asked: int = 3
    max_new_tokens: int = 50

    def generate(self, material, length, index):
        return frequent_words(material, self, length, index)


@dataclasses.dataclass(frozen=True)
class QuestionAnswering:
    """A question about one or more of many documents. source: a name in Material.questions. documents: at
    most so many, None for as many as fit."""

    task: str
    source: str
    documents: int | None = None
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        return question_answering(material, self, length, index)


def niah(material, config, length, index):
    """Sample: needles in a haystack."""
    rng = material.rng(config, length, index)
    words, noun = material.words, ruler_text.noun(config.value_kind)
    keys, queries = max(config.keys, config.queries), config.queries
    pool, pool_tokens, taken = [], (), ()
    if config.haystack == 'needles':
        pool, pool_tokens, taken = material.needle_pool(config.name_kind, config.value_kind, length)
    names = words.distinct(rng, config.name_kind, keys, taken)
    values = words.distinct(rng, config.value_kind, keys * config.values, taken)
    asked = rng.sample(range(keys), queries)
    outputs = [values[i * config.values + j] for i in asked for j in range(config.values)]
    inserts = [(ruler_text.needle(noun, names[i // config.values], value), i // config.values in asked)
               for i, value in enumerate(values)]

    plural = 's' * (len(outputs) > 1)
    listed = _listed([names[i] for i in asked])
    head = f'Some {noun}s are stored under names in the text below. A question about them follows it.\n\n'
    tail = (f'Question: Which {noun}{plural} {"are" if plural else "is"} stored under {listed}? Read the text '
            'above for the answer.\nAnswer:')
    prefix = f' The {noun}{plural} stored under {listed} {"are" if plural else "is"}'
    fit = material.fit(config, length, head, tail + prefix, _listed(outputs))
    sizes = material.counter.pieces([line for line, _ in inserts])
    room = fit.room(int(sizes.sum()))
    if config.haystack == 'text':
        lines, tokens = material.text(rng, room)
    elif config.haystack == 'noise':
        lines, tokens = material.noise(room)
    elif config.haystack == 'needles':
        order = rng.sample(range(len(pool)), len(pool))
        tokens = pool_tokens[order]
        count = prompt_fitting.whole(None, tokens, room)
        fit.full(count < len(pool), f'{words.source} words give only {len(pool)} needles')
        lines, tokens = prompt_fitting.with_part(
            material.counter, [pool[i] for i in order[:count]], tokens[:count], pool[order[count]], room)
    else:
        raise ValueError(f"unknown haystack {config.haystack!r}; use 'noise', 'text' or 'needles'")
    gold = [asked for _, asked in inserts]
    depths = material.placement.needle_depths(
        rng, material.placement.depth(config.task, length, index), gold, config.haystack == 'text')
    context, depths = prompt_fitting.insert(
        lines, tokens, [(depth, line) for depth, (line, _) in zip(depths, inserts, strict=True)],
        material.counter)
    meta = {'depths': [depth for depth, asked in zip(depths, gold, strict=True) if asked],
            'haystack': config.haystack if config.haystack != 'text' else material.text_source}
    return fit.sample(index, head + context + tail, prefix, outputs, int(tokens.sum() + sizes.sum()), meta)


def variable_tracking(material, config, length, index):
    """Sample: which variables hold a value, by way of each other."""
    rng = material.rng(config, length, index)
    example = ''
    if config.example:
        chain, value, head, statements, tail, prefix = _chains(rng, 1, min(config.hops, 10), 3)
        spare = min(500, length // 8) - material.counter.text(head + ''.join(statements) + tail + prefix)
        lines, tokens = material.noise(max(spare, 0))
        depths = sorted(rng.random() for _ in statements)
        context, _ = prompt_fitting.insert(lines, tokens, list(zip(depths, statements, strict=True)), material.counter)
        example = f'{head}{context}{tail}{prefix} {", ".join(chain)}.\n\n'
    chain, value, head, statements, tail, prefix = _chains(rng, config.chains, config.hops, config.name_len)
    fit = material.fit(config, length, example + head, tail + prefix, _listed(chain))
    sizes = material.counter.pieces(statements)
    room = fit.room(int(sizes.sum()))
    if config.haystack not in ('noise', 'text'):
        raise ValueError(f"unknown haystack {config.haystack!r}; use 'noise' or 'text'")
    lines, tokens = material.noise(room) if config.haystack == 'noise' else material.text(rng, room)
    # The statements of a chain stay in their order; those of different chains mix.
    per_chain = config.hops + 1
    depths = [depth for _ in range(config.chains) for depth in sorted(rng.random() for _ in range(per_chain))]
    context, depths = prompt_fitting.insert(lines, tokens, list(zip(depths, statements, strict=True)), material.counter)
    return fit.sample(index, example + head + context + tail, prefix, chain, int(tokens.sum() + sizes.sum()),
                      {'depths': depths[:per_chain], 'value': value})


def _chains(rng, chains, hops, name_len):
    """-> names of the first chain, its value, and the four parts of the prompt around the haystack."""
    names, values = [], rng.sample(range(10_000, 99_999), chains)
    for _ in range(1000 * chains * (hops + 1)):
        name = ''.join(rng.choices(string.ascii_uppercase, k=name_len))
        if name not in names:
            names.append(name)
        if len(names) == chains * (hops + 1):
            break
    else:
        raise ValueError(f'names of {name_len} letters are too few for {chains} chains of {hops} hops; '
                         'use longer ones')
    statements = []
    for i, value in enumerate(values):
        chain = names[i * (hops + 1):(i + 1) * (hops + 1)]
        statements += [f'SET {chain[0]} TO {value}.\n']
        statements += [f'SET {name} TO {before}.\n' for before, name in zip(chain, chain[1:], strict=False)]
    count, value = hops + 1, values[0]
    head = 'Variables are set in the text below, to numbers or to each other. Keep track of their values.\n\n'
    tail = (f'Question: Which {count} variables in the text above have the value {value}, directly or by way of '
            'other variables?\nAnswer:')
    return names[:count], value, head, statements, tail, f' The {count} variables with the value {value} are'


def common_words(material, config, length, index):
    """Sample: the most common words of a list; words that are too long for it are drawn again."""
    level = material.once(('level', config, length), lambda: _level(material, config, length))
    for again in range(100):
        found = _word_list(material, config, length, index, f'{index} {again}' if again else index, level)
        if not isinstance(found, ValueError):
            return found
    raise found


def _level(material, config, length):
    """The first level at which most lists fit."""
    for least, *level in config.levels:
        if length >= least:
            lists = [_word_list(material, config, length, 0, f'level {i}', level) for i in range(9)]
            if sum(isinstance(found, ValueError) for found in lists) < 5:
                return level
    raise lists[-1]


def _word_list(material, config, length, index, draw, level):
    """Sample of the words of a draw, or the ValueError that says why they do not fit."""
    try:
        return _drawn_list(material, config, length, index, material.rng(config, length, draw), *level)
    except ValueError as error:
        return error


def _drawn_list(material, config, length, index, rng, common_repeats, other_repeats, example_words, example_common,
                example_other):
    common = config.common
    head = 'The list below names some words more often than others. Keep count of them.\n\n'
    tail = f'Question: Which {common} words are the most common in the list above?\nAnswer:'
    prefix = f' The {common} most common words are:'
    words, word_tokens = material.list_pool(length // other_repeats)
    if len(words) <= example_words + 2 * common:
        raise ValueError(f'the list of words ({material.words.source}) holds {len(words)}, and {config.task} takes '
                         f'more than {example_words + 2 * common}; give a longer one')
    order = rng.sample(range(len(words)), len(words))
    example = ''
    if config.example:
        few = [order.pop() for _ in range(example_words)]
        items = few[:common] * example_common + few[common:] * example_other
        material.placement.shuffle(rng, items)
        example = f'{head}{_numbered(words, items)}{tail}{prefix} {_in_line(words, few[:common])}\n\n'
    fit = material.fit(config, length, example + head, tail + prefix, _in_line(words, order[:common]))
    room = fit.room(0)
    # Tokens of lists with 0, 1, 2, ... words beside the common ones, and of the numbers before their items.
    sizes = other_repeats * np.concatenate([[0], np.cumsum(word_tokens[order[common:]])])
    sizes += common_repeats * int(word_tokens[order[:common]].sum())
    numbers = material.number_tokens(length)
    items = common * common_repeats + other_repeats * np.arange(len(sizes))
    sizes += np.where(items < len(numbers), numbers[np.minimum(items, len(numbers) - 1)], length)
    others = int(np.searchsorted(sizes, room, 'right')) - 1
    if others < common:
        fit.too_small(int(sizes[common]) - room)
    fit.full(others < len(sizes) - 1, f'the list of words ({material.words.source}) holds {len(words)}')
    items = order[:common] * common_repeats + order[common:common + others] * other_repeats
    material.placement.shuffle(rng, items)
    meta = {'words': common + others, 'repeats': [common_repeats, other_repeats],
            'word_source': material.words.source}
    return fit.sample(index, example + head + _numbered(words, items) + tail, prefix,
                      [words[i].strip() for i in order[:common]], int(sizes[others]), meta)


def _numbered(words, items):
    return ''.join([f'{i}.{words[j]}' for i, j in enumerate(items, 1)])


def _in_line(words, items):
    return _numbered(words, items).rstrip().replace('\n', ' ')


def frequent_words(material, config, length, index):
    """Sample: the most frequent coded words."""
    rng, counter = material.rng(config, length, index), material.counter
    head = ('Count how often each coded word appears in the text below, and disregard the dots.\n\n'
            'Coded text:')
    tail = f'Question: Which {config.asked} coded words appear most often in the text above?\nAnswer:'
    prefix = f' The {config.asked} coded words that appear most often are'
    vocab_size = config.vocab_size or (length - config.max_new_tokens) // 50
    # No rank beyond this appears even once.
    seen = int((length / _zeta(config.alpha)) ** (1 / config.alpha)) + 1
    coded = ['...', *_coded(rng, config.word_len, max(min(vocab_size, seen), config.asked + 2) - 1)]
    outputs = coded[1:config.asked + 1]
    fit = material.fit(config, length, head, tail + prefix, _listed(outputs))
    pieces, end = [f' {word}' for word in coded], ' END\n'
    tokens = counter.pieces(pieces)
    end_tokens = int(counter.pieces([end])[0])
    counter.check([*pieces, end])
    room = fit.room(end_tokens)
    shares = np.arange(1, len(coded) + 1) ** -config.alpha / _zeta(config.alpha)

    def size(num_words):
        return int((tokens * (num_words * shares).astype(int)).sum())

    fits, over = 0, length
    while over - fits > 1:
        middle = (fits + over) // 2
        fits, over = (middle, over) if size(middle) <= room else (fits, middle)
    counts = (fits * shares).astype(int)
    if counts[config.asked] <= counts[config.asked + 1]:
        fit.too_small(room)
    items = [i for i, count in enumerate(counts) for _ in range(count)]
    material.placement.shuffle(rng, items)
    context = ''.join([pieces[i] for i in items]) + end
    return fit.sample(index, head + context + tail, prefix, outputs, size(fits) + end_tokens,
                      {'counts': counts[:config.asked + 2].tolist()})


def _coded(rng, word_len, count):
    """[word] distinct."""
    if count > 26 ** word_len // 2:
        raise ValueError(f'words of {word_len} letters are too few for a vocabulary of {count}; use longer ones')
    words = {}
    while len(words) < count:
        words[''.join(rng.choices(string.ascii_lowercase, k=word_len))] = None
    return list(words)


def _zeta(alpha):
    """Riemann's zeta for alpha > 1 by the Euler-Maclaurin formula, to 1e-10."""
    if alpha <= 1:
        raise ValueError(f'alpha {alpha} must be above 1, or the shares of the words have no sum; use 1.1 or more')
    n = np.arange(1, 100)
    return float((n ** -alpha).sum() + 100 ** (1 - alpha) / (alpha - 1) + 100 ** -alpha / 2
                 + alpha * 100 ** (-alpha - 1) / 12)


def question_answering(material, config, length, index):
    """Sample: a question about numbered documents."""
    rng = material.rng(config, length, index)
    source, texts, tokens = material.document_pool(config.source, length)
    question = source.question(index, len(texts))
    head = 'Answer the question that follows the documents below. Reply with the answer alone.\n\n'
    tail = f'Question: {question.text} Reply with the answer alone.\n'
    prefix = 'Answer:'
    fit = material.fit(config, length, head, tail + prefix, max(question.answers, key=len))
    near = [i for i in question.near if i not in question.gold]
    other = [i for i in range(len(texts)) if i not in {*question.gold, *near}]
    rng.shuffle(near)
    rng.shuffle(other)
    candidates = np.array(near + other, int)
    # A title with the highest number is the longest, so the real ones fit too.
    title = int(material.counter.pieces([_title(len(texts))])[0])
    room = fit.room(int(tokens[list(question.gold)].sum()) + title * len(question.gold))
    most = (config.documents or len(texts)) - len(question.gold)
    chosen, left = [], room
    sizes = tokens[candidates] + title
    while len(candidates) and len(chosen) < most:
        count = max(min(prompt_fitting.whole(None, sizes, left), most - len(chosen)), 0)
        chosen += candidates[:count].tolist()
        left -= int(sizes[:count].sum())
        candidates, sizes = candidates[count:], sizes[count:]
        fitting_ones = sizes <= left  # one that does not fit does not keep smaller ones out
        candidates, sizes = candidates[fitting_ones], sizes[fitting_ones]
    if config.documents is None and len(chosen) + len(question.gold) == len(texts):
        fit.full(left < length // 10, f'{source.source} holds {len(texts)} documents')
    order = material.placement.put_gold(
        rng, material.placement.depth(config.task, length, index), list(question.gold), chosen)
    context = ''.join(f'{_title(i)}{texts[j]}' for i, j in enumerate(order, 1))
    used = int(tokens[order].sum() + material.counter.pieces([_title(i) for i in range(1, len(order) + 1)]).sum())
    meta = {'depths': [order.index(i) / len(order) for i in question.gold], 'documents': len(order),
            'source': source.source}
    return fit.sample(index, head + context + tail, prefix, question.answers, used, meta)


def _title(number):
    return f'Document {number}:\n'


def _listed(names):
    return ' and '.join([', '.join(names[:-1]), names[-1]] if len(names) > 1 else names)
