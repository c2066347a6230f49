"""Tiles of a Mosaic kernel on Hopper: their visits, copies into shared memory, products and masks.

A program has three warpgroups. The third fetches tiles into slots of shared memory; each of the others
multiplies them with its half of the program's block. A slot is filled again when both have passed its barrier
`free`. Tiles in registers are float32 in the layout of the matrix instruction.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from lct.ops.masks import Tokens

INTERPRET = None  # set by checks to Mosaic's interpreter, which simulates copies, barriers and warpgroups
BLOCK = 128  # queries or keys of a program
ROWS = BLOCK // 2  # of them in each of the two warpgroups that multiply
STAGES = 2  # tiles in flight; at head_dim 128 they and a program's own fill 192 of an SM's 227 KiB
ROW, COLUMN = (mosaic.Layout.WGMMA.reduce(axis) for axis in (1, 0))  # of numbers for each row, each column
NO_INDEX = ((),) if 'idx' in inspect.signature(mosaic.load).parameters else ()  # of load in jax 0.10
Ref = Any  # an array in memory, or a part of one


class Visits:
    """The tiles that a program visits, `per_block` for each block of its list, `repeats` times.

    lists: order of the blocks [B, blocks, blocks to visit], number of FULL ones and of non-EMPTY ones
    [B, blocks]. at: the program's indices into them.
    """

    def __init__(self, lists: Sequence[Ref], at: tuple, per_block: int, repeats: int = 1):
        self.order, self.at, self.per_block, self.repeats = lists[0], at, per_block, repeats
        self.full, self.busy = (x[at] * per_block for x in lists[1:])

    @property
    def count(self) -> jax.Array:
        """Number of visits."""
        return self.busy * self.repeats

    def tile(self, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(repeat, tile) of visit m: the FULL tiles of all repeats come before the MIXED ones."""
        is_full = m < self.full * self.repeats
        m -= jnp.where(is_full, 0, self.full * self.repeats)
        span = jnp.where(is_full, self.full, self.busy - self.full)
        repeat, m = lax.div(m, span), lax.rem(m, span) + jnp.where(is_full, 0, self.full)
        block = self.order[(*self.at, lax.div(m, self.per_block))]
        return repeat, block * self.per_block + lax.rem(m, self.per_block)

    def fetch(self, copies: Callable[..., Iterable[tuple[Ref, Ref]]], ready: Ref, free: Ref) -> None:
        """Fill a slot for every visit, with the (source, buffer) pairs of copies(repeat, tile)."""
        @pl.loop(0, self.count)
        def _(m):
            slot = lax.rem(m, STAGES)
            pl.when(m >= STAGES)(lambda: mosaic.barrier_wait(free.at[slot]))
            for source, buffer in copies(*self.tile(m)):
                mosaic.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])

        @pl.loop(jnp.maximum(self.count - STAGES, 0), self.count)
        def _(m):
            mosaic.barrier_wait(free.at[lax.rem(m, STAGES)])

    def over(self, step: Callable[..., Any], carry: Any, ready: Ref, free: Ref) -> Any:
        """carry after step(carry, tile, slot, masked) for every visit."""
        def visit(m, carry, masked):
            slot = lax.rem(m, STAGES)
            mosaic.barrier_wait(ready.at[slot])
            carry = step(carry, self.tile(m)[1], slot, masked)
            mosaic.barrier_arrive(free.at[slot])
            return carry

        full = self.full * self.repeats
        carry = lax.fori_loop(0, full, lambda m, carry: visit(m, carry, False), carry)
        return lax.fori_loop(full, self.count, lambda m, carry: visit(m, carry, True), carry)


def barriers(own: int, in_flight: int) -> list[mosaic.Barrier]:
    """own, ready and free. own: tiles that each warpgroup fetches for itself. in_flight: tiles of a slot."""
    return [mosaic.Barrier(num_arrivals=own, num_barriers=2),
            mosaic.Barrier(num_arrivals=in_flight, num_barriers=STAGES),
            mosaic.Barrier(num_arrivals=2, num_barriers=STAGES)]


def program(last_first: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(block, head, batch row) of a program. Late queries attend to the most keys: their blocks run first."""
    i, n, b = (lax.axis_index(name) for name in ('block', 'head', 'batch'))
    return lax.axis_size('block') - 1 - i if last_first else i, n, b


def divide(fetch: Callable[[], None], compute: Callable[[jax.Array], None]) -> None:
    """fetch() in the third warpgroup, compute(number) in the two that multiply and need more registers."""
    number = lax.axis_index('warpgroup')

    @pl.when(number == 2)
    def _():
        mosaic.set_max_registers(40, action='decrease')
        fetch()

    @pl.when(number < 2)
    def _():
        mosaic.set_max_registers(232, action='increase')
        compute(number)


def fetch_own(ready: Ref, number: jax.Array, *copies: tuple[Ref, Ref]) -> None:
    """The (source, buffer) pairs that a warpgroup needs throughout a program."""
    for source, buffer in copies:
        mosaic.copy_gmem_to_smem(source, buffer.at[number], ready.at[number])
    mosaic.barrier_wait(ready.at[number])


# The interpreter knows no layouts, and no products of registers: there both are plain jax.


def load(ref: Ref, layout: Any) -> jax.Array:
    """What ref holds, in registers."""
    return ref[...] if INTERPRET else mosaic.load(ref, *NO_INDEX, layout=layout, optimized=False)


def full(shape: tuple[int, ...], value: float) -> jax.Array:
    """A tile of one value, or a number for each row."""
    x = jnp.full(shape, value, jnp.float32)
    return x if INTERPRET else mosaic.layout_cast(x, mosaic.Layout.WGMMA if len(shape) == 2 else ROW)


def dot(x: Ref, y: Ref) -> jax.Array:
    """x @ y.T of two tiles in shared memory."""
    if INTERPRET:
        return jnp.dot(x[...], y[...].T, preferred_element_type=jnp.float32)

    def product(acc):
        mosaic.wgmma(acc, x, y.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(product, mosaic.ACC((x.shape[0], y.shape[0]), jnp.float32))


def add_dot(acc: jax.Array, x: jax.Array, y: Ref) -> jax.Array:
    """acc + x @ y, with x rounded to the dtype of y, a tile in shared memory."""
    x = x.astype(y.dtype)
    if INTERPRET:
        return acc + jnp.dot(x, y[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: mosaic.wgmma(ref, x, y))(mosaic.ACC.init(acc))


def over_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """A number for each row, in every column of a tile."""
    return lax.broadcast_in_dim(x, like.shape, [0])


def load_tokens(tokens: Ref, b: jax.Array, span: Any, layout: Any) -> Tokens:
    """The Tokens of a span of tokens [B, 2, T]."""
    return Tokens(*(load(tokens.at[b, i, span], layout) for i in range(2)))


def attention_mask(q_tokens: Tokens, k_tokens: Tokens, shape: tuple[int, int], window: int | None,
                   keys_dim: int = 1) -> jax.Array:
    """masks.attention_mask for a tile in registers whose keys are along keys_dim."""
    q_pos, q_seg = (lax.broadcast_in_dim(x, shape, [1 - keys_dim]) for x in q_tokens)
    k_pos, k_seg = (lax.broadcast_in_dim(x, shape, [keys_dim]) for x in k_tokens)
    mask = (q_pos >= k_pos) & (q_seg == k_seg) & (k_seg > 0)
    return mask if window is None else mask & (q_pos - k_pos < window)
