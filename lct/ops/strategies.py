"""The strategies that split attention over the sequence axis, their facts, and the choice of one in a config.

    python -m lct.ops.strategies        prints the table

To add a strategy: one module with its function, and one record in STRATEGIES.
"""

import dataclasses
from collections.abc import Callable

import jax
from jax import lax

from lct import text
from lct.ops.all_gather_attention import DIRECTIONS as ALL_GATHER
from lct.ops.all_gather_attention import all_gather_attention
from lct.ops.all_to_all_attention import DIRECTIONS as ALL_TO_ALL
from lct.ops.all_to_all_attention import all_to_all_attention
from lct.ops.blockwise_attention import Chunks, KVBlock, QueryBlock, Residuals
from lct.ops.context_parallel import KERNELS, AttentionOptions, Directions, SequenceAxis, fit_chunks
from lct.ops.double_ring_attention import DIRECTIONS as DOUBLE_RING
from lct.ops.double_ring_attention import double_ring_attention
from lct.ops.kernels import choice
from lct.ops.ring_attention import DIRECTIONS as RING
from lct.ops.ring_attention import ring_attention


@dataclasses.dataclass(frozen=True)
class Strategy:
    """One way to split attention over the sequence axis.

    attend: (q, k, v, positions, segment_ids, axis_name, options) -> out, as ring_attention.
    directions: its forward and its backward, for queries in passes.
    schedule, requires, exposed: the order of communication, its conditions, and the communication that is not
      overlapped with compute, as text for the table.
    two_level: nodes of node_size neighbours exchange keys and values within, and a ring connects the nodes.
    splits_heads: the devices of a node share the heads among them.
    gathers: every device of a node gathers the keys and values of the node.
    """

    attend: Callable[..., jax.Array]
    directions: Directions
    schedule: str
    requires: str
    exposed: str
    two_level: bool = False
    splits_heads: bool = False
    gathers: bool = False


STRATEGIES: dict[str, Strategy] = {
    'ring': Strategy(
        ring_attention, RING,
        schedule='one ring of all devices',
        requires='-',
        exposed='none: each transfer overlaps with the attention of one block'),
    'all_gather': Strategy(
        all_gather_attention, ALL_GATHER,
        schedule='all-gather of K/V',
        requires='memory for the K/V of the sequence',
        exposed='the all-gathers',
        gathers=True),
    'all_to_all': Strategy(
        all_to_all_attention, ALL_TO_ALL,
        schedule='all-to-all of heads and tokens',
        requires='ring_size divides num_heads',
        exposed='four all-to-alls',
        splits_heads=True),
    'all_gather_ring': Strategy(
        all_gather_attention, ALL_GATHER,
        schedule='all-gather within nodes, ring of nodes',
        requires='node_size divides ring_size',
        exposed='the all-gathers within nodes',
        two_level=True, gathers=True),
    'all_to_all_ring': Strategy(
        all_to_all_attention, ALL_TO_ALL,
        schedule='all-to-all within nodes, ring of nodes',
        requires='node_size divides ring_size and num_heads',
        exposed='four all-to-alls within nodes',
        two_level=True, splits_heads=True),
    'double_ring': Strategy(
        double_ring_attention, DOUBLE_RING,
        schedule='ring within nodes, ring of nodes',
        requires='node_size divides ring_size',
        exposed='none: each transfer between nodes overlaps with a ring pass within the node',
        two_level=True),
}
DEFAULT = 'ring'  # a single device runs it too
COMMON = ('layouts contiguous, zigzag, striped; causal masks, packed documents, sliding window; MHA, GQA, '
          'MQA; any head_dim; dk and dv communicated in float32; kernel xla on any device, triton on CUDA '
          'devices with head_dim 16, 32, 64, 128, 256, mosaic on Hopper with 64, 128. No bias, no dropout.')


@dataclasses.dataclass(frozen=True)
class Attention:
    """The choice of an attention strategy and of its settings.

    strategy: a key of STRATEGIES.
    node_size: neighbours on the sequence axis with fast links between them, for the two-level strategies.
    chunks: tile sizes in tokens.
    kernel: the inner block, a key of KERNELS, or 'auto' for the fused one where it applies and xla elsewhere.
    """

    strategy: str = DEFAULT
    node_size: int = 1
    chunks: Chunks = Chunks()
    kernel: str = choice.AUTO

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f'attention strategy {self.strategy!r} is not one of {", ".join(STRATEGIES)}')
        if self.kernel not in (choice.AUTO, *KERNELS):
            names = ', '.join((choice.AUTO, *KERNELS))
            raise ValueError(f'attention kernel {self.kernel!r} is not one of {names}')
        if self.node_size < 1:
            raise ValueError(f'node_size {self.node_size} must be at least 1')
        if self.facts.two_level and self.node_size == 1:
            raise ValueError(f'strategy {self.strategy} needs node_size > 1, the devices of one machine; '
                             f'with one device per machine use strategy {DEFAULT!r}')

    @property
    def facts(self) -> Strategy:
        """The record of the strategy."""
        return STRATEGIES[self.strategy]

    def nodes(self, ring_size: int) -> tuple[int, int]:
        """(devices per node, number of nodes). To a strategy of collectives alone the whole ring is one node;
        to a single ring every device is a node."""
        if self.facts.two_level:
            node_size = self.node_size
        else:
            node_size = ring_size if self.facts.gathers or self.facts.splits_heads else 1
        return node_size, ring_size // node_size


