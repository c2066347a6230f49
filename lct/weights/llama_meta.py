"""Meta's original folders of Llama weights: params.json and consolidated.NN.pth, split over the ranks of Meta's
model parallelism. Load sharded, save whole, strict both ways.

Rows of wq and wk lie there in the order of complex rotations, dims 2i and 2i + 1 of a head together; they are put
into the half-split order at the door, and back on the way out.
Letters: V vocab, D embed_dim, L layers, N query heads, K key/value heads, H head_dim, F mlp_dim.
"""

import contextlib
import dataclasses
import math
import os
import re
import shutil

from lct.models.llama import LlamaConfig
from lct.ops.rope import RopeConfig
from lct.weights import folders, json_files, streaming, torch_files
from lct.weights.json_files import shown
from lct.weights.llama_config import check_sizes
from lct.weights.tensors import DTYPES, FLOATS, Matrix, check_dtype, equal

NAMES = {  # ours -> theirs; {} is the layer
    'embed': 'tok_embeddings.weight',
    'layers.attn_norm': 'layers.{}.attention_norm.weight',
    'layers.wq': 'layers.{}.attention.wq.weight',
    'layers.wk': 'layers.{}.attention.wk.weight',
    'layers.wv': 'layers.{}.attention.wv.weight',
    'layers.wo': 'layers.{}.attention.wo.weight',
    'layers.mlp_norm': 'layers.{}.ffn_norm.weight',
    'layers.w_gate': 'layers.{}.feed_forward.w1.weight',
    'layers.w_up': 'layers.{}.feed_forward.w3.weight',
    'layers.w_down': 'layers.{}.feed_forward.w2.weight',
    'final_norm': 'norm.weight',
    'lm_head': 'output.weight',
}
ROTATED = ('layers.wq', 'layers.wk')
CUT_INSIDE = ('layers.wo', 'layers.w_down')  # split over their input dim; every other matrix over its output
IGNORED = ('rope.freqs',)  # a buffer of some files
FILE_NAME = re.compile(r'consolidated\.(\d\d)\.pth')
REQUIRED = {'dim': 'embed_dim', 'n_layers': 'num_layers', 'n_heads': 'num_heads', 'vocab_size': 'vocab_size'}
OPTIONAL = {'n_kv_heads', 'norm_eps', 'rope_theta', 'use_scaled_rope', 'multiple_of', 'ffn_dim_multiplier'}
HARMLESS = {'max_batch_size', 'max_seq_len'}  # how Meta's program was run, not what the model is
COMPANIONS = ('tokenizer.model', 'LICENSE', 'LICENSE.txt', 'USE_POLICY.md', 'NOTICE')

# Llama 3.1 and later, when use_scaled_rope: params.json does not carry these numbers.
SCALED = RopeConfig(theta=500000.0, type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                    original_max_position=8192)
WIDER = {2048: 32.0, 3072: 32.0}  # embed_dim of Llama 3.2 1B and 3B -> the factor that they are distributed with
TRAINED, TRAINED_SCALED = 8192, 131072  # positions of Llama 3, and of 3.1 and later


# ---------------------------------------------------------------------------------------------------
# params.json
# ---------------------------------------------------------------------------------------------------


