"""Adversarial needles, which fail a reader that goes by position or habit instead of by the question.

There are several needles of a kind, names that almost match, contradicting statements, an absent name, and a
needle across a shard boundary.
"""

import dataclasses

from lct.eval import samples
from lct.eval.tasks import prompt_fitting, ruler_text
from lct.eval.tasks.material import Material, PromptFrame

STALE_COUNTS = (0, 2, 4, 8)  # wrong values beside the right one; DEFAULTS have 1


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule for which of several statements about a name is right.

    right, wrong: patterns of statements. instruction: precedes the question.
    right_position: 'first' or 'last' of the statements, or 'any' (first and last alternate).
    """

    right: str
    wrong: str
    instruction: str
    right_position: str


PLAIN = 'One {type_name} stored under {name} is {value}.\n'
RULES = {
    'latest': Rule(
        PLAIN, PLAIN,
        'Where several {type_name}s are stored under one name, the last in the text counts.', 'last'),
    'first': Rule(
        PLAIN, PLAIN,
        'Where several {type_name}s are stored under one name, the first in the text counts.', 'first'),
    'correction': Rule(
        'Correction: the {type_name} stored under {name} is {value}.\n', PLAIN,
        'A correction overrides what it corrects, wherever in the text it stands.', 'any'),
    'dated': Rule(
        'As of day {late} the {type_name} stored under {name} is {value}.\n',
        'As of day {early} the {type_name} stored under {name} is {value}.\n',
        'Of several {type_name}s stored under one name the one of the latest day counts.', 'any'),
    'trusted': Rule(
        'By the register the {type_name} stored under {name} is {value}.\n',
        'By hearsay the {type_name} stored under {name} is {value}.\n',
        'The register is right and hearsay is wrong.', 'any'),
    'retracted': Rule(PLAIN, PLAIN, 'An entry that is said to be void does not count.', 'any'),
}
UNKNOWN = 'unknown'
VOID = 'The entry {value} under {name} is void.\n'


@dataclasses.dataclass(frozen=True)
class Conflict:
    """A name with a right value, by a rule of RULES, and `wrong` stale values; wrong 0 is the control.

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

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if self.rule not in RULES:
            raise ValueError(f"unknown rule {self.rule!r}; use one of {', '.join(RULES)}")
        rule, rng = RULES[self.rule], material.rng(self, length, index)
        type_name = ruler_text.type_name(self.value_kind)
        name, *others = material.lexicon.distinct(rng, self.name_kind, 1 + self.distractors)
        value, *values = material.lexicon.distinct(
            rng, self.value_kind, 1 + self.wrong + self.distractors, (name,))
        stale = values[:self.wrong]
        days = sorted(rng.sample(range(10, 100), self.wrong + 1))
        late = days.pop()
        right = rule.right.format(type_name=type_name, name=name, value=value, late=late)
        lines = [rule.wrong.format(type_name=type_name, name=name, value=old, early=day)
                 for old, day in zip(stale, days, strict=True)]
        is_first = rule.right_position == 'first' or (rule.right_position == 'any' and index % 2 == 0)
        lines.insert(0 if is_first else len(lines), right)
        # Even and odd samples take the same depths, so that first and last differ in nothing else.
        start = material.first_depth(self, length, index // 2) * (1 - self.spread)
        inserts = [(start + self.spread * i / max(self.wrong, 1), line) for i, line in enumerate(lines)]
        if self.rule == 'retracted':
            inserts += [(rng.random(), VOID.format(name=name, value=old)) for old in stale]
        inserts += [(rng.random(), ruler_text.needle(type_name, *pair))
                    for pair in zip(others, values[self.wrong:], strict=True)]
        question = _Question(type_name, name, value, lines.index(right),
                             rule.instruction.format(type_name=type_name))
        return _sample(material, self, length, index, inserts, question,
                       {'stale': stale, 'right_is': 'first' if is_first else 'last'})

    def expected_rate(self, position: str) -> float:
        """The target rate of a reader that always takes the value at a position ('first' or 'last').

        It holds over complete cycles of samples and without distractors.
        """
        right = RULES[self.rule].right_position if self.wrong else position
        return 0.5 if right == 'any' else float(right == position)


@dataclasses.dataclass(frozen=True)
class NearNames:
    """One needle among `wrong` others whose names differ from its name in a single word, digit or letter.

    Sample by sample it is the first, the second, ... of them.
    """

    task: str
    wrong: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng = material.rng(self, length, index)
        type_name = ruler_text.type_name(self.value_kind)
        name = material.lexicon.value(rng, self.name_kind)
        value, *stale = material.lexicon.distinct(rng, self.value_kind, 1 + self.wrong)
        names = ruler_text.near_names(rng, material.lexicon, self.name_kind, name, self.wrong)
        pairs = list(zip(names, stale, strict=True))
        place = index % (self.wrong + 1)
        pairs.insert(place, (name, value))
        depths = sorted(rng.random() for _ in pairs)
        inserts = [(depth, ruler_text.needle(type_name, *pair))
                   for depth, pair in zip(depths, pairs, strict=True)]
        return _sample(material, self, length, index, inserts, _Question(type_name, name, value, place),
                       {'stale': stale, 'names': names, 'place': place})

    def expected_rate(self, position: str) -> float:
        """See Conflict.expected_rate."""
        return 1 / (self.wrong + 1)


@dataclasses.dataclass(frozen=True)
class Absent:
    """A name that is not in the text, among `others` that are. UNKNOWN is right, and all values are wrong.

    present: the control, in which the name is in the text, sample by sample as the first, the second, ... Its
    value is right and UNKNOWN wrong. Both draw the same names, values and depths.
    """

    task: str
    present: bool = False
    others: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if self.others < 1:
            raise ValueError(
                f'{self.others} other names leave none to confuse with the absent one; use 1 or more')
        rng = samples.rng(
            material.seed, 'absent', length, index, self.others, self.name_kind, self.value_kind)
        type_name = ruler_text.type_name(self.value_kind)
        name, *names = material.lexicon.distinct(rng, self.name_kind, 1 + self.others)
        value, *values = material.lexicon.distinct(rng, self.value_kind, 1 + self.others, (name,))
        pairs, place = list(zip(names, values, strict=True)), index % (self.others + 1)
        depths = sorted(rng.random() for _ in range(self.others + 1))
        if self.present:
            pairs.insert(place, (name, value))
            answer, answer_line, meta = value, place, {'stale': [UNKNOWN, *values]}
        else:
            depths.pop(place)
            answer, answer_line, meta = UNKNOWN, 0, {'stale': values, 'depths': []}
        inserts = [(depth, ruler_text.needle(type_name, *pair))
                   for depth, pair in zip(depths, pairs, strict=True)]
        instruction = f'If the text stores no {type_name} under a name, it is {UNKNOWN}.'
        question = _Question(type_name, name, answer, answer_line, instruction)
        return _sample(material, self, length, index, inserts, question, meta, rng)

    def expected_rate(self, position: str) -> float:
        """See Conflict.expected_rate."""
        return 1 / (1 + self.others) if self.present else 0.0


@dataclasses.dataclass(frozen=True)
class Several:
    """`needles` needles and questions about `queries` of them, one a sample.

    Samples queries * i to queries * (i + 1) - 1 share one text, and so its key/value cache, up to character
    meta['shared'] of the prompt.
    """

    task: str
    needles: int = 8
    queries: int = 4
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        if not 1 <= self.queries <= self.needles:
            raise ValueError(f'queries {self.queries} must be 1 to {self.needles}, the number of needles')
        group, query = divmod(index, self.queries)
        rng = material.rng(self, length, group)
        type_name = ruler_text.type_name(self.value_kind)
        names = material.lexicon.distinct(rng, self.name_kind, self.needles)
        values = material.lexicon.distinct(rng, self.value_kind, self.needles, names)
        first = material.first_depth(self, length, group)
        inserts = [((first + i / self.needles) % 1, ruler_text.needle(type_name, name, value))
                   for i, (name, value) in enumerate(zip(names, values, strict=True))]
        queried = rng.sample(range(self.needles), self.queries)
        i = queried[query]
        longest_name = max(
            (names[j] for j in queried), key=lambda name: _frame_tokens(material, type_name, name))
        question = _Question(type_name, names[i], values[i], i, longest_name=longest_name)
        sample = _sample(material, self, length, index, inserts, question,
                         {'stale': values[:i] + values[i + 1:], 'group': group}, rng)
        shared = sample.prompt.rindex('Question: ') + len('Question: ')
        return dataclasses.replace(sample, meta={**sample.meta, 'shared': shared})


@dataclasses.dataclass(frozen=True)
class Straddling:
    """A needle across a shard boundary: token meta['boundary'] lies in the span meta['span'] of its line.

    shards: equal blocks of seq_len tokens (the length by default), as the contiguous layout cuts them. Sample
    by sample the needle is at the first, the second, ... of the boundaries within the text.
    """

    task: str
    shards: int
    seq_len: int | None = None
    name_kind: str = 'words'
    value_kind: str = 'numbers'
    max_new_tokens: int = 32

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng, counter = material.rng(self, length, index), material.counter
        type_name = ruler_text.type_name(self.value_kind)
        name = material.lexicon.value(rng, self.name_kind)
        value = material.lexicon.value(rng, self.value_kind)
        line = ruler_text.needle(type_name, name, value)
        frame = _frame(type_name, name)
        budget = material.budget(self, length, frame, value)
        size = counter.count_one(line)
        room = budget.room(size)
        text_start = material.overhead.before_prompt + counter.bos + counter.count_head(frame.head)
        boundary = self._boundary(length, index, text_start, size, room)
        text = material.text
        for _ in range(ruler_text.MAX_TRIES):
            first_line = rng.randrange(len(text.lines))
            # End the text early, within the needle's length of the boundary. Where no word ends exactly
            # there, the needle starts earlier and the boundary comes later in it.
            before, tokens = text.excerpt(
                first_line, boundary - text_start - rng.randint(1, max(size // 2, 1)))
            start = text_start + int(tokens.sum())
            if start < boundary < start + size:
                break
        else:
            raise ValueError(f'no line of the text ends near token {boundary}; use a text with shorter words')
        after, after_tokens = text.excerpt(
            (first_line + len(before)) % len(text.lines), room - int(tokens.sum()))
        used = int(tokens.sum()) + size + int(after_tokens.sum())
        meta = {'boundary': boundary, 'span': [start, start + size], 'stale': [],
                'depths': [float(tokens.sum() / used)]}
        return budget.sample(index, ''.join([*before, line, *after]), [value], used, meta)

    def _boundary(self, length, index, text_start, size, room):
        """The token of a shard boundary that a needle of `size` tokens can straddle."""
        shard_len = (self.seq_len or length) / self.shards
        boundaries = [round(i * shard_len) for i in range(1, self.shards)]
        boundaries = [token for token in boundaries if size < token - text_start <= room]
        if not boundaries:
            raise ValueError(f'length {length} has no boundary of {self.shards} shards of {shard_len:g} '
                             'tokens within its text; use more tokens or other shards')
        return boundaries[index % len(boundaries)]

    def expected_rate(self, position: str) -> float:
        """See Conflict.expected_rate."""
        return 1.0


DEFAULTS = {config.task: config for config in (
    Several('several'), NearNames('near_names'), Straddling('straddling', 8), Absent('absent'),
    Absent('present', present=True),
    *(Conflict(rule, rule) for rule in RULES),
)}
TASKS = DEFAULTS | {
    f'{rule}_{wrong}': Conflict(f'{rule}_{wrong}', rule, wrong) for rule in RULES for wrong in STALE_COUNTS}


# ---------------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Question:
    """The question for the value of a name.

    answer_line: index of the inserted line that holds the answer. instruction: precedes the question.
    longest_name: the name that takes the most tokens, of all questions about the same text.
    """

    type_name: str
    name: str
    answer: str
    answer_line: int
    instruction: str = ''
    longest_name: str | None = None


def _frame(type_name, name, instruction=''):
    """PromptFrame of a question for the value of a name."""
    head = (f'Some {type_name}s are stored under names in the text below. '
            'A question about one of them follows it.\n\n')
    tail = (f'{instruction and instruction + " "}Question: Which {type_name} is stored under {name}? '
            'Read the text above for the answer.\nAnswer:')
    return PromptFrame(head, tail, f' The {type_name} stored under {name} is')


def _frame_tokens(material, type_name, name):
    return material.counter.count(''.join(_frame(type_name, name)))


def _sample(material, config, length, index, inserts, question, meta, rng=None):
    """Sample of a text with lines inserted at depths, inserts [(depth, line)]."""
    type_name, name = question.type_name, question.name
    frame = _frame(type_name, name, question.instruction)
    budget = material.budget(config, length, frame, question.answer)
    spare = 0
    if question.longest_name:
        spare = (_frame_tokens(material, type_name, question.longest_name)
                 - _frame_tokens(material, type_name, name))
    sizes = int(material.counter.count_each([line for _, line in inserts]).sum())
    rng = rng or material.rng(config, length, f'{index} text')
    lines, tokens = material.excerpt(rng, budget.room(sizes + spare))
    context, depths = prompt_fitting.insert_lines(lines, tokens, inserts, material.counter)
    return budget.sample(index, context, [question.answer], int(tokens.sum()) + sizes,
                         {'depths': [depths[question.answer_line]], **meta})
