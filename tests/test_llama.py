"""The model as a whole: causality, packing, meshes and remat policies."""

import contextlib
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from attention_cases import permutes, relative_error

from lct import sharding
from lct.models import llama
from lct.models.memory import REMAT
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.train.step import loss_and_grads

MESHES = [(1, 1, 1, 1), (1, 1, 8, 1), (2, 1, 4, 1), (1, 2, 2, 2), (1, 1, 4, 2)]


@pytest.fixture(scope='module')
def host_params():
    return jax.device_get(llama.init(tiny.UNTIED, jax.random.key(0)))


def placed(host_params, config=tiny.UNTIED):
    return jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), host_params, llama.abstract(config))


def compiled_step(host_params, mesh, config=tiny.UNTIED, memory=tiny.MEMORY, accumulation=1,
                  layout='zigzag'):
    """Loss and gradients on a mesh as host arrays, and the text of the program."""
    batch = tiny.batch(4, 64, ring_size=mesh[2], layout=layout)
    batch = {k: x.reshape(accumulation, 4 // accumulation, 64) for k, x in batch.items()}
    with jax.set_mesh(sharding.make_mesh(mesh)):
        params, batch, tables = placed(host_params, config), tiny.place(batch, (None,)), tiny.tables()
        step = jax.jit(loss_and_grads, static_argnums=(1, 4))
        step = step.lower(params, config, batch, tables, memory).compile()
        return jax.device_get(step(params, batch, tables)), step.as_text()


def sharded_loss_and_grads(*args, **kwargs):
    return compiled_step(*args, **kwargs)[0]


@pytest.fixture(scope='module')
def plain(host_params):
    """Loss and gradients by mesh, with nothing recomputed."""
    return functools.cache(functools.partial(sharded_loss_and_grads, host_params))


@pytest.fixture(scope='module')
def reference(host_params):
    """Dense, unsharded and unchunked: the loss straight from the logits."""
    batch = tiny.batch(4, 64)

    def loss(params):
        logits = llama.logits(params, tiny.UNTIED, batch['tokens'], batch['positions'], batch['segment_ids'])
        picked = jnp.take_along_axis(logits, batch['targets'][..., None], -1)[..., 0]
        nll = jax.nn.logsumexp(logits, -1) - picked
        return (nll * batch['loss_mask']).sum() / batch['loss_mask'].sum()

    return jax.device_get(jax.value_and_grad(loss)(jax.tree.map(jnp.asarray, host_params)))


def assert_same(ours, reference, limit=1e-5):
    assert abs(ours[0] - reference[0]) <= limit * abs(reference[0])
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours[1]), jax.tree.leaves(reference[1])):
        assert relative_error(a, b) < limit, jax.tree_util.keystr(path)


@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_loss_and_gradients_are_equal_on_every_mesh(mesh, plain, reference):
    assert_same(plain(mesh), reference)


@pytest.mark.parametrize(('remat', 'mesh'), [
    *((remat, (1, 1, 4, 2)) for remat in ('full', 'dots', 'attention', 'offload')),
    *itertools.product(('attention_output', 'offload_attention_output'), ((1, 1, 8, 1), (1, 2, 2, 2)))],
    ids=str)
def test_loss_and_gradients_are_equal_under_every_memory_policy(remat, mesh, host_params, plain):
    memory = dataclasses.replace(tiny.MEMORY, remat=remat, ffn_chunks=4)
    assert_same(sharded_loss_and_grads(host_params, mesh, memory=memory), plain(mesh), 1e-6)


