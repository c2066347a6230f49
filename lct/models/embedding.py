"""Lookup of tokens in the embedding, which is sharded over the mesh.

Letters: B batch, T sequence, D embed_dim, V vocab.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lct import sharding


@jax.named_scope('embedding')
def embed_tokens(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    """tokens int32 [B, T] -> [B, T, D] in the dtype of embed [V, D].

    The gradient is summed in float32: a bfloat16 sum stops growing at 256 times its terms, and tokens occur
    more often than that.
    """
    return lookup(embed.astype(jnp.float32), tokens).astype(embed.dtype)


def lookup(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of a table [V, D] by tokens int32 [B, T] -> [B, T, D]."""
    if sharding.current_mesh() is None:
        return table[tokens]
    # An explicit gather, or XLA falls back to 'involuntary full rematerialization'. The table is small next
    # to the activations that it fills.
    return jax.reshard(table, P(None, None)).at[tokens].get(out_sharding=sharding.spec('BTD'))


@jax.named_scope('embedding')
def embed_row_tokens(embed: jax.Array, tokens: jax.Array) -> jax.Array:
    """tokens int32 [B], one of each row, or a chunk [B, T] -> [B, D] or [B, T, D] in the dtype of embed
    [V, D]; for decoding and short chunks alone."""
    if sharding.current_mesh() is None:
        return embed[tokens]
    # The table stays split over the ring by D; the rows are gathered.
    split = 'sequence' if 'sequence' in jax.tree.leaves(tuple(jax.typeof(embed).sharding.spec)) else None
    leading = (sharding.BATCH_AXES, None)[:tokens.ndim]
    table, tokens = jax.reshard(embed, P(None, split)), jax.reshard(tokens, P(*leading))
    rows = table.at[tokens].get(out_sharding=P(*leading, split))
    return jax.reshard(rows, sharding.spec('BTD' if tokens.ndim == 2 else 'BD'))
