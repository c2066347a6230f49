"""Checkpoints: fingerprints of arrays, falling back to an older checkpoint, saves that fail."""

import json
import os
import pathlib
import re
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.train import checkpoint, fingerprints

MESHES = [(1, 1, 1, 1), (1, 8, 1, 1), (2, 2, 1, 2)]


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {'wide': rng.normal(size=(8, 24, 1040)).astype(np.float32),
            'narrow': rng.normal(size=(3, 1000, 50)).astype(np.float32),
            'half': jnp.asarray(rng.normal(size=(64, 16)), jnp.bfloat16),
            'bytes': rng.integers(-128, 128, (8, 4), np.int8), 'step': np.int32(7)}


def place(tree, mesh):
    """The tree on a mesh, all dims that divide sharded."""
    with jax.set_mesh(sharding.make_mesh(mesh)):
        specs = {'wide': P('fsdp', ('data', 'sequence'), 'tensor'), 'narrow': P(None, 'fsdp'),
                 'half': P('tensor', 'fsdp'),
                 'bytes': P(('data', 'fsdp')), 'step': P()}
        return {name: jax.device_put(x, NamedSharding(jax.sharding.get_mesh(), specs[name]))
                for name, x in tree.items()}


def reference(x):
    """The formula over the whole array in numpy."""
    def index_hash(dim, size):
        h = (np.arange(1, size + 1, dtype=np.uint32)) * np.uint32(0x9E3779B1 + 2 * dim)
        h = (h ^ (h >> 16)) * np.uint32(0x21F0AAAD)
        h = (h ^ (h >> 15)) * np.uint32(0xD35A2D97)
        return (h ^ (h >> 15)) << 1

    x = np.asarray(x)
    bits = x.view(f'uint{8 * x.dtype.itemsize}').astype(np.uint32)
    total = np.zeros(x.shape, np.uint32)
    for dim, size in enumerate(x.shape):
        total += index_hash(dim, size).reshape([-1 if d == dim else 1 for d in range(x.ndim)])
    crc = fingerprints.zlib.crc32(f'{x.dtype.name}{x.shape}'.encode())
    return f'{int(np.sum((bits ^ (bits >> 16)) * (total | 1), dtype=np.uint64) + crc) % 2**32:08x}'


def test_a_fingerprint_is_the_same_on_every_mesh():
    expected = {name: reference(x) for name, x in arrays().items()}
    for mesh in MESHES:
        assert fingerprints.fingerprints(place(arrays(), mesh)) == expected
    assert fingerprints.fingerprints(arrays()) == expected


