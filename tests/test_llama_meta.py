"""Meta's folders: the logits of Meta's own convention, shards of ranks, exact round trips, refused
folders."""

import dataclasses
import json
import math
import pathlib

import jax
import numpy as np
import pytest
import tiny_hf
from tiny import leaves_equal

from lct import sharding
from lct.models import llama
from lct.models.llama_sizes import SIZES
from lct.weights import llama_hf, llama_meta, streaming, torch_files
from lct.weights.llama_meta import config_from_params, params_from_config

PARAMS = {'dim': 32, 'n_layers': 2, 'n_heads': 4, 'n_kv_heads': 2, 'vocab_size': 128, 'multiple_of': 16,
          'ffn_dim_multiplier': 1.3, 'norm_eps': 1e-5, 'rope_theta': 500000.0}
FFN = 112  # 16 * ceil(int(1.3 * 85) / 16)
TOKENS = np.random.RandomState(1).randint(0, 128, (2, 48)).astype(np.int32)


def tensors(params=PARAMS, ffn=FFN, seed=0):
    """{Meta's name: float32}, shapes written down independently of the package."""
    draw = np.random.RandomState(seed)
    dim, vocab = params['dim'], params['vocab_size']
    kv = dim // params['n_heads'] * params['n_kv_heads']
    shapes = {'tok_embeddings.weight': (vocab, dim), 'norm.weight': (dim,), 'output.weight': (vocab, dim)}
    for i in range(params['n_layers']):
        shapes |= {f'layers.{i}.{name}.weight': shape for name, shape in {
            'attention.wq': (dim, dim), 'attention.wk': (kv, dim), 'attention.wv': (kv, dim),
            'attention.wo': (dim, dim), 'feed_forward.w1': (ffn, dim), 'feed_forward.w3': (ffn, dim),
            'feed_forward.w2': (dim, ffn), 'attention_norm': (dim,), 'ffn_norm': (dim,)}.items()}
    result = {}
    for name, shape in shapes.items():
        values = draw.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + 0.2 * values
        elif 'tok' not in name:
            values *= (2 if 'wq' in name or 'wk' in name else 1) / math.sqrt(shape[1])
        result[name] = values.astype(np.float32)
    return result


def split(values, ranks, embed_dim=0):
    """The shards of the ranks of Meta's model parallelism."""
    def shard(name, value, rank):
        if value.ndim == 1:
            return value
        dim = embed_dim if 'tok' in name else 1 if name.endswith(('wo.weight', 'w2.weight')) else 0
        return np.split(value, ranks, dim)[rank]

    return [{name: shard(name, value, rank) for name, value in values.items()} for rank in range(ranks)]


def write(folder, files, params=PARAMS, dtype='F32'):
    folder.mkdir(exist_ok=True)
    (folder / 'params.json').write_text(json.dumps(params))
    for rank, values in enumerate(files):
        shapes = {name: value.shape for name, value in values.items()}
        with torch_files.create(folder / f'consolidated.{rank:02d}.pth', shapes, dtype) as arrays:
            for name, value in values.items():
                arrays[name][...] = value
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / 'meta', split(tensors(), 2))


def stored(folder):
    """[{name: (dtype, shape, bytes)}] of the files of a folder."""
    paths = sorted(pathlib.Path(folder).glob('*.pth'))
    return [{name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
             for name, tensor in torch_files.read_header(path).items()}
            for path in paths]


# --- against Meta's convention --------------------------------------------------------------------


