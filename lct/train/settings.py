"""The settings of a training run, apart from model and data."""

import dataclasses
import math

from lct.models import lora
from lct.models.config import LlamaConfig
from lct.train import optimizer as optimizers
from lct.train import stages as stage_plans


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of a training run, apart from model and data.

    checkpoint_every: steps between checkpoints; the end of a stage and an interruption write one too.
    keep_checkpoints: number of newest checkpoints to keep.
    max_skips_in_row: skipped steps (not finite, or spikes) in a row after which the run ends with an error.
    max_failed_saves: checkpoints in a row that cannot be written after which the run ends with an error.
    spike_factor: a step whose gradient norm exceeds this multiple of the median norm of the last spike_window
      accepted steps of its stage is skipped; 0 skips none. It takes a quarter of the window to begin.
    line_every_s: minimum seconds between two progress lines.
    adapter: lora.Adapter to train in place of all weights, or None.
    """

    stages: tuple[stage_plans.Stage, ...]
    optimizer: optimizers.OptimizerConfig = optimizers.OptimizerConfig()
    param_dtype: str = 'float32'
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    max_skips_in_row: int = 5
    max_failed_saves: int = 5
    spike_factor: float = 0.0
    spike_window: int = 64
    line_every_s: float = 3.0
    adapter: lora.Adapter | None = None

    def __post_init__(self):
        if self.param_dtype not in ('float32', 'bfloat16'):
            raise ValueError(f"param_dtype {self.param_dtype!r} must be 'float32' or 'bfloat16'")
        for field in ('checkpoint_every', 'keep_checkpoints', 'max_skips_in_row', 'max_failed_saves',
                      'spike_window'):
            if getattr(self, field) < 1:
                raise ValueError(f'{field} {getattr(self, field)} must be at least 1')
        if self.spike_factor and not 1 < self.spike_factor < math.inf:
            raise ValueError(f'spike_factor {self.spike_factor} must be above 1, such as 10, or 0')

    def check(self, config: LlamaConfig) -> None:
        """Check that the adapter fits the model and every stage.

        Raises:
          ValueError: as lora.Adapter.check.
        """
        for stage in self.stages if self.adapter else ():
            self.adapter.check(config, stage.mesh, stage.memory)
