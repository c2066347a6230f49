"""Saved folders appear complete or not at all, even if the writer fails or is killed."""

import json
import os
import shutil

import jax.numpy as jnp
import pytest
import tiny_hf
from tiny import leaves_equal

from lct.weights import folders, llama_hf


@pytest.fixture
def folder(tmp_path):
    """The GQA case as a folder."""
    tiny_hf.write_case('gqa', tmp_path / 'model')
    return tmp_path / 'model'


def test_save_copies_the_tokenizer_and_its_ids(folder, tmp_path):
    config, params = llama_hf.load(folder)
    (folder / 'tokenizer.json').write_text('{}')
    (folder / 'generation_config.json').write_text('{"eos_token_id": 2}')
    llama_hf.save(tmp_path / 'saved', config, params, tokenizer_from=folder, card='# A model\n')
    assert sorted(os.listdir(tmp_path / 'saved')) == [
        'README.md', 'config.json', 'generation_config.json', 'lct_manifest.json', 'model.safetensors',
        'tokenizer.json']
    values = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert (values['bos_token_id'], values['eos_token_id'], values['torch_dtype']) == (1, 2, 'bfloat16')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='tokenizer_from'):
        llama_hf.save(tmp_path / 'other', config, params, tokenizer_from=tmp_path / 'empty')


def test_save_replaces_a_folder_only_with_overwrite(folder, tmp_path):
    config, params = llama_hf.load(folder)
    with pytest.raises(ValueError, match='overwrite=True'):
        llama_hf.save(folder, config, params)
    (folder / 'stale.txt').write_text('old')
    llama_hf.save(folder, config, params, dtype='float32', overwrite=True)
    assert not (folder / 'stale.txt').exists()
    assert leaves_equal(llama_hf.load(folder)[1], params)
    assert os.listdir(tmp_path) == ['model']


def test_failed_save_leaves_nothing_behind(folder, tmp_path):
    config, params = llama_hf.load(folder)
    before = sorted(os.listdir(folder))
    broken = params.replace(final_norm=params.final_norm.at[0].set(jnp.nan))
    wide = params.replace(final_norm=params.final_norm.at[0].set(1e6))
    for bad, dtype in ((broken, 'bfloat16'), (wide, 'float16')):
        with pytest.raises(ValueError, match='final_norm'):
            llama_hf.save(tmp_path / 'saved', config, bad, dtype=dtype)
        with pytest.raises(ValueError, match='final_norm'):
            llama_hf.save(folder, config, bad, dtype=dtype, overwrite=True)
    assert os.listdir(tmp_path) == ['model'] and sorted(os.listdir(folder)) == before


def test_leftovers_of_a_killed_writer_are_cleared_by_the_next_one(folder, tmp_path):
    config, params = llama_hf.load(folder)
    (tmp_path / '.model.writing-0123abcd').mkdir()
    (tmp_path / '.model.writing-0123abcd' / 'config.json').write_text('half')
    (tmp_path / '.model.writing-notes').mkdir()
    os.rename(folder, tmp_path / '.model.replaced-89abcdef')  # killed between the two renames
    with pytest.raises(ValueError, match='overwrite=True'):
        llama_hf.save(folder, config, params)
    assert sorted(os.listdir(tmp_path)) == ['.model.writing-notes', 'model']
    assert leaves_equal(llama_hf.load(folder)[1], params)
    shutil.copytree(folder, tmp_path / '.model.replaced-89abcdef')  # killed before the removal
    llama_hf.save(folder, config, params, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ['.model.writing-notes', 'model']


def test_a_living_writer_is_left_alone(tmp_path):
    with folders.atomic_folder(tmp_path / 'model') as first:
        (tmp_path / 'other').write_text('')
        with folders.atomic_folder(tmp_path / 'model'):
            assert os.path.isdir(first)
        shutil.rmtree(tmp_path / 'model')
    assert sorted(os.listdir(tmp_path)) == ['model', 'other']


def test_files_without_posix_fallocate(folder, tmp_path, monkeypatch):
    config, params = llama_hf.load(folder)
    monkeypatch.delattr(os, 'posix_fallocate', raising=False)
    llama_hf.save(tmp_path / 'saved', config, params, dtype='float32')
    assert leaves_equal(llama_hf.load(tmp_path / 'saved')[1], params)


def test_save_checks_params_against_the_config(folder, tmp_path):
    config, params = llama_hf.load(folder)
    with pytest.raises(ValueError, match='lm_head'):
        llama_hf.save(tmp_path / 'saved', config, params.replace(lm_head=None))
    with pytest.raises(ValueError, match='final_norm'):
        llama_hf.save(tmp_path / 'saved', config, params.replace(final_norm=params.final_norm[:-1]))
    with pytest.raises(ValueError, match='int8'):
        llama_hf.save(tmp_path / 'saved', config, params, dtype='int8')


def test_targets_that_cannot_be_written_are_refused(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='not a folder'):
        llama_hf.check_writable(tmp_path / 'file', 1)
    with pytest.raises(ValueError, match='does not exist'):
        llama_hf.check_writable(tmp_path / 'no' / 'model', 1)
    with pytest.raises(ValueError, match='GB free'):
        llama_hf.check_writable(tmp_path / 'model', 1 << 62)

    def refuse(*_):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr(os, 'mkdir', refuse)
    with pytest.raises(ValueError, match='not writable'):
        llama_hf.check_writable(tmp_path / 'model', 1)


def test_no_space_is_an_error_before_any_work(folder, tmp_path, monkeypatch):
    config, params = llama_hf.load(folder)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage._replace(free=1000))
    with pytest.raises(ValueError, match='GB free'):
        llama_hf.save(tmp_path / 'saved', config, params)
    assert os.listdir(tmp_path) == ['model']