def meta_logits(w, params, tokens):
    """Llama as Meta defines it, in float64: a rotation is a product of complex numbers with dims 2i and 2i +
    1 of a head as real and imaginary parts; use_scaled_rope lengthens waves of more than a quarter of 8,192
    tokens."""
    heads, kv_heads = params['n_heads'], params['n_kv_heads']
    w = {name: value.astype(np.float64) for name, value in w.items()}
    head = params['dim'] // heads
    speed = params['rope_theta'] ** -(np.arange(0, head, 2) / head)
    if params.get('use_scaled_rope'):
        waves = 8192 * speed / (2 * np.pi)  # that fit into the trained context
        smooth = np.clip((waves - 1) / (4 - 1), 0, 1)
        speed = (1 - smooth) * speed / 8 + smooth * speed
    rotation = np.exp(1j * np.outer(np.arange(tokens.shape[1]), speed))[:, None]

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + params['norm_eps']) * w[name]

    def rotated(x):
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * rotation
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x = w['tok_embeddings.weight'][tokens]
    future = np.triu(np.full((tokens.shape[1],) * 2, -np.inf), 1)
    for i in range(params['n_layers']):
        at = f'layers.{i}.'
        y = norm(x, at + 'attention_norm.weight')
        q, k, v = (
            (y @ w[f'{at}attention.w{name}.weight'].T).reshape(*tokens.shape, n, head)
            for name, n in (('q', heads), ('k', kv_heads), ('v', kv_heads)))
        k, v = (np.repeat(z, heads // kv_heads, 2) for z in (rotated(k), v))
        scores = np.einsum('btnh,bsnh->bnts', rotated(q), k) / math.sqrt(head) + future
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum('bnts,bsnh->btnh', weights / weights.sum(-1, keepdims=True), v)
        x = x + out.reshape(x.shape) @ w[at + 'attention.wo.weight'].T
        y = norm(x, at + 'ffn_norm.weight')
        gate = y @ w[at + 'feed_forward.w1.weight'].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w[at + 'feed_forward.w3.weight'].T)) @ (
            w[at + 'feed_forward.w2.weight'].T)
    return norm(x, 'norm.weight') @ w['output.weight'].T


@pytest.mark.parametrize('scaled', [False, True])
def test_logits_are_those_of_complex_rotations(scaled, tmp_path):
    params = PARAMS | {'use_scaled_rope': scaled}
    expected = meta_logits(tensors(), params, TOKENS)
    config, loaded = llama_meta.load(write(tmp_path / 'meta', split(tensors(), 2), params))
    assert config.rope.type == ('llama3' if scaled else 'default')
    logits = np.asarray(llama.logits(loaded, config, TOKENS))
    assert np.abs(logits - expected).max() / np.abs(expected).max() <= 2e-5
    without = loaded.replace(layers=loaded.layers.replace(wq=loaded.layers.wk.repeat(2, 2)))
    assert np.abs(np.asarray(llama.logits(without, config, TOKENS)) - expected).max() > 0.1


# --- ranks, meshes, round trips -------------------------------------------------------------------


@pytest.mark.parametrize(('ranks', 'embed_dim'), [(1, 0), (2, 0), (2, 1), (4, 0), (8, 0), (8, 1)])
def test_every_split_gives_the_same_weights(ranks, embed_dim, tmp_path):
    params = PARAMS | {'n_heads': 8, 'n_kv_heads': 8}
    config, expected = llama_meta.load(write(tmp_path / 'one', [tensors(params)], params))
    assert leaves_equal(expected, llama_meta.load(write(
        tmp_path / 'split', split(tensors(params), ranks, embed_dim), params))[1])


@pytest.mark.parametrize('degrees', [(2, 2, 1, 2), (1, 4, 2, 1)])
def test_load_on_a_mesh_gives_the_same_weights(degrees, folder, monkeypatch):
    config, alone = llama_meta.load(folder)
    with jax.set_mesh(sharding.make_mesh(degrees)):
        for staged in (streaming.STAGED, 1):  # all layers at a time, and one by one
            monkeypatch.setattr(streaming, 'STAGED', staged)
            _, params = llama_meta.load(folder)
            assert jax.tree.map(lambda x: x.sharding.spec, params) == llama.specs(config)
            assert leaves_equal(params, alone)
        llama_meta.save(folder.parent / 'again', config, params, dtype='float32', num_files=2)
    assert stored(folder.parent / 'again') == stored(folder)


def test_strips_and_blocks_may_be_of_any_size(folder, monkeypatch):
    expected = llama_meta.load(folder)[1]
    for strip, block in ((1, 1), (7, 1), (64, 1), (3, 10_000)):
        monkeypatch.setattr(streaming, 'STRIP', strip)
        monkeypatch.setattr(streaming, 'BLOCK', block)
        assert leaves_equal(llama_meta.load(folder)[1], expected)


