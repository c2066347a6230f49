"""Numerical agreement of all ways to split a model: logits, loss and gradients against one device.

The reference is one device without a mesh, whose own attention is compared with the dense oracle in float64.
Comparisons run on the host in float64, so that no device checks itself.

Letters: B batch, T tokens, V vocab.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data.batches import packing
from lct.models import llama
from lct.ops import rope, strategies
from lct.ops.attention import attention as dense_attention
from lct.ops.masks import Tokens
from lct.ops.strategies import Attention

FLOAT32_LIMIT, FLOAT32_LOGITS = 1e-5, 2e-5
BFLOAT16_MODEL = 1.1  # times the error of one device, for all logits and for the complete gradient
BFLOAT16_KIND = 1.5  # times that error, for one parameter kind, whose rounding errors are a small sample
BFLOAT16_ROUNDING = 2**-8  # for a single number, whose error on one device can be small by chance
BFLOAT16_OP = 4  # times the error of rounding the exact result: the backward starts from a rounded output
ORACLE_LENGTH = 1024  # tokens of the dense oracle, which builds [T, S] for every head


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a run is split: degrees of sequence and tensor parallelism, layout and attention strategy.

    node_size: of two-level strategies. kernel: a key of strategies.KERNELS. remat, query_passes: as in
      llama.Memory.
    """

    ring_size: int
    tensor: int
    layout: str
    strategy: str
    node_size: int
    kernel: str
    remat: str = 'full'
    query_passes: int = 1

    @property
    def attention(self) -> Attention:
        return Attention(self.strategy, self.node_size, kernel=self.kernel)

    def memory(self, dtype: str | None = None) -> llama.Memory:
        """The memory policy, for a dtype of activations."""
        return llama.Memory(self.remat, self.attention, dtype=dtype, query_passes=self.query_passes)


class Outcome(NamedTuple):
    """The results of a model for a batch, on the host and in the order of the batch.

    grads: {parameter kind: gradient}. loss: mean over target tokens.
    """

    logits: np.ndarray  # float32 [B, T, V]
    loss: np.ndarray
    grads: dict[str, np.ndarray]


