"""Needles that mislead: several of a kind, names that almost match, statements that contradict each other, a
needle cut by the boundary of a shard. What reads by place or by habit instead of by the question fails here."""

import dataclasses

from lct.eval import samples, scoring
from lct.eval.tasks import prompt_fitting, ruler_text

RUNGS = (0, 2, 4, 8)  # wrong values beside the right one, besides the 1 of DEFAULTS


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the right one of several statements is known. right and wrong are statements; told precedes the
    question. place: which of the statements is right: 'first', 'last' or 'any' (first and last in turn)."""

    right: str
    wrong: str
    told: str
    place: str


PLAIN = 'One {noun} stored under {name} is {value}.\n'
RULES = {
    'latest': Rule(PLAIN, PLAIN, 'Where several {noun}s are stored under one name, the last in the text counts.',
                   'last'),
    'first': Rule(PLAIN, PLAIN, 'Where several {noun}s are stored under one name, the first in the text counts.',
                  'first'),
    'correction': Rule('Correction: the {noun} stored under {name} is {value}.\n', PLAIN,
                       'A correction overrides what it corrects, wherever in the text it stands.', 'any'),
    'dated': Rule('As of day {late} the {noun} stored under {name} is {value}.\n',
                  'As of day {early} the {noun} stored under {name} is {value}.\n',
                  'Of several {noun}s stored under one name the one of the latest day counts.', 'any'),
    'trusted': Rule('By the register the {noun} stored under {name} is {value}.\n',
                    'By hearsay the {noun} stored under {name} is {value}.\n',
                    'The register is right and hearsay is wrong.', 'any'),
    'retracted': Rule(PLAIN, PLAIN, 'An entry that is said to be void does not count.', 'any'),
}
UNKNOWN = 'unknown'
VOID = 'The entry {value} under {name} is void.\n'


@dataclasses.dataclass(frozen=True)
class Conflict:
    """One name with `wrong` stale values beside the one that counts by a rule of RULES; wrong 0 is the control.

    spread: fraction of the text from the first statement to the last. distractors: needles of other names.
    """

    task: str
    rule: str
    wrong: int = 1
    spread: float = 0.5
    distractors: int = 0
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; use one of {', '.join(RULES)}")
        rule, rng = RULES[self.rule], material.rng(self, length, index)
        noun = ruler_text.noun(self.value_kind)
        name, *others = material.words.distinct(rng, self.name_kind, 1 + self.distractors)
        value, *values = material.words.distinct(rng, self.value_kind, 1 + self.wrong + self.distractors, (name,))
        stale = values[:self.wrong]
        days = sorted(rng.sample(range(10, 100), self.wrong + 1))
        late = days.pop()
        right = rule.right.format(noun=noun, name=name, value=value, late=late)
        lines = [rule.wrong.format(noun=noun, name=name, value=old, early=day)
                 for old, day in zip(stale, days, strict=True)]
        first = rule.place == 'first' or (rule.place == 'any' and index % 2 == 0)
        lines.insert(0 if first else len(lines), right)
        # Even and odd samples walk the same depths, so that first and last differ in nothing else.
        start = material.placement.depth(self.task, length, index // 2) * (1 - self.spread)
        inserts = [(start + self.spread * i / max(self.wrong, 1), line) for i, line in enumerate(lines)]
        if self.rule == 'retracted':
            inserts += [(rng.random(), VOID.format(name=name, value=old)) for old in stale]
        inserts += [(rng.random(), ruler_text.needle(noun, *pair))
                    for pair in zip(others, values[self.wrong:], strict=True)]
        return _sample(material, self, length, index, inserts, lines.index(right), noun, name, value,
                       {'stale': stale, 'right_is': 'first' if first else 'last'}, rule.told.format(noun=noun))


@dataclasses.dataclass(frozen=True)
class NearNames:
    """One needle among `wrong` whose names differ from the one asked for in a single word, digit or letter;
    it is the first, the second, ... of them in turn."""

    task: str
    wrong: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        rng = material.rng(self, length, index)
        noun = ruler_text.noun(self.value_kind)
        name = material.words.value(rng, self.name_kind)
        value, *stale = material.words.distinct(rng, self.value_kind, 1 + self.wrong)
        names = near_names(rng, material.words, self.name_kind, name, self.wrong)
        pairs = list(zip(names, stale, strict=True))
        place = index % (self.wrong + 1)
        pairs.insert(place, (name, value))
        depths = sorted(rng.random() for _ in pairs)
        inserts = [(depth, ruler_text.needle(noun, *pair)) for depth, pair in zip(depths, pairs, strict=True)]
        return _sample(material, self, length, index, inserts, place, noun, name, value,
                       {'stale': stale, 'names': names, 'place': place})


def near_names(rng, words, kind, name, count):
    """[name] of count others that differ from name, and from each other, in one part of it."""
    names = []
    for _ in range(ruler_text.MAX_TRIES * count):
        if kind == 'words':
            parts = name.split('-')
            i = rng.randrange(len(parts))
            parts[i] = rng.choice(words.name_parts[i])
            other = '-'.join(parts)
        else:
            i = rng.choice([i for i, letter in enumerate(name) if letter.isalnum()])
            other = name[:i] + rng.choice('123456789') + name[i + 1:]
        # A name within another would be said by whoever says that one.
        if other not in names and other not in name and name not in other:
            names.append(other)
        if len(names) == count:
            return names
    raise ValueError(f'{name!r} has fewer than {count} near names; use fewer')


@dataclasses.dataclass(frozen=True)
class Absent:
    """A name that the text does not hold, among `others` that it does: the right answer is UNKNOWN, and every value in
    the text is wrong. present: the control, where the name is there after all, the first, the second, ... in turn, its
    value is right and UNKNOWN wrong. Both draw the same names, values and depths."""

    task: str
    present: bool = False
    others: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        if self.others < 1:
            raise ValueError(f'{self.others} other names leave nothing to mistake for the one asked; use 1 or more')
        rng = samples.rng(material.seed, 'absent', length, index, self.others, self.name_kind, self.value_kind)
        noun = ruler_text.noun(self.value_kind)
        name, *names = material.words.distinct(rng, self.name_kind, 1 + self.others)
        value, *values = material.words.distinct(rng, self.value_kind, 1 + self.others, (name,))
        pairs, place = list(zip(names, values, strict=True)), index % (self.others + 1)
        depths = sorted(rng.random() for _ in range(self.others + 1))
        if self.present:
            pairs.insert(place, (name, value))
        else:
            depths.pop(place)
        inserts = [(depth, ruler_text.needle(noun, *pair)) for depth, pair in zip(depths, pairs, strict=True)]
        told = f'If the text stores no {noun} under a name, it is {UNKNOWN}.'
        right, meta = (value, {'stale': [UNKNOWN, *values]}) if self.present else (UNKNOWN, {'stale': values, 'depths': []})
        return _sample(material, self, length, index, inserts, place if self.present else 0, noun, name, right, meta, told,
                       rng=rng)


@dataclasses.dataclass(frozen=True)
class Several:
    """`needles` needles, of which `asked` are asked for, one a sample: samples asked * i to asked * (i + 1) - 1
    share one text, and so its key/value cache, up to meta['shared'] characters of the prompt."""

    task: str
    needles: int = 8
    asked: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        if not 1 <= self.asked <= self.needles:
            raise ValueError(f'{self.asked} of {self.needles} needles cannot be asked for; use 1 to {self.needles}')
        group, which = divmod(index, self.asked)
        rng = material.rng(self, length, group)
        noun = ruler_text.noun(self.value_kind)
        names = material.words.distinct(rng, self.name_kind, self.needles)
        values = material.words.distinct(rng, self.value_kind, self.needles, names)
        first = material.placement.depth(self.task, length, group)
        inserts = [((first + i / self.needles) % 1, ruler_text.needle(noun, name, value))
                   for i, (name, value) in enumerate(zip(names, values, strict=True))]
        chosen = rng.sample(range(self.needles), self.asked)
        i = chosen[which]
        sample = _sample(material, self, length, index, inserts, i, noun, names[i], values[i],
                         {'stale': values[:i] + values[i + 1:], 'group': group},
                         longest=max((names[j] for j in chosen), key=lambda name: _size(material, noun, name)),
                         rng=rng)
        return dataclasses.replace(
            sample, meta={**sample.meta, 'shared': sample.prompt.rindex('Question: ') + len('Question: ')})


@dataclasses.dataclass(frozen=True)
class Straddling:
    """A needle through which a boundary between shards runs: token number meta['boundary'] of the sequence is
    within the tokens meta['span'] of its line. shards: equal stretches of seq_len tokens (default: the length), as
    the contiguous layout cuts them; the boundaries within the prompt take turns."""

    task: str
    shards: int
    seq_len: int | None = None
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material, length, index):
        rng, counter = material.rng(self, length, index), material.counter
        noun = ruler_text.noun(self.value_kind)
        name = material.words.value(rng, self.name_kind)
        value = material.words.value(rng, self.value_kind)
        line = ruler_text.needle(noun, name, value)
        head, tail, prefix = _frame(noun, name)
        fit = material.fit(self, length, head, tail + prefix, value)
        size = int(counter.pieces([line])[0])
        room = fit.room(size)
        start_of_text = material.before + counter.bos + counter.before(head)
        stretch = (self.seq_len or length) / self.shards
        boundaries = [round(i * stretch) for i in range(1, self.shards)]
        boundaries = [place for place in boundaries if size < place - start_of_text <= room]
        if not boundaries:
            raise ValueError(f'length {length} has no boundary of {self.shards} shards of {stretch:g} tokens within '
                             'its text; use more tokens or other shards')
        boundary = boundaries[index % len(boundaries)]
        cycle = material.cycle
        for _ in range(ruler_text.MAX_TRIES):
            start = rng.randrange(len(cycle.lines))
            # Cut a little into the needle; where words do not end there the boundary comes later in it.
            before, tokens = cycle.cut(start, boundary - start_of_text - rng.randint(1, max(size // 2, 1)))
            begin = start_of_text + int(tokens.sum())
            if begin < boundary < begin + size:
                break
        else:
            raise ValueError(f'no line of the text ends near token {boundary}; use a text with shorter words')
        after, after_tokens = cycle.cut((start + len(before)) % len(cycle.lines), room - int(tokens.sum()))
        used = int(tokens.sum()) + size + int(after_tokens.sum())
        meta = {'boundary': boundary, 'span': [begin, begin + size], 'stale': [],
                'depths': [float(tokens.sum() / used)]}
        return fit.sample(index, head + ''.join([*before, line, *after]) + tail, prefix, [value], used, meta)


DEFAULTS = {config.task: config for config in (
    Several('several'), NearNames('near_names'), Straddling('straddling', 8), Absent('absent'),
    Absent('present', present=True),
    *(Conflict(rule, rule) for rule in RULES),
)}
TASKS = DEFAULTS | {f'{rule}_{wrong}': Conflict(f'{rule}_{wrong}', rule, wrong) for rule in RULES for wrong in RUNGS}


def _frame(noun, name, told=''):
    """-> head, tail, answer prefix of a prompt."""
    head = f'Some {noun}s are stored under names in the text below. A question about one of them follows it.\n\n'
    told = told and f'{told} '
    tail = f'{told}Question: Which {noun} is stored under {name}? Read the text above for the answer.\nAnswer:'
    return head, tail, f' The {noun} stored under {name} is'


def _size(material, noun, name):
    return material.counter.text(''.join(_frame(noun, name)))


def _sample(material, config, length, index, inserts, right, noun, name, value, meta, told='', longest=None,
            rng=None):
    """Sample with lines inserted into the text, of which number `right` holds the answer; room is left for the
    name `longest` in the question."""
    head, tail, prefix = _frame(noun, name, told)
    fit = material.fit(config, length, head, tail + prefix, value)
    spare = _size(material, noun, longest) - _size(material, noun, name) if longest else 0
    sizes = int(material.counter.pieces([line for _, line in inserts]).sum())
    lines, tokens = material.text(rng or material.rng(config, length, f'{index} text'), fit.room(sizes + spare))
    context, depths = prompt_fitting.insert(lines, tokens, inserts, material.counter)
    return fit.sample(index, head + context + tail, prefix, [value], int(tokens.sum()) + sizes,
                      {'depths': [depths[right]], **meta})


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------


def outcome(sample, text):
    """'target', 'stale' (a value that is wrong here), 'mixed' (both) or 'none'."""
    target = scoring.says(text, sample.outputs[0])
    stale = any(scoring.says(text, value) for value in sample.meta['stale'])
    return {(True, False): 'target', (False, True): 'stale', (True, True): 'mixed', (False, False): 'none'}[
        target, stale]


def rates(pairs):
    """{outcome: rate, ..., 'interval': 95% of the target rate, 'count': n, 'position_bias': ...} for JSON, of
    (Sample, text) pairs. The four rates sum to 1. interval: None where all questions are about one text.
    position_bias: the target rate where the right statement comes first less that where it comes last, None where it
    is always the same."""
    pairs = list(pairs)
    if not pairs:
        raise ValueError('no predictions to rate; run at least one sample')
    got = [outcome(sample, text) for sample, text in pairs]
    out = {kind: got.count(kind) / len(got) for kind in ('target', 'stale', 'mixed', 'none')}
    sides = {side: [one == 'target' for one, (sample, _) in zip(got, pairs, strict=True)
                    if sample.meta.get('right_is') == side] for side in ('first', 'last')}
    bias = None
    if sides['first'] and sides['last']:
        bias = sum(sides['first']) / len(sides['first']) - sum(sides['last']) / len(sides['last'])
    # Questions about one text hang together.
    sets = {}
    for one, (sample, _) in zip(got, pairs, strict=True):
        sets.setdefault(sample.meta.get('group'), []).append(float(one == 'target'))
    alone = None in sets
    interval = scoring.wilson(out['target'], len(got)) if alone else scoring.interval_of_sets(list(sets.values()))
    return {**out, 'interval': interval and list(interval), 'count': len(got), 'position_bias': bias}


def expected(config, reader):
    """The target rate that the design gives a reader which always takes the 'first' or the 'last' value in the
    text, over a number of samples that all turns divide and without distractors."""
    if isinstance(config, Conflict):
        place = RULES[config.rule].place if config.wrong else 'both'
        return 0.5 if place == 'any' else float(place in (reader, 'both'))
    if isinstance(config, NearNames):
        return 1 / (config.wrong + 1)
    if isinstance(config, Straddling):
        return 1.0
    if isinstance(config, Absent):
        return 1 / (1 + config.others) if config.present else 0.0
    raise ValueError(f'{config.task} has no fixed place of the right value, so no rate is expected')
