"""The curriculum: stages with a length, a theta rule, a RoPE scaling, a mesh, a mixture and a gate."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from lct.data.layout import LAYOUTS
from lct.models.llama import LlamaConfig, Memory, check_mesh
from lct.ops import rope, strategies
from lct.text import multiples_near
from lct.train.gates import Gate


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of progressive context extension.

    seq_len: tokens of one row. batch_size: rows of one micro-batch. accumulation: micro-batches per step.
    num_steps: steps of the stage; a gate may end it earlier.
    theta: how this stage's RoPE base follows from the one before: 'keep', 'dynamic_ntk' (with alpha),
      'critical_base' (from the base model's theta and length), or a number.
    scaling: fields of rope.RopeConfig as pairs, such as (('type', 'yarn'),); () keeps the scaling of the
      stage before. original_max_position is by default the model's length before any scaling, factor is
      seq_len over that length.
    mesh: degrees of ('data', 'fsdp', 'sequence', 'tensor'); layout: of the sequence over the ring.
    mixture: (kind of rows, weight) pairs.
    final_fraction: the learning rate falls to this fraction of itself by a cosine; 1.0 is constant.
    carry_optimizer: whether to keep the optimizer's moments of the stage before, or start from zeros.
    gate: scores that the model must reach for the next stage to begin, or None.
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
    mesh: tuple[int, ...] = (1, 1, 1, 1)
    layout: str = 'zigzag'
    mixture: tuple = (('text', 1.0),)
    memory: Memory = Memory()
    carry_optimizer: bool = True
    gate: Gate | None = None

    def __post_init__(self):
        self._check_numbers()
        self._check_division()

    def _check_numbers(self):
        for field in ('seq_len', 'batch_size', 'accumulation', 'num_steps'):
            if getattr(self, field) < 1:
                raise ValueError(f'stage {self.name}: {field} must be positive, got {getattr(self, field)}')
        for field in ('learning_rate', 'alpha'):
            if not 0 < getattr(self, field) < math.inf:
                raise ValueError(
                    f'stage {self.name}: {field} {getattr(self, field)} must be a positive number')
        if not 0 <= self.warmup_steps <= self.num_steps:
            raise ValueError(
                f'stage {self.name}: warmup_steps {self.warmup_steps} must be from 0 to num_steps = '
                f'{self.num_steps}, or the learning rate is never reached; use fewer')
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f'stage {self.name}: final_fraction {self.final_fraction} must be from 0 to 1')
        if len(self.mesh) != 4 or min(self.mesh) < 1:
            raise ValueError(f'stage {self.name}: mesh {self.mesh} must be four positive degrees of data, '
                             'fsdp, sequence and tensor, such as (1, 1, 8, 1)')
        if self.layout not in LAYOUTS:
            raise ValueError(f'stage {self.name}: layout {self.layout!r} is not one of {LAYOUTS}')

    def _check_division(self):
        data, fsdp, ring, _ = self.mesh
        chunks, factor = (2 * ring, '2 * ring_size') if self.layout == 'zigzag' else (ring, 'ring_size')
        if self.seq_len % chunks:
            raise ValueError(
                f'stage {self.name}: seq_len {self.seq_len} is not a multiple of {factor} = {chunks} for '
                f'layout {self.layout}; use {multiples_near(self.seq_len, chunks)}'
            )
        try:
            self.memory.check_length(self.seq_len, ring)
        except ValueError as error:
            raise ValueError(f'stage {self.name}: {error}') from None
        if self.batch_size % (data * fsdp):
            raise ValueError(
                f'stage {self.name}: batch_size {self.batch_size} is not a multiple of data * fsdp = '
                f'{data} * {fsdp}, and each replica needs whole rows; use '
                f'{multiples_near(self.batch_size, data * fsdp)}'
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all rows of one optimizer step, padding included."""
        return self.seq_len * self.batch_size * self.accumulation


