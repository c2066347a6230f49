"""Adapters: the base model at their start, the merged model once trained, and nothing else is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training
from attention_cases import relative_error

from lct import sharding
from lct.models import llama, lora
from lct.models.flops import matmul_params, train_flops
from lct.models.llama_sizes import LLAMA3_8B
from lct.train import loop, optimizer, stages, state, stopping
from lct.train.step import loss_and_grads
from lct.weights import llama_hf

CONFIG = dataclasses.replace(tiny_training.CONFIG, tie_embeddings=False)
ADAPTER = lora.Adapter(rank=2, alpha=4.0)
STAGE = stages.Stage(name='only', seq_len=32, num_steps=6, batch_size=2, learning_rate=3e-3,
                     memory=tiny.MEMORY)
RUN = loop.Run(stages=(STAGE,), adapter=ADAPTER, checkpoint_every=100)


@pytest.fixture(scope='module', autouse=True)
def no_benchmark():
    """The peak of the machine, measured at every start, takes longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, 'measured_peak', lambda dtype: 1e12)
        yield


def trained_far(config, adapter, params, size=0.1):
    """Trained and frozen, with adapters and norms that have moved far from their start."""
    rng = np.random.default_rng(0)
    whole, frozen = lora.freeze(params, adapter)
    trained = lora.Trained(lora.init(config, adapter), whole)
    return jax.tree.map(lambda x: x + size * rng.standard_normal(x.shape, np.float32), trained), frozen


def start():
    """The base model on the current mesh."""
    return llama.init(CONFIG, jax.random.key(0))


def train(workdir, stop_requested=()):
    return loop.train(RUN, CONFIG, start, tiny_training.mixture(), workdir, stop_requested)


@pytest.fixture(scope='module')
def far():
    return trained_far(CONFIG, ADAPTER, start())


