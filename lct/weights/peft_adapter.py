"""LoRA adapters of the library PEFT, merged into the weights that they adapt (Hu et al. 2021, arXiv
2106.09685): W + alpha / r * B @ A. What PEFT would compute otherwise is refused."""

import math
import os
import re
from typing import Any, NamedTuple

import numpy as np

from lct import json_files
from lct.json_files import short_repr
from lct.weights import safetensors_files
from lct.weights.tensors import ALL, FLOATS

EMBED, HEAD = 'model.embed_tokens.weight', 'lm_head.weight'
CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
OTHERS = {'adapters.safetensors': 'merge this adapter of mlx-lm with mlx_lm.fuse',
          'adapter_model.bin': 'load it with PEFT and save it again with save_pretrained'}
NAME = re.compile(r'(.+)\.lora_(embedding_)?([AB])(?:\.weight)?')
FIXED = {  # the values of each field with which a merge is W + scale * B @ A
    'peft_type': ('LORA',), 'use_dora': (False,), 'fan_in_fan_out': (False,), 'bias': ('none',),
    'lora_bias': (False,), 'layer_replication': (), 'megatron_config': (), 'trainable_token_indices': (),
    'use_qalora': (False,), 'target_parameters': (), 'alora_invocation_tokens': (), 'arrow_config': (),
    'use_bdlora': (False,), 'velora_config': (), 'monteclora_config': (), 'kasa_config': (),
    'task_type': ('CAUSAL_LM',),
}
# Initial values that leave the base as it is; with others, such as PiSSA, the trained base was another.
INITIAL = (True, False, 'gaussian', 'eva', 'orthogonal')
USED = {'r', 'lora_alpha', 'use_rslora', 'rank_pattern', 'alpha_pattern', 'init_lora_weights'}
HARMLESS = {  # of the training, or told by the tensors themselves
    'auto_mapping', 'base_model_name_or_path', 'corda_config', 'ensure_weight_tying', 'eva_config',
    'exclude_modules', 'inference_mode', 'layers_pattern', 'layers_to_transform', 'loftq_config',
    'lora_dropout', 'megatron_core', 'modules_to_save', 'peft_version', 'qalora_group_size', 'revision',
    'runtime_config', 'target_modules', 'lora_ga_config',
}