@pytest.mark.parametrize('dtype', ['F32', 'F16', 'BF16'])
@pytest.mark.parametrize('ranks', [1, 2])
def test_round_trip_is_exact(ranks, dtype, tmp_path):
    source = write(tmp_path / 'source', split(tensors(), ranks), dtype=dtype)
    config, params = llama_meta.load(source)
    llama_meta.save(tmp_path / 'saved', config, params, dtype=params.embed.dtype.name, num_files=ranks)
    assert stored(tmp_path / 'saved') == stored(source)
    assert llama_meta.load(tmp_path / 'saved')[0] == config


def test_through_both_formats_and_back(folder, tmp_path):
    config, params = llama_meta.load(folder)
    llama_hf.save(tmp_path / 'hf', config, params, dtype='float32')
    llama_meta.save(tmp_path / 'again', *llama_hf.load(tmp_path / 'hf'), dtype='float32', num_files=2)
    assert stored(tmp_path / 'again') == stored(folder)


def test_a_head_equal_to_the_embedding_is_tied_and_written_out(tmp_path):
    values = tensors()
    values['output.weight'] = values['tok_embeddings.weight']
    folder = write(tmp_path / 'meta', split(values, 2, 1))
    config, params = llama_meta.load(folder)
    assert config.tie_embeddings and params.lm_head is None
    llama_meta.save(tmp_path / 'saved', config, params, dtype='float32', num_files=2)
    assert stored(tmp_path / 'saved') == stored(write(tmp_path / 'rows', split(values, 2)))


# --- params.json ----------------------------------------------------------------------------------

