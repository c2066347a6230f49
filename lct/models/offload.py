"""Arrays in host memory: a program fetches them to the device where it uses them, a stack layer by layer.

Only arrays on a mesh carry their memory in their type, so all others count as on the device. On a CPU both
memories are one, and nothing is copied.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

HOST, DEVICE = 'pinned_host', 'device'  # the memory kinds of shardings
STACKED = ('layers', 'adapters')  # the fields of params whose arrays are stacked on L


def is_on_host(x: jax.Array) -> bool:
    """Whether an array is in host memory; also inside a program."""
    return jax.typeof(x).memory_space == jax.memory.Space.Host


def any_on_host(tree: Any) -> bool:
    """Whether any array of a tree is in host memory."""
    return any(map(is_on_host, jax.tree.leaves(tree)))


def onto_device(x: jax.Array) -> jax.Array:
    """An array on its devices, outside of a program; itself if it is there."""
    return jax.device_put(x, x.sharding.with_memory_kind(None)) if is_on_host(x) else x


def fetch(tree: Any) -> Any:
    """A tree of arrays with those in host memory copied to the device. Their gradients return to the host."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x, tree)


def fetch_rest(tree: Any) -> Any:
    """fetch of all arrays but the stacks. One copy of an array serves all its uses: gradients that were sent
    back by several would have to be added on the host."""
    return jax.tree_util.tree_map_with_path(lambda path, x: x if _is_stacked(path) else fetch(x), tree)


def to_host(x: jax.Array) -> jax.Array:
    """An array in host memory, inside a program."""
    return jax.device_put(x, jax.memory.Space.Host)


def store_like(old: jax.Array, new: jax.Array) -> jax.Array:
    """The new array in the memory of the old one, inside a program."""
    return to_host(new) if is_on_host(old) else new


def layer_of(stacks: Any, i: jax.Array) -> Any:
    """Layer i of a tree of arrays [L, ...], on the device. Scalars are as they are."""
    return jax.tree.map(
        lambda x: fetch(lax.dynamic_index_in_dim(x, i, keepdims=False)) if x.ndim else x, stacks)


def by_layer(function: Callable, tree: Any, *others: Any) -> Any:
    """function(tree, *others); if arrays are on the host, those of one layer are on the device at a time.

    Args:
      function: works on each array and the arrays of the others that belong to it, and on scalars; it is
        called once with the arrays that are not stacked, and once in a loop with those of one layer.
    Returns:
      A tree like the first, each array in the memory that it was in, and a stack in the place of the old one.
    """
    if not any_on_host((tree, others)):
        return function(tree, *others)
    rest, stacks = _split(tree)
    rest_of_others, other_stacks = zip(*map(_split, others)) if others else ((), ())
    rest = jax.tree.map(store_like, rest, function(fetch(rest), *fetch(rest_of_others)))
    sizes = {x.shape[0] for x in jax.tree.leaves(stacks) if x.ndim}

    def body(i, stacks):
        def store(stack, x):
            return lax.dynamic_update_index_in_dim(stack, store_like(stack, x), i, 0) if stack.ndim else stack

        return jax.tree.map(store, stacks, function(layer_of(stacks, i), *layer_of(other_stacks, i)))

    if sizes:
        stacks = lax.fori_loop(0, sizes.pop(), body, stacks)
    return jax.tree.map(lambda a, b: b if a is None else a, rest, stacks, is_leaf=lambda x: x is None)


def sum_by_layer(function: Callable, tree: Any) -> jax.Array:
    """function(tree), a float32 sum over all elements, added up as by_layer works."""
    if not any_on_host(tree):
        return function(tree)
    rest, stacks = _split(tree)
    sizes = {x.shape[0] for x in jax.tree.leaves(stacks)}
    total = jnp.asarray(function(fetch(rest)), jnp.float32)
    if not sizes:
        return total
    return lax.fori_loop(0, sizes.pop(), lambda i, total: total + function(layer_of(stacks, i)), total)


def _split(tree):
    """(rest, stacks): the tree twice, with None for the arrays of the other; scalars are in both."""
    def keep(stacked):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: x if not x.ndim or _is_stacked(path) == stacked else None, tree)

    return keep(False), keep(True)


def _is_stacked(path):
    return any(getattr(key, 'name', None) in STACKED for key in path)