def theta_of(stage: Stage, theta: float, seq_len: int, base: tuple[float, int], head_dim: int) -> float:
    """RoPE theta of a stage that follows a model of (theta, seq_len); base: the base model's (theta, length).

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
        f"stage {stage.name}: theta {stage.theta!r} is not 'keep', 'dynamic_ntk', "
        "'critical_base' or a number > 1"
    )


def rope_of(stage: Stage, before: rope.RopeConfig, theta: float, length: int, native: int,
            head_dim: int) -> rope.RopeConfig:
    """RopeConfig of a stage.

    before: RoPE of the stage before. theta: of this stage. length: max_position of its model. native: the
      base model's length.
    """
    if not stage.scaling:
        if before.type == 'dynamic' and stage.theta == 'keep' and stage.seq_len > before.max_position:
            raise ValueError(
                f"stage {stage.name}: theta 'keep' at {stage.seq_len} tokens would train without the model's "
                f"scaling of type 'dynamic', whose beginning would move from {before.max_position} to "
                f"{length} tokens; use theta 'dynamic_ntk'")
        return dataclasses.replace(before, theta=theta, max_position=length)
    given = dict(stage.scaling)
    kind = given.get('type')
    if kind == 'dynamic':
        raise ValueError(f"stage {stage.name}: scaling type 'dynamic' depends on the length of the prompt "
                         "and cannot be trained at one length; use theta 'dynamic_ntk'")
    original = given.get('original_max_position', before.original_max_position or native)
    defaults = {}
    if kind != 'default':
        defaults = {'original_max_position': original, 'factor': stage.seq_len / original}
    try:
        scaled = rope.RopeConfig(theta=theta, max_position=length, **{**defaults, **given})
        rope.frequencies(scaled, head_dim, stage.seq_len)
    except (TypeError, ValueError) as error:
        raise ValueError(f'stage {stage.name}: scaling {given} is not possible: {error}') from error
    return scaled


class PlannedStage(NamedTuple):
    """A stage, its model config, and its place in the schedule: it takes the steps from start to end."""

    stage: Stage
    config: LlamaConfig
    start: int
    end: int


def plan(stages: Sequence[Stage], config: LlamaConfig) -> list[PlannedStage]:
    """The stages in order, each beginning where the one before ends; errors as in configs."""
    ends = list(itertools.accumulate(stage.num_steps for stage in stages))
    return list(map(PlannedStage, stages, configs(stages, config), [0, *ends[:-1]], ends))


def configs(stages: Sequence[Stage], config: LlamaConfig) -> list[LlamaConfig]:
    """The LlamaConfig of every stage: theta by its rule, its RoPE scaling, max positions at least its length.

    Raises:
      ValueError: for a stage shorter than the one before, or weights that do not divide over its mesh.
    """
    base = (config.rope.theta, config.max_position_embeddings)
    theta, length = base
    scaled, out = config.rope, []
    for stage in stages:
        check_mesh(config, stage.mesh)
        _, _, ring_size, tensor = stage.mesh
        heads, kv_heads = config.num_heads // tensor, config.num_kv_heads // tensor
        strategies.check(stage.memory.attention, ring_size, heads, kv_heads, config.head_dim,
                         stage.memory.dtype)
        if out and stage.seq_len < stages[len(out) - 1].seq_len:
            raise ValueError(
                f'stage {stage.name}: seq_len {stage.seq_len} is shorter than the stage before it '
                f'({stages[len(out) - 1].seq_len}); order the stages by length'
            )
        if stage.theta in ('dynamic_ntk', 'critical_base') and stage.seq_len < length:
            raise ValueError(
                f'stage {stage.name}: seq_len {stage.seq_len} is shorter than the {length} tokens that the '
                f"model supports already; drop the stage, or give it theta 'keep' instead of {stage.theta!r}"
            )
        theta = theta_of(stage, theta, length, base, config.head_dim)
        length = max(length, stage.seq_len)
        scaled = rope_of(stage, scaled, theta, length, base[1], config.head_dim)
        out.append(dataclasses.replace(config, max_position_embeddings=length, rope=scaled))
    return out
