"""A second way to read every format, for the check of a conversion: written apart from the loaders, so that a
fault of theirs shows.

Each reader returns {tensor name of a Hugging Face folder: function that reads it, in the file's own dtype},
with matrices [out, in] and rotated rows in the half-split order. Plain and slow: a complete tensor at a time,
with the libraries of the formats.
"""

import functools
import glob
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

Tensors = dict[str, Callable[[], np.ndarray]]

HF_DTYPES = {
    'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F8_E4M3': ml_dtypes.float8_e4m3fn,
    'F8_E5M2': ml_dtypes.float8_e5m2, 'I8': np.int8,
}
META_TO_HF = {
    'tok_embeddings': 'model.embed_tokens', 'norm': 'model.norm', 'output': 'lm_head',
    'attention_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
    'attention.wq': 'self_attn.q_proj', 'attention.wk': 'self_attn.k_proj',
    'attention.wv': 'self_attn.v_proj', 'attention.wo': 'self_attn.o_proj',
    'feed_forward.w1': 'mlp.gate_proj', 'feed_forward.w2': 'mlp.down_proj',
    'feed_forward.w3': 'mlp.up_proj',
}
GGUF_TO_HF = {
    'token_embd': 'model.embed_tokens', 'output_norm': 'model.norm', 'output': 'lm_head',
    'attn_norm': 'input_layernorm', 'ffn_norm': 'post_attention_layernorm',
    'attn_q': 'self_attn.q_proj', 'attn_k': 'self_attn.k_proj', 'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj', 'ffn_gate': 'mlp.gate_proj', 'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj', 'attn_q_norm': 'self_attn.q_norm', 'attn_k_norm': 'self_attn.k_norm',
    'attn_qkv': 'self_attn.qkv_proj',
}
ORBAX_TO_HF = {
    'embed': 'model.embed_tokens', 'final_norm': 'model.norm', 'lm_head': 'lm_head',
    'layers.attn_norm': 'input_layernorm', 'layers.mlp_norm': 'post_attention_layernorm',
    'layers.wq': 'self_attn.q_proj', 'layers.wk': 'self_attn.k_proj', 'layers.wv': 'self_attn.v_proj',
    'layers.wo': 'self_attn.o_proj', 'layers.w_gate': 'mlp.gate_proj', 'layers.w_up': 'mlp.up_proj',
    'layers.w_down': 'mlp.down_proj', 'layers.q_norm': 'self_attn.q_norm',
    'layers.k_norm': 'self_attn.k_norm', 'layers.q_bias': 'self_attn.q_proj',
    'layers.k_bias': 'self_attn.k_proj', 'layers.v_bias': 'self_attn.v_proj',
    'layers.out_bias': 'self_attn.o_proj', 'layers.gate_bias': 'mlp.gate_proj',
    'layers.up_bias': 'mlp.up_proj', 'layers.down_bias': 'mlp.down_proj',
}
ROTATED = ('self_attn.q_proj.weight', 'self_attn.k_proj.weight')
INTERLEAVED = ('llama', 'smollm3')  # architectures of GGUF with rows in Meta's order


def hf(folder: str | os.PathLike, edit: Callable[[Tensors], Tensors] | None = None) -> Tensors:
    """The tensors of a Hugging Face folder. edit: of those that are stored, before fused ones are split."""
    tensors = {}
    for path in _safetensors(folder):
        tensors |= read_file(path)
    tensors = _with_scales(tensors, folder)
    embed = next(name for name in tensors if name.endswith('embed_tokens.weight'))
    prefix = embed.removesuffix('embed_tokens.weight')
    names = {name: _hf_name(name, prefix) for name in tensors if 'rotary_emb' not in name}
    tensors = {names[name]: tensors[name] for name in names}
    return _split(tensors if edit is None else edit(tensors), _num_rows(folder))


