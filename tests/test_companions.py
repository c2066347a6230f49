"""What stands beside the weights: token ids, tokenizers, templates and lengths, through every format."""

import base64
import dataclasses
import json
import sys

import convert_weights
import pytest
import tiny_hf

from lct.cli import convert
from lct.data import chat_template
from lct.data import tokenizer as tokenizers
from lct.weights import companions, llama_hf

IDS = {'bos_token_id': 1, 'eos_token_id': [2, 5], 'pad_token_id': 3}
FILES = {
    'tokenizer.json': {'truncation': {'max_length': 64, 'strategy': 'LongestFirst'}, 'model': {'é': 1}},
    'tokenizer_config.json': {'model_max_length': 64, 'max_length': 32, 'bos_token': '<s>'},
    'generation_config.json': {'max_length': 64, 'temperature': 0.6},
}


@pytest.fixture
def folder(tmp_path):
    """A folder with every kind of file beside its weights."""
    tiny_hf.write_case('bf16', tmp_path / 'hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config | IDS))
    for name, values in FILES.items():
        (tmp_path / 'hf' / name).write_text(json.dumps(values, ensure_ascii=False))
    for name in ('chat_template.jinja', 'additional_chat_templates/tool_use.jinja', 'LICENSE', 'notes.txt',
                 'optimizer.pt'):
        (tmp_path / 'hf' / name).parent.mkdir(exist_ok=True)
        (tmp_path / 'hf' / name).write_text(f'{{"of": "{name}"}}')
    return tmp_path / 'hf'


def json_of(folder, name):
    return json.loads((folder / name).read_text(encoding='utf-8'))


@pytest.mark.parametrize('via', ['hf', 'meta', 'orbax'])
def test_everything_comes_back_from_every_format(via, folder, tmp_path, monkeypatch, capsys):
    for source, target, to in ((folder, tmp_path / 'via', via), (tmp_path / 'via', tmp_path / 'again', 'hf')):
        monkeypatch.setattr(sys, 'argv', ['x', str(source), str(target), '--to', to])
        convert_weights.main()
        for name, values in FILES.items():
            assert json_of(target, name) == values
        assert 'tool_use' in chat_template.load(target, 'tool_use').source
    again = tmp_path / 'again'
    assert {key: json_of(again, 'config.json')[key] for key in IDS} == IDS
    assert llama_hf.read_config(again) == llama_hf.read_config(folder)
    assert json_of(again, 'config.json')['max_position_embeddings'] == 64
    assert "not carried: 'notes.txt', 'optimizer.pt'" in capsys.readouterr().out


def test_token_ids_are_kept_without_a_tokenizer(folder, tmp_path):
    for name in FILES:
        (folder / name).unlink()
    convert.convert(folder, tmp_path / 'meta', 'meta')
    convert.convert(tmp_path / 'meta', tmp_path / 'again', 'hf')
    assert {key: json_of(tmp_path / 'again', 'config.json')[key] for key in IDS} == IDS


def test_an_extended_folder_states_the_new_lengths_everywhere(folder, tmp_path):
    config, params = llama_hf.load(folder)
    longer = dataclasses.replace(config, max_position_embeddings=4096)
    llama_hf.save(tmp_path / 'long', longer, params, tokenizer_from=folder)
    assert json_of(tmp_path / 'long', 'config.json')['max_position_embeddings'] == 4096
    assert json_of(tmp_path / 'long', 'tokenizer_config.json') == {
        'model_max_length': 4096, 'max_length': 32, 'bos_token': '<s>'}
    assert json_of(tmp_path / 'long', 'tokenizer.json')['truncation']['max_length'] == 4096
    assert json_of(tmp_path / 'long', 'generation_config.json')['max_length'] == 4096
    assert 'é' in (tmp_path / 'long' / 'tokenizer.json').read_text(encoding='utf-8')


def test_a_length_that_means_none_stays(folder, tmp_path):
    for length in (int(1e30), 8192):
        (folder / 'tokenizer_config.json').write_text(json.dumps({'model_max_length': length}))
        (tmp_path / str(length)).mkdir()
        companions.copy(folder, tmp_path / str(length), 4096)
        assert json_of(tmp_path / str(length), 'tokenizer_config.json') == {'model_max_length': length}


def test_a_tokenizer_model_of_meta_becomes_a_tokenizer_json(folder, tmp_path):
    convert.convert(folder, tmp_path / 'meta', 'meta')
    for name in ('config.json', *FILES):
        (tmp_path / 'meta' / name).unlink()
    ranks = [bytes([i]) for i in range(256)] + [b'he', b'll', b'hell', b'hello']
    lines = b''.join(base64.b64encode(token) + f' {i}\n'.encode() for i, token in enumerate(ranks))
    (tmp_path / 'meta' / 'tokenizer.model').write_bytes(lines)
    convert.convert(tmp_path / 'meta', tmp_path / 'again', 'hf')
    made, expected = (tokenizers.load(tmp_path / name) for name in ('again', 'meta'))
    for text in ('hello hell', "naïve 北京 🙂\n", 'a12 <|eot_id|>'):
        assert made.encode(text) == expected.encode(text)
        assert made.encode_special(text) == expected.encode_special(text)
    assert (made.bos_id, made.eos_id) == (260, 261)
    assert json_of(tmp_path / 'again', 'tokenizer_config.json')['model_max_length'] == 8192
    assert (tmp_path / 'again' / 'tokenizer.model').is_file()
    convert.convert(tmp_path / 'again', tmp_path / 'written', 'meta')  # with a config.json
    convert.convert(tmp_path / 'written', tmp_path / 'long', 'hf', max_position_embeddings=2**14)
    assert json_of(tmp_path / 'long', 'tokenizer_config.json')['model_max_length'] == 2**14


def test_config_json_beside_params_json_must_agree(folder, tmp_path):
    convert.convert(folder, tmp_path / 'meta', 'meta')
    values = json_of(tmp_path / 'meta', 'config.json')
    (tmp_path / 'meta' / 'config.json').write_text(json.dumps(values | {'rms_norm_eps': 1e-6}))
    with pytest.raises(ValueError, match='describe different models'):
        convert.load(tmp_path / 'meta')
