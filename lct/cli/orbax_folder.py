"""Folders of weights that Orbax restores onto any mesh: config.json, params/ and the files beside them."""

import os
from pathlib import Path
from typing import Any

import jax

from lct import json_files
from lct.models import llama
from lct.models.llama import LlamaConfig, Params
from lct.out_of_memory import is_out_of_memory
from lct.train import checkpoint, fingerprints
from lct.weights import companions, folders, llama_hf, streaming

ARRAYS = 'params'  # the folder of arrays beside the config.json
FINGERPRINTS = 'fingerprints.json'  # of those arrays, because Orbax restores a flipped bit without an error


def load(folder: str | os.PathLike, dtype: Any = None) -> tuple[LlamaConfig, Params]:
    """(LlamaConfig, Params) of a folder written by save; each device reads its own shard.

    Raises:
      ValueError: naming the array, if one is not what was written.
    """
    config = llama_hf.read_config(folder)
    streaming.check_mesh(config)
    path, saved = Path(folder).absolute() / ARRAYS, Path(folder) / FINGERPRINTS
    arrays = {}
    try:
        if saved.exists():
            arrays = fingerprints.unseal(json_files.read_json(saved))
        stored = arrays or checkpoint.describe_arrays(path)
        targets = llama.abstract(config, stored['embed']['dtype'])
        if jax.sharding.get_mesh().empty:  # explicit, or the arrays get the sharding of the save
            one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            targets = jax.tree.map(lambda x: x.update(sharding=one_device), targets)
        params = checkpoint.restore_arrays(path, targets)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f'{folder} cannot be restored ({checkpoint.first_line(error)}); write it again from '
                         'its source') from error
    if arrays:
        fingerprints.check(params, arrays, folder)
    else:
        print(f'{folder} has no {FINGERPRINTS}; its bits cannot be checked')
    return config, jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)


def save(folder: str | os.PathLike, config: LlamaConfig, params: Params, *, dtype: str,
         tokenizer_from: str | os.PathLike | None = None, overwrite: bool = False) -> None:
    """Write a folder atomically: config.json with the token ids, params/, their fingerprints, and the files
    beside the weights of tokenizer_from."""
    streaming.check_params(config, params)
    values = llama_hf.config_to_json(config, dtype) | companions.token_ids(tokenizer_from)
    nbytes = llama.num_params(config) * jax.numpy.dtype(dtype).itemsize
    folders.check_writable(folder, nbytes, overwrite)
    with folders.atomic_folder(folder, overwrite) as temporary:
        arrays = jax.tree.map(lambda x: x.astype(dtype), params)
        checkpoint.save_arrays(Path(temporary) / ARRAYS, arrays)
        record = fingerprints.seal(fingerprints.describe_bits(arrays))
        json_files.write_json(os.path.join(temporary, FINGERPRINTS), record)
        json_files.write_json(os.path.join(temporary, 'config.json'), values)
        companions.copy(tokenizer_from, temporary, config.max_position_embeddings)
