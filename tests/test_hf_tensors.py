"""Folders that are right but unusual are read, and those that would be read wrongly are refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import tiny_families
import tiny_hf
from tiny import leaves_equal

from lct.cli import convert
from lct.weights import llama_hf, plain_readers

CONFIG = tiny_hf.BASE
VALUES = tiny_hf.tensors(CONFIG)
Q_PROJ, DOWN = 'model.layers.1.self_attn.q_proj.weight', 'model.layers.0.mlp.down_proj.weight'
DTYPES = {np.dtype(np.float32): 'F32', np.dtype(np.int8): 'I8',
          np.dtype(ml_dtypes.float8_e4m3fn): 'F8_E4M3', np.dtype(ml_dtypes.bfloat16): 'BF16'}


def write_tensors(path, values):
    """A safetensors file of arrays in their own dtypes."""
    header, data = {}, b''
    for name, value in values.items():
        header[name] = {'dtype': DTYPES[value.dtype], 'shape': list(value.shape),
                        'data_offsets': [len(data), len(data) + value.nbytes]}
        data += value.tobytes()
    tiny_hf.write_raw(path, json.dumps(header), data)


def write(folder, values=VALUES, **fields):
    folder.mkdir(exist_ok=True)
    (folder / 'config.json').write_text(json.dumps(CONFIG | fields))
    write_tensors(folder / 'model.safetensors', values)
    return folder


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    """A folder, and what is loaded from it."""
    folder = write(tmp_path_factory.mktemp('base') / 'base')
    return folder, llama_hf.load(folder)[1]


def loaded(folder, name, **options):
    """One tensor of a model as the files have it: converted to float32 and read by the check's own reader."""
    convert.convert(folder, folder.parent / 'out', 'hf', dtype='float32', overwrite=True, **options)
    convert.check(folder, folder.parent / 'out', 'hf', **options)
    return plain_readers.hf(folder.parent / 'out')[name]()


# --- names and files ------------------------------------------------------------------------------


@pytest.mark.parametrize(('decoder', 'head'), [
    ('_orig_mod.model.', '_orig_mod.lm_head'), ('module.model.', 'module.lm_head'), ('', 'lm_head'),
    ('model.model.', 'model.lm_head')])
def test_another_prefix_of_all_names_is_read(decoder, head, base, tmp_path):
    renamed = {f'{head}.weight' if name == 'lm_head.weight' else decoder + name.removeprefix('model.'): value
               for name, value in VALUES.items()}
    assert leaves_equal(llama_hf.load(write(tmp_path / 'x', renamed))[1], base[1])


def test_a_part_with_another_prefix_is_refused(tmp_path):
    mixed = {name.replace('model.layers.1', 'module.layers.1'): value for name, value in VALUES.items()}
    with pytest.raises(ValueError, match="lacks tensor 'model.layers.1.input_layernorm.weight'"):
        llama_hf.load(write(tmp_path / 'x', mixed))


def test_one_file_with_an_index_is_read(base, tmp_path):
    folder = write(tmp_path / 'x')
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': dict.fromkeys(VALUES, 'model.safetensors')}))
    assert leaves_equal(llama_hf.load(folder)[1], base[1])
    index.write_text(json.dumps({'weight_map': dict.fromkeys(VALUES, 'model-00001-of-00001.safetensors')}))
    with pytest.raises(ValueError, match='both model.safetensors and'):
        llama_hf.load(folder)


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'model.safetensors.index.json'])
def test_a_pointer_of_git_lfs_is_named(name, tmp_path):
    folder = write(tmp_path / 'x')
    (folder / name).write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4976698672\n')
    with pytest.raises(ValueError, match=f'{name} is a git-lfs pointer .* run git lfs pull'):
        llama_hf.load(folder)


# --- adapters -------------------------------------------------------------------------------------

DRAW = np.random.RandomState(0)


def product(out, rank, inside):
    return [DRAW.standard_normal(shape).astype(np.float32) for shape in ((rank, inside), (out, rank))]


def write_adapter(folder, values, **fields):
    folder.mkdir(exist_ok=True)
    write_tensors(folder / 'adapter_model.safetensors', {
        f'base_model.model.{name}': value for name, value in values.items()})
    settings = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 8, 'target_modules': ['q_proj'], 'bias': 'none',
                'use_dora': False, 'use_rslora': False, 'task_type': 'CAUSAL_LM', 'inference_mode': True}
    (folder / 'adapter_config.json').write_text(json.dumps(settings | fields))
    return folder


def lora(name, a, b, kind=''):
    stem, end = name.removesuffix('.weight'), '' if kind else '.weight'
    return {f'{stem}.lora_{kind}A{end}': a, f'{stem}.lora_{kind}B{end}': b}


@pytest.mark.parametrize(('fields', 'scale'), [
    ({}, 2), ({'use_rslora': True}, 4), ({'alpha_pattern': {'layers.1.self_attn.q_proj': 2}}, 0.5)])