class Merged(NamedTuple):
    """A Tensor [out, in] plus scale * b @ a, read as float32.

    dtype: of the model. a: [r, in] and b: [out, r], float32, or None for a tensor that was trained in full.
    """

    tensor: Any
    dtype: str
    a: np.ndarray | None = None
    b: np.ndarray | None = None
    scale: float = 0.0

    @property
    def path(self) -> str:
        return self.tensor.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle of the sum."""
        values = self.tensor.read(rows, cols).astype(np.float32)
        if self.a is None:
            return values
        return values + np.float32(self.scale) * (self.b[rows] @ self.a[:, cols])


def merge(tensors: dict[str, Any], folder: str | os.PathLike) -> dict[str, Any]:
    """The tensors {name: Tensor} of a model with the adapter in a folder merged.

    Raises:
      ValueError: for an adapter of another kind, or of another model.
    """
    path = os.path.join(folder, WEIGHTS)
    for name, remedy in OTHERS.items():
        if not os.path.exists(path) and os.path.exists(os.path.join(folder, name)):
            raise ValueError(f'{folder} holds {name} instead of {WEIGHTS}; {remedy}')
    settings = read_config(folder)
    stored = safetensors_files.read_header(path)
    pairs, result = {}, dict(tensors)
    for name, tensor in stored.items():
        if tensor.dtype not in FLOATS:
            raise ValueError(f'{path}: tensor {short_repr(name)} has dtype {tensor.dtype}; weights must be '
                             f'{", ".join(FLOATS)}')
        match = NAME.fullmatch(name)
        if match is not None:
            pairs.setdefault((match[1], bool(match[2])), {})[match[3]] = tensor
            continue
        # Stored in full: one of modules_to_save, or the embedding below an adapter.
        target = _target(name.removesuffix('.weight').removesuffix('.base_layer'), tensors, path)
        _check_shape(path, name, tensor.shape, tensors[target].shape)
        result[target] = Merged(tensor, tensors[target].dtype)
    if not stored:
        raise ValueError(f'{path} holds no tensors; copy the adapter again')
    for (module, is_embedding), pair in pairs.items():
        target = _target(module, tensors, path)
        if set(pair) != {'A', 'B'}:
            raise ValueError(f'{path} has one of lora_A and lora_B of {module!r} alone; copy it again')
        a, b = (np.asarray(pair[key].read(), np.float32) for key in 'AB')
        if is_embedding:  # a [r, V] and b [D, r], of a weight [V, D]
            a, b = b.T, a.T
        _check_shape(path, module, (b.shape[0], a.shape[1]), tensors[target].shape)
        if a.shape[0] != b.shape[1]:
            raise ValueError(f'{path}: lora_A and lora_B of {module!r} have the ranks {a.shape[0]} and '
                             f'{b.shape[1]}; they must be equal')
        scale = _scale(settings, module, a.shape[0], path)
        result[target] = Merged(result[target], tensors[target].dtype, a, b, scale)
    return result


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
    """The fields of an adapter_config.json.

    Raises:
      ValueError: naming a field with which the merged weights would be others.
    """
    path = os.path.join(folder, CONFIG)
    values = {key: value for key, value in json_files.read_json(path).items() if value not in (None, {}, [])}
    for field, allowed in FIXED.items():
        if field in values and values[field] not in allowed:
            raise ValueError(f'{path}: {field} is {short_repr(values[field])}, with which the adapter is not '
                             'W + alpha / r * B @ A; merge it with merge_and_unload of PEFT')
    if (initial := values.get('init_lora_weights', True)) not in INITIAL:
        raise ValueError(f'{path}: init_lora_weights is {short_repr(initial)}, which alters the base model; '
                         'merge it with merge_and_unload of PEFT')
    for field in values:
        if field not in FIXED.keys() | USED | HARMLESS:
            raise ValueError(f'{path}: field {short_repr(field)} is not known and might change the result; '
                             'remove it if it does not')
    for field in ('rank_pattern', 'alpha_pattern'):
        pattern = values.get(field, {})
        if not isinstance(pattern, dict) or not all(
                type(x) in (int, float) and x > 0 for x in pattern.values()):
            raise ValueError(
                f'{path}: {field} is {short_repr(pattern)}; it must be an object of numbers above 0')
    for field in ('r', 'lora_alpha'):
        if type(values.get(field)) not in (int, float) or not 0 < values[field] < 1e9:
            raise ValueError(
                f'{path}: {field} is {short_repr(values.get(field))}; it must be a number above 0')
    return values


def _scale(settings, module, rank, path):
    """alpha / r of one module, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023, arXiv 2312.03732)."""
    module = module.removeprefix(PREFIX)
    r = _of_pattern(settings.get('rank_pattern'), module, settings['r'])
    alpha = _of_pattern(settings.get('alpha_pattern'), module, settings['lora_alpha'])
    if r != rank:
        raise ValueError(f'{path}: lora_A of {module!r} has rank {rank} but {CONFIG} says {r}; it is the '
                         'config of another adapter')
    return alpha / math.sqrt(r) if settings.get('use_rslora') else alpha / r


def _of_pattern(pattern, module, default):
    """The value of the first key, a regular expression for the end of a module's name, that matches."""
    for key, value in (pattern or {}).items():
        try:
            if re.match(rf'(.*\.)?({key})$', module):
                return value
        except re.error:
            raise ValueError(f'{CONFIG} has the pattern {short_repr(key)}, which is not a regular '
                             'expression; correct it') from None
    return default


def _target(module, tensors, path):
    """The name of the weight that a module of the adapter belongs to."""
    name = module.removeprefix(PREFIX) + '.weight'
    if not module.startswith(PREFIX) or name not in tensors or len(tensors[name].shape) > 2:
        raise ValueError(f'{path} adapts {short_repr(module)}, which this model does not have; give the base '
                         'model that the adapter was trained on')
    if name == EMBED and HEAD not in tensors:
        raise ValueError(f'{path} adapts the embedding, which is the head of this model too; merge it with '
                         'merge_and_unload of PEFT')
    return name


def _check_shape(path, module, found, wanted):
    if tuple(found) != tuple(wanted):
        raise ValueError(f'{path}: {module!r} has the shape {list(found)} but the model {list(wanted)}; give '
                         'the base model that the adapter was trained on')