def _num_rows(folder):
    """(rows of q_proj, of k_proj) of a config.json."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        values = json.load(file)
    heads = values['num_attention_heads']
    head_dim = values.get('head_dim') or values['hidden_size'] // heads
    return heads * head_dim, (values.get('num_key_value_heads') or heads) * head_dim


def _split(tensors, num_rows):
    """The tensors with those that a Phi-3 stores as one apart. num_rows: of q_proj and of k_proj."""
    def rows(read, start, stop):
        def part():
            return read()[start:stop]
        part.rounded = getattr(read, 'rounded', False)
        return part

    result = {}
    for name, read in tensors.items():
        if '.qkv_proj.' in name:
            q, kv = num_rows
            for part, start, stop in (('q', 0, q), ('k', q, q + kv), ('v', q + kv, None)):
                result[name.replace('qkv', part)] = rows(read, start, stop)
        elif '.gate_up_proj.' in name:
            half = len(read()) // 2
            result[name.replace('gate_up', 'gate')] = rows(read, 0, half)
            result[name.replace('gate_up', 'up')] = rows(read, half, None)
        else:
            result[name] = read
    return result


def read_file(path: str | os.PathLike) -> Tensors:
    """The tensors of a safetensors file, under its own names."""
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
    header.pop('__metadata__', None)
    return {name: functools.partial(_read_safetensor, path, 8 + length, entry)
            for name, entry in header.items()}


def _with_scales(tensors, folder):
    """The tensors with weights of 8 bits multiplied by their scales."""
    with open(os.path.join(folder, 'config.json'), encoding='utf-8') as file:
        settings = json.load(file).get('quantization_config') or {}
    weights = [group['weights'] for group in settings.get('config_groups', {}).values()]
    size = settings.get('weight_block_size') or next(
        (one.get('block_structure') or [1, one['group_size']] for one in weights
         if one.get('block_structure') or one.get('group_size')), None)
    result = {name: read for name, read in tensors.items() if name.endswith(('.weight', '.bias'))}
    for name, read in result.items():
        for suffix in ('_scale', '_scale_inv'):
            if name + suffix in tensors:
                result[name] = functools.partial(_scale, read, tensors[name + suffix], size, 1)
        if (scales := name.removesuffix('weight') + 'SCB') in tensors:
            result[name] = functools.partial(_scale, read, tensors[scales], None, 127)
    return result


def _scale(read, read_scales, size, divisor):
    values, scales = read().astype(np.float32), read_scales().astype(np.float32) / np.float32(divisor)
    if size is not None and scales.size > 1:
        scales = np.repeat(np.repeat(scales, size[0], 0), size[1], 1)[:values.shape[0], :values.shape[1]]
    return values * (scales.reshape(-1, 1) if scales.size in (1, len(values)) else scales)


def _safetensors(folder):
    """The files of the model: those of the index, or the only one."""
    index = os.path.join(folder, 'model.safetensors.index.json')
    if not os.path.exists(index):
        return [os.path.join(folder, 'model.safetensors')]
    with open(index, encoding='utf-8') as file:
        return [os.path.join(folder, name) for name in sorted(set(json.load(file)['weight_map'].values()))]


def _hf_name(name, prefix):
    """A name in a file whose decoder has a prefix, as in one where it is 'model.'."""
    if name.endswith('lm_head.weight'):
        return 'lm_head.weight'
    return 'model.' + name.removeprefix(prefix)


def _read_safetensor(path, start, entry):
    begin, end = entry['data_offsets']
    with open(path, 'rb') as file:
        file.seek(start + begin)
        data = file.read(end - begin)
    return np.frombuffer(data, HF_DTYPES[entry['dtype']]).reshape(entry['shape'])


def meta(folder: str | os.PathLike) -> Tensors:
    """The tensors of a folder in Meta's format, with the shards of all ranks joined."""
    with open(os.path.join(folder, 'params.json'), encoding='utf-8') as file:
        params = json.load(file)
    head_dim = params['dim'] // params['n_heads']
    ranks = [_read_pth(path) for path in sorted(glob.glob(os.path.join(folder, 'consolidated.*.pth')))]
    tensors = {}
    for name in ranks[0]:
        if name == 'rope.freqs':
            continue
        hf_name = _layer_name(name, r'layers\.(\d+)\.', META_TO_HF)
        read = functools.partial(_join, [rank[name] for rank in ranks], name, params['dim'])
        tensors[hf_name] = _in_halves(read, head_dim) if hf_name.endswith(ROTATED) else read
    return tensors


def _join(shards, name, dim):
    """A tensor of the shards of all ranks: norms are replicated, wo and w2 split over their inputs."""
    arrays = [read() for read in shards]
    if arrays[0].ndim == 1:
        return arrays[0]
    over_inputs = name.endswith(('wo.weight', 'w2.weight'))
    if name.startswith('tok_embeddings'):  # over its rows in Llama-3, over its columns in Llama-2
        over_inputs = arrays[0].shape[1] != dim
    return np.concatenate(arrays, 1 if over_inputs else 0)


def _in_halves(read, head_dim):
    """Rows of wq or wk as Hugging Face permutes them: 2i and 2i + 1 of a head to i and i + H/2."""
    def permuted():
        rows = read()
        heads = rows.reshape(len(rows) // head_dim, head_dim // 2, 2, *rows.shape[1:])
        return np.swapaxes(heads, 1, 2).reshape(rows.shape)
    return permuted


class _Unpickler(pickle.Unpickler):
    """Of torch.save's data.pkl: the few globals that a table of tensors needs, everything else is refused."""

    def __init__(self, file, archive, root):
        super().__init__(file)
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ('collections', 'OrderedDict'): dict, ('torch', 'FloatStorage'): np.float32,
            ('torch', 'HalfStorage'): np.float16, ('torch', 'BFloat16Storage'): ml_dtypes.bfloat16,
            ('torch._utils', '_rebuild_tensor_v2'): _rebuild,
        }
        if (module, name) not in known:
            raise ValueError(f'a pickle calls {module}.{name}; only tensors are read')
        return known[module, name]

    def persistent_load(self, pid: tuple) -> Callable[[], np.ndarray]:
        _, dtype, key, _, _ = pid
        return lambda: np.frombuffer(self.archive.read(f'{self.root}/data/{key}'), dtype)