def test_an_adapter_is_merged(fields, scale, base, tmp_path):
    a, b = product(32, 4, 32)
    adapter = write_adapter(tmp_path / 'adapter', lora(Q_PROJ, a, b), **fields)
    merged = loaded(base[0], Q_PROJ, adapter=adapter)
    np.testing.assert_allclose(merged, VALUES[Q_PROJ] + scale * b @ a, rtol=1e-6, atol=1e-5)


def test_an_adapter_of_fused_weights_is_merged_and_verified(tmp_path):
    case, name = tiny_families.CASES['phi3_0'], 'model.layers.0.self_attn.qkv_proj.weight'
    values = tiny_families.tensors('phi3_0')
    write(tmp_path / 'phi3', values)
    (tmp_path / 'phi3' / 'config.json').write_text(json.dumps(case))
    a, b = product(len(values[name]), 4, values[name].shape[1])
    adapter = write_adapter(tmp_path / 'adapter', lora(name, a, b), target_modules=['qkv_proj'])
    query = loaded(tmp_path / 'phi3', name.replace('qkv', 'q'), adapter=adapter)
    np.testing.assert_allclose(query, (values[name] + 2 * b @ a)[:len(query)], rtol=1e-5, atol=1e-6)


def test_an_adapter_may_have_embeddings_and_weights_in_full(base, tmp_path):
    a, b = product(32, 4, 128)
    head = DRAW.standard_normal((128, 32)).astype(np.float32)
    embed = 'model.embed_tokens.weight'
    stored = lora(embed, a, b, 'embedding_') | {
        'lm_head.weight': head, 'model.embed_tokens.base_layer.weight': VALUES[embed] + 1}
    adapter = write_adapter(tmp_path / 'adapter', stored, modules_to_save=['lm_head'])
    np.testing.assert_array_equal(loaded(base[0], 'lm_head.weight', adapter=adapter), head)
    np.testing.assert_allclose(loaded(base[0], embed, adapter=adapter), VALUES[embed] + 1 + 2 * (b @ a).T,
                               rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(('fields', 'message'), [
    ({'use_dora': True}, 'use_dora is True.* merge_and_unload'), ({'peft_type': 'IA3'}, 'peft_type'),
    ({'bias': 'all'}, 'bias'), ({'lora_bias': True}, 'lora_bias'), ({'fan_in_fan_out': True}, 'fan_in'),
    ({'init_lora_weights': 'pissa'}, 'alters the base model'), ({'r': 8}, 'has rank 4 but .* says 8'),
    ({'new_variant': 2}, "'new_variant' is not known"), ({'lora_alpha': '8'}, 'lora_alpha'),
    ({'layer_replication': [[0, 1], [0, 1]]}, 'layer_replication'),
    ({'alpha_pattern': {'(': 2}}, 'not a regular expression'), ({'rank_pattern': ['q_proj']}, 'of numbers'),
])
def test_an_adapter_of_another_kind_is_refused(fields, message, base, tmp_path):
    adapter = write_adapter(tmp_path / 'adapter', lora(Q_PROJ, *product(32, 4, 32)), **fields)
    with pytest.raises(ValueError, match=message) as error:
        llama_hf.load(base[0], adapter=adapter)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('values', 'message'), [
    (lora('model.layers.9.self_attn.q_proj.weight', *product(32, 4, 32)), 'does not have'),
    (lora(Q_PROJ, *product(16, 4, 32)), r'shape \[16, 32\] but the model \[32, 32\]'),
    ({key: x for key, x in lora(Q_PROJ, *product(32, 4, 32)).items() if 'lora_A' in key}, 'alone'),
])
def test_an_adapter_of_another_model_is_refused(values, message, base, tmp_path):
    adapter = write_adapter(tmp_path / 'adapter', values)
    with pytest.raises(ValueError, match=message):
        llama_hf.load(base[0], adapter=adapter)


def test_an_adapter_in_another_format_is_named(base, tmp_path):
    for name, remedy in (('adapters.safetensors', 'mlx_lm.fuse'), ('adapter_model.bin', 'save_pretrained')):
        adapter = write_adapter(tmp_path / name, lora(Q_PROJ, *product(32, 4, 32)))
        (adapter / 'adapter_model.safetensors').rename(adapter / name)
        with pytest.raises(ValueError, match=f'holds {name} instead of .* {remedy}'):
            llama_hf.load(base[0], adapter=adapter)


def test_an_adapter_is_never_ignored(base, tmp_path):
    folder = write(tmp_path / 'x')
    write_adapter(folder, lora(Q_PROJ, *product(32, 4, 32)))
    with pytest.raises(ValueError, match='beside a model, and the adapter would be ignored'):
        llama_hf.load(folder)
    (folder / 'config.json').unlink()
    for read in (llama_hf.load, convert.format_of):
        with pytest.raises(ValueError, match='holds an adapter .* merge it into its base'):
            read(folder)


# --- quantized weights ----------------------------------------------------------------------------


