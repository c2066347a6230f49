"""Hostile descriptions of weights: each is refused at once, in one sentence that names file and field,
without allocating the memory that it claims."""

import json
import os
import resource
import time

import pytest
import tiny_hf

from lct import json_files
from lct.weights import llama_hf, safetensors_files


@pytest.fixture
def refused():
    """Calls a reader, which must refuse at once; returns its message."""
    def run(function, path):
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ValueError) as error:
            function(path)
        message = str(error.value)
        assert str(path) in message and '\n' not in message and len(message) < 800
        assert time.process_time() - start < 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
        return message

    return run


@pytest.mark.parametrize(('text', 'message'), [
    (b'\xff{}', 'not UTF-8'), (b'', 'not valid JSON'), (b'[1]', 'must hold a JSON object, got list'),
    (b'{"a": ' * 100_000, 'not valid JSON'), (b'{"a": 1, "b": {"c": 1, "c": 1}}', "names 'c' twice"),
    (b'{"a": ' + b'9' * 4500 + b'}', '4500 digits'), (b'{"a": [1,]}', 'not valid JSON'),
    (b'{"' + b'a' * 10_000 + b'": 1, "' + b'a' * 10_000 + b'": 1}', 'twice'),
])
def test_json_that_does_not_describe_a_model(text, message, tmp_path, refused):
    (tmp_path / 'config.json').write_bytes(text)
    assert message in refused(json_files.read_json, tmp_path / 'config.json')


def test_json_of_a_gigabyte(tmp_path, refused):
    (tmp_path / 'config.json').write_bytes(b'{')
    os.truncate(tmp_path / 'config.json', 10**9)
    assert 'too many for a description' in refused(json_files.read_json, tmp_path / 'config.json')
    assert 'missing' in refused(json_files.read_json, tmp_path / 'no.json')


@pytest.mark.parametrize('value', [0, -4, 2.0, '4', True, [4], {}, 10**12, 10**30, 10**499])
@pytest.mark.parametrize('field', [
    'vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
    'num_key_value_heads', 'head_dim', 'max_position_embeddings'])
def test_absurd_sizes(field, value, tmp_path, refused):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(tiny_hf.BASE | {field: value}))
    assert f'{field} is' in refused(lambda path: llama_hf.read_config(path.parent), path)


@pytest.mark.parametrize(('changes', 'message'), [
    (dict(rope_theta=10**400), 'rope_theta'), (dict(rope_theta=float('nan')), 'theta'),
    (dict(rms_norm_eps=float('nan')), 'rms_norm_eps'), (dict(rope_scaling=[]), 'rope_scaling'),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': 10**400}), 'factor'),
    (dict(rope_scaling={'rope_type': 'yarn', 'original_max_position_embeddings': 0}), 'original_max'),
    (dict(rope_scaling={'rope_type': 'linear', 'factor': float('inf')}), 'factor'),
    (dict(rope_scaling={'rope_type': 'yarn', 'x' * 10_000: 1}), 'x'),
    (dict(model_type=['llama']), 'model_type'),
])
def test_absurd_rope(changes, message, tmp_path, refused):
    path = tmp_path / 'config.json'
    path.write_text(json.dumps(tiny_hf.BASE | changes))
    assert message in refused(lambda path: llama_hf.read_config(path.parent), path)


def test_sizes_that_the_files_do_not_have(tmp_path, refused):
    tiny_hf.write_case('gqa', tmp_path)
    path = tmp_path / 'config.json'
    config = json.loads(path.read_text())
    for field, value in {'num_hidden_layers': 10_000, 'vocab_size': 2**31 - 1, 'intermediate_size': 2**31 - 1,
                         'hidden_size': 2**30}.items():
        path.write_text(json.dumps(config | {field: value}))
        refused(llama_hf.load, tmp_path)


@pytest.mark.parametrize(('header', 'message'), [
    (b'\xff' + b' ' * 20, 'not UTF-8'),
    (json.dumps({'a': {'dtype': 'BF16', 'shape': [2], 'data_offsets': [0, 8]}}).encode(), 'takes 4'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [8, 16]}}).encode(), 'hole'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode(), 'truncated'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [1] * 9, 'data_offsets': [0, 8]}}).encode(), 'at most 8'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [10**600] * 8, 'data_offsets': [0, 8]}}).encode(),
     '601 digits'),
    (json.dumps({'a': {'dtype': 'F32', 'shape': [10**499] * 8, 'data_offsets': [0, 8]}}).encode(), 'takes 4'),
    (json.dumps({'a': {'dtype': ['F32'], 'shape': [2], 'data_offsets': [0, 8]}}).encode(), 'dtype'),
    (json.dumps({'a' * 10_000: {'dtype': 'F32', 'shape': [3], 'data_offsets': [0, 8]}}).encode(), 'takes 12'),
    (json.dumps({'__metadata__': [], 'a': {}}).encode(), '__metadata__'),
])
def test_headers_that_do_not_fit_their_file(header, message, tmp_path, refused):
    path = tmp_path / 'model.safetensors'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
    assert message in refused(safetensors_files.read_header, path)


def test_a_header_of_half_a_gigabyte(tmp_path, refused):
    path = tmp_path / 'model.safetensors'
    path.write_bytes((2**29).to_bytes(8, 'little') + b'{')
    os.truncate(path, 2**30)
    assert 'header length' in refused(safetensors_files.read_header, path)