def test_a_fingerprint_changes_with_bits_places_and_dtype(monkeypatch):
    rng, x = np.random.default_rng(0), arrays()['wide']
    before = reference(x)
    for _ in range(50):
        flipped = x.copy()
        flipped.reshape(-1).view(np.uint32)[rng.integers(x.size)] ^= np.uint32(1 << rng.integers(32))
        assert reference(flipped) != before
    for dim in range(x.ndim):
        assert reference(np.flip(x, dim)) != before
    signs = np.where(rng.random(x.shape) < 0.5, -1, 1).astype(np.float32)
    assert reference(signs[::-1]) != reference(signs)
    zeros = [jnp.zeros(4, dtype) for dtype in (jnp.float32, jnp.int32, jnp.bfloat16, jnp.int8, jnp.bool_)]
    assert len(set(fingerprints.fingerprints([*zeros, jnp.zeros((2, 2))]).values())) == 6
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')  # the sum that other devices compute
    jax.clear_caches()
    assert fingerprints.fingerprints({'x': x})['x'] == before
    jax.clear_caches()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the checkpoints 2, 4 and 6 of three states."""
    folder = tmp_path_factory.mktemp('saved') / 'checkpoints'
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    for step in (2, 4, 6):
        assert checkpoints.save(step, place(arrays(step), (1, 8, 1, 1)), {'cursor': {'row': step}}) is None
    checkpoints.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / 'checkpoints'))


def restore(folder, **changed):
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
              for name, x in place({**arrays(), **changed}, (2, 2, 1, 2)).items()}
    checkpoints = checkpoint.Checkpoints(folder, keep=3)
    try:
        return checkpoints.restore_newest_valid(lambda step: target)
    finally:
        checkpoints.close()


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def data_file(folder, step):
    """The file that holds the arrays of a step."""
    return max((folder / str(step) / 'state').rglob('*'), key=lambda path: path.stat().st_size)


def test_the_newest_checkpoint_is_restored_on_another_mesh(folder):
    restored = restore(folder)
    assert restored.step == 6 and restored.record['cursor'] == {'row': 6} and restored.warnings == []
    assert jax.tree.all(jax.tree.map(np.array_equal, restored.state, arrays(6)))
    assert restore(folder / 'new') is None


def test_damaged_checkpoints_are_set_aside_for_the_newest_valid_one(folder):
    flip(data_file(folder, 6), 8 * 100_000)
    record = folder / '4' / 'record' / 'metadata'
    record.write_text(record.read_text().replace('"row": 4', '"row": 5'))
    restored = restore(folder)
    assert restored.step == 2 and jax.tree.all(jax.tree.map(np.array_equal, restored.state, arrays(2)))
    first, second = restored.warnings
    assert re.search(r'checkpoints/6 is damaged .item state is not what was written: array (wide|narrow) ',
                     first)
    assert 'checkpoints/4 is damaged (item record: its content does not match' in second
    assert '6.damaged and the run continues from step 2' in first
    assert sorted(os.listdir(folder)) == ['2', '4.damaged', '6.damaged']
    assert restore(folder).warnings == []


def test_without_a_valid_checkpoint_nothing_is_renamed(folder):
    for step in (2, 4, 6):
        shutil.rmtree(folder / str(step) / 'state')
    with pytest.raises(ValueError, match='no checkpoint under .* can be restored .step 6: item state: '):
        restore(folder)
    assert sorted(os.listdir(folder)) == ['2', '4', '6']


@pytest.mark.parametrize(('changed', 'message'), [
    ({'half': np.zeros((64, 16), np.float32)}, r'half bfloat16 \[64, 16\] in place of float32 \[64, 16\]'),
    ({'half': jnp.zeros((64, 8), jnp.bfloat16)}, r'half bfloat16 \[64, 16\] in place of bfloat16 \[64, 8\]'),
])
def test_another_dtype_or_shape_is_refused_and_no_damage(folder, changed, message):
    with pytest.raises(ValueError, match=message):
        restore(folder, **changed)
    assert sorted(os.listdir(folder)) == ['2', '4', '6']


def test_missing_and_extra_arrays_are_named():
    wanted = {'a': {'dtype': 'int8', 'shape': [1]}}
    assert fingerprints.differences({'b': {'dtype': 'int8', 'shape': [2]}}, wanted) == (
        'a nothing in place of int8 [1], b int8 [2] in place of nothing')


def test_a_checkpoint_saved_without_fingerprints_is_accepted_with_a_line(folder):
    path = folder / '6' / 'record' / 'metadata'
    path.write_text(json.dumps({'cursor': json.loads(path.read_text())['cursor'], 'seconds': 1.0}))
    restored = restore(folder)
    assert restored.step == 6 and 'saved without fingerprints' in restored.warnings[0]
    with pytest.raises(ValueError, match='half bfloat16'):
        restore(folder, half=np.zeros((64, 16), np.float32))


def test_failed_saves_warn_leave_nothing_behind_and_end_the_run_in_the_end(folder, monkeypatch):
    manager = checkpoint.ocp.CheckpointManager
    checkpoints, finalize = checkpoint.Checkpoints(folder, keep=3, max_failed=2), manager._finalize

    def full(self, step, *args):
        self._wait_for_checkpointers()
        os.rename(self.directory / str(step), self.directory / f'{step}.orbax-checkpoint-tmp')
        raise OSError('No space left on device\nand more')

    def save(step, fails):
        monkeypatch.setattr(manager, '_finalize', full if fails else finalize)
        assert checkpoints.save(step, place(arrays(), (1, 1, 1, 1)), {'cursor': {}}) is None
        return checkpoints.wait()

    assert save(8, fails=True) == (
        'the checkpoint of step 8 could not be written (No space left on device); step 6 is on disk')
    assert sorted(os.listdir(folder)) == ['2', '4', '6'] and checkpoints.latest() == 6
    assert save(8, fails=False) is None  # there is room again
    assert sorted(os.listdir(folder)) == ['4', '6', '8']
    assert 'could not be written' in save(10, fails=True)
    with pytest.raises(checkpoint.Unwritable, match='2 checkpoints in a row .* step 8 is on disk') as ended:
        save(12, fails=True)
    assert ended.value.exit_status == 74
    checkpoints.close()


class Before(struct.PyTreeNode):
    """Parameters as they were when a checkpoint was saved."""

    weight: Any


class After(struct.PyTreeNode):
    """The same with an optional one, which this model does not have."""

    weight: Any
    bias: Any = None


def test_arrays_saved_before_there_were_optional_parameters_are_restored(tmp_path):
    saved = {'params': Before(jnp.arange(3.0)), 'step': jnp.array(7)}
    checkpoint.save_arrays(tmp_path / 'arrays', saved)
    target = {**saved, 'params': After(saved['params'].weight)}
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target)
    restored = checkpoint.restore_arrays(tmp_path / 'arrays', target)
    assert isinstance(restored['params'], After) and restored['params'].bias is None
    assert restored['params'].weight.tolist() == [0, 1, 2] and restored['step'] == 7
    with pytest.raises(checkpoint.Damaged, match='does not hold the arrays'):
        checkpoint.restore_arrays(tmp_path / 'arrays', {**target, 'params': After(*[target['step']] * 2)})