def quantized(kind, rows, cols, divisor=1.0):
    """(8-bit weights of DOWN, their scales), one for rows x cols numbers."""
    weight = VALUES[DOWN]
    blocks = [-(-n // size) for n, size in zip(weight.shape, (rows, cols))]
    scales = DRAW.uniform(0.5, 2, blocks).astype(np.float32) / 64
    wide = np.repeat(np.repeat(scales, rows, 0), cols, 1)[:weight.shape[0], :weight.shape[1]]
    stored = np.rint(weight / wide).clip(-127, 127).astype(kind)
    return stored, scales * np.float32(divisor), stored.astype(np.float32) * wide


COMPRESSED = {'quant_method': 'compressed-tensors', 'format': 'int-quantized',
              'config_groups': {'group_0': {'weights': {'num_bits': 8, 'symmetric': True, 'type': 'int'}}}}


def in_blocks(**fields):
    weights = COMPRESSED['config_groups']['group_0']['weights']
    return COMPRESSED | {'config_groups': {'group_0': {'weights': weights | fields}}}


@pytest.mark.parametrize(('settings', 'kind', 'block', 'suffix', 'divisor'), [
    ({'quant_method': 'fp8', 'weight_block_size': [24, 24]}, 'float8_e4m3fn', (24, 24),
     'weight_scale_inv', 1),
    ({'quant_method': 'fp8'}, 'float8_e4m3fn', (32, 64), 'weight_scale', 1),
    ({'quant_method': 'fbgemm_fp8'}, 'float8_e4m3fn', (1, 64), 'weight_scale', 1),
    (COMPRESSED, 'int8', (1, 64), 'weight_scale', 1),
    (in_blocks(block_structure=[24, 24]), 'int8', (24, 24), 'weight_scale', 1),
    (in_blocks(group_size=16), 'int8', (1, 16), 'weight_scale', 1),
    ({'quant_method': 'bitsandbytes', 'load_in_8bit': True}, 'int8', (1, 64), 'SCB', 127),
])
def test_weights_of_8_bits_are_read_with_their_scales(settings, kind, block, suffix, divisor, tmp_path):
    stored, scales, expected = quantized(kind, *block, divisor)
    if suffix == 'SCB':
        scales = scales.reshape(-1)
    extra = {DOWN: stored, DOWN.replace('weight', suffix): scales,
             DOWN.replace('weight', 'input_scale'): np.ones(1, np.float32)}
    folder = write(tmp_path / 'x', VALUES | extra, quantization_config=settings)
    np.testing.assert_allclose(loaded(folder, DOWN), expected, rtol=0 if divisor == 1 else 2e-7)


def test_weights_of_8_bits_without_fitting_scales_are_refused(tmp_path):
    stored, scales, _ = quantized('float8_e4m3fn', 24, 24)
    settings = {'quant_method': 'fp8', 'weight_block_size': [16, 16]}
    with pytest.raises(ValueError, match='needs one tensor of scales'):
        llama_hf.load(write(tmp_path / 'x', VALUES | {DOWN: stored}, quantization_config=settings))
    extra = {DOWN: stored, DOWN.replace('weight', 'weight_scale_inv'): scales}
    with pytest.raises(ValueError, match=r'does not fit .* in blocks of \[16, 16\]'):
        llama_hf.load(write(tmp_path / 'x', VALUES | extra, quantization_config=settings))


@pytest.mark.parametrize(('settings', 'message'), [
    ({'quant_method': 'gptq', 'bits': 4}, "'gptq', whose weights are not read; .* GPTQModel"),
    ({'quant_method': 'awq', 'bits': 4}, "'awq'.* GPTQModel"),
    ({'quant_method': 'bitsandbytes', 'load_in_4bit': True}, r"'bitsandbytes'.* model.dequantize\(\)"),
    ({'group_size': 64, 'bits': 4}, "'mlx'.* mlx_lm.convert --dequantize"),
    (COMPRESSED | {'format': 'pack-quantized'}, 'run_compressed=False'),
    ({'quant_method': 'new'}, "'new'.* checkpoint in 16 bits"), ([4], 'must be a JSON object'),
])
def test_other_quantizations_are_refused_with_a_remedy(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        llama_hf.load(write(tmp_path / 'x', quantization_config=settings))


# --- added tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize('tied', [False, True])
def test_embeddings_are_resized_for_added_tokens(tied, tmp_path):
    values = {name: value for name, value in VALUES.items() if not (tied and name == 'lm_head.weight')}
    folder = write(tmp_path / 'x', values, tie_word_embeddings=tied)
    for name in ('model.embed_tokens.weight', *(() if tied else ('lm_head.weight',))):
        rows = loaded(folder, name, vocab_size=131)
        np.testing.assert_array_equal(rows[:128], VALUES[name])
        np.testing.assert_allclose(rows[128:], np.tile(VALUES[name].mean(0), (3, 1)), atol=1e-6)
    with pytest.raises(ValueError, match='rows are only added'):
        llama_hf.load(folder, vocab_size=100)