def _rebuild(storage, offset, size, stride, *_):
    def read():
        flat = storage()[offset:]
        steps = [step * flat.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(flat, size, steps, writeable=False)
    return read


def _read_pth(path):
    archive = zipfile.ZipFile(path)
    table = next(name for name in archive.namelist() if name.endswith('/data.pkl'))
    with archive.open(table) as file:
        return _Unpickler(file, archive, table.removesuffix('/data.pkl')).load()


def gguf(path: str | os.PathLike) -> Tensors:
    """The tensors of a GGUF file; quantized ones are dequantized to float32."""
    import gguf as library

    reader = library.GGUFReader(path)
    architecture = reader.fields['general.architecture'].contents()
    heads = reader.fields[f'{architecture}.attention.head_count'].contents()
    kv_heads = reader.fields.get(f'{architecture}.attention.head_count_kv')
    rows_per_head = {'q_proj': heads, 'k_proj': kv_heads.contents() if kv_heads else heads}
    tensors = {}
    for one in reader.tensors:
        if one.name.startswith('rope_'):
            continue
        name = _layer_name(one.name, r'blk\.(\d+)\.', GGUF_TO_HF)
        read = functools.partial(_read_gguf, library, one)
        kind = name.split('.')[-2]
        if architecture in INTERLEAVED and kind in rows_per_head:  # the others have rows in halves already
            rows = int(one.shape[-1])
            read = _in_halves(read, rows // rows_per_head[kind])
        tensors[name.replace('up_proj', 'gate_up_proj') if architecture == 'phi3' else name] = read
    value_dim = int(reader.fields[f'{architecture}.embedding_length'].contents()) // heads
    return _split(tensors, [rows_per_head[kind] * value_dim for kind in ('q_proj', 'k_proj')])


def _read_gguf(library, tensor):
    kind = tensor.tensor_type
    if kind in (library.GGMLQuantizationType.F32, library.GGMLQuantizationType.F16):
        return np.asarray(tensor.data)
    if kind == library.GGMLQuantizationType.BF16:
        return np.asarray(tensor.data).view(ml_dtypes.bfloat16)
    return library.quants.dequantize(tensor.data, kind)


def orbax(folder: str | os.PathLike) -> Tensors:
    """The tensors of an Orbax folder of params/, read with tensorstore: parameters are [in..., out...] and
    stacked over layers."""
    import tensorstore

    base = 'file://' + os.path.join(os.path.abspath(folder), 'params/')
    store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': base}).result()
    names = {key.decode().split('/')[0] for key in store.list().result()}
    tensors = {}
    for name in sorted(names):
        spec = {'driver': 'zarr', 'kvstore': {'driver': 'ocdbt', 'base': base, 'path': name + '/'}}
        array = tensorstore.open(spec, open=True, read=True).result()
        leaf = name.split('.')[-1]
        hf_name = ORBAX_TO_HF[name] + ('.bias' if leaf.endswith('_bias') else '.weight')
        if not name.startswith('layers.'):
            tensors[hf_name] = functools.partial(_read_parameter, array, leaf)
            continue
        for layer in range(array.shape[0]):
            tensors[f'model.layers.{layer}.{hf_name}'] = functools.partial(
                _read_parameter, array[layer], leaf)
    return tensors


def _read_parameter(array, leaf):
    """[in..., out...] -> [out, in]. The embedding and vectors are stored as they are."""
    values = np.asarray(array.read().result())
    if leaf.endswith('_bias'):  # [N, H], [K, H], [D] or [F]
        return values.reshape(-1)
    if leaf == 'embed' or values.ndim == 1:
        return values
    if leaf == 'wo':  # [N, H, D]
        return values.reshape(-1, values.shape[-1]).T
    return values.reshape(values.shape[0], -1).T  # [D, N, H], [D, F], [F, D] or [D, V]


def _layer_name(name, layer_pattern, table):
    """The Hugging Face name of another format's: 'blk.3.attn_q.weight' -> 'model.layers.3....weight'."""
    stem, _, kind = name.rpartition('.')
    match = re.match(layer_pattern, name)
    if match is None:
        return f'{table[stem]}.{kind}'
    return f'model.layers.{match[1]}.{table[stem[match.end():]]}.{kind}'
