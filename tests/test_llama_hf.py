"""Hugging Face folders: logits and gradients of transformers, exact round trips, refused folders."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_hf
from tiny import leaves_equal

from lct import sharding
from lct.models import llama
from lct.models.llama_sizes import SIZES
from lct.ops import rope
from lct.weights import llama_hf, mapping, other_families, safetensors_files

GOLDEN = pathlib.Path(__file__).parent / 'golden'
Q_PROJ = 'model.layers.1.self_attn.q_proj.weight'


@pytest.fixture
def folder(tmp_path):
    """The GQA case as a folder."""
    tiny_hf.write_case('gqa', tmp_path / 'model')
    return tmp_path / 'model'


def golden_folder(name, tmp_path):
    tiny_hf.write_case(name, tmp_path)
    return tmp_path, np.load(GOLDEN / f'{name}.npz')


def relative(values, expected):
    return np.abs(np.asarray(values) - expected).max() / np.abs(expected).max()


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is KeyError:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


# --- against transformers -------------------------------------------------------------------------


@pytest.mark.parametrize('name', tiny_hf.CASES)
def test_logits_match_transformers(name, tmp_path):
    path, golden = golden_folder(name, tmp_path)
    config, params = llama_hf.load(path, 'float32')
    logits = llama.logits(params, config, tiny_hf.tokens(name)[0])
    assert relative(logits, golden['logits']) <= 2e-5


@pytest.mark.parametrize('name', [name for name, case in tiny_hf.CASES.items() if case.get('gradients')])
def test_gradients_match_transformers(name, tmp_path):
    path, golden = golden_folder(name, tmp_path)
    config, params = llama_hf.load(path)
    tokens, targets = tiny_hf.tokens(name)
    batch = dict(
        tokens=tokens, targets=targets, segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        loss_mask=np.ones(tokens.shape, np.float32))
    tables = rope.make_tables(config.rope, config.head_dim, tokens.shape[1])

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: llama.loss_sum(p, config, batch, tables, llama.Memory()) / tokens.size)(params)

    gradients = {'.'.join(k.name for k in path): np.asarray(leaf)
                 for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(params))}
    compared = 0
    for tensor, (name, layer) in llama_hf.tensor_names(config).items():
        letters = mapping.parameter_table(config)[name].letters.replace('L', '')
        expected = mapping.from_checkpoint(golden[f'grad/{tensor}'], config, letters)
        got = gradients[name] if layer is None else gradients[name][layer]
        assert relative(got, expected) <= 1e-4, tensor
        compared += 1
    assert compared == len([key for key in golden if key.startswith('grad/')])


# --- placement and round trips --------------------------------------------------------------------


@pytest.mark.parametrize('degrees', [(2, 2, 1, 2), (1, 4, 2, 1)])
def test_load_on_a_mesh_gives_the_same_weights_and_logits(degrees, folder, tmp_path):
    config, alone = llama_hf.load(folder)
    tokens = np.tile(tiny_hf.tokens('gqa')[0], (2, 1))
    expected = llama.logits(alone, config, tokens)
    with jax.set_mesh(sharding.make_mesh(degrees)):
        _, params = llama_hf.load(folder)
        assert jax.tree.map(lambda x: x.sharding.spec, params) == llama.specs(config)
        assert leaves_equal(params, alone)
        assert relative(llama.logits(params, config, tokens), np.asarray(expected)) <= 2e-5
        llama_hf.save(tmp_path / 'again', config, params, dtype='float32')
    assert leaves_equal(llama_hf.load(tmp_path / 'again')[1], alone)


def test_mesh_that_does_not_divide_is_refused(folder):
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 4))), pytest.raises(ValueError, match='num_kv_heads 2'):
        llama_hf.load(folder)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize(
    'name', ['gqa', 'tied', 'head_dim', 'longrope', 'yarn', 'dynamic', 'linear', 'llama3'])
def test_round_trip_is_exact(name, dtype, tmp_path):
    tiny_hf.write_case(name, tmp_path / 'source')
    config, params = llama_hf.load(tmp_path / 'source', dtype)
    llama_hf.save(tmp_path / 'saved', config, params, dtype=dtype, max_shard_bytes=20_000)
    assert len(list((tmp_path / 'saved').glob('*.safetensors'))) > 1
    again_config, again = llama_hf.load(tmp_path / 'saved')
    assert again_config == config
    assert leaves_equal(params, again)


def test_saved_tensors_are_the_loaded_ones_for_the_reference_reader(folder, tmp_path):
    from safetensors import safe_open

    config, params = llama_hf.load(folder)
    llama_hf.save(tmp_path / 'saved', config, params, dtype='float32')
    expected = tiny_hf.tensors(tiny_hf.CASES['gqa']['config'])
    with safe_open(tmp_path / 'saved' / 'model.safetensors', 'numpy') as file:
        assert file.metadata() == {'format': 'pt'}
        assert set(file.keys()) == set(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)


@pytest.mark.parametrize('name', SIZES)
def test_published_configs_survive_json(name):
    values = json.loads(json.dumps(llama_hf.config_to_json(SIZES[name])))
    assert llama_hf.config_from_json(values) == SIZES[name]
    old = {key: value for key, value in values.items() if key != 'rope_parameters'}
    new = {key: value for key, value in values.items() if key not in ('rope_theta', 'rope_scaling')}
    assert llama_hf.config_from_json(old) == llama_hf.config_from_json(new) == SIZES[name]


def test_absent_fields_mean_what_transformers_means():
    config = llama_hf.config_from_json({
        'model_type': 'llama', 'vocab_size': 8, 'hidden_size': 8, 'intermediate_size': 8,
        'num_hidden_layers': 1, 'num_attention_heads': 2, 'max_position_embeddings': 16})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (2, 4, 1e-6)
    assert not config.tie_embeddings
    assert config.rope == rope.RopeConfig(theta=10000.0)


def test_a_sliding_window_is_not_exported():
    with pytest.raises(ValueError, match='window 64: config.json of a Llama has no sliding window'):
        llama_hf.config_to_json(dataclasses.replace(SIZES['llama3-8b'], window=64))


# --- refused folders ------------------------------------------------------------------------------


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(model_type='gemma2'), 'model_type'),
    (dict(model_type='mistral'), 'architectures'),
    (dict(architectures=['LlamaForSequenceClassification']), 'architectures'),
    (dict(attention_bias=1), 'attention_bias'),
    (dict(mlp_bias='no'), 'mlp_bias'),
    (dict(hidden_act='gelu'), 'hidden_act'),
    (dict(sliding_window=4096), 'sliding_window'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(logit_scale=2.0), 'logit_scale'),
    (dict(attention_dropout=0.1), 'attention_dropout'),
    (dict(hidden_size=KeyError), 'hidden_size is missing'),
    (dict(num_attention_heads=0), 'num_attention_heads'),
    (dict(num_key_value_heads=3), 'num_kv_heads'),
    (dict(hidden_size=34), 'hidden_size 34'),
    (dict(rms_norm_eps='1e-5'), 'rms_norm_eps'),
    (dict(tie_word_embeddings=1), 'tie_word_embeddings'),
    (dict(rope_scaling={'rope_type': 'su', 'factor': 2.0}), "'su'"),
    (dict(rope_scaling={'rope_type': 'linear', 'type': 'dynamic', 'factor': 2.0}), 'disagree'),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': 2.0, 'low_freq_factor': 1.0}), 'low_freq_factor'),
    (dict(rope_scaling={'rope_type': 'llama3', 'factor': 2.0}), 'low_freq_factor'),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': '2'}), 'must be a number'),
    (dict(rope_parameters={'rope_type': 'default', 'rope_theta': 1e6}), 'rope_theta'),
    (dict(rope_scaling={'type': 'linear', 'factor': 2.0},
          rope_parameters={'rope_type': 'linear', 'factor': 4.0}), 'disagree'),
    (dict(partial_rotary_factor=0.5), 'partial_rotary_factor'),
    (dict(rope_scaling={'rope_type': 'longrope', 'factor': 2.0, 'long_factor': [1.0],
                        'short_factor': [1.0]}), 'head_dim/2'),
    (dict(rope_scaling={'rope_type': 'longrope', 'factor': 2.0, 'long_factor': [1.0] * 4,
                        'short_factor': [1.0, 1.0, 1.0, None]}), 'short_factor'),
    (dict(rope_scaling={'rope_type': 'yarn', 'factor': 2.0, 'beta_fast': [1.0] * 4}), 'beta_fast'),
])
def test_config_that_would_change_the_result_is_refused(changes, message, folder):
    edit_json(folder / 'config.json', **changes)
    with pytest.raises(ValueError, match=message) as error:
        llama_hf.load(folder)
    assert 'config.json' in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(('edit', 'message'), [
    (lambda v: {k: x for k, x in v.items() if k != Q_PROJ}, f'lacks tensor {Q_PROJ!r}'),
    (lambda v: {k: x for k, x in v.items() if k != 'lm_head.weight'}, 'tie_word_embeddings'),
    (lambda v: v | {'model.layers.2.mlp.up_proj.weight': v[Q_PROJ]}, 'unexpected'),
    (lambda v: v | {Q_PROJ: v[Q_PROJ][:-1]}, 'shape'),
    (lambda v: v | {Q_PROJ: np.where(np.eye(32) == 1, np.nan, v[Q_PROJ])}, 'not finite'),
    (lambda v: v | {'model.norm.weight': np.full(32, np.inf)}, 'not finite'),
])
def test_wrong_tensors_are_refused(edit, message, folder):
    values = edit(tiny_hf.tensors(tiny_hf.CASES['gqa']['config']))
    tiny_hf.write_safetensors(folder / 'model.safetensors', values)
    with pytest.raises(ValueError, match=message) as error:
        llama_hf.load(folder)
    assert str(folder) in str(error.value)


def test_not_finite_is_refused_on_a_mesh_too(folder):
    values = tiny_hf.tensors(tiny_hf.CASES['gqa']['config'])
    values['lm_head.weight'][3, 4] = np.nan
    tiny_hf.write_safetensors(folder / 'model.safetensors', values)
    with jax.set_mesh(sharding.make_mesh((1, 2, 1, 2))), pytest.raises(ValueError, match='not finite'):
        llama_hf.load(folder)


def test_old_frequency_buffers_and_an_identical_tied_head_are_ignored(tmp_path):
    config = tiny_hf.CASES['tied']['config']
    values = tiny_hf.tensors(config)
    tiny_hf.write_folder(tmp_path, config, values)
    expected = llama_hf.load(tmp_path)[1]
    values['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4)
    values['lm_head.weight'] = values['model.embed_tokens.weight']
    tiny_hf.write_folder(tmp_path, config, values)
    assert leaves_equal(llama_hf.load(tmp_path)[1], expected)
    values['lm_head.weight'] = values['lm_head.weight'] + 1
    tiny_hf.write_folder(tmp_path, config, values)
    with pytest.raises(ValueError, match='differs from the embedding'):
        llama_hf.load(tmp_path)


def _entry(shape, begin, end, dtype='F32'):
    return json.dumps({'dtype': dtype, 'shape': shape, 'data_offsets': [begin, end]})


def _header(*entries, names='ab'):
    """Header text, put together by hand so that it can be wrong."""
    pairs = (f'"{name}": {entry}' for name, entry in zip(names, entries, strict=False))
    return '{' + ', '.join(pairs) + '}'


@pytest.mark.parametrize(('header', 'data', 'message'), [
    (_header(_entry([2], 0, 8)), 4, 'truncated'),
    (_header(_entry([2], 0, 8)), 9, 'appended'),
    (_header(_entry([2], 4, 12)), 12, 'hole'),
    (_header(_entry([2], 0, 8), _entry([2], 4, 12)), 12, 'overlap'),
    (_header(_entry([2], 0, 8), _entry([2], 8, 16), names='aa'), 16, 'twice'),
    (_header(_entry([2], -8, 0)), 0, 'data_offsets'),
    (_header(_entry([3], 0, 8)), 8, 'takes 12'),
    (_header(_entry([0], 0, 0)), 0, 'positive'),
    (_header(_entry([2], 0, 8, 'F31')), 8, 'dtype'),
    ('{"a": [1]}', 0, 'nothing else'),
    ('[1, 2, 3]', 0, 'JSON object'),
    ('{"a": ', 0, 'not valid JSON'),
])
def test_malformed_safetensors_are_refused(header, data, message, tmp_path):
    path = tmp_path / 'model.safetensors'
    tiny_hf.write_raw(path, header, bytes(data))
    with pytest.raises(ValueError, match=message) as error:
        safetensors_files.read_header(path)
    assert 'model.safetensors' in str(error.value)


def test_truncated_file_and_absurd_header_are_refused(folder):
    path = folder / 'model.safetensors'
    content = path.read_bytes()
    for broken in (content[:-1], content[:6], content[:200], (1 << 60).to_bytes(8, 'little') + content[8:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match='model.safetensors'):
            llama_hf.load(folder)


def test_wrong_dtypes_are_refused(folder):
    with pytest.raises(ValueError, match='int32'):
        llama_hf.load(folder, 'int32')
    with pytest.raises(ValueError, match="dtype 'foo' is not supported for weights; use one of float32"):
        llama_hf.load(folder, 'foo')
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ValueError, match='I32'):
        llama_hf.load(folder)


@pytest.mark.parametrize('shard', [
    '../model.safetensors', '/etc/model.safetensors', 'a/b.safetensors', '..', 'model.bin', 7, ''])
def test_index_may_name_only_files_of_its_folder(shard, tmp_path):
    tiny_hf.write_case('sharded', tmp_path)
    path = tmp_path / 'model.safetensors.index.json'
    weight_map = json.loads(path.read_text())['weight_map']
    edit_json(path, weight_map=weight_map | {Q_PROJ: shard})
    with pytest.raises(ValueError, match='index.json'):
        llama_hf.load(tmp_path)


def test_index_and_shards_must_agree(tmp_path):
    tiny_hf.write_case('sharded', tmp_path)
    path = tmp_path / 'model.safetensors.index.json'
    good = json.loads(path.read_text())['weight_map']
    other = next(shard for shard in good.values() if shard != good[Q_PROJ])
    for bad in (good | {Q_PROJ: other}, {k: v for k, v in good.items() if k != Q_PROJ}, {}):
        edit_json(path, weight_map=bad)
        with pytest.raises(ValueError, match='index.json'):
            llama_hf.load(tmp_path)
    edit_json(path, weight_map=good)
    (tmp_path / other).unlink()
    with pytest.raises(ValueError, match='is missing'):
        llama_hf.load(tmp_path)


def test_folder_without_weights_or_config_is_refused(folder):
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='neither model.safetensors'):
        llama_hf.load(folder)
    (folder / 'config.json').unlink()
    with pytest.raises(ValueError, match='config.json is missing'):
        llama_hf.load(folder)


# --- other families -------------------------------------------------------------------------------


@pytest.mark.parametrize(('kind', 'difference'), [
    ('gemma2', r'norms scale by 1 \+ weight'), ('llama4', 'reads images'), ('granite', 'have multipliers'),
    ('cohere2', 'layer norms with means'), ('olmo2', 'norms follow the layers'), ('mixtral', 'experts'),
    ('qwen3_next', 'a recurrent state'), ('of-2031', 'under another name'), (None, 'model_type None'),
])
def test_another_family_is_refused_by_what_it_computes(kind, difference, folder):
    edit_json(folder / 'config.json', model_type=kind)
    message = f'is not supported.*{difference}.*; only|{difference} is not'
    with pytest.raises(ValueError, match=message) as error:
        llama_hf.load(folder)
    assert 'config.json: model_type' in str(error.value)


@pytest.mark.parametrize(('name', 'sizes'), [
    ('SmolLM3-3B', (2048, 11008, 36, 16, 4)), ('Gemma 7B', (3072, 24576, 28, 16, 16)),
    ('Granite 3 8B', (4096, 12800, 40, 32, 8))])
def test_a_renamed_model_is_known_by_its_sizes(name, sizes):
    values = dict(zip(other_families.SIZES, sizes)) | {
        'model_type': 'llama', 'vocab_size': 128256, 'max_position_embeddings': 65536}
    with pytest.raises(ValueError, match=f'has the sizes of {name}, where .* but says model_type'):
        llama_hf.config_from_json(values)
    assert llama_hf.config_from_json(values | {'is_llama_config': True}).num_layers == sizes[2]


def test_a_class_beside_the_weights_is_refused(folder):
    edit_json(folder / 'config.json', auto_map={'AutoModelForCausalLM': 'modeling.MyLlama'})
    with pytest.raises(ValueError, match='auto_map names the class .modeling.MyLlama'):
        llama_hf.load(folder)
    edit_json(folder / 'config.json', auto_map={'AutoModelForCausalLM': 'modeling.LlamaForCausalLM'})
    llama_hf.load(folder)


# --- fields that change nothing, and lengths --------------------------------------------------------


@pytest.mark.parametrize('changes', [
    dict(gradient_checkpointing=True), dict(max_sequence_length=64), dict(use_sliding_window=False),
    dict(rope_scaling={'type': 'linear', 'factor': 2.0, 'finetuned': True}),
])
def test_fields_that_change_nothing_are_read(changes, folder):
    expected = llama_hf.read_config(folder)
    edit_json(folder / 'config.json', **changes)
    config = llama_hf.read_config(folder)
    assert dataclasses.replace(config, rope=expected.rope) == expected


def test_a_longrope_may_have_its_original_length_at_the_top(tmp_path):
    tiny_hf.write_case('longrope', tmp_path)
    expected = llama_hf.read_config(tmp_path)
    edit_json(tmp_path / 'config.json', original_max_position_embeddings=32)
    assert llama_hf.read_config(tmp_path) == expected
    edit_json(tmp_path / 'config.json', original_max_position_embeddings=16)
    with pytest.raises(ValueError, match='original_max_position_embeddings 16 is not the one'):
        llama_hf.read_config(tmp_path)


def test_a_linear_factor_on_the_positions_before_it(folder):
    linear = dict(rope_scaling={'type': 'linear', 'factor': 4.0})
    edit_json(folder / 'config.json', max_sequence_length=256, **linear)
    assert llama_hf.read_config(folder).max_position_embeddings == 256
    edit_json(folder / 'config.json', max_sequence_length=KeyError)
    assert llama_hf.read_config(folder).max_position_embeddings == 64
    (folder / 'tokenizer_config.json').write_text('{"model_max_length": 256}')
    assert llama_hf.read_config(folder).max_position_embeddings == 256
    edit_json(folder / 'config.json', max_sequence_length=128)
    with pytest.raises(ValueError, match='max_sequence_length 128 and max_position_embeddings 64 disagree'):
        llama_hf.read_config(folder)