def check(attention: Attention, ring_size: int, num_heads: int, num_kv_heads: int,
          head_dim: int | None = None, dtype: jax.typing.DTypeLike | None = None) -> None:
    """Refuse an Attention that the mesh or the model cannot run; heads are those of one tensor shard.

    head_dim, dtype: of the heads, None where they are not known.

    Raises:
      ValueError: with the reason.
    """
    named = attention.kernel != choice.AUTO
    if named and (reason := choice.obstacle(attention.kernel, head_dim, dtype)):
        raise ValueError(f"kernel {attention.kernel} cannot run here, because {reason}; use kernel 'auto'")
    if attention.facts.two_level and ring_size % attention.node_size:
        raise ValueError(f'strategy {attention.strategy}: the sequence axis has {ring_size} devices, not a '
                         f'multiple of node_size {attention.node_size}; use a node_size of '
                         f'{text.divisors_near(ring_size, attention.node_size)}')
    if attention.facts.splits_heads:
        degree, _ = attention.nodes(ring_size)
        if num_heads % degree or (num_kv_heads % degree and degree % num_kv_heads):
            raise ValueError(
                f'strategy {attention.strategy} gives each of {degree} devices an equal share of heads, but '
                f'a tensor shard has {num_heads} heads and {num_kv_heads} key/value heads; use a smaller '
                f'node_size with a two-level strategy, or {DEFAULT}')


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array, segment_ids: jax.Array,
    axis_name: str | None, attention: Attention, window: int | None = None,
) -> jax.Array:
    """Attention by the chosen strategy; call inside shard_map.

    q: [B, T, N, H]; k, v: [B, T, K, H]; positions, segment_ids: int32 [B, T] -> [B, T, N, H].
    axis_name: None on a single device. window: tokens that a query attends to, itself included; None for all
    before it.
    """
    strategy, options = _resolve(q, axis_name, attention, window)
    return strategy.attend(q, k, v, positions, segment_ids, axis_name, options)


def attend_queries(queries: QueryBlock, block: KVBlock, axis_name: str | None, attention: Attention,
                   window: int | None = None) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, K, G, H], lse [B, T, K, G]) in float32 of some of the shard's queries, over all keys.

    block: all keys and values of the shard. It communicates as much as the forward of attend. Without a
    gradient; other arguments as in attend.
    """
    strategy, axis, options = _resolve_queries(queries, block, axis_name, attention, window)
    with jax.named_scope(f'{attention.strategy}_attention'):
        return strategy.directions.forward(queries, block, axis, options)


def attend_queries_backward(
    queries: QueryBlock, block: KVBlock, residuals: Residuals, grads: tuple[jax.Array, jax.Array],
    axis_name: str | None, attention: Attention, window: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq [B, T, K, G, H], and grads, which are dk and dv [B, K, S, H], with the share of these queries added;
    all float32."""
    strategy, axis, options = _resolve_queries(queries, block, axis_name, attention, window)
    with jax.named_scope(f'{attention.strategy}_attention'):
        return strategy.directions.backward(queries, block, residuals, grads, axis, options)


def _resolve_queries(queries, block, axis_name, attention, window):
    """The Strategy, its SequenceAxis and its options with fitted chunks."""
    strategy, options = _resolve(queries.q, axis_name, attention, window)
    options = fit_chunks(options, queries.q, block.tokens.positions.shape[1])
    return strategy, SequenceAxis(axis_name, options.node_size), options


def _resolve(q, axis_name, attention, window):
    """The Strategy that runs on the axis, and its AttentionOptions; q: [..., H]."""
    ring_size = 1 if axis_name is None else lax.axis_size(axis_name)
    strategy, node_size = attention.facts, attention.nodes(ring_size)[0]
    if ring_size == 1:
        strategy, node_size = STRATEGIES[DEFAULT], 1
    kernel = choice.choose(attention.kernel, q.shape[-1], q.dtype).kernel
    return strategy, AttentionOptions(attention.chunks, window, kernel, node_size)


def table() -> str:
    """The facts of all strategies as a text table."""
    header = ('strategy', 'schedule', 'requires', 'exposed communication')
    rows = [(name, facts.schedule, facts.requires, facts.exposed) for name, facts in STRATEGIES.items()]
    return f'{text.table(header, rows, left=range(4))}\n\nAll of them: {COMMON}'


if __name__ == '__main__':
    print(table())
