"""RULER's variable tracking task (Hsieh et al. 2024, section 3)."""

import dataclasses
import string
from typing import NamedTuple

from lct.eval import samples
from lct.eval.tasks import prompt_fitting, ruler_text
from lct.eval.tasks.material import Material, PromptFrame

EXAMPLE_HOPS = 10  # at most
EXAMPLE_TOKENS = 500  # at most


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """Chains of assignments; the question asks for the names of the first chain.

    haystack: noise or text. name_len: letters of a name. example: whether a short solved example precedes.
    """

    task: str = 'vt'
    chains: int = 1
    hops: int = 4
    haystack: str = 'noise'
    name_len: int = 5
    example: bool = True
    max_new_tokens: int = 30

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        rng = material.rng(self, length, index)
        example = _example(material, rng, self.hops, length) if self.example else ''
        problem = _problem(rng, self.chains, self.hops, self.name_len)
        frame = problem.frame._replace(head=example + problem.frame.head)
        budget = material.budget(self, length, frame, ruler_text.enumeration(problem.names))
        sizes = material.counter.count_each(problem.statements)
        room = budget.room(int(sizes.sum()))
        if self.haystack not in ('noise', 'text'):
            raise ValueError(f"unknown haystack {self.haystack!r}; use 'noise' or 'text'")
        lines, tokens = material.noise(room) if self.haystack == 'noise' else material.excerpt(rng, room)
        # The statements of a chain stay in their order; statements of different chains mix.
        per_chain = self.hops + 1
        depths = [depth for _ in range(self.chains)
                  for depth in sorted(rng.random() for _ in range(per_chain))]
        context, depths = prompt_fitting.insert_lines(
            lines, tokens, list(zip(depths, problem.statements, strict=True)), material.counter)
        return budget.sample(index, context, problem.names, int(tokens.sum() + sizes.sum()),
                             {'depths': depths[:per_chain], 'value': problem.value})


class _Problem(NamedTuple):
    """names: the variables of the first chain, which hold value; statements: of all chains."""

    names: list
    value: int
    statements: list
    frame: PromptFrame


def _example(material, rng, hops, length):
    """The text of a small solved problem with one chain."""
    problem = _problem(rng, 1, min(hops, EXAMPLE_HOPS), 3)
    head, tail, prefix = problem.frame
    spare = min(EXAMPLE_TOKENS, length // 8) - material.counter.count(
        head + ''.join(problem.statements) + tail + prefix)
    lines, tokens = material.noise(max(spare, 0))
    depths = sorted(rng.random() for _ in problem.statements)
    context, _ = prompt_fitting.insert_lines(
        lines, tokens, list(zip(depths, problem.statements, strict=True)), material.counter)
    return f'{head}{context}{tail}{prefix} {", ".join(problem.names)}.\n\n'


def _problem(rng, chains, hops, name_len):
    values = rng.sample(range(10_000, 99_999), chains)
    names = _names(rng, chains, hops, name_len)
    statements = []
    for i, value in enumerate(values):
        chain = names[i * (hops + 1):(i + 1) * (hops + 1)]
        statements += [f'SET {chain[0]} TO {value}.\n']
        statements += [f'SET {name} TO {before}.\n' for before, name in zip(chain, chain[1:], strict=False)]
    count, value = hops + 1, values[0]
    head = 'Variables are set in the text below, to numbers or to each other. Keep track of their values.\n\n'
    tail = (f'Question: Which {count} variables in the text above have the value {value}, directly or by way '
            'of other variables?\nAnswer:')
    frame = PromptFrame(head, tail, f' The {count} variables with the value {value} are')
    return _Problem(names[:count], value, statements, frame)


def _names(rng, chains, hops, name_len):
    """[name] distinct, hops + 1 for each chain."""
    names = []
    for _ in range(1000 * chains * (hops + 1)):
        name = ''.join(rng.choices(string.ascii_uppercase, k=name_len))
        if name not in names:
            names.append(name)
        if len(names) == chains * (hops + 1):
            return names
    raise ValueError(f'names of {name_len} letters are too few for {chains} chains of {hops} hops; '
                     'use longer ones')
