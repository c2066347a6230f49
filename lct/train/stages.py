"""The curriculum: each stage a length, a theta rule, a RoPE scaling, a mesh, a mix, an optimizer schedule, a gate."""

import dataclasses
import math

from lct.models.llama import Memory, check_mesh
from lct.ops import rope, strategies
from lct.train.gates import Gate

LAYOUTS = ('contiguous', 'zigzag', 'striped')


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of progressive context extension.

    seq_len: tokens of one row. batch_size: rows of one micro-batch. accumulation: micro-batches a step.
    num_steps: steps of the stage, the most of them if it has a gate, which may end it earlier.
    theta: how this stage's RoPE base follows from the one before: 'keep', 'dynamic_ntk' (with alpha),
      'critical_base' (from the base model's theta and length), or a number.
    scaling: fields of rope.RopeConfig as pairs, such as (('type', 'yarn'),); () keeps that of the stage before.
      original_max_position is by default what the model had before any scaling, factor how many times longer
      seq_len is.
    mesh: degrees of ('data', 'fsdp', 'sequence', 'tensor'); layout: of the sequence over the ring.
    mixture: weights of the kinds of rows, as pairs.
    final_fraction: the learning rate falls to this fraction of itself by a cosine; 1.0 is constant.
    carry_optimizer: whether the optimizer's moments go on from the stage before or start anew.
    gate: what must hold for the next stage to begin; None is nothing but num_steps.
    """

    name: str
    seq_len: int
    num_steps: int
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 2e-5
    warmup_steps: int = 0
    final_fraction: float = 1.0
    theta: str | float = 'keep'
    alpha: float = 4.0
    scaling: tuple = ()
    mesh: tuple = (1, 1, 1, 1)
    layout: str = 'zigzag'
    mixture: tuple = (('text', 1.0),)
    memory: Memory = Memory()
    carry_optimizer: bool = True
    gate: Gate | None = None

    def __post_init__(self):
        for field in ('seq_len', 'batch_size', 'accumulation', 'num_steps'):
            if getattr(self, field) < 1:
                raise ValueError(f'stage {self.name}: {field} must be positive, got {getattr(self, field)}')
        for field in ('learning_rate', 'alpha'):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(f'stage {self.name}: {field} {getattr(self, field)} must be a positive number')
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f'stage {self.name}: warmup_steps {self.warmup_steps} must be from 0 to num_steps = {self.num_steps}, '
                'or the learning rate is never reached; use fewer')
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f'stage {self.name}: final_fraction {self.final_fraction} must be from 0 to 1')
        if len(self.mesh) != 4 or min(self.mesh) < 1:
            raise ValueError(f'stage {self.name}: mesh {self.mesh} must be four positive degrees of data, fsdp, '
                             'sequence and tensor, such as (1, 1, 8, 1)')
        data, fsdp, ring, _ = self.mesh
        if self.layout not in LAYOUTS:
            raise ValueError(f'stage {self.name}: layout {self.layout!r} is not one of {LAYOUTS}')
        pieces = 2 * ring if self.layout == 'zigzag' else ring
        if self.seq_len % pieces:
            factor = '2 * ring_size' if self.layout == 'zigzag' else 'ring_size'
            raise ValueError(
                f'stage {self.name}: seq_len {self.seq_len} is not a multiple of {factor} = {pieces} for layout '
                f'{self.layout}; use {-(-self.seq_len // pieces) * pieces}'
            )
        if self.seq_len % (ring * self.memory.ffn_chunks):
            raise ValueError(
                f'stage {self.name}: seq_len {self.seq_len} is not a multiple of ring_size * ffn_chunks = '
                f'{ring} * {self.memory.ffn_chunks}; use fewer ffn_chunks'
            )
        if self.batch_size % (data * fsdp):
            raise ValueError(
                f'stage {self.name}: batch_size {self.batch_size} is not a multiple of data * fsdp = '
                f'{data} * {fsdp}; each replica needs whole rows'
            )

    @property
    def tokens_per_step(self):
        return self.seq_len * self.batch_size * self.accumulation


def theta_of(stage, theta, seq_len, base, head_dim):
    """RoPE theta of a stage after a model of (theta, seq_len); base is the (theta, length) of the start.

    A theta from a rule is rounded down to a whole number, as the published ones were from stage to stage.
    """
    if stage.theta == 'keep':
        return theta
    if stage.theta == 'dynamic_ntk':
        theta = rope.dynamic_ntk_theta(theta, seq_len, stage.seq_len, alpha=stage.alpha, head_dim=head_dim)
        return float(math.floor(theta))
    if stage.theta == 'critical_base':
        return float(math.floor(rope.critical_base(base[0], base[1], stage.seq_len)))
    if isinstance(stage.theta, (int, float)) and stage.theta > 1 and math.isfinite(stage.theta):
        return float(stage.theta)
    raise ValueError(
        f"stage {stage.name}: theta {stage.theta!r} is not 'keep', 'dynamic_ntk', 'critical_base' or a number > 1"
    )


def rope_of(stage, before, theta, length, native, head_dim):
    """RopeConfig of a stage of theta whose model reads length tokens, after one of RopeConfig before; native: the
    length of the base model."""
    if not stage.scaling:
        if before.type == 'dynamic' and stage.theta == 'keep' and stage.seq_len > before.max_position:
            raise ValueError(
                f"stage {stage.name}: theta 'keep' at {stage.seq_len} tokens would train without the model's scaling of "
                f"type 'dynamic', which begins beyond its length, from {before.max_position} on moved to {length}; use "
                "theta 'dynamic_ntk'")
        return dataclasses.replace(before, theta=theta, max_position=length)
    given = dict(stage.scaling)
    kind = given.get('type')
    if kind == 'dynamic':
        raise ValueError(f"stage {stage.name}: scaling type 'dynamic' changes with what is read and cannot be trained "
                         "at one length; use theta 'dynamic_ntk'")
    original = given.get('original_max_position', before.original_max_position or native)
    defaults = {} if kind == 'default' else {'original_max_position': original, 'factor': stage.seq_len / original}
    try:
        scaled = rope.RopeConfig(theta=theta, max_position=length, **{**defaults, **given})
        rope.frequencies(scaled, head_dim, stage.seq_len)
    except (TypeError, ValueError) as error:
        raise ValueError(f'stage {stage.name}: scaling {given} is not possible: {error}') from error
    return scaled


def configs(stages, config):
    """The LlamaConfig of every stage: theta by its rule, its RoPE scaling, positions at least its length.

    Raises:
      ValueError: for a stage shorter than the one before, or weights that do not divide over its mesh.
    """
    base = (config.rope.theta, config.max_position_embeddings)
    theta, length = base
    scaled, out = config.rope, []
    for stage in stages:
        check_mesh(config, stage.mesh)
        _, _, ring_size, tensor = stage.mesh
        strategies.check(stage.memory.attention, ring_size, config.num_heads // tensor, config.num_kv_heads // tensor)
        if out and stage.seq_len < stages[len(out) - 1].seq_len:
            raise ValueError(
                f'stage {stage.name}: seq_len {stage.seq_len} is shorter than the stage before it '
                f'({stages[len(out) - 1].seq_len}); order the stages by length'
            )
        if stage.theta in ('dynamic_ntk', 'critical_base') and stage.seq_len < length:
            raise ValueError(
                f'stage {stage.name}: seq_len {stage.seq_len} is shorter than the {length} tokens that the model '
                f"reads already; drop the stage, or give it theta 'keep' instead of {stage.theta!r}"
            )
        theta = theta_of(stage, theta, length, base, config.head_dim)
        length = max(length, stage.seq_len)
        scaled = rope_of(stage, scaled, theta, length, base[1], config.head_dim)
        out.append(dataclasses.replace(config, max_position_embeddings=length, rope=scaled))
    return out