@pytest.mark.parametrize(('mesh', 'layout', 'changes'), [
    ((1, 1, 1, 1), 'zigzag', {'remat': 'full', 'query_passes': 4}),
    ((1, 1, 8, 1), 'zigzag', {'remat': 'offload_attention_output', 'query_passes': 4}),
    ((1, 2, 2, 2), 'striped', {'remat': 'attention_output', 'query_passes': 2, 'ffn_chunks': 4}),
    ((1, 1, 4, 1), 'contiguous', {'attention': Attention('double_ring', 2, Chunks(8, 8)), 'query_passes': 2,
                                  'remat': 'offload'}),
], ids=str)
def test_passes_over_the_queries_change_neither_loss_nor_gradients(mesh, layout, changes, host_params, plain):
    memory = dataclasses.replace(tiny.MEMORY, **changes)
    ours = sharded_loss_and_grads(host_params, mesh, memory=memory, layout=layout)
    assert_same(ours, plain((1, 1, 1, 1) if mesh == (1, 1, 1, 1) else (1, 1, 8, 1)), 1e-6)


@pytest.mark.parametrize(('remat', 'products'), [
    ('full', 18), ('offload', 18), ('attention_output', 14), ('offload_attention_output', 14)])
def test_attention_runs_once_more_only_where_its_output_is_not_kept(remat, products, host_params, plain):
    """Products of attention in the compiled program, for full and for mixed tiles: 2 forward, 5 backward."""
    memory = dataclasses.replace(tiny.MEMORY, remat=remat)
    ours, text = compiled_step(host_params, (1, 1, 1, 1), memory=memory)
    assert_same(ours, plain((1, 1, 1, 1)), 1e-6)
    assert len(re.findall(r' dot\(.*op_name="[^"]*/ring_attention/', text)) == products


def test_policies_recompute_the_ring_or_keep_it_as_they_say(host_params):
    """Those with 'attention' keep its output, which no second forward needs; 'full' sends every block once
    more."""
    batch = {name: x[None] for name, x in tiny.batch(4, 64, ring_size=4).items()}
    sent = {}
    with jax.set_mesh(sharding.make_mesh((1, 1, 4, 1))):
        batch = tiny.place(batch, (None,))
        params = placed(host_params)
        for remat in REMAT:
            memory = dataclasses.replace(tiny.MEMORY, remat=remat)
            step = functools.partial(loss_and_grads, config=tiny.UNTIED, batch=batch, tables=tiny.tables())
            jaxpr = jax.make_jaxpr(functools.partial(step, memory=memory))(params).jaxpr
            sent[remat] = sum(times for _, times in permutes(jaxpr, 1))
    assert {sent[remat] for remat in ('attention', 'attention_output', 'offload_attention_output')} == {
        sent['none']}
    assert sent['none'] < sent['full'] == sent['offload'] == sent['dots']
    # forward: 3 ring passes of k, v and the tokens' positions and segments in each of 2 layers
    assert sent['full'] - sent['none'] == 2 * 3 * 3


def test_accumulated_micro_batches_equal_one_batch(host_params, reference):
    assert_same(sharded_loss_and_grads(host_params, (1, 1, 2, 1), accumulation=4), reference)


def test_a_token_moves_only_itself_and_what_follows_in_its_document(host_params):
    params = jax.tree.map(jnp.asarray, host_params)
    batch = tiny.batch(1, 32)
    cut = int((batch['segment_ids'][0] == 1).sum())

    @jax.jit
    @jax.grad
    def gradient(embeddings, target):
        probe = dataclasses.replace(params, embed=embeddings)
        tokens = jnp.arange(32)[None]  # every position has its own row of the embedding
        out = llama.hidden_states(
            probe, tiny.UNTIED, tokens, batch['positions'], batch['segment_ids'], tiny.tables())
        return out[0, target].sum()

    for target in (cut - 1, cut + 3):
        grad = np.abs(gradient(params.embed, target)[:32]).sum(1)
        first = 0 if target < cut else cut
        assert (grad[first : target + 1] > 0).all()
        assert (grad[:first] == 0).all() and (grad[target + 1 :] == 0).all()


def test_packed_documents_equal_each_alone(host_params):
    params = jax.tree.map(jnp.asarray, host_params)
    batch = tiny.batch(1, 64)
    cut = int((batch['segment_ids'][0] == 1).sum())
    packed = llama.logits(params, tiny.UNTIED, batch['tokens'], batch['positions'], batch['segment_ids'])
    alone = llama.logits(params, tiny.UNTIED, batch['tokens'][:, cut:62])
    np.testing.assert_allclose(packed[:, cut:62], alone, atol=2e-6)


