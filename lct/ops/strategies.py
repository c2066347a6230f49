"""The ways to split attention over the sequence axis, what each can do, and the choice of one in a config.

    python -m lct.ops.strategies        prints the table
"""

import dataclasses

import jax
from jax import lax

from lct import text
from lct.ops.all_gather_attention import all_gather_attention
from lct.ops.all_to_all_attention import all_to_all_attention
from lct.ops.blockwise_attention import Chunks
from lct.ops.context_parallel import KERNELS
from lct.ops.double_ring_attention import double_ring_attention
from lct.ops.kernels import triton_attention
from lct.ops.ring_attention import ring_attention

# strategy: (how a shard meets the others, what it needs, what waits for the network)
CAPABILITIES = {
    'ring': ('one ring of all devices', '-', 'nothing: a hop of attention hides each transfer'),
    'all_gather': ('all K/V on every device', 'memory for the K/V of the sequence', 'the gathers'),
    'all_to_all': ('heads for tokens', 'ring_size divides num_heads', 'four all-to-alls'),
    'all_gather_ring': ('gather in the node, ring of nodes', 'node_size divides ring_size', 'the gathers in the node'),
    'all_to_all_ring': ('heads for tokens in the node, ring of nodes', 'node_size divides ring_size and num_heads',
                        'four all-to-alls in the node'),
    'double_ring': ('ring in the node, ring of nodes', 'node_size divides ring_size',
                    'nothing: a turn of the node hides each transfer between nodes'),
}
TWO_LEVEL = ('all_gather_ring', 'all_to_all_ring', 'double_ring')
EVERYWHERE = ('layouts contiguous, zigzag, striped; causal, packed documents, sliding window; MHA, GQA, MQA; any '
              'head_dim; dk and dv in float32 on the wire; kernel xla anywhere, or triton on GPUs with head_dim '
              '16, 32, 64, 128, 256. None has bias or dropout.')


@dataclasses.dataclass(frozen=True)
class Attention:
    """How attention is computed.

    strategy: a key of CAPABILITIES.
    node_size: neighbours on the sequence axis with fast links between them, for the two-level strategies.
    chunks: tokens of one tile. kernel: the inner block, xla or, on GPUs, triton.
    """

    strategy: str = 'ring'
    node_size: int = 1
    chunks: Chunks = Chunks()
    kernel: str = 'xla'

    def __post_init__(self):
        if self.strategy not in CAPABILITIES:
            raise ValueError(f'attention strategy {self.strategy!r} is not one of {", ".join(CAPABILITIES)}')
        if self.kernel not in KERNELS:
            raise ValueError(f'attention kernel {self.kernel!r} is not one of {", ".join(KERNELS)}')
        if self.node_size < 1:
            raise ValueError(f'node_size {self.node_size} must be at least 1')
        if self.strategy in TWO_LEVEL and self.node_size == 1:
            raise ValueError(f'strategy {self.strategy} needs node_size > 1, the devices of one machine; '
                             "with one device a machine use strategy 'ring'")


def check(attention, ring_size, num_heads, num_kv_heads):
    """Refuse what the mesh cannot do; heads are those of one tensor shard.

    Raises:
      ValueError: with the reason.
    """
    platform = _platform()
    if attention.kernel == 'triton' and platform != 'gpu' and not triton_attention.INTERPRET:
        raise ValueError(f"kernel triton runs on GPUs and the devices are {platform}; use kernel 'xla'")
    if attention.strategy in TWO_LEVEL and ring_size % attention.node_size:
        raise ValueError(f'strategy {attention.strategy}: the sequence axis has {ring_size} devices, not a multiple of '
                         f'node_size {attention.node_size}')
    if attention.strategy.startswith('all_to_all'):
        degree = attention.node_size if attention.strategy in TWO_LEVEL else ring_size
        if num_heads % degree or (num_kv_heads % degree and degree % num_kv_heads):
            raise ValueError(
                f'strategy {attention.strategy} gives each of {degree} devices an equal share of heads, but a tensor '
                f'shard has {num_heads} heads and {num_kv_heads} key/value heads; use a smaller node_size with '
                'all_to_all_ring, or ring')


def _platform():
    """Of the current mesh, which may be one to compile for, or of the devices at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def attend(q, k, v, positions, segment_ids, axis_name, attention, window=None):
    """Attention by the chosen strategy; call inside shard_map. Arguments as ring_attention's."""
    ring_size = 1 if axis_name is None else lax.axis_size(axis_name)
    args, how = (q, k, v, positions, segment_ids, axis_name), (attention.chunks, window, attention.kernel)
    if attention.strategy == 'ring' or ring_size == 1:
        return ring_attention(*args, *how)
    if attention.strategy == 'double_ring':
        return double_ring_attention(*args, attention.node_size, *how)
    op = all_gather_attention if attention.strategy.startswith('all_gather') else all_to_all_attention
    return op(*args, attention.node_size if attention.strategy in TWO_LEVEL else ring_size, *how)


def table():
    """The capability table as text."""
    header = ('strategy', 'how', 'needs', 'what is waited for')
    rows = [(name, *row) for name, row in CAPABILITIES.items()]
    return f'{text.table(header, rows, left=range(4))}\n\nAll of them: {EVERYWHERE}'


if __name__ == '__main__':
    print(table())
