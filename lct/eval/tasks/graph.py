"""A list of edges as the prompt: the nodes that a breadth-first search reaches, and the parents of a node.

The tasks and their score, the F1 of the set of nodes, are those of OpenAI's GraphWalks; names, graphs and
wording are our own.
"""

import dataclasses
import string
from collections.abc import Callable

import numpy as np

from lct.eval import samples
from lct.eval.tasks.material import Material, PromptFrame

NODE_COUNT = 26 * 26 * 1000
EDGES_PER_NODE = 1.6
MOST_ANSWERS = 6
MAX_TRIES = 200  # of graphs, until a node has 1 to MOST_ANSWERS answers


@dataclasses.dataclass(frozen=True)
class Walk:
    """The nodes whose shortest path from a node has `steps` edges."""

    task: str
    steps: int
    max_new_tokens: int = 64

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        ask = lambda node: (
            f'Question: Which nodes does a breadth-first search from {node} reach in exactly {self.steps} '
            f'steps, and not in fewer? Name them, separated by commas, and write nothing else.\nAnswer:',
            f' The nodes at {self.steps} steps from {node}:')
        return _sample(material, self, length, index, ask, self.answers)

    def answers(self, edges: np.ndarray, start: int) -> list[int]:
        """The nodes at `steps` steps from start; edges: [E, 2], from and to."""
        layer, reached = {start}, {start}
        for _ in range(self.steps):
            layer = set(edges[np.isin(edges[:, 0], list(layer)), 1].tolist()) - reached
            reached |= layer
        return sorted(layer)


@dataclasses.dataclass(frozen=True)
class Parents:
    """The nodes with an edge to a node."""

    task: str = 'graph_parents'
    max_new_tokens: int = 64

    def generate(self, material: Material, length: int, index: int) -> samples.Sample:
        ask = lambda node: (
            f'Question: Which nodes have an edge that leads to {node}? Name them, separated by commas, and '
            f'write nothing else.\nAnswer:', f' The nodes with an edge to {node}:')
        return _sample(material, self, length, index, ask, self.answers)

    def answers(self, edges: np.ndarray, node: int) -> list[int]:
        """The nodes with an edge to node; edges: [E, 2], from and to."""
        return sorted(set(edges[edges[:, 1] == node, 0].tolist()))


def _sample(material, config, length, index, ask: Callable, answers: Callable):
    rng, (names, sizes) = material.rng(config, length, index), _names(material, length)
    numbers = np.random.default_rng(rng.getrandbits(64))
    start = int(numbers.integers(len(names)))
    frame = PromptFrame(
        'Each line below is an edge of a directed graph: "a -> b" leads from the node a to the node b. A '
        'question about the graph comes last.\n\n', *ask(names[start]))
    longest = np.argsort(sizes[:, 1])[-MOST_ANSWERS:]
    budget = material.budget(config, length, frame, ', '.join(names[i] for i in longest))
    for _ in range(MAX_TRIES):
        edges = _edges(numbers, sizes, start, budget.room())
        if 0 < len(found := answers(edges, start)) <= MOST_ANSWERS:
            break
    else:
        budget.raise_too_small(length)
    context = ''.join([f'{names[a]} -> {names[b]}\n' for a, b in edges.tolist()])
    used = int(sizes[edges[:, 0], 0].sum() + sizes[edges[:, 1], 1].sum())
    side = edges[:, 0 if isinstance(config, Parents) else 1]
    depths = [int((side == node).argmax()) / len(side) for node in found]
    # The expected F1 of one node taken at random.
    chance = 2 * len(found) / ((1 + len(found)) * len(np.unique(edges)))
    return budget.sample(index, context, [names[node] for node in found], used,
                         {'depths': depths, 'edges': len(edges), 'metric': 'set_f1', 'chance': chance})


def _names(material, length):
    """([name], tokens [n, 2] of 'name ->' and of ' name' at the end of a line) of nodes for a length."""
    def make():
        rng = samples.rng(material.seed, 'nodes')
        codes = rng.sample(range(NODE_COUNT), min(max(length // 8, 64), NODE_COUNT))
        letters = string.ascii_lowercase
        names = [f'{letters[code // 26000]}{letters[code // 1000 % 26]}{code % 1000:03}' for code in codes]
        sides = [f'{name} ->' for name in names], [f' {name}\n' for name in names]
        material.counter.check_additive([part for pair in zip(*sides, strict=True) for part in pair][:512])
        return names, np.stack([material.counter.count_each(side) for side in sides], 1)

    return material.cached(('nodes', length), make)


def _edges(rng, sizes, start, room):
    """[E, 2] distinct random edges that fill room tokens, among nodes one of which is start.

    sizes: [nodes, 2] tokens of a name on each side.
    """
    mean = sizes.mean(0).sum()
    count = min(max(int(room / mean / EDGES_PER_NODE), 2), len(sizes))
    nodes = rng.permutation(len(sizes))[:count]
    nodes[0] = start  # or twice among them, which does no harm
    drawn = nodes[rng.integers(0, count, (int(1.5 * room / mean) + 8, 2))]
    drawn = drawn[drawn[:, 0] != drawn[:, 1]]
    _, first = np.unique(drawn[:, 0] * len(sizes) + drawn[:, 1], return_index=True)
    drawn = drawn[np.sort(first)]
    fits = np.searchsorted(np.cumsum(sizes[drawn[:, 0], 0] + sizes[drawn[:, 1], 1]), room, 'right')
    return drawn[:fits]