BASE = {'norm_eps': 1e-5, 'rope_theta': 500000.0, 'vocab_size': 128256, 'n_kv_heads': 8}
PUBLISHED = {  # llama-models, models/sku_list.py
    'llama3-8b': dict(dim=4096, n_layers=32, n_heads=32, ffn_dim_multiplier=1.3, multiple_of=1024),
    'llama3-70b': dict(dim=8192, n_layers=80, n_heads=64, ffn_dim_multiplier=1.3, multiple_of=4096),
    'llama3.1-8b': dict(dim=4096, n_layers=32, n_heads=32, ffn_dim_multiplier=1.3, multiple_of=1024,
                        use_scaled_rope=True),
    'llama3.1-70b': dict(dim=8192, n_layers=80, n_heads=64, ffn_dim_multiplier=1.3, multiple_of=4096,
                         use_scaled_rope=True),
    'llama3.1-405b': dict(dim=16384, n_layers=126, n_heads=128, ffn_dim_multiplier=1.2, multiple_of=4096,
                          use_scaled_rope=True),
    'llama3.2-1b': dict(dim=2048, n_layers=16, n_heads=32, ffn_dim_multiplier=1.5, multiple_of=256,
                        use_scaled_rope=True),
    'llama3.2-3b': dict(dim=3072, n_layers=28, n_heads=24, ffn_dim_multiplier=1.0, multiple_of=256,
                        use_scaled_rope=True),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_params_are_the_published_configs(name):
    untied = dataclasses.replace(SIZES[name], tie_embeddings=False)
    assert config_from_params(BASE | PUBLISHED[name]) == untied
    assert config_from_params(json.loads(json.dumps(params_from_config(untied)))) == untied


def test_fields_that_params_cannot_express():
    config = config_from_params(BASE | PUBLISHED['llama3.2-1b'], rope_factor=8, max_position_embeddings=16384)
    assert (config.rope.factor, config.max_position_embeddings) == (8.0, 16384)
    with pytest.raises(ValueError, match='factor 8.0'):
        params_from_config(config)
    with pytest.raises(ValueError, match="'yarn'"):
        params_from_config(llama_hf.config_from_json(tiny_hf.CASES['yarn']['config']))
    with pytest.raises(ValueError, match='window 64: params.json has no sliding window'):
        params_from_config(dataclasses.replace(config, window=64))
    with pytest.raises(ValueError, match='head_dim 16'):
        params_from_config(llama_hf.config_from_json(tiny_hf.CASES['head_dim']['config']))


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(dim=None), 'dim is missing'), (dict(dim=0), 'dim is 0'), (dict(dim=True), 'dim is True'),
    (dict(dim='32'), 'dim is'), (dict(dim=10**400), 'dim is'), (dict(n_layers=10**12), 'n_layers'),
    (dict(vocab_size=-1), 'vocab_size'), (dict(n_heads=5), 'n_heads 5'), (dict(n_kv_heads=3), 'num_kv_heads'),
    (dict(multiple_of=None), 'multiple_of'), (dict(multiple_of=0), 'multiple_of'),
    (dict(ffn_dim_multiplier=-1), 'ffn_dim_multiplier'),
    (dict(ffn_dim_multiplier=float('nan')), 'multiplier'), (dict(rope_theta=None), 'rope_theta'),
    (dict(rope_theta=10**400), 'rope_theta'), (dict(norm_eps=0), 'norm_eps'),
    (dict(use_scaled_rope='yes'), 'use_scaled_rope'),
    (dict(quantization_args={'group_size': 32}), 'quantization'), (dict(dim=64), 'shape'),
])
def test_params_that_would_change_the_result_are_refused(changes, message, folder):
    (folder / 'params.json').write_text(json.dumps(PARAMS | changes))
    with pytest.raises(ValueError, match=message) as error:
        llama_meta.load(folder)
    assert str(folder) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(('edit', 'message'), [
    (lambda a, b: (a, {k: v for k, v in b.items() if k != 'norm.weight'}), 'lacks tensor'),
    (lambda a, b: (a, b | {'layers.2.attention.wq.bias': a['norm.weight']}), 'unexpected'),
    (lambda a, b: (a | {'norm.weight': a['norm.weight'] + 1}, b),
     'differs from the one in the file of rank 0'),
    (lambda a, b: (a, b | {'output.weight': b['output.weight'][:-1]}), 'shape'),
    (lambda a, b: (a, b | {'tok_embeddings.weight': b['tok_embeddings.weight'].reshape(128, 16)}), 'shape'),
    (lambda a, b: (a, b | {'output.weight': b['output.weight'] * np.inf}), 'not finite'),
    (lambda a, b: (a, b, a, b), 'shape'),
])
def test_wrong_tensors_are_refused(edit, message, folder):
    write(folder, edit(*split(tensors(), 2)))
    with pytest.raises(ValueError, match=message) as error:
        llama_meta.load(folder)
    assert str(folder) in str(error.value) and '\n' not in str(error.value)


def test_incomplete_folders_are_refused(folder):
    (folder / 'consolidated.00.pth').rename(folder / 'consolidated.02.pth')
    with pytest.raises(ValueError, match='lacks consolidated.00.pth but holds consolidated.01.pth'):
        llama_meta.load(folder)
    (folder / 'consolidated.01.pth').rename(folder / 'consolidated.00.pth')
    with pytest.raises(ValueError, match='lacks consolidated.01.pth'):
        llama_meta.load(folder)
    (folder / 'consolidated.02.pth').unlink()
    with pytest.raises(ValueError, match='shape'):
        llama_meta.load(folder)
    (folder / 'consolidated.00.pth').unlink()
    with pytest.raises(ValueError, match='holds no consolidated.00.pth'):
        llama_meta.load(folder)
    (folder / 'params.json').unlink()
    with pytest.raises(ValueError, match='params.json is missing'):
        llama_meta.load(folder)


def test_impossible_saves_are_refused_and_leave_nothing(folder, tmp_path):
    config, params = llama_meta.load(folder)
    with pytest.raises(ValueError, match='num_files 3'):
        llama_meta.save(tmp_path / 'saved', config, params, num_files=3)
    with pytest.raises(ValueError, match='int8'):
        llama_meta.save(tmp_path / 'saved', config, params, dtype='int8')
    with pytest.raises(ValueError, match='not finite'):
        llama_meta.save(tmp_path / 'saved', config, params.replace(final_norm=params.final_norm * np.inf))
    with pytest.raises(ValueError, match='overwrite=True'):
        llama_meta.save(folder, config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['meta']