def ffn_dim(dim, multiple_of, multiplier):
    """Width of the MLP by Meta's rule (llama-models, FeedForward): 8/3 of dim, scaled, rounded up."""
    width = int(2 * 4 * dim / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    return multiple_of * -(-width // multiple_of)


def config_from_params(values, path='params.json', *, rope_factor=None, max_position_embeddings=None):
    """LlamaConfig of the dict in a params.json, its embedding untied.

    rope_factor and max_position_embeddings are what params.json does not say: absent, a scaled RoPE has the
    factor of the published model of that width (32 for 3.2 1B and 3B, else 8), and positions are 8,192, or
    131,072 when scaled.

    Raises:
      ValueError: naming path and field, for whatever this model would not compute as described.
    """
    for field in values:
        if field not in HARMLESS | OPTIONAL | set(REQUIRED) and values[field] is not None:
            raise ValueError(f'{path}: field {shown(field)} is not known and might change the result; remove it if '
                             'it does not')
    fields = {}
    for field, ours in REQUIRED.items():
        if values.get(field) is None:
            raise ValueError(f'{path}: {field} is missing')
        fields[ours] = values[field]
    multiple_of, multiplier = values.get('multiple_of'), values.get('ffn_dim_multiplier')
    fields['num_kv_heads'] = fields['num_heads'] if values.get('n_kv_heads') is None else values['n_kv_heads']
    counts = {field: values[field] for field in REQUIRED}
    check_sizes({**counts, 'n_kv_heads': fields['num_kv_heads'], 'multiple_of': multiple_of}, path)
    if fields['embed_dim'] % fields['num_heads']:
        raise ValueError(f"{path}: dim {fields['embed_dim']} is not a multiple of n_heads {fields['num_heads']}")
    if multiplier is not None and not (_is_number(multiplier) and 0 < multiplier < 1000):
        raise ValueError(f'{path}: ffn_dim_multiplier is {shown(multiplier)}; it must be a positive number')
    fields['mlp_dim'] = ffn_dim(fields['embed_dim'], multiple_of, multiplier)
    theta, eps, scaled = (values.get(x) for x in ('rope_theta', 'norm_eps', 'use_scaled_rope'))
    if not (_is_number(theta) and 1 <= theta < 1e30):
        raise ValueError(f'{path}: rope_theta is {shown(theta)}; it must be a number >= 1, 500000.0 for Llama-3')
    if not (_is_number(eps) and 0 < eps < 1):
        raise ValueError(f'{path}: norm_eps is {shown(eps)}; it must be a number between 0 and 1')
    if scaled not in (None, True, False):
        raise ValueError(f'{path}: use_scaled_rope is {shown(scaled)}; it must be true or false')
    if rope_factor is not None and not scaled:
        raise ValueError(f'{path} has no use_scaled_rope, so that rope_factor {rope_factor} does nothing')
    rope = RopeConfig(theta=float(theta))
    if scaled:
        factor = WIDER.get(fields['embed_dim'], SCALED.factor) if rope_factor is None else float(rope_factor)
        rope = dataclasses.replace(SCALED, theta=float(theta), factor=factor)
    try:
        return LlamaConfig(
            **fields, head_dim=fields['embed_dim'] // fields['num_heads'], norm_eps=float(eps), rope=rope,
            max_position_embeddings=max_position_embeddings or (TRAINED_SCALED if scaled else TRAINED))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def _is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def params_from_config(config):
    """The dict of a params.json. max_position_embeddings has no place there: Meta's programs are told at run
    time how long a context may be.

    Raises:
      ValueError: if Meta's model cannot compute what the config says.
    """
    if config.window is not None:
        raise ValueError(f'window {config.window}: params.json has no sliding window, and its readers would compute '
                         'full attention; export a model with window None')
    scaled = config.rope.type != 'default'
    if scaled and config.rope != dataclasses.replace(
            SCALED, theta=config.rope.theta, factor=WIDER.get(config.embed_dim, SCALED.factor)):
        raise ValueError(
            f'params.json cannot say the RoPE scaling {config.rope.type!r} with factor {config.rope.factor} for a '
            'model of this width; save a Hugging Face folder')
    if config.head_dim * config.num_heads != config.embed_dim:
        raise ValueError(
            f'params.json cannot say head_dim {config.head_dim}: there it is embed_dim {config.embed_dim} / num_heads '
            f'{config.num_heads}; save a Hugging Face folder')
    multiple_of, multiplier = _ffn_fields(config)
    return {
        'dim': config.embed_dim, 'n_layers': config.num_layers, 'n_heads': config.num_heads,
        'n_kv_heads': config.num_kv_heads, 'vocab_size': config.vocab_size, 'multiple_of': multiple_of,
        'ffn_dim_multiplier': multiplier, 'norm_eps': config.norm_eps, 'rope_theta': config.rope.theta,
        'use_scaled_rope': scaled,
    }


def _ffn_fields(config):
    """(multiple_of, ffn_dim_multiplier) that give mlp_dim: round ones as published if there are, else exact ones."""
    for tenths in range(10, 20):
        for multiple_of in (4096, 1024, 256):
            if ffn_dim(config.embed_dim, multiple_of, tenths / 10) == config.mlp_dim:
                return multiple_of, tenths / 10
    return 1, (config.mlp_dim + 0.5) / int(2 * 4 * config.embed_dim / 3)


# ---------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------


def load(folder, dtype=None, *, rope_factor=None, max_position_embeddings=None):
    """(LlamaConfig, Params) of a folder in Meta's format, sharded on the current mesh.

    Each device's part is read from the memory-mapped members of the archives, so that no process holds more than
    it keeps. dtype None keeps the dtype of the files. A head that is equal to the embedding is tied to it, as in
    Llama 3.2. What params.json does not say: see config_from_params.

    Raises:
      ValueError: naming file and field or tensor, for anything missing, left over, of a wrong shape or dtype, not
        finite or not understood; a pickle that asks for anything but tensors is refused without running it.
    """
    folder = os.fspath(folder)
    path = os.path.join(folder, 'params.json')
    config = config_from_params(json_files.read_json(path), path, rope_factor=rope_factor,
                                max_position_embeddings=max_position_embeddings)
    streaming.check_mesh(config)
    matrices = _matrices(config, read_folder(folder), folder)
    if equal(matrices['lm_head', None], matrices['embed', None]):
        config = dataclasses.replace(config, tie_embeddings=True)
        del matrices['lm_head', None]
    return config, streaming.load(config, streaming.wanted_dtype(dtype, matrices, folder), matrices)


def read_folder(folder):
    """[{name: Tensor}] of the files of a folder, in the order of their ranks."""
    try:
        found = sorted(name for name in os.listdir(folder) if FILE_NAME.fullmatch(name))
    except OSError as error:
        raise ValueError(f'{folder} cannot be read ({error.strerror})') from None
    if not found:
        raise ValueError(f'{folder} holds no consolidated.00.pth; a folder in Meta\'s format must')
    for rank, name in enumerate(found):
        if name != f'consolidated.{rank:02d}.pth':
            raise ValueError(f'{folder} lacks consolidated.{rank:02d}.pth but holds {name}; copy it again')
    return [torch_files.read_header(os.path.join(folder, name)) for name in found]


def _matrices(config, files, folder):
    """{(our name, layer or None): Matrix} of {name: Tensor} of each file; ValueError if they are not just those
    of the config, each file with its share."""
    shapes, names = (f(config, NAMES) for f in (streaming.their_shapes, streaming.tensor_names))
    matrices = {}
    for rank, tensors in enumerate(files):
        path = next(iter(tensors.values())).path
        missing = [name for name in shapes if name not in tensors]
        extra = [name for name in tensors if name not in shapes and name not in IGNORED]
        if missing:
            raise ValueError(f'{path} lacks tensor {missing[0]!r} ({len(missing)} missing in all)')
        if extra:
            raise ValueError(
                f'{path}: tensor {shown(extra[0])} is no part of the model that params.json describes ({len(extra)} '
                'left over in all)')
        for name, (ours, _) in names.items():
            cut = _cut(ours, tensors[name].shape, shapes[name], len(files))
            if cut is None or (rank and cut != _cut(ours, files[0][name].shape, shapes[name], len(files))):
                raise ValueError(
                    f'{path}: tensor {name!r} has shape {list(tensors[name].shape)}; params.json asks for a share of '
                    f'{list(shapes[name])} over {len(files)} file{"s" * (len(files) > 1)}')
            if tensors[name].dtype != files[0][name].dtype:
                raise ValueError(f'{path}: tensor {name!r} is {tensors[name].dtype}, in the file of rank 0 it is not')
    for name, (ours, layer) in names.items():
        pieces = tuple(tensors[name] for tensors in files)
        if len(shapes[name]) == 1:  # norms stand whole in every file
            for piece in pieces[1:]:
                if not equal(Matrix(name, (piece,)), Matrix(name, pieces[:1])):
                    raise ValueError(f'{piece.path}: tensor {name!r} is not that of rank 0; the folder mixes models')
            pieces = pieces[:1]
        cut = _cut(ours, pieces[0].shape, shapes[name], len(files))
        matrices[ours, layer] = Matrix(name, pieces, cut, config.head_dim if ours in ROTATED else None)
    return matrices


def _cut(ours, shape, whole, count):
    """The dim along which a tensor of the whole shape is split into `count` of this shape; None if it is not.

    Llama-3 splits the embedding over its rows, Llama-2 did over its columns.
    """
    if len(whole) == 1:
        return 0 if shape == whole else None
    for dim in (0, 1) if ours == 'embed' else (1,) if ours in CUT_INSIDE else (0,):
        if whole[dim] % count == 0 and shape == _share(whole, dim, count):
            return dim
    return None


def _share(shape, dim, count):
    return tuple(n // count if i == dim else n for i, n in enumerate(shape))


# ---------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------


def save(folder, config, params, *, dtype='bfloat16', num_files=1, tokenizer_from=None, overwrite=False):
    """Write a folder in Meta's format: params.json, `num_files` consolidated.NN.pth, and if given the
    tokenizer.model and licence files of the folder tokenizer_from.

    A tied head is written out, as Meta does. The folder appears whole or not at all.
    """
    folder = os.path.abspath(os.fspath(folder))
    check_dtype(dtype, 'to save')
    streaming.check_params(config, params)
    values = params_from_config(config)
    if config.tie_embeddings:
        config = dataclasses.replace(config, tie_embeddings=False)
        params = params.replace(lm_head=params.embed.T)
    shapes, names = (f(config, NAMES) for f in (streaming.their_shapes, streaming.tensor_names))
    cuts = {name: 1 if names[name][0] in CUT_INSIDE else 0 for name in shapes}
    if num_files not in range(1, 101):
        raise ValueError(f'num_files {num_files} must be 1 to 100; the published models have 1, 2, 4 or 8')
    shares = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and shape[cuts[name]] % num_files:
            raise ValueError(f'tensor {name!r} of shape {list(shape)} does not divide into num_files {num_files}')
        shares[name] = shape if len(shape) == 1 else _share(shape, cuts[name], num_files)
    nbytes = num_files * sum(map(math.prod, shares.values())) * FLOATS[DTYPES[dtype]].itemsize
    folders.check_writable(folder, nbytes + 2**20, overwrite)
    with folders.whole_folder(folder, overwrite) as temporary:
        with contextlib.ExitStack() as stack:
            files = [
                stack.enter_context(torch_files.create(
                    os.path.join(temporary, f'consolidated.{rank:02d}.pth'), shares, DTYPES[dtype]))
                for rank in range(num_files)
            ]
            matrices = {
                ours: Matrix(name, tuple(file[name] for file in files[:1 if len(shapes[name]) == 1 else None]),
                             cuts[name], config.head_dim if ours[0] in ROTATED else None)
                for name, ours in names.items()
            }
            streaming.save(config, params, matrices)
            for name, shape in shapes.items():
                for file in files[1:] if len(shape) == 1 else []:
                    file[name][...] = files[0][name]
        json_files.write_json(os.path.join(temporary, 'params.json'), values)
        for name in COMPANIONS if tokenizer_from is not None else ():
            if os.path.isfile(os.path.join(tokenizer_from, name)):
                shutil.copyfile(os.path.join(tokenizer_from, name), os.path.join(temporary, name))
