"""Training state in host memory: the same numbers, and checkpoints of either placement."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training

from lct import sharding
from lct.models import llama, offload
from lct.train import optimizer, stages, state
from lct.train.checkpoint import Checkpoints
from lct.train.step import train_step

TX = optimizer.make(optimizer.OptimizerConfig(weight_decay=0.1, clip_norm=0.5, eps=1e-4))
SCHEDULE = optimizer.schedule((stages.Stage('', 32, 40, learning_rate=1e-2),))


def train(mesh, offload_state):
    """(TrainState after two steps and a bad one, all losses) of a mesh; two micro-batches a step."""
    memory = dataclasses.replace(tiny.MEMORY, remat='full', offload_state=offload_state)
    with jax.set_mesh(sharding.make_mesh(mesh)):
        params = llama.init(tiny.UNTIED, jax.random.key(0))
        train_state = state.create(params, TX, offload_state=offload_state)
        losses = []
        for bad in (False, False, True):
            rows = tiny.batch(8, 32, ring_size=mesh[2])
            batch = {name: np.stack([x[:4], x[4:]]) for name, x in rows.items()}
            batch['loss_mask'][1, 0, 3] *= np.nan if bad else 1
            train_state, metrics = train_step(
                train_state, tiny.place(batch, (None,)), tiny.tables(), tiny.UNTIED.architecture(), memory,
                TX, SCHEDULE)
            losses.append(float(metrics['loss']))
        assert float(metrics['skipped']) == 1 and not np.isfinite(losses.pop())
    return train_state, losses


@pytest.fixture(scope='module')
def plain():
    return train((1, 1, 1, 1), 'none')


@pytest.mark.parametrize(('mesh', 'offload_state'), [((1, 1, 1, 1), 'moments'), ((1, 2, 2, 2), 'all')])
def test_steps_are_those_on_the_device(mesh, offload_state, plain):
    trained, losses = train(mesh, offload_state)
    np.testing.assert_allclose(losses, plain[1], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), trained, plain[0])
    on_host = lambda tree: {offload.is_on_host(x) for x in jax.tree.leaves(tree) if x.ndim}
    assert on_host(trained.opt_state) == {True} and on_host(trained.params) == {offload_state == 'all'}
    with jax.set_mesh(sharding.make_mesh(mesh)):
        assert on_host(state.model(trained)) == {False}
        target = state.abstract(tiny.UNTIED, TX, jnp.float32, offload_state=offload_state)
    assert jax.tree.map(lambda x: x.sharding, trained) == jax.tree.map(lambda x: x.sharding, target)


def test_checkpoints_are_restored_onto_either_placement(tmp_path):
    """And onto another mesh, where a state also moves between two stages."""
    def target(mesh, offload_state):
        with jax.set_mesh(sharding.make_mesh(mesh)):
            return state.abstract(tiny.CONFIG, TX, jnp.float32, offload_state=offload_state)

    with jax.set_mesh(sharding.make_mesh((1, 1, 8, 1))):
        made = state.create(llama.init(tiny.CONFIG, jax.random.key(0)), TX, offload_state='all')
    before = tiny_training.digest(jax.device_get(made))
    checkpoints = Checkpoints(tmp_path)
    for step, (mesh, offload_state) in enumerate(
            [((1, 2, 2, 2), 'all'), ((1, 1, 1, 1), 'none'), ((1, 1, 8, 1), 'moments')], 1):
        wanted = target(mesh, offload_state)
        assert checkpoints.save(step, made, {'cursor': 0}) is None and checkpoints.wait() is None
        moved = state.move(made, wanted)
        made = checkpoints.restore_newest_valid(lambda _, wanted=wanted: wanted).state
        for found in (moved, made):
            assert tiny_training.digest(jax.device_get(found)) == before
            assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, wanted)
    checkpoints.close()


def test_what_may_be_offloaded_is_named():
    with pytest.raises(ValueError, match="offload_state 'weights' is not one of none, moments, all"):
        dataclasses.replace(tiny.MEMORY, offload_state='weights')
