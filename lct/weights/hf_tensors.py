"""The tensors of a Hugging Face folder under the names of a causal language model: 'model.' before those of
the decoder, 8-bit weights with their scales, and an adapter's product added to the weights it adapts."""

import os
from typing import Any, NamedTuple

import numpy as np

from lct import json_files
from lct.weights import peft_adapter, quantized, safetensors_files
from lct.weights.peft_adapter import EMBED, HEAD
from lct.weights.tensors import ALL

ADAPTER_FILES = ('adapter_config.json', 'adapter_model.safetensors', 'adapters.safetensors')


def read(folder: str | os.PathLike, adapter: str | os.PathLike | None = None,
         vocab_size: int | None = None) -> dict[str, Any]:
    """{name: Tensor, or an object that is read like one} of the model in a folder.

    Args:
      adapter: the folder of a PEFT adapter, which is merged.
      vocab_size: rows of the embedding and of the head; those that are added are the mean of the others.
    Raises:
      ValueError: if the folder holds an adapter that would be ignored, and as the readers of its files do.
    """
    refuse_adapter(folder)
    config = json_files.read_json(os.path.join(folder, 'config.json'))
    tensors = rename(safetensors_files.read_folder(folder))
    tensors = quantized.dequantize(tensors, config.get('quantization_config') or {})
    if vocab_size is not None:
        tensors = {name: resize(name, tensor, vocab_size) if name in (EMBED, HEAD) else tensor
                   for name, tensor in tensors.items()}
    return tensors if adapter is None else peft_adapter.merge(tensors, adapter)


def refuse_adapter(folder: str | os.PathLike) -> None:
    """Raise ValueError for the folder of an adapter, or for one beside a model, which would be ignored."""
    found = [name for name in ADAPTER_FILES if os.path.exists(os.path.join(folder, name))]
    if found and not os.path.exists(os.path.join(folder, 'config.json')):
        raise ValueError(f'{folder} holds an adapter ({found[0]}) and not a model; merge it into its base: '
                         'convert_weights.py BASE TARGET --adapter FOLDER')
    if found:
        raise ValueError(f'{folder} holds {found[0]} beside a model, and the adapter would be ignored; move '
                         'it into a folder of its own and merge it with convert_weights.py --adapter')


def rename(tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors with 'model.' before the names of the decoder, where all of them have another prefix: none
    in the folder of a LlamaModel, '_orig_mod.model.' of a compiled one, 'module.model.' of a wrapped one."""
    end = EMBED.removeprefix('model.')
    prefixes = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    if len(prefixes) != 1 or prefixes[0] == 'model.':
        return tensors
    prefix = prefixes[0]
    head = prefix.removesuffix('model.') + HEAD
    renamed = {name: 'model.' + name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    renamed[head] = HEAD
    return {renamed.get(name, name): tensor for name, tensor in tensors.items()}


class Resized(NamedTuple):
    """An embedding or a head [V, D] with rows added below, read like a Tensor. A new row is the mean of all
    stored ones (Hewitt 2021, 'Initializing new word embeddings for pretrained language models'): it takes
    little probability from other tokens."""

    tensor: Any
    num_rows: int

    @property
    def path(self) -> str:
        return self.tensor.path

    @property
    def dtype(self) -> str:
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.num_rows, *self.tensor.shape[1:]

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle, float32 where it has new rows."""
        start, stop, _ = rows.indices(self.num_rows)
        stored = self.tensor.shape[0]
        values = self.tensor.read(slice(min(start, stored), min(stop, stored)), cols)
        added = max(0, stop - max(start, stored))
        if not added:
            return values
        mean = mean_of_rows(self.tensor, cols)
        return np.concatenate([values.astype(np.float32), np.broadcast_to(mean, (added, mean.size))])


def resize(name: str, tensor: Any, num_rows: int) -> Resized:
    """A Resized, which may not lose rows. Raises ValueError."""
    if num_rows < tensor.shape[0]:
        raise ValueError(f'{tensor.path}: tensor {name!r} has {tensor.shape[0]} rows, more than the '
                         f'{num_rows} to resize it to; rows are only added')
    return Resized(tensor, num_rows)


def mean_of_rows(tensor: Any, cols: slice = ALL, step: int = 4096) -> np.ndarray:
    """The mean [D], float32, of the rows of a tensor [V, D]."""
    count = tensor.shape[0]
    sums = (tensor.read(slice(i, min(i + step, count)), cols).astype(np.float64).sum(0)
            for i in range(0, count, step))
    return (sum(sums) / count).astype(np.float32)
