"""The converter: every path is exact tensor for tensor, and the dry run agrees with a load."""

import re
import sys

import convert_weights
import jax
import numpy as np
import pytest
import tiny_hf

from lct import sharding
from lct.cli import convert
from lct.models import llama
from lct.weights import llama_hf, safetensors_files


def stored(folder):
    """{name: (dtype, shape, bytes)} of a Hugging Face folder."""
    return {name: (tensor.dtype, tensor.shape, tensor.read().tobytes())
            for name, tensor in safetensors_files.read_folder(folder).items()}


@pytest.fixture
def folder(tmp_path):
    tiny_hf.write_case('bf16', tmp_path / 'hf')
    (tmp_path / 'hf' / 'tokenizer.json').write_text('{}')
    return tmp_path / 'hf'


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['convert_weights.py', *map(str, args)])
    convert_weights.main()


def test_through_orbax_onto_another_mesh_and_back(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / 'orbax', '--to', 'orbax', '--mesh', '1,2,2,2')
    with jax.set_mesh(sharding.make_mesh((1, 4, 1, 1))):
        config, params = convert.load(tmp_path / 'orbax')
        assert jax.tree.map(lambda x: x.sharding.spec, params) == llama.specs(config)
        assert params.embed.sharding.mesh.shape['fsdp'] == 4
    run(monkeypatch, tmp_path / 'orbax', tmp_path / 'again', '--to', 'hf', '--mesh', '1,1,4,1')
    assert stored(tmp_path / 'again') == stored(folder)
    assert llama_hf.read_config(tmp_path / 'again') == llama_hf.read_config(folder)
    assert (tmp_path / 'again' / 'tokenizer.json').read_text() == '{}'


def test_through_metas_format_and_back(folder, tmp_path, monkeypatch, capsys):
    run(monkeypatch, folder, tmp_path / 'meta', '--to', 'meta', '--num-files', '2')
    assert "Meta's programs read a tokenizer.model" in capsys.readouterr().out
    run(monkeypatch, tmp_path / 'meta', tmp_path / 'again')
    assert stored(tmp_path / 'again') == stored(folder)
    assert llama_hf.read_config(tmp_path / 'again') == llama_hf.read_config(folder)


def test_a_flipped_bit_of_an_orbax_folder_is_refused_in_one_line(folder, tmp_path, monkeypatch):
    run(monkeypatch, folder, tmp_path / 'orbax', '--to', 'orbax')
    path = max((tmp_path / 'orbax' / 'params').rglob('*'), key=lambda path: path.stat().st_size)
    content, messages = path.read_bytes(), []
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1))):
        for at in range(1, 6):
            damaged = bytearray(content)
            damaged[at * len(content) // 6] ^= 16
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match='is not what was written|cannot be restored') as error:
                convert.load(tmp_path / 'orbax')
            messages.append(str(error.value))
    assert any(re.search('array [a-z_.]+ differs from its fingerprint', message) for message in messages)
    assert not any('\n' in message for message in messages)


@pytest.mark.parametrize('degrees', [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_dry_run_lists_the_bytes_of_each_device(degrees, folder, monkeypatch, capsys):
    run(monkeypatch, folder, '--dry-run', '--mesh', ','.join(map(str, degrees)))
    lines = capsys.readouterr().out.splitlines()
    with jax.set_mesh(sharding.make_mesh(degrees)):
        _, params = llama_hf.load(folder)
    leaves = jax.tree.leaves(params)
    held = [leaf.addressable_shards[0].data.nbytes for leaf in leaves]
    assert [int(line.split()[-1].replace(',', '')) for line in lines[2:-1]] == held
    for line, leaf in zip(lines[2:-1], leaves, strict=True):
        assert re.findall(r'\b[A-Z] (\d+)', line) == [str(n) for n in leaf.shape]
    assert f'{sum(held):,} bytes on each of {np.prod(degrees)} devices' in lines[-1]


def test_impossible_conversions_are_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='neither a folder'):
        run(monkeypatch, tmp_path, tmp_path / 'x')
    with pytest.raises(ValueError, match='name the folder'):
        run(monkeypatch, folder)
    with pytest.raises(ValueError, match='mesh degree tensor = 64'):
        run(monkeypatch, folder, '--dry-run', '--mesh', '1,1,1,64')
    with pytest.raises(ValueError, match='four degrees'):
        run(monkeypatch, folder, '--dry-run', '--mesh', '1,1,x')
    with pytest.raises(ValueError, match='not empty'):
        run(monkeypatch, folder, folder, '--to', 'meta')
    with pytest.raises(ValueError, match="Meta's format"):
        run(monkeypatch, folder, tmp_path / 'x', '--rope-factor', '8')
