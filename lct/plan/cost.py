"""What one training step costs: FLOPs of a device, bytes on its links. Predictions, made without a compiler.

The program that is reckoned is that of lct.train.step: weights split over fsdp and sequence and gathered twice per
micro-batch, layers under a remat policy, attention split over the sequence axis by a strategy. The counts follow from
it and are held against its compiled text. Memory: buffers.py. Seconds: timing.py.

Letters as everywhere: B, T, N, K, H, D, F, V, L; c tokens of a row on one device.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from lct.models import llama
from lct.models.llama import LlamaConfig, Memory
from lct.ops import strategies

WIDTH = {'bfloat16': 2, 'float32': 4}
FLOAT32 = 4
TOKEN_TAGS = 8  # int32 position and segment that travel with every key


@dataclasses.dataclass(frozen=True)
class Step:
    """What one optimizer step computes and where: a model, a mesh (data, fsdp, sequence, tensor), rows of seq_len
    tokens, batch_size of them at a time and accumulation times. dtype is that of the stored parameters; memory.dtype,
    if given, that of the computation."""

    config: LlamaConfig
    mesh: tuple
    seq_len: int
    batch_size: int = 1
    accumulation: int = 1
    memory: Memory = Memory(dtype='bfloat16')
    dtype: str = 'float32'
    layout: str = 'zigzag'

    def check(self):
        """Raises ValueError with the reason if the program does not exist."""
        config, attention = self.config, self.memory.attention
        data, fsdp, ring, tensor = self.mesh
        llama.check_mesh(config, self.mesh)
        strategies.check(attention, ring, config.num_heads // tensor, config.num_kv_heads // tensor)
        pieces = math.lcm(2 * ring, ring * self.memory.ffn_chunks)
        if self.seq_len % pieces:
            raise ValueError(f'seq_len {self.seq_len} is not a multiple of {pieces}, two stretches and '
                             f'{self.memory.ffn_chunks} ffn_chunks for each of {ring} devices')
        if self.batch_size % (data * fsdp):
            raise ValueError(f'batch_size {self.batch_size} is not a multiple of data * fsdp = {data} * {fsdp}')

    @property
    def devices(self):
        return math.prod(self.mesh)

    @property
    def rows(self):
        """Rows of a micro-batch on one device."""
        return self.batch_size // (self.mesh[0] * self.mesh[1])

    @property
    def shard(self):
        """c, tokens of one row on one device."""
        return self.seq_len // self.mesh[2]

    @property
    def local(self):
        """Tokens of a micro-batch on one device."""
        return self.rows * self.shard

    @property
    def tokens(self):
        """Tokens of the whole step."""
        return self.batch_size * self.accumulation * self.seq_len

    @property
    def width(self):
        """Bytes of an activation, and of a weight in use or under way."""
        return WIDTH[self.memory.dtype or self.dtype]

    @property
    def stored_width(self):
        """Bytes of a parameter and of each of its moments."""
        return WIDTH[self.dtype]

    @property
    def node(self):
        """Neighbours on the sequence axis that a strategy treats as one node, and the number of nodes."""
        return self.memory.attention.nodes(self.mesh[2])

    @property
    def recomputes(self):
        """Does the backward run the attention of a layer again?"""
        return self.memory.remat in ('full', 'dots', 'offload')


# ---------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------


num_params = functools.cache(llama.num_params)  # a search asks thousands of times


@functools.cache
def layer_params(config):
    """Parameters in the matmuls of one layer: attention's, the FFN's."""
    heads = 2 * config.num_heads + 2 * config.num_kv_heads
    return config.embed_dim * config.head_dim * heads, 3 * config.embed_dim * config.mlp_dim


def matmul_params(config):
    """Parameters that multiply every token: all but norms and the embedding that is looked up."""
    return config.num_layers * sum(layer_params(config)) + config.vocab_size * config.embed_dim


def visible_pairs(seq_len, window=None):
    """Query-key pairs of a row that causal attention sees, each query at most window keys."""
    seen = min(seq_len, window or seq_len)
    return seen * (seen + 1) // 2 + (seq_len - seen) * seen


def model_flops(step):
    """FLOPs that the model needs, whole step, all devices: 6 per matmul parameter and token, 12 L N H per visible
    pair (PaLM, appendix B). What utilisation counts."""
    config = step.config
    pairs = visible_pairs(step.seq_len, config.window) * step.batch_size * step.accumulation
    return (6 * matmul_params(config) * step.tokens
            + 12 * config.num_layers * config.num_heads * config.head_dim * pairs)


def busiest_pairs(step, causal=True):
    """Pairs of one row that a device must wait for: its own, or those of the device that has most at each hop.

    causal False: every pair is worked on, as by a ring that skips nothing.
    """
    ring, window = step.mesh[2], step.config.window
    heads_split = step.node[0] if step.memory.attention.facts.splits_heads else 1
    shards, length = ring // heads_split, step.shard * heads_split  # what goes around, and tokens of each
    if not causal:
        pairs = length * step.seq_len
    elif step.layout == 'contiguous' and window is None:  # at every hop but the first some device sees all it gets
        pairs = length * (length + 1) // 2 + (shards - 1) * length**2
    else:
        pairs = visible_pairs(step.seq_len, window) / shards
        if step.layout == 'striped':  # the diagonal tiles of every hop are worked on whole
            pairs += length * min(step.memory.attention.chunks.key, length) / 2 * shards
    return pairs / heads_split


class Work(NamedTuple):
    """FLOPs of one device and step, those done again included."""

    matmul: float
    attention_forward: float
    attention_backward: float

    @property
    def total(self):
        return sum(self)


def work(step, causal=True):
    """The Work of a step.

    The backward of a layer under remat runs its products again, but the last of them, w_down, whose result nobody
    needs; 'attention' also spares those before it, 'dots' all. Attention: 4 N H per pair forward, 10 N H backward
    (two products and five).
    """
    config, tensor = step.config, step.mesh[3]
    attention, ffn = layer_params(config)
    remat = step.memory.remat
    again = {'full': attention + ffn * 2 / 3, 'offload': attention + ffn * 2 / 3, 'dots': 0, 'none': 0,
             'attention': config.embed_dim * config.head_dim * config.num_heads + ffn * 2 / 3}[remat]
    if remat in ('dots', 'none') and step.memory.ffn_chunks > 1:  # chunks of the FFN always run again
        again = ffn * 2 / 3
    layer = 6 * (attention + ffn) + 2 * again
    micro = step.accumulation
    per_token = config.num_layers * layer + 6 * config.vocab_size * config.embed_dim
    pairs = busiest_pairs(step, causal) * step.rows * micro
    scores = config.num_layers * config.num_heads * config.head_dim * pairs / tensor
    return Work(per_token * step.local * micro / tensor, 4 * scores * (1 + step.recomputes), 10 * scores)


# ---------------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------------


class Transfer(NamedTuple):
    """What one device sends in one step.

    axis: of the mesh. flow: 'ring' to one neighbour, 'collective' among group devices that are stride apart.
    behind: 'forward' or 'backward' attention hides it, '' nothing does.
    """

    name: str
    axis: str
    flow: str
    stride: int
    group: int
    bytes: float
    behind: str


def transfers(step):
    """Every Transfer of a step, those of no bytes left out."""
    found = [*_attention_transfers(step), *_weight_transfers(step), *_tensor_transfers(step)]
    return [t for t in found if t.bytes]


def _attention_transfers(step):
    """Keys and values under way. A forward of a ring of n sends n - 1 blocks; its backward, which cuts a block in
    two, n - 1/2 of them and as many of float32 dk and dv. Gathers: see the ops."""
    config, tensor = step.config, step.mesh[3]
    ring, (node, nodes) = step.mesh[2], step.node
    if ring == 1:
        return []
    times = config.num_layers * step.accumulation
    kv_heads = config.num_kv_heads / tensor
    forwards = 1 + step.recomputes
    values = 2 * step.local * kv_heads * config.head_dim
    strategy = step.memory.attention.facts
    copies = max(node / kv_heads, 1) if strategy.splits_heads else 1
    block = values * copies * step.width + TOKEN_TAGS * step.local  # one block of keys
    grads = values * copies * FLOAT32

    def around(name, size, stride, turns):
        """turns of a ring of size devices, stride apart on the sequence axis, forward and backward."""
        if size == 1:
            return []
        return [Transfer(f'{name} forward', 'sequence', 'ring', stride * tensor, size,
                         times * turns * forwards * (size - 1) * block, 'forward'),
                Transfer(f'{name} backward', 'sequence', 'ring', stride * tensor, size,
                         times * turns * (size - 0.5) * (block + grads), 'backward')]

    rings = around('ring of nodes' if strategy.two_level else 'ring', nodes, node, 1)
    others = (node - 1) / node
    collective = functools.partial(Transfer, axis='sequence', flow='collective', stride=tensor, group=node, behind='')
    if strategy.splits_heads:  # q, out and their gradients; k, v and theirs
        heads = step.local * config.num_heads / tensor * config.head_dim
        passes = forwards + 1
        sent = (2 * heads + values * copies) * step.width * others * passes
        return [collective('all-to-all', bytes=times * sent), *rings]
    if not strategy.gathers:
        return [*around('ring in the node', node, 1, nodes), *rings]
    gathers = forwards + (nodes > 1 or not step.recomputes)  # in one go, the second forward's serves the backward too
    sent = (gathers * block + grads) * (node - 1) * nodes
    return [collective('gather of keys, scatter of their gradients', bytes=times * sent), *rings]


def _weight_transfers(step):
    """Weights of a micro-batch: gathered for the forward and again for the backward, in their dtype. Their gradients,
    float32, are scattered to where the weights are kept; with a data axis the compilers all-reduce them whole. Those of
    the FFN and wo wait behind attention."""
    config = step.config
    data, fsdp, ring, tensor = step.mesh
    attention, ffn = layer_params(config)
    late = config.num_layers * (ffn + config.embed_dim * config.num_heads * config.head_dim)
    early = config.num_layers * (attention + ffn) - late
    table = config.vocab_size * config.embed_dim
    gathers = 1 + (step.memory.remat != 'none')

    def gather(name, parameters, behind):
        group = fsdp * ring
        size = parameters * step.width * step.accumulation / tensor
        return Transfer(name, 'fsdp+sequence', 'collective', tensor, group, (group - 1) / group * size, behind)

    def reduce(name, parameters, behind):
        group = data * fsdp * ring
        size = parameters * FLOAT32 * step.accumulation / tensor
        axis, times = ('fsdp+sequence', 1) if data == 1 else ('data+fsdp+sequence', 2)
        return Transfer(name, axis, 'collective', tensor, group, times * (group - 1) / group * size, behind)

    return [
        gather('weights behind attention, forward', late, 'forward'),
        gather('weights behind attention, backward', (gathers - 1) * late, 'backward'),
        gather('weights waited for', gathers * early + 2 * table, ''),
        reduce('gradients behind attention', late, 'backward'),
        reduce('gradients waited for', early + (1 + step.width / FLOAT32) * table, ''),
    ]


def _tensor_transfers(step):
    """All-reduces of [tokens, D] in float32: after wo and w_down forward, wo again under remat, and for the inputs of
    q, k, v, gate and up backward."""
    tensor = step.mesh[3]
    reduces = 7 + (step.memory.remat in ('full', 'offload', 'attention'))
    size = step.local * step.config.embed_dim * FLOAT32 * step.accumulation
    return [Transfer('partial sums', 'tensor', 'collective', 1, tensor,
                     2 * (tensor - 1) / tensor * size * reduces * step.config.num_layers, '')]