@pytest.fixture(scope='module')
def exported(far, tmp_path_factory):
    """far merged, written as a Hugging Face folder and read again."""
    folder = tmp_path_factory.mktemp('merged') / 'model'
    llama_hf.save(folder, CONFIG, lora.merge(*far), dtype='float32')
    return llama_hf.load(folder)[1]


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The merged model of a whole run."""
    return jax.device_get(train(tmp_path_factory.mktemp('lora'))[1])


def test_the_share_of_llama3_8b_is_below_two_percent():
    total = llama.num_params(LLAMA3_8B)
    attention = 32 * 8 * (2 * (4096 + 4096) + 2 * (4096 + 1024))
    norms = 4096 * (2 * 32 + 1)
    assert lora.num_trained(LLAMA3_8B, lora.Adapter()) == attention + norms == 7_081_984
    assert 7_081_984 / total < 0.001
    longlora = lora.Adapter(also_train=('embed', 'attn_norm', 'mlp_norm', 'final_norm'))
    assert lora.num_trained(LLAMA3_8B, longlora) == 7_081_984 + 128256 * 4096
    assert 0.066 < lora.num_trained(LLAMA3_8B, longlora) / total < 0.067


def test_initial_adapters_change_nothing():
    params = start()
    whole, frozen = lora.partition(params, ADAPTER)
    merged = lora.merge(lora.Trained(lora.init(CONFIG, ADAPTER), whole), frozen)
    assert tiny_training.digest(merged) == tiny_training.digest(params)


def test_a_frozen_weight_costs_two_thirds_of_a_trained_one():
    size, rank, layers = CONFIG, ADAPTER.rank, CONFIG.num_layers
    heads, kv_heads = size.num_heads * size.head_dim, size.num_kv_heads * size.head_dim
    low_rank = layers * rank * (2 * (size.embed_dim + heads) + 2 * (size.embed_dim + kv_heads))
    frozen, pairs = matmul_params(CONFIG), 12 * layers * heads * 55
    assert train_flops(CONFIG, 10, 55, ADAPTER) == 10 * (4 * frozen + 6 * low_rank) + pairs
    also = dataclasses.replace(ADAPTER, also_train=('embed', 'lm_head', 'w_up', 'final_norm'))
    whole = size.embed_dim * (size.vocab_size + layers * size.mlp_dim)
    assert train_flops(CONFIG, 10, 55, also) == 10 * (4 * frozen + 2 * whole + 6 * low_rank) + pairs


def test_the_merged_export_is_the_adapter_model(far, exported):
    trained, frozen = far
    batch = tiny.batch(2, 32)
    tokens = [batch[name] for name in ('tokens', 'positions', 'segment_ids')]

    @jax.jit
    def logits(trained):
        args = frozen, CONFIG.architecture(), *tokens, tiny.tables(CONFIG), tiny.MEMORY
        return jnp.einsum('BTD,DV->BTV', lora.hidden_states(trained, *args), frozen.lm_head)

    merged = llama.logits(exported, CONFIG, *tokens)
    assert relative_error(logits(trained), merged) < 1e-5
    initial = lora.Trained(lora.init(CONFIG, ADAPTER), trained.whole)
    assert relative_error(logits(initial), merged) > 0.1  # or equality would be vacuous


def test_loss_and_gradients_on_a_mesh_follow_from_those_of_the_merged_model(far, exported):
    """The chain rule: d down = scale * dW up^T and d up = scale * down^T dW, with dW of the merged weight."""
    step = jax.jit(loss_and_grads, static_argnums=(1, 4))
    memory = dataclasses.replace(tiny.MEMORY, remat='full')
    batch = {name: x[None] for name, x in tiny.batch(4, 32).items()}
    loss, full = jax.device_get(step(exported, CONFIG.architecture(), batch, tiny.tables(CONFIG), memory))
    with jax.set_mesh(sharding.make_mesh((1, 2, 2, 2))):
        trained, frozen = state.move(jax.device_get(far), lora.abstract(CONFIG, ADAPTER))
        batch = tiny.place({name: x[None] for name, x in tiny.batch(4, 32, ring_size=2).items()}, (None,))
        got_loss, got = jax.device_get(
            step(trained, CONFIG.architecture(), batch, tiny.tables(CONFIG), memory, frozen))
        assert lora.merge(trained, frozen).layers.wo.sharding.spec == sharding.weight_spec('LNHD')
    assert abs(got_loss - loss) < 1e-5 * loss
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got.whole),
                            jax.tree.leaves(lora.partition(full, ADAPTER)[0]), strict=True):
        assert relative_error(a, b) < 1e-5, path
    for name, (reads, writes) in lora.ADAPTED.items():
        adapter, mine = getattr(far[0].adapters, name), getattr(got.adapters, name)
        weight = adapter.scale * getattr(full.layers, name)
        down = np.einsum(f'L{reads}{writes},LR{writes}->L{reads}R', weight, adapter.up)
        up = np.einsum(f'L{reads}R,L{reads}{writes}->LR{writes}', adapter.down, weight)
        assert relative_error(mine.down, down) < 1e-5 and relative_error(mine.up, up) < 1e-5, name


def test_training_moves_only_what_is_listed(trained):
    with jax.set_mesh(sharding.make_mesh(STAGE.mesh)):
        base = jax.device_get(start())
    moved = {jax.tree_util.keystr(path): not np.array_equal(a, b) for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(trained), strict=True)}
    listed = {'.final_norm', *(f'.layers.{name}' for name in ('attn_norm', 'mlp_norm', *lora.ADAPTED))}
    assert {path for path, yes in moved.items() if yes} == listed


def test_checkpoints_hold_adapters_alone_and_a_stopped_run_ends_with_the_same_bits(
        trained, tmp_path, monkeypatch):
    stop_requested, original = [], loop.train_step

    def then_stop(train_state, *args):
        if not stop_requested and int(train_state.step) == 3:
            stop_requested.append('SIGTERM')
        return original(train_state, *args)

    monkeypatch.setattr(loop, 'train_step', then_stop)
    with pytest.raises(stopping.Interrupted, match='saved step 4 of 6'):
        train(tmp_path, stop_requested)
    size = sum(path.stat().st_size for path in (tmp_path / 'checkpoints' / '4').rglob('*') if path.is_file())
    assert size < 4 * llama.num_params(CONFIG)  # less than the model without its optimizer
    params = train(tmp_path)[1]
    assert tiny_training.digest(jax.device_get(params)) == tiny_training.digest(trained)


def test_moments_only_for_what_is_trained_and_the_rest_in_its_own_dtype():
    adapter = dataclasses.replace(ADAPTER, frozen_dtype='bfloat16')
    tx = optimizer.make(optimizer.OptimizerConfig())
    made = state.create(start(), tx, CONFIG, adapter)
    moments = sum(x.size for x in jax.tree.leaves(made.opt_state) if x.ndim)
    assert moments == 2 * lora.num_trained(CONFIG, adapter)
    assert {x.dtype for x in jax.tree.leaves(made.frozen)} == {jnp.dtype('bfloat16')}
    assert {x.dtype for x in jax.tree.leaves(made.params)} == {jnp.dtype('float32')}
    wanted = state.abstract(CONFIG, tx, jnp.dtype('float32'), adapter)
    described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    assert described(made) == described(wanted)


@pytest.mark.parametrize('fields, message', [
    ({'rank': 0}, 'rank 0 must be a positive integer'),
    ({'alpha': 0.0}, 'alpha 0.0 must be a positive number'),
    ({'also_train': ('wq',)}, "'wq' has an adapter; choose from embed"),
    ({'also_train': ('norm',)}, "'norm' is not a parameter"),
    ({'frozen_dtype': 'int4'}, "'float32', 'bfloat16', 'int8' or None"),
])
def test_impossible_adapters_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        lora.Adapter(**fields)


def test_a_tied_head_is_the_embedding():
    with pytest.raises(ValueError, match="'lm_head' is the embedding"):
        lora.num_trained(tiny.CONFIG, lora.Adapter(also_train=('lm_head',)))
