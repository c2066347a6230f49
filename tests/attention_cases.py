"""Random attention inputs, errors and counts of transfers, shared by the tests."""

import jax.numpy as jnp
import numpy as np


def inputs(rng, batch, length, num_heads, num_kv_heads, head_dim, packed, dtype=jnp.float32):
    """q, k, v, positions, segment_ids and a cotangent; packed rows hold documents of uneven length."""
    shape = lambda n: (batch, length, n, head_dim)
    q, k, v, cotangent = (
        jnp.asarray(rng.normal(size=shape(n)), dtype)
        for n in (num_heads, num_kv_heads, num_kv_heads, num_heads)
    )
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    segments = np.ones((batch, length), np.int32)
    if packed:
        for b in range(batch):
            cuts = np.sort(rng.choice(np.arange(1, length), size=3, replace=False))
            segments[b] = 1 + np.searchsorted(cuts, np.arange(length), side='right')
            starts = np.concatenate([[0], cuts])
            positions[b] -= starts[segments[b] - 1].astype(np.int32)
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments), cotangent


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| in the Euclidean norm, in float64."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def permutes(jaxpr, times):
    """(operand, how often it runs) of every ppermute below a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'ppermute':
            yield from ((x.aval, times) for x in equation.invars)
        inner = times * equation.params.get('length', 1) if equation.primitive.name == 'scan' else times
        for value in equation.params.values():
            for sub in value if isinstance(value, (tuple, list)) else [value]:
                sub = getattr(sub, 'jaxpr', sub)
                if hasattr(sub, 'eqns'):
                    yield from permutes(sub, inner)
