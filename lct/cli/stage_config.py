"""Stages of a config, every field by name, and the fields that published recipes share.

Meaning of the fields: lct.train.stages.Stage and models.llama.Memory.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict


def stage(
    *, name: str, seq_len: int, num_steps: int, learning_rate: float, theta: str | float, mesh: Sequence[int],
    memory: Mapping[str, Any], **optional: Any,
) -> ConfigDict:
    """An entry of config.stages. Fields of Stage and Memory that are left out have their defaults there."""
    return ConfigDict({
        'name': name, 'seq_len': seq_len, 'num_steps': num_steps, 'learning_rate': learning_rate,
        'theta': theta, 'mesh': tuple(mesh), 'memory': dict(memory), **optional,
    })


def published_stage(
    *, name: str, seq_len: int, num_steps: int, theta: str | float, mesh: Sequence[int], remat: str,
    ffn_chunks: int, published: Mapping[str, Any], **optional: Any,
) -> ConfigDict:
    """A stage of a published recipe: text only, constant learning rate, zigzag layout, bfloat16 computation.

    published: what the source prints about the stage; not an input of the run.
    """
    memory = {'remat': remat, 'query_chunk': 512, 'key_chunk': 512, 'ffn_chunks': ffn_chunks,
              'loss_chunk': 512, 'dtype': 'bfloat16'}
    common = {'batch_size': 1, 'accumulation': 1, 'warmup_steps': 0, 'final_fraction': 1.0,
              'layout': 'zigzag', 'mixture': {'text': 1.0}}
    return stage(name=name, seq_len=seq_len, num_steps=num_steps, theta=theta, mesh=mesh, memory=memory,
                 published=dict(published), **{**common, **optional})


def published_config(
    *, name: str, base: str, license: str, native: int, rope_theta: float, checkpoint_every: int,
) -> ConfigDict:
    """The fields that published recipes share; base: its model in the table of plan.py; native and
    rope_theta: of that model."""
    return ConfigDict({
        'name': name,
        'model_folder': '',  # the user's folder of the base model
        'base': {'model': base, 'max_position_embeddings': native, 'rope_theta': rope_theta},
        'license': license,
        'seed': 0,
        'corpus': '',  # the user's long documents: a folder, glob, JSONL or text file
        'held_out': 0.01,
        'optimizer': {'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1},
        'checkpoint_every': checkpoint_every,
        # each window is one document, so some must be as long as this
        'loss': {'seq_len': 2**17, 'windows': 16, 'rotations': 4},
    })
