"""Checkpoints of 8-bit weights with scales, which are read in the precision of a normal checkpoint, and those
of other quantizations, which are refused with the tool that dequantizes them.

A weight is its 8-bit number times a scale, which is the one of the tensor, of its row (output channel), or of
a block of rows and columns (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3).
"""

from typing import Any, NamedTuple

import numpy as np

from lct.json_files import short_repr
from lct.weights.tensors import ALL, EIGHT_BITS, FLOATS, Tensor

SCALES = ('weight_scale_inv', 'weight_scale', 'SCB')  # each multiplies; SCB is the largest of a row: / 127
# Of the activations and the cache: a model in 16 bits quantizes neither.
UNUSED = ('input_scale', 'input_scale_ub', 'output_scale', 'k_scale', 'v_scale', 'q_scale', 'weight_format')
READ = ('fp8', 'fbgemm_fp8')
REMEDIES = {  # quant_method -> what writes a checkpoint in 16 bits
    'gptq': 'gptqmodel.utils.model_dequant.dequantize_model of GPTQModel',
    'awq': 'gptqmodel.utils.model_dequant.dequantize_model of GPTQModel',
    'bitsandbytes': 'model.dequantize() and save_pretrained of transformers',
    'compressed-tensors': 'CompressedTensorsConfig(run_compressed=False) and save_pretrained of transformers',
    'mxfp4': 'Mxfp4Config(dequantize=True) and save_pretrained of transformers',
    'mlx': 'mlx_lm.convert --dequantize',
}


def check_config(values: dict[str, Any], path: str) -> None:
    """Refuse the quantization of a config.json unless its weights are read.

    Raises:
      ValueError: naming the method, and the tool that dequantizes it.
    """
    settings = values.get('quantization_config') or values.get('quantization')
    if not settings:
        return
    if not isinstance(settings, dict):
        raise ValueError(f'{path}: quantization_config is {short_repr(settings)}; it must be a JSON object')
    method = settings.get('quant_method') or ('mlx' if 'group_size' in settings else None)
    if method in READ or _is_8_bit(method, settings):
        return
    remedy = 'take the checkpoint in 16 bits'
    if isinstance(method, str) and method in REMEDIES:
        remedy = f'dequantize it first, with {REMEDIES[method]}'
    raise ValueError(f'{path}: quantization_config has quant_method {short_repr(method)}, whose weights are '
                     f'not read; {remedy}')


def _is_8_bit(method, settings):
    """Whether a method that has several kinds of weights is used with whole 8-bit numbers and scales."""
    if method == 'bitsandbytes':
        return settings.get('load_in_8bit') is True and not settings.get('load_in_4bit')
    if method != 'compressed-tensors':
        return False
    groups = settings.get('config_groups')
    groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get('weights') for group in groups if isinstance(group, dict)]
    whole = settings.get('format') in ('float-quantized', 'int-quantized', 'naive-quantized')
    return whole and bool(weights) and all(
        isinstance(one, dict) and one.get('num_bits') == 8 and one.get('symmetric', True) for one in weights)


class Scaled(NamedTuple):
    """A Tensor of 8 bits with its scales [rows, cols] of blocks, read as float32; dtype is the one of the
    other weights of the checkpoint."""

    tensor: Tensor
    scales: np.ndarray
    block: tuple[int, int]
    dtype: str

    @property
    def path(self) -> str:
        return self.tensor.path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    def read(self, rows: slice = ALL, cols: slice = ALL) -> np.ndarray:
        """A rectangle, dequantized."""
        at = [np.arange(*part.indices(n)) // size
              for part, n, size in zip((rows, cols), self.shape, self.block)]
        return self.tensor.read(rows, cols).astype(np.float32) * self.scales[np.ix_(*at)]


def dequantize(tensors: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """{name: Tensor, or Scaled for one of 8 bits}, without the tensors of scales.

    settings: the quantization_config of the config.json.
    Raises:
      ValueError: for a weight of 8 bits without scales, or with scales that do not fit.
    """
    narrow = [name for name, tensor in tensors.items()
              if tensor.dtype in EIGHT_BITS and name.endswith('.weight')]
    if not narrow:
        return tensors
    result, used = dict(tensors), set()
    for name in narrow:
        tensor, stem = tensors[name], name.removesuffix('weight')
        found = [stem + suffix for suffix in SCALES if stem + suffix in tensors]
        if len(found) != 1 or tensors[found[0]].dtype not in FLOATS:
            raise ValueError(f'{tensor.path}: tensor {name!r} is {tensor.dtype} and needs one tensor of '
                             f'scales, {" or ".join(SCALES)}; it has {", ".join(found) or "none"}')
        result[name] = _scaled(name, tensor, found[0], tensors[found[0]], _block_size(settings))
        used.add(found[0])
    result = {name: tensor for name, tensor in result.items()
              if name not in used and name.rpartition('.')[2] not in UNUSED}
    dtypes = {tensor.dtype for name, tensor in result.items() if name not in narrow}
    dtype = dtypes.pop() if len(dtypes) == 1 else 'F32'
    return result | {name: result[name]._replace(dtype=dtype) for name in narrow}


def _block_size(settings):
    """(rows, cols) that share a scale in a checkpoint with blocks, or None."""
    sizes = [settings.get('weight_block_size')]
    if settings.get('quant_method') == 'compressed-tensors':
        for group in settings['config_groups'].values():
            size = group['weights'].get('group_size')
            sizes += [group['weights'].get('block_structure'), [1, size] if size else None]
    return next((size for size in sizes if isinstance(size, list) and len(size) == 2 and all(
        type(n) is int and n > 0 for n in size)), None)


def _scaled(name, tensor, scale_name, stored, block):
    """The Scaled of a tensor [out, in] and its scales: [], [1], [out], [out, 1] or one for each block."""
    scales = np.asarray(stored.read(), np.float32) / (127 if scale_name.endswith('SCB') else 1)
    rows, cols = tensor.shape
    if scales.size == 1:
        return Scaled(tensor, scales.reshape(1, 1), (rows, cols), '')
    if scales.shape in ((rows,), (rows, 1)):
        return Scaled(tensor, scales.reshape(rows, 1), (1, cols), '')
    if block is None or scales.shape != tuple(-(-n // size) for n, size in zip((rows, cols), block)):
        raise ValueError(
            f'{stored.path}: tensor {scale_name!r} has shape {list(stored.shape)}, which does not fit '
            f'{name!r} of shape {[rows, cols]} in blocks of {block}; copy it again')
    return Scaled(tensor, scales, tuple(block), '')