def settings(
    ring_sizes: Sequence[int], tensor: int, layout_names: Sequence[str], strategy_names: Sequence[str],
    kernels: Sequence[str], node_size: int | None = None, remat: str = 'full', query_passes: int = 1,
) -> Iterator[Setting]:
    """Every combination, ring sizes outermost. Layouts are innermost: they are data of one compiled program.

    node_size: of the two-level strategies, None for two nodes.
    """
    for ring_size, kernel, name, layout in itertools.product(
        ring_sizes, kernels, strategy_names, layout_names
    ):
        node = (node_size or max(ring_size // 2, 1)) if strategies.STRATEGIES[name].two_level else 1
        yield Setting(ring_size, tensor, layout, name, node, kernel, remat, query_passes)


def refusal(config: llama.LlamaConfig, length: int, dtype: str, setting: Setting) -> str:
    """Why a setting cannot run on these devices, '' if it can.

    A ring of one runs with one layout and one strategy, since all others are the same program.
    """
    ring_size, heads, kv_heads = (
        setting.ring_size, config.num_heads // setting.tensor, config.num_kv_heads // setting.tensor)
    if ring_size == 1 and (setting.strategy, setting.layout) != (strategies.DEFAULT, 'contiguous'):
        return 'on a ring of one every strategy is ring and every layout contiguous'
    try:
        sharding.make_mesh((1, 1, ring_size, setting.tensor))
        llama.check_mesh(config, (1, 1, ring_size, setting.tensor))
        strategies.check(setting.attention, ring_size, heads, kv_heads, config.head_dim, dtype)
        layouts.permutation(setting.layout, length, ring_size)
        setting.memory().check_length(length, ring_size)
    except ValueError as error:
        return ' '.join(str(error).split())
    return ''


def make_batch(vocab_size: int, length: int, packed: bool, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens as arrays [1, T]: one document, or eight documents of different lengths and some padding.

    Raises:
      ValueError: if length is below 32.
    """
    if length < 32:
        raise ValueError(f'length {length} must be at least 32 for a batch that distinguishes settings')
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, length)
    if packed:
        cuts = np.sort(rng.choice(np.arange(2, length - 1), size=8, replace=False))
        documents = np.split(ids, cuts)[:-1]  # the last one is left to padding
    else:
        documents = [ids]
    row = packing.pack([packing.segment(document) for document in documents], length)
    return {name: x[None] for name, x in row.items()}


def run(
    params: llama.Params, config: llama.LlamaConfig, batch: dict, dtype: str, setting: Setting | None = None,
) -> Outcome:
    """The Outcome of a batch, computed in dtype.

    Args:
      params: float32 on the host.
      setting: None for one device without a mesh.
    """
    length = batch['tokens'].shape[1]
    mesh, order, memory = contextlib.nullcontext(), np.arange(length), llama.Memory(dtype=dtype)
    if setting is not None:
        mesh = jax.set_mesh(sharding.make_mesh((1, 1, setting.ring_size, setting.tensor)))
        order = layouts.permutation(setting.layout, length, setting.ring_size)
        memory = setting.memory(dtype)
    with mesh:
        params = jax.tree.map(lambda x, to: jax.device_put(x, to.sharding), params, llama.abstract(config))
        batch = {name: sharding.put(x, sharding.spec('BT'))
                 for name, x in layouts.permute(batch, order).items()}
        tables = rope.make_tables(config.rope, config.head_dim, length)
        logits, loss, grads = jax.device_get(_outcome(params, config.architecture(), batch, tables, memory))
    named = jax.tree_util.tree_leaves_with_path(grads)
    return Outcome(logits[:, layouts.inverse(order)], loss,
                   {jax.tree_util.keystr(path, simple=True, separator='.'): grad for path, grad in named})


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _outcome(params, config, batch, tables, memory):
    mean = lambda params: llama.loss_sum(params, config, batch, tables, memory) / batch['loss_mask'].sum()
    loss, grads = jax.value_and_grad(mean)(params)
    x = llama.hidden_states(
        params, config, batch['tokens'], batch['positions'], batch['segment_ids'], tables, memory)
    logits = sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), llama.head(params))
    return logits, loss, grads


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in float64."""
    actual, expected = (np.asarray(x, np.float64).ravel() for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def errors(actual: Outcome, expected: Outcome) -> dict[str, float]:
    """Relative errors of 'logits', 'loss', 'gradient norm', 'gradient' and each parameter kind's gradient.

    The error of a kind's gradient bounds the error of its norm.
    """
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    kinds = {kind: relative_error(actual.grads[kind], grad) for kind, grad in expected.grads.items()}
    norms = {kind: norm(grad) for kind, grad in expected.grads.items()}
    total_norm = norm([*norms.values()])
    return {
        'logits': relative_error(actual.logits, expected.logits),
        'loss': relative_error(actual.loss, expected.loss),
        'gradient norm': relative_error(norm([norm(grad) for grad in actual.grads.values()]), total_norm),
        'gradient': norm([kinds[kind] * norms[kind] for kind in kinds]) / total_norm,
        **kinds,
    }


def limits(dtype: str, one_device: dict[str, float]) -> dict[str, float]:
    """The limits of errors: fixed in float32; in bfloat16 multiples of the errors of one device."""
    if dtype == 'float32':
        return {name: FLOAT32_LOGITS if name == 'logits' else FLOAT32_LIMIT for name in one_device}
    factors = {'logits': BFLOAT16_MODEL, 'gradient': BFLOAT16_MODEL}
    allowed = {name: factors.get(name, BFLOAT16_KIND) * error for name, error in one_device.items()}
    return allowed | dict.fromkeys(('loss', 'gradient norm'), BFLOAT16_ROUNDING)


def within(measured: dict[str, float], allowed: dict[str, float]) -> bool:
    """Whether every error is within its limit; NaN never is."""
    return all(measured[name] <= limit for name, limit in allowed.items())


# ---------------------------------------------------------------------------------------------------
# Attention of the reference
# ---------------------------------------------------------------------------------------------------


def attention_errors(
    params: llama.Params, config: llama.LlamaConfig, batch: dict, dtype: str, kernel: str,
) -> tuple[dict[str, float], dict[str, float]]:
    """Attention on one device against the dense oracle in float64, on q, k, v of the model's first layer.

    It uses the first ORACLE_LENGTH tokens of the batch at most.

    Returns:
      relative errors of 'out', 'dq', 'dk', 'dv', and their limits.
    """
    tokens, positions, segments = (
        batch[name][:, :ORACLE_LENGTH] for name in ('tokens', 'positions', 'segment_ids'))
    tables = rope.make_tables(config.rope, config.head_dim, batch['tokens'].shape[1])
    layer = jax.tree.map(lambda x: jnp.asarray(x[0], dtype), params.layers)
    embedded = jnp.asarray(params.embed[tokens], dtype)
    q, k, v = llama.project_qkv(embedded, layer, rope.angles(tables, positions), config)
    cotangent = jax.random.normal(jax.random.key(0), q.shape, q.dtype)
    actual = _op(_one_device(kernel))(q, k, v, cotangent, positions, segments)
    with jax.enable_x64(True), jax.default_device(_cpu()):
        inputs = [np.asarray(x, np.float64) for x in (q, k, v, cotangent)]
        exact = jax.device_get(_op(_dense)(*inputs, positions, segments))
    names = ('out', 'dq', 'dk', 'dv')
    allowed = dict.fromkeys(names, FLOAT32_LIMIT)
    if dtype != 'float32':
        allowed = {name: BFLOAT16_OP * relative_error(x.astype(dtype), x) for name, x in zip(names, exact)}
    return {name: relative_error(a, b) for name, a, b in zip(names, actual, exact)}, allowed


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
    """The CPU, where float64 is native; None, the default device, in a process without a CPU backend."""
    try:
        return jax.devices('cpu')[0]
    except RuntimeError:
        return None
