"""The batches of a stage, placed on its mesh."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.train.stages import Stage


def held_rows(stage: Stage) -> list[tuple[np.ndarray, slice]]:
    """[(rows [A, b], slice of columns)] of the host batch [A * B, T] on this process's devices."""
    placed, shape, rows = _batch_sharding(stage)
    return [(rows[index[:2]], index[2]) for index in placed.addressable_devices_indices_map(shape).values()]


def place_batch(batch: Mapping[str, np.ndarray], stage: Stage) -> dict[str, jax.Array]:
    """The host batch {name: [A * B, T]} on the mesh as [A, B, T]; reads only the rows of this process."""
    placed, shape, rows = _batch_sharding(stage)
    return {
        name: jax.make_array_from_callback(
            shape, placed, lambda index, x=x: x[rows[index[:2]], index[2]], dtype=x.dtype)
        for name, x in batch.items()
    }


def _batch_sharding(stage):
    """-> (sharding of a batch [A, B, T], its shape, its row numbers [A, B] in a host batch [A * B, T])."""
    shape = (stage.accumulation, stage.batch_size, stage.seq_len)
    placed = NamedSharding(jax.sharding.get_mesh(), P(None, *sharding.spec('BT')))
    return placed, shape, np.arange(shape[0] * shape[1]).reshape(shape[:2])
