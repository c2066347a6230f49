"""Is a model the same however it is split: logits, loss and gradients of every setting against one device.

One device without a mesh is the reference; its own attention is held against the dense oracle in float64.
Comparisons are made on the host in float64, so that no device judges itself.
"""

import contextlib
import dataclasses
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lct import sharding
from lct.data import layout
from lct.data.batches import packing
from lct.models import llama
from lct.ops import rope, strategies
from lct.ops.attention import attention as dense_attention
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention

FLOAT32_LIMIT, FLOAT32_LOGITS = 1e-5, 2e-5
BFLOAT16_MODEL = 1.1  # times the error of one device, of all logits and of the whole gradient
BFLOAT16_KIND = 1.5  # of one parameter kind, whose rounding errors are a small sample
BFLOAT16_ROUNDING = 2**-8  # what a single number may be off: on one device it can be right by luck
BFLOAT16_OP = 4  # times the error of rounding the exact result: the backward starts from a rounded out
ORACLE_LENGTH = 1024  # tokens that the dense oracle sees: it builds [T, S] for every head


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a run is split: degrees of sequence and tensor, the order of tokens, the way of attention. kernel: a
    key of strategies.KERNELS."""

    ring_size: int
    tensor: int
    layout: str
    strategy: str
    node_size: int
    kernel: str

    @property
    def attention(self):
        return Attention(self.strategy, self.node_size, kernel=self.kernel)


class Outcome(NamedTuple):
    """What a model gives for a batch, on the host and in the order of the batch."""

    logits: Any  # float32 [B, T, V]
    loss: Any  # mean over target tokens
    grads: Any  # {parameter kind: its gradient}


def settings(ring_sizes, tensor, layouts, names, kernels, node_size=None):
    """Every combination, ring sizes outermost; the layouts of one program, which are only data to it, follow each
    other. node_size: of the two-level strategies, None for two nodes."""
    for ring_size, kernel, name, order in itertools.product(ring_sizes, kernels, names, layouts):
        node = (node_size or max(ring_size // 2, 1)) if strategies.STRATEGIES[name].two_level else 1
        yield Setting(ring_size, tensor, order, name, node, kernel)


def refusal(config, length, dtype, setting):
    """Why a setting cannot run on these devices, '' if it can.

    A ring of one keeps one layout and one strategy: the others are the same program.
    """
    ring_size, heads, kv_heads = (
        setting.ring_size, config.num_heads // setting.tensor, config.num_kv_heads // setting.tensor)
    if ring_size == 1 and (setting.strategy, setting.layout) != (strategies.DEFAULT, 'contiguous'):
        return 'on a ring of one every strategy is ring and every layout contiguous'
    try:
        sharding.make_mesh((1, 1, ring_size, setting.tensor))
        llama.check_mesh(config, (1, 1, ring_size, setting.tensor))
        strategies.check(setting.attention, ring_size, heads, kv_heads)
        layout.permutation(setting.layout, length, ring_size)
    except ValueError as error:
        return ' '.join(str(error).split())
    return _kernel_refusal(config, dtype, setting.kernel)


@functools.cache
def _kernel_refusal(config, dtype, kernel):
    """Why a kernel does not take the heads of a model in this dtype, '' if it does."""
    q, k = (jax.ShapeDtypeStruct((1, ORACLE_LENGTH, n, config.head_dim), dtype)
            for n in (config.num_heads, config.num_kv_heads))
    tokens = jax.ShapeDtypeStruct((1, ORACLE_LENGTH), jnp.int32)
    try:
        jax.eval_shape(_op(_one_device(kernel)), q, k, k, q, tokens, tokens)
    except ValueError as error:
        return ' '.join(str(error).split())
    return ''


def make_batch(vocab_size, length, packed, seed=0):
    """Random tokens as a dict of arrays [1, T]: one document, or eight of uneven length and some padding.

    Raises:
      ValueError: for a length too short to be cut.
    """
    if length < 32:
        raise ValueError(f'length {length} must be at least 32 for a batch that tells settings apart')
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, length)
    if packed:
        cuts = np.sort(rng.choice(np.arange(2, length - 1), size=8, replace=False))
        documents = np.split(ids, cuts)[:-1]  # the last stretch is left to padding
    else:
        documents = [ids]
    row = packing.pack([packing.segment(document) for document in documents], length)
    return {name: x[None] for name, x in row.items()}


def run(params, config, batch, dtype, setting=None):
    """The Outcome of host params (float32) and batch, computed in dtype; setting None is one device without a mesh."""
    length = batch['tokens'].shape[1]
    mesh, order, how = contextlib.nullcontext(), np.arange(length), Attention()
    if setting is not None:
        mesh = jax.set_mesh(sharding.make_mesh((1, 1, setting.ring_size, setting.tensor)))
        order, how = layout.permutation(setting.layout, length, setting.ring_size), setting.attention
    with mesh:
        params = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, llama.abstract(config))
        batch = {name: sharding.put(x, sharding.spec('BT')) for name, x in layout.permute(batch, order).items()}
        tables = rope.make_tables(config.rope, config.head_dim, length)
        memory = llama.Memory(attention=how, dtype=dtype)
        logits, loss, grads = jax.device_get(_outcome(params, config.architecture(), batch, tables, memory))
    named = jax.tree_util.tree_leaves_with_path(grads)
    return Outcome(logits[:, layout.inverse(order)], loss,
                   {jax.tree_util.keystr(path, simple=True, separator='.'): grad for path, grad in named})


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _outcome(params, config, batch, tables, memory):
    mean = lambda params: llama.loss_sum(params, config, batch, tables, memory) / batch['loss_mask'].sum()
    loss, grads = jax.value_and_grad(mean)(params)
    x = llama.hidden_states(
        params, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory)
    logits = sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), llama.head(params))
    return logits, loss, grads


def relative_error(ours, theirs):
    """|ours - theirs| / |theirs| in the Euclidean norm, in float64."""
    ours, theirs = (np.asarray(x, np.float64).ravel() for x in (ours, theirs))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def errors(ours, theirs):
    """Relative errors of an Outcome: {'logits', 'loss', 'gradient norm', 'gradient', and of every parameter kind}.

    A kind's is that of its gradient, which bounds that of the gradient's norm.
    """
    size = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    kinds = {kind: relative_error(ours.grads[kind], grad) for kind, grad in theirs.grads.items()}
    norms = {kind: size(grad) for kind, grad in theirs.grads.items()}
    whole = size([*norms.values()])
    return {
        'logits': relative_error(ours.logits, theirs.logits),
        'loss': relative_error(ours.loss, theirs.loss),
        'gradient norm': relative_error(size([size(grad) for grad in ours.grads.values()]), whole),
        'gradient': size([kinds[kind] * norms[kind] for kind in kinds]) / whole,
        **kinds,
    }


def limits(dtype, one_device):
    """What errors may be: fixed in float32, in bfloat16 set by the errors of one_device against float32."""
    if dtype == 'float32':
        return {name: FLOAT32_LOGITS if name == 'logits' else FLOAT32_LIMIT for name in one_device}
    factors = {'logits': BFLOAT16_MODEL, 'gradient': BFLOAT16_MODEL}
    allowed = {name: factors.get(name, BFLOAT16_KIND) * error for name, error in one_device.items()}
    return allowed | dict.fromkeys(('loss', 'gradient norm'), BFLOAT16_ROUNDING)


def within(found, allowed):
    """Whether every error is within its limit; not a number never is."""
    return all(found[name] <= limit for name, limit in allowed.items())


# ---------------------------------------------------------------------------------------------------
# The reference's own attention
# ---------------------------------------------------------------------------------------------------


def attention_errors(params, config, batch, dtype, kernel):
    """One device's attention against the dense oracle in float64, on q, k, v of the model's first layer.

    At most the first ORACLE_LENGTH tokens of the batch are seen.

    Returns:
      relative errors {'out', 'dq', 'dk', 'dv'} and their limits.
    """
    tokens, positions, segments = (
        batch[name][:, :ORACLE_LENGTH] for name in ('tokens', 'positions', 'segment_ids'))
    tables = rope.make_tables(config.rope, config.head_dim, batch['tokens'].shape[1])
    layer = jax.tree.map(lambda x: jnp.asarray(x[0], dtype), params.layers)
    embedded = jnp.asarray(params.embed[tokens], dtype)
    q, k, v = llama.project_qkv(embedded, layer, rope.angles(tables, positions), config)
    cotangent = jax.random.normal(jax.random.key(0), q.shape, q.dtype)
    ours = _op(_one_device(kernel))(q, k, v, cotangent, positions, segments)
    with jax.enable_x64(True), jax.default_device(_cpu()):
        inputs = [np.asarray(x, np.float64) for x in (q, k, v, cotangent)]
        exact = jax.device_get(_op(_dense)(*inputs, positions, segments))
    names = ('out', 'dq', 'dk', 'dv')
    allowed = dict.fromkeys(names, FLOAT32_LIMIT)
    if dtype != 'float32':
        allowed = {name: BFLOAT16_OP * relative_error(x.astype(dtype), x) for name, x in zip(names, exact)}
    return {name: relative_error(a, b) for name, a, b in zip(names, ours, exact)}, allowed


def _one_device(kernel):
    return lambda *args: strategies.attend(*args, None, Attention(kernel=kernel))


def _dense(q, k, v, positions, segments):
    tokens = Tokens(positions, segments)
    return dense_attention(q, k, v, tokens, tokens)[0]


def _op(attend):
    """Jitted (q, k, v, cotangent, positions, segments) -> out, dq, dk, dv."""
    @jax.jit
    def op(q, k, v, cotangent, positions, segments):
        out, pull = jax.vjp(lambda *qkv: attend(*qkv, positions, segments), q, k, v)
        return out, *pull(cotangent)

    return op


def _cpu():
    """Where float64 is native; None, the default device, in a process that was denied its CPU."""
    try:
        return jax.devices('cpu')[0]
    except RuntimeError:
        return None
