"""The study of a real model: its controls, its paired differences, and what its config trains on."""

import json
import pathlib

import numpy as np
import pytest
import real_model
from test_comparison import write

from lct.cli.config import load_config, make_run
from lct.cli.corpus import read_documents
from lct.cli.paths import experiments_folder
from lct.weights import llama_hf

BASE = experiments_folder() / 'base'


@pytest.fixture
def trained(tmp_path):
    """The base as if it had been extended with YaRN to four times its length."""
    config = json.loads((BASE / 'config.json').read_text())
    config |= {'max_position_embeddings': 2048, 'rope_scaling': {
        'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 512}}
    config['rope_theta'] = config.pop('rope_parameters')['rope_theta']
    folder = tmp_path / 'trained'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_controls_are_the_base_with_and_without_the_scaling_of_the_trained_model(trained, tmp_path):
    folders = real_model.make_controls(BASE, trained, tmp_path / 'models')
    base, unscaled, scaled = map(llama_hf.read_config, (BASE, *folders.values()))
    assert unscaled.rope == base.rope
    assert scaled.rope == llama_hf.read_config(trained).rope
    assert unscaled.max_position_embeddings == scaled.max_position_embeddings == 2048
    for folder in folders.values():
        for path in BASE.glob('*.safetensors'):
            assert (folder / path.name).read_bytes() == path.read_bytes()


def test_a_model_that_is_not_longer_is_refused(tmp_path):
    with pytest.raises(ValueError, match='has 512 positions'):
        real_model.make_controls(BASE, BASE, tmp_path / 'models')


def test_the_config_excludes_what_the_study_evaluates_on():
    config = load_config(experiments_folder() / 'configs' / 'smollm2_16k.py')
    assert {path.name for path in real_model.TEXTS} == set(config.exclude)
    stages = make_run(config).stages
    assert {dict(stage.scaling)['factor'] for stage in stages} == {2.0}
    assert stages[-1].seq_len == 16384
    names = {pathlib.PurePath(one.name).name
             for one in read_documents(config.corpus, exclude=config.exclude)}
    assert 'pickle.py' in names and not names & set(config.exclude)


def test_scores_of_a_needle_grid_are_those_of_its_cells():
    grid = {'lengths': [8, 16], 'depths': [0.0, 1.0], 'scores': [[1.0, 0.0], [1.0, 1.0]],
            'samples': [[2, 2], [2, 2]]}
    found = real_model.by_length(grid)
    assert [found[8]['mean'], found[16]['mean']] == [100, 50]
    assert found[16]['count'] == 4
    assert [found[16]['low'], found[16]['high']] == pytest.approx([15.0, 85.0], abs=0.1)


def test_losses_are_means_over_eighths_of_the_native_length():
    found = real_model.bins(np.arange(32, dtype=np.float32), 16)
    assert found['edges'] == list(range(0, 33, 2))
    assert found['mean'] == [x + 0.5 for x in range(0, 32, 2)]


def test_differences_pair_the_prompts_that_both_answered(tmp_path):
    write(tmp_path / 'scaled', range(4))
    write(tmp_path / 'trained', range(16), lengths=(1024,))
    (length, found), = real_model.paired(tmp_path / 'scaled', tmp_path / 'trained')['ruler'].items()
    assert (length, found['count'], found['mean']) == (1024, 20, pytest.approx(60))
    assert 30 < found['low'] < 60 < found['high'] < 90