def test_a_mesh_larger_than_the_devices_is_refused():
    with pytest.raises(ValueError, match=r'= 16 devices but this process has 8 .*such as \(1, 1, 8, 1\)'):
        sharding.make_mesh((1, 1, 16, 1))


def test_weights_that_do_not_divide_over_the_mesh_are_refused():
    with pytest.raises(ValueError, match='num_kv_heads 2 is not .* degree tensor = 4, .*; use a degree of 2'):
        llama.check_mesh(tiny.CONFIG, (1, 1, 1, 4))


@pytest.mark.parametrize('field, value, message', [
    ('num_kv_heads', 3, 'num_heads 4 is not a multiple of num_kv_heads 3'),
    ('head_dim', 7, 'head_dim 7 must be even'),
    ('num_layers', 0, 'num_layers must be a positive integer, got 0'),
    ('window', 0, 'window 0 must be an integer of at least 1'),
    ('window', 4.0, 'window 4.0 must be an integer of at least 1'),
])
def test_impossible_configs_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.CONFIG, **{field: value})


def test_bfloat16_activations_leave_parameters_gradients_and_loss_in_float32(host_params, reference):
    """The ring passes are bfloat16, the learned parameters are not."""
    batch = {name: x[None] for name, x in tiny.batch(4, 64, ring_size=4).items()}
    memory = dataclasses.replace(tiny.MEMORY, dtype='bfloat16')
    with jax.set_mesh(sharding.make_mesh((1, 1, 4, 1))):
        batch = tiny.place(batch, (None,))
        params = placed(host_params)
        step = functools.partial(loss_and_grads, config=tiny.UNTIED, batch=batch, tables=tiny.tables())
        jaxpr = jax.make_jaxpr(functools.partial(step, memory=memory))(params).jaxpr
        sent = {x.dtype for x, _ in permutes(jaxpr, 1)}
        loss, grads = jax.jit(functools.partial(step, memory=memory))(params)
    exact, exact_grads = reference
    assert sent == {jnp.dtype(name) for name in ('bfloat16', 'int32', 'float32')}  # float32: dk and dv alone
    assert 0 < abs(loss - exact) / exact < 1e-2
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(exact_grads)):
        assert ours.dtype == jnp.float32 and relative_error(ours, theirs) < 0.1


@pytest.mark.parametrize('mesh', [None, (1, 1, 4, 1)])
def test_a_frequent_token_of_a_bfloat16_embedding_keeps_its_gradient(mesh):
    tokens = np.full((4, 2048), 7, np.int32)
    tokens[:, ::2] = np.arange(1024) % 64
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(sharding.make_mesh(mesh)):
        embed = jnp.ones((64, 8), jnp.bfloat16)
        if mesh is not None:
            embed, tokens = (sharding.put(np.asarray(x), sharding.spec(letters))
                             for x, letters in ((embed, 'VD'), (tokens, 'BT')))
        grad = jax.grad(lambda embed: llama.embed_tokens(embed, tokens).astype(jnp.float32).sum())(embed)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=64)
    np.testing.assert_allclose(np.asarray(grad, np.float32), np.tile(counts[:, None], 8), rtol=1e-2)


@pytest.mark.parametrize('tokens, message', [
    (np.array([[1, 2, 3, 4, 5]]), '5 tokens a row do not divide over the 2 devices of the sequence axis'),
    (np.array([[1, 10**6]]), "ids from 1 to 1000000 are not all among the model's 0 to"),
    (np.array([[-1, 3]]), 'ids from -1 to 3'),
])
def test_logits_refuse_rows_and_ids_that_do_not_fit(tokens, message):
    with jax.set_mesh(sharding.make_mesh((1, 1, 2, 1))), pytest.raises(ValueError, match=message):
        llama.logits(None, tiny.UNTIED, tokens)
