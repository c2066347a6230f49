"""The memory policy: the only place that trades memory for time.

Letters: B batch, T sequence, D embed_dim, L layers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from lct import sharding
from lct.models.offload import fetch
from lct.ops.context_parallel import ATTENTION_INPUT, ATTENTION_OUTPUT
from lct.ops.kernels.choice import device
from lct.ops.strategies import Attention
from lct.text import divisors_near

LAYER_INPUT = 'layer_input'
OFFLOAD_STATE = ('none', 'moments', 'all')  # in order of decreasing memory of a device
CORE_TOKENS = 512  # of an FFN chunk on CPUs, see keep_in_core
CACHE_DTYPES = ('float32', 'bfloat16', 'int8')


@dataclasses.dataclass(frozen=True)
class Remat:
    """A remat policy, and its facts.

    policy: that of jax.checkpoint; None to keep everything.
    attention_once: whether the backward finds attention's output, and need not run its forward again.
    on_host: whether what a layer keeps is in host memory.
    in_passes: whether a layer can run in passes over its queries: if it keeps nothing inside of a pass but
      attention's output.
    """

    policy: Callable | None
    attention_once: bool = False
    on_host: bool = False
    in_passes: bool = False


def _on_device(*names):
    return Remat(jax.checkpoint_policies.save_only_these_names(*names), ATTENTION_OUTPUT in names,
                 in_passes=ATTENTION_INPUT not in names)


def _on_host(*names):
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names,
        offload_src='device', offload_dst='pinned_host')
    return Remat(policy, ATTENTION_OUTPUT in names, on_host=True, in_passes=True)


REMAT = {  # in order of decreasing memory of a device
    'none': Remat(None, attention_once=True),
    'dots': Remat(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    'attention': _on_device(ATTENTION_INPUT, ATTENTION_OUTPUT),
    'attention_output': _on_device(ATTENTION_OUTPUT),
    'full': Remat(jax.checkpoint_policies.nothing_saveable, in_passes=True),
    'offload_attention_output': _on_host(LAYER_INPUT, ATTENTION_OUTPUT),
    'offload': _on_host(LAYER_INPUT),
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Activations to keep, recompute or offload, and the sizes of chunks.

    remat: 'none' keeps every activation; 'dots' keeps matmul outputs; 'full' keeps only each layer's input;
      'attention' also what the attention backward needs (q, k, v, out, lse), 'attention_output' of that only
      out and lse, with which the backward recomputes q, k and v but not attention. 'offload' is 'full', and
      'offload_attention_output' is 'attention_output', with all of what they keep in host memory.
    attention: how attention is split over the sequence axis and into tiles.
    ffn_chunks: number of chunks that the sequence is cut into inside the FFN; on CPUs see keep_in_core.
    query_passes: number of passes over the queries in training (query_passes.py): the FFN runs on a pass, in
      ffn_chunks / query_passes chunks if that is more than one. For the policies that keep a layer's input
      and at most attention's output.
    loss_chunk: tokens of a device whose logits exist at one time.
    dtype: of activations and of weights in use; None for the dtype of the stored parameters. Gradients, their
      sums over devices and the stored parameters are not affected.
    offload_state: what of the training state is in host memory: 'none'; 'moments', those of the optimizer;
      'all', also the weights as they are stored and their gradients. A layer's weights are then fetched when
      the layer is computed, the update fetches and stores one layer after the other. (It takes a fraction of
      the time on the device that it would take on the host's cores.) Numbers stay the same.
    cache_dtype: of cached keys and values, 'float32', 'bfloat16' or 'int8'; None for the one of activations.

    Raises:
      ValueError: for a policy, a dtype or a number of chunks that does not exist.
    """

    remat: str = 'full'
    attention: Attention = Attention()
    ffn_chunks: int = 1
    loss_chunk: int = 512
    dtype: str | None = None
    offload_state: str = 'none'
    cache_dtype: str | None = None
    query_passes: int = 1

    def __post_init__(self):
        if self.cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f'cache dtype {self.cache_dtype!r} is not one of {", ".join(CACHE_DTYPES)}')
        if self.dtype not in (None, 'float32', 'bfloat16'):
            raise ValueError(f"dtype {self.dtype!r} of activations must be 'float32', 'bfloat16' or None")
        if self.remat not in REMAT:
            raise ValueError(f'remat {self.remat!r} is not one of {sorted(REMAT)}')
        if self.offload_state not in OFFLOAD_STATE:
            raise ValueError(
                f'offload_state {self.offload_state!r} is not one of {", ".join(OFFLOAD_STATE)}')
        if min(self.ffn_chunks, self.loss_chunk, self.query_passes) < 1:
            raise ValueError(f'ffn_chunks {self.ffn_chunks}, loss_chunk {self.loss_chunk} and query_passes '
                             f'{self.query_passes} must be positive')
        if self.query_passes > 1:
            self._check_passes()

    def _check_passes(self):
        if not REMAT[self.remat].in_passes:
            allowed = ', '.join(name for name, remat in REMAT.items() if remat.in_passes)
            raise ValueError(f'query_passes {self.query_passes} cannot be combined with remat '
                             f'{self.remat!r}, which keeps what a pass would free; use one of {allowed}')
        if self.ffn_chunks > self.query_passes and self.ffn_chunks % self.query_passes:
            raise ValueError(f'ffn_chunks {self.ffn_chunks} is not a multiple of query_passes '
                             f'{self.query_passes}, each of which runs its own; use a multiple, or 1')

    def check_length(self, seq_len: int, ring_size: int) -> None:
        """Refuse rows of seq_len tokens that a ring cannot divide into passes and chunks of the FFN.

        Raises:
          ValueError: with the counts that divide them.
        """
        for name, factor in (('ffn_chunks', 1), ('query_passes', 2)):  # a pass takes of both stretches
            count = getattr(self, name)
            if count > 1 and seq_len % (factor * ring_size * count):
                label = f'{"2 * " * (factor > 1)}ring_size'
                counts = divisors_near(max(seq_len // (factor * ring_size), 1), count)
                raise ValueError(f'seq_len {seq_len} is not a multiple of {label} * {name} = '
                                 f'{factor * ring_size} * {count}; use {name} {counts}')

    @property
    def ffn_chunks_in_pass(self) -> int:
        """The number of chunks that the tokens of one pass are cut into inside the FFN."""
        return max(self.ffn_chunks // self.query_passes, 1)

    @property
    def in_inference(self) -> 'Memory':
        """The policy without passes over the queries, which save nothing where there is no backward."""
        return dataclasses.replace(self, query_passes=1)


def keep_in_core(num_chunks: int, batch: int, length: int) -> int:
    """Chunks of the FFN of [batch, length] tokens: num_chunks, or on CPUs the next multiple of it that leaves
    each at most CORE_TOKENS tokens of a device, and a quarter of that at least, if one divides the length:
    activations then stay in the cache of a core.
    """
    if device()[0] != 'cpu':
        return num_chunks
    ring = sharding.axis_size('sequence')
    tokens = batch * length / (sharding.axis_size('data') * sharding.axis_size('fsdp') * ring)
    counts = range(num_chunks, int(4 * tokens / CORE_TOKENS) + 1, num_chunks)
    fitting = (n for n in counts if tokens <= n * CORE_TOKENS and length % (n * ring) == 0)
    return next(fitting, num_chunks)


def scan_layers(step: Callable, x: jax.Array, layers: Any, memory: Memory) -> jax.Array:
    """x [B, T, D] after every layer, in memory.dtype, recomputed in the backward pass as memory.remat says.

    Args:
      step: (x, layer) -> x. layers: a pytree of arrays stacked on L, on the device or the host.
    """
    def body(x, layer):
        return step(checkpoint_name(x, LAYER_INPUT), fetch(layer)), None

    if memory.remat != 'none':
        body = jax.checkpoint(body, policy=REMAT[memory.remat].policy, prevent_cse=False)
    return lax.scan(body, x.astype(memory.dtype or x.dtype), layers)[0]
