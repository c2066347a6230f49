"""The parameters of a config and the tensors of a checkpoint: names, shapes, and corresponding rectangles.

Every format stores a Linear as [out, in], one tensor per layer; parameters are [in..., out...], stacked on L.
Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import itertools
import math

import jax
import numpy as np

from lct.models import llama
from lct.models.llama import LlamaConfig
from lct.weights.tensors import ALL


def parameter_table(config: LlamaConfig) -> dict[str, llama.ParamInfo]:
    """{parameter name, such as 'embed' or 'layers.wq': its ParamInfo}, in the order of llama.param_table."""
    leaves = jax.tree_util.tree_leaves_with_path(llama.param_table(config), is_leaf=llama.is_param_info)
    return {'.'.join(key.name for key in path): info for path, info in leaves}


def checkpoint_letters(letters: str) -> tuple[str, str]:
    """Letters of a parameter without L -> letters of the tensor's (output dims, input dims):
    'DNH' -> ('NH', 'D').

    D is one side of every matrix. The embedding is a lookup, with the same layout in both. A vector (the
    weight of a norm, or a bias) has no input.
    """
    if letters == 'VD':
        return 'V', 'D'
    if letters == 'D' or 'D' not in letters:
        return letters, ''
    return (letters[1:], 'D') if letters[0] == 'D' else ('D', letters[:-1])


def is_transposed(letters: str) -> bool:
    """Whether the tensor of a parameter has its dims in another order; letters without L."""
    return ''.join(checkpoint_letters(letters)) != letters


def checkpoint_shape(config: LlamaConfig, letters: str) -> tuple[int, ...]:
    """Shape of the tensor that holds one layer of a parameter with these letters."""
    size = llama.dims(config)
    outputs, inputs = checkpoint_letters(letters.replace('L', ''))
    return tuple(math.prod(size[x] for x in side) for side in (outputs, inputs) if side)


def from_checkpoint(tensor: np.ndarray, config: LlamaConfig, letters: str) -> np.ndarray:
    """A view of a tensor [out, in] with the dims of a parameter: [N * H, D] -> [D, N, H]. No L in letters."""
    size = llama.dims(config)
    outputs, inputs = checkpoint_letters(letters)
    stored = outputs + inputs
    return tensor.reshape([size[x] for x in stored]).transpose([stored.index(x) for x in letters])


def tensor_names(config: LlamaConfig, names: dict[str, str]) -> dict[str, tuple[str, int | None]]:
    """{tensor name: (parameter name, layer or None)} of a config, in the order of a file.

    names: {parameter name: tensor name}, with {} for the layer.
    """
    entries = parameter_table(config)
    result = {
        names[name]: (name, None) for name, entry in entries.items() if not entry.letters.startswith('L')}
    for layer, (name, entry) in itertools.product(range(config.num_layers), entries.items()):
        if entry.letters.startswith('L'):
            result[names[name].format(layer)] = (name, layer)
    return result


def checkpoint_shapes(config: LlamaConfig, names: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of a config; names as in tensor_names."""
    entries = parameter_table(config)
    return {
        tensor: checkpoint_shape(config, entries[name].letters)
        for tensor, (name, _) in tensor_names(config, names).items()
    }


def rectangle(config: LlamaConfig, letters: str, index: tuple[slice, ...]) -> tuple[slice, slice]:
    """(rows, cols) of the tensor that hold an index into a parameter; letters and index without L."""
    size = llama.dims(config)
    sides = []
    for side in checkpoint_letters(letters):
        selected = index[letters.index(side[0])] if side else ALL
        width = math.prod(size[x] for x in side[1:])  # the dims of one head are never sharded
        start, stop, _ = selected.indices(size[side[0]] if side else 1)
        sides.append(slice(start * width, stop * width))
    return tuple(sides)
