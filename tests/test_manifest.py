"""Folders that lct wrote are compared with their manifest when they are read."""

import json
import os
import zlib

import numpy as np
import pytest
import tiny_hf
from tiny import leaves_equal

from lct.checksums import chunk_crc32s, total_crc32
from lct.cli.model import model_fingerprint, warn_of_edits
from lct.weights import llama_hf, llama_meta, manifest, safetensors_files

CHUNK = 512


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    """(folder of several safetensors files, folder of Meta's format, params) with chunks of 512 bytes."""
    root = tmp_path_factory.mktemp('written')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, 'CHUNK', CHUNK)
        tiny_hf.write_case('gqa', root / 'source')
        config, params = llama_hf.load(root / 'source')
        llama_hf.save(root / 'hf', config, params, dtype='float32', max_shard_bytes=20_000)
        llama_meta.save(root / 'meta', config, params, dtype='float32', num_files=2)
    return root / 'hf', root / 'meta', params


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(manifest, 'CHUNK', CHUNK)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize('size', [0, 1, 9, 10, 11, 100])
def test_the_crc32_of_chunks(tmp_path, size):
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / 'file').write_bytes(data)
    expected = [zlib.crc32(data[i:i + 10]) for i in range(0, size, 10)]
    assert chunk_crc32s(tmp_path / 'file', 10) == expected
    assert total_crc32(expected) == zlib.crc32(np.array(expected, '<u4').tobytes())


@pytest.mark.parametrize('index, load', [(0, llama_hf.load), (1, llama_meta.load)])
def test_no_flipped_bit_of_the_weights_is_read(written, index, load):
    folder, rng = written[index], np.random.default_rng(0)
    assert leaves_equal(load(folder)[1], written[2])
    for path in sorted(folder.glob('*.safetensors')) + sorted(folder.glob('*.pth')):
        bits = rng.integers(0, 8 * path.stat().st_size, 3)
        for bit in (*bits.tolist(), 8 * path.stat().st_size - 1):
            flip(path, bit)
            with pytest.raises(ValueError, match=str(path)):
                load(folder)
            flip(path, bit)
    load(folder)


def test_the_error_names_the_tensor(written):
    path = sorted(written[0].glob('*.safetensors'))[0]
    name, tensor = list(safetensors_files.read_header(path).items())[0]
    at = (tensor.offset // CHUNK + 1) * CHUNK + 5
    flip(path, 8 * at)
    with pytest.raises(ValueError, match=rf'{path} differs from what was written \(another crc32 of bytes '
                                         rf"{at - 5} to \d+, tensor '{name}'\); copy it again, or delete "
                                         'lct_manifest.json if it was changed on purpose'):
        llama_hf.load(written[0])
    flip(path, 8 * at)


def test_a_part_of_a_tensor_verifies_its_own_chunks(written, monkeypatch):
    tensors = safetensors_files.read_folder(written[0])
    tensor = max(tensors.values(), key=manifest.tensor_bytes)
    row = tensor.shape[1] * 4
    expected = np.array(tensor.read())
    reads = []
    monkeypatch.setattr(os, 'pread', lambda fd, n, at, pread=os.pread: reads.append(at) or pread(fd, n, at))
    tensor = safetensors_files.read_folder(written[0])[next(
        name for name, one in tensors.items() if one is tensor)]
    reads.clear()
    for _ in range(2):
        np.testing.assert_array_equal(tensor.read(slice(8, 24)), expected[8:24])
    start, stop = tensor.offset + 8 * row, tensor.offset + 24 * row
    assert set(reads) <= {i * CHUNK for i in range(start // CHUNK, -(-stop // CHUNK))}
    assert 0 < len(reads) == len(set(reads))


def test_files_that_were_changed_on_purpose(written, tmp_path, capsys):
    folder = tmp_path / 'model'
    config, params = llama_hf.load(written[0])
    llama_hf.save(folder, config, params, dtype='float32', card='# A model')
    (folder / 'README.md').write_text('# My model')
    assert manifest.edited(folder) == []
    values = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**values, 'rms_norm_eps': 0.1}))
    llama_hf.load(folder)
    warn_of_edits(folder)
    warning = capsys.readouterr().err
    assert warning.startswith(f'WARNING: {folder / "config.json"} differs from what was written (')
    assert warning.count('\n') == 1
    with pytest.raises(ValueError, match='config.json differs from what was written'):
        manifest.verify(folder)
    os.truncate(folder / 'model.safetensors', 100)
    with pytest.raises(ValueError, match='model.safetensors'):
        llama_hf.load(folder)
    llama_hf.save(tmp_path / 'other', config, params, max_shard_bytes=20_000)
    for path in (tmp_path / 'other').glob('model*'):
        os.replace(path, folder / path.name)
    (folder / 'model.safetensors').unlink()
    with pytest.raises(ValueError, match='is not in lct_manifest.json, which was written for other weights'):
        llama_hf.load(folder)
    (folder / manifest.NAME).unlink()
    llama_hf.load(folder)
    assert manifest.edited(folder) == []


def test_a_damaged_manifest_is_named(written):
    path = written[0] / manifest.NAME
    content = path.read_bytes()
    for bit in np.random.default_rng(0).integers(0, 8 * len(content), 40).tolist():
        flip(path, bit)
        if path.read_bytes().split() != content.split():  # JSON does not mind other white space
            with pytest.raises(ValueError, match=f'{manifest.NAME}.*; copy the folder again, or delete'):
                llama_hf.check(written[0])
        path.write_bytes(content)


@pytest.mark.parametrize('entry', [
    None, {}, {'bytes': 1}, {'bytes': 1, 'crc32': None}, {'bytes': -1000, 'crc32': ''},
    {'bytes': 1, 'crc32': 'ABCDEFGH'}, {'bytes': 1, 'crc32': '00' * 8}])
def test_an_odd_manifest_is_one_sentence(written, tmp_path, entry):
    content = json.loads((written[0] / manifest.NAME).read_text())
    content['files']['config.json'] = entry
    (tmp_path / manifest.NAME).write_text(json.dumps({**content, 'crc32': manifest._crc32_of(content)}))
    with pytest.raises(ValueError, match=f'copy the folder again, or delete {manifest.NAME} to read it'):
        manifest.read(tmp_path)


def test_the_fingerprint_of_a_model_covers_all_bytes(written, tmp_path):
    config, params = llama_hf.load(written[0])
    llama_hf.save(tmp_path / 'model', config, params, dtype='float32')
    first = model_fingerprint(tmp_path / 'model', tmp_path)
    assert first['config.json rope_theta'] == '500000.0'
    (tmp_path / 'model' / manifest.NAME).unlink()
    (tmp_path / 'model_crc32.json').write_text('not JSON')
    assert model_fingerprint(tmp_path / 'model', tmp_path) == first  # read in full
    path = tmp_path / 'model' / 'model.safetensors'
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    flip(path, 8 * path.stat().st_size - 1)
    assert model_fingerprint(tmp_path / 'model', tmp_path)['all bytes'] != first['all bytes']
    flip(path, 8 * path.stat().st_size - 1)
    os.utime(path, ns=(times[0], times[1] + 1))
    assert model_fingerprint(tmp_path / 'model', tmp_path) == first
    os.utime(path, ns=times)
