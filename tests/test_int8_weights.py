"""Frozen weights in 8 bits: GGML's Q8_0 to the bit, the dequantized model's loss and gradients, a layer at a
time."""

import contextlib
import dataclasses
import math

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tiny_training
from attention_cases import relative_error

from lct import sharding
from lct.models import int8_weights, llama, lora
from lct.models.llama_sizes import LLAMA3_8B
from lct.ops import int8_blocks
from lct.train import loop, stages, state, stopping
from lct.train.step import loss_and_grads
from lct.weights import llama_hf

CONFIG = dataclasses.replace(
    tiny_training.CONFIG, embed_dim=128, head_dim=32, mlp_dim=192, tie_embeddings=False)
ADAPTER = lora.Adapter(rank=2, alpha=4.0, frozen_dtype='int8')
MEMORY = dataclasses.replace(tiny.MEMORY, remat='full')


def start(convert=None, config=CONFIG):
    """The base model on the current mesh, as a loader returns it."""
    params = llama.init(config, jax.random.key(0))
    return params if convert is None else int8_weights.map_named(convert, params)


def test_blocks_are_those_of_ggml():
    kind = gguf.GGMLQuantizationType.Q8_0
    weights = np.random.default_rng(0).standard_normal((48, 256), np.float32) ** 3
    weights[3, 64:96] = 0
    packed = gguf.quants.quantize(weights, kind).reshape(48, 8, 34)  # a float16 and 32 integers
    blocks = jax.jit(int8_blocks.quantize, static_argnums=1)(weights, -1)
    np.testing.assert_array_equal(blocks.scales, packed[..., :2].copy().view(np.float16)[..., 0])
    np.testing.assert_array_equal(blocks.values, packed[..., 2:].view(np.int8).reshape(48, 256))
    read = gguf.quants.dequantize(packed.reshape(48, -1), kind)
    np.testing.assert_array_equal(int8_blocks.dequantize(blocks, -1), read)
    for x, y in zip(int8_blocks.quantize(read, -1), blocks):  # what a file holds is kept to the bit
        np.testing.assert_array_equal(x, y)


def test_loss_and_gradients_on_a_mesh_are_those_of_the_dequantized_weights():
    config = dataclasses.replace(CONFIG, tie_embeddings=True)
    batch = {name: x[None] for name, x in tiny.batch(2, 32, ring_size=2).items()}
    step = jax.jit(loss_and_grads, static_argnums=(1, 4))
    with jax.set_mesh(sharding.make_mesh((1, 2, 2, 2))):
        whole, frozen = lora.freeze(start(config=config), ADAPTER)
        trained = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape),
                               jax.device_get(lora.Trained(lora.init(config, ADAPTER), whole)))
        trained = state.move(trained, lora.abstract(config, ADAPTER)[0])
        args = config.architecture(), tiny.place(batch, (None,)), tiny.tables(config), MEMORY
        loss, grads = jax.device_get(step(trained, *args, frozen))
        plain = int8_weights.dequantize(frozen, 'float32')
        wanted, wanted_grads = jax.device_get(step(trained, *args, plain))
    assert abs(loss - wanted) < 1e-6 * wanted
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted_grads),
                            strict=True):
        assert np.abs(b).max() > 0 and relative_error(a, b) < 1e-6, path


def test_one_layer_is_dequantized_at_a_time():
    config = dataclasses.replace(CONFIG, mlp_dim=1024, num_layers=16)
    trained, frozen = lora.abstract(config, ADAPTER)
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in tiny.batch(1, 16).items()}
    layers = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(lora.partition(
        llama.abstract(config), ADAPTER)[1].layers))

    def temporaries(remat):
        memory = dataclasses.replace(MEMORY, remat=remat)
        lowered = jax.jit(loss_and_grads, static_argnums=(1, 4)).lower(
            trained, config.architecture(), batch, tiny.tables(config), memory, frozen)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries('full') < 4 / 16 * layers
    assert temporaries('none') > layers  # which is why it is refused
    with pytest.raises(ValueError, match="'int8' with remat 'none' would keep the dequantized weights"):
        ADAPTER.check(config, (1, 1, 1, 1), tiny.MEMORY)


@pytest.mark.parametrize(('degrees', 'message'), [
    ((1, 1, 256, 1), r'cuts embed_dim 4096 into blocks of 32 of each of 256 devices of fsdp \* sequence'),
    ((1, 1, 128, 1), None)])
def test_a_block_does_not_straddle_devices(degrees, message):
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        ADAPTER.check(LLAMA3_8B, degrees, llama.Memory())
    with pytest.raises(ValueError, match='cuts head_dim 8 into blocks of 32, which does not come out even'):
        ADAPTER.check(tiny.UNTIED, (1, 1, 1, 1), llama.Memory())


def test_weights_are_quantized_as_they_are_loaded(tmp_path):
    params = start()
    llama_hf.save(tmp_path / 'model', CONFIG, params, dtype='float32')
    loaded = llama_hf.load(tmp_path / 'model', convert=lora.freezer(ADAPTER))[1]
    whole, frozen = lora.freeze(params, ADAPTER)
    assert tiny.leaves_equal(lora.freeze(loaded, ADAPTER), (whole, frozen))
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype('int8'), jnp.dtype('float16')}
    assert sum(x.nbytes for x in jax.tree.leaves(frozen)) == 17 / 16 * sum(
        x.size for x in jax.tree.leaves(lora.partition(params, ADAPTER)[1]))


def test_a_stopped_run_ends_with_the_same_bits_and_is_merged_into_the_original(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, 'measured_peak', lambda dtype: 1e12)
    stage = stages.Stage('only', seq_len=32, num_steps=4, batch_size=2, learning_rate=3e-3, memory=MEMORY)
    run, stop_requested, original = loop.Run((stage,), adapter=ADAPTER), [], loop.train_step

    def without_original(convert=None):
        if convert is None:
            raise FileNotFoundError('the disk is gone')
        return start(convert)

    def then_stop(train_state, *args):
        if int(train_state.step) == 1:
            stop_requested.append('SIGTERM')
        return original(train_state, *args)

    def train(name, params):
        result = loop.train(run, CONFIG, params, tiny_training.mixture(), tmp_path / name, stop_requested)[1]
        return jax.device_get(result), capsys.readouterr().out

    dequantized, log = train('a', without_original)
    assert 'merged into the dequantized weights, because the original ones cannot be read: the disk' in log
    monkeypatch.setattr(loop, 'train_step', then_stop)
    with pytest.raises(stopping.Interrupted, match='saved step 2 of 4'):
        train('b', start)
    monkeypatch.setattr(loop, 'train_step', original)
    stop_requested.clear()
    merged, log = train('b', start)
    assert 'merged into the original weights' in log
    base = jax.device_get(start())
    rounded = jax.device_get(int8_weights.dequantize(lora.freeze(start(), ADAPTER)[1], jnp.float32))
    np.testing.assert_array_equal(merged.layers.w_up, base.layers.w_up)
    np.testing.assert_array_equal(dequantized.layers.w_up, rounded.layers.w_up)
    assert np.array_equal(merged.layers.attn_norm, dequantized.layers.attn_norm)
    assert not np.array_equal(merged.layers.attn_norm, base.layers.attn_norm)
    difference = (merged.layers.wq - base.layers.wq) - (dequantized.layers.wq - rounded.layers.wq)
    assert np.abs(difference).max() < 1e-6 < np.abs(merged.layers.wq - base.layers.wq).max()
