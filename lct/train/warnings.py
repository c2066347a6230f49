"""Warnings about stages that can run, but slowly, without effect, or beyond the reach of their theta."""

import itertools
import math
from collections.abc import Sequence

from lct.models.llama import LlamaConfig
from lct.ops import rope
from lct.ops import theta as laws
from lct.ops.blockwise_attention import fit
from lct.train import stages as stage_plans
from lct.train.stages import Stage


def stage_warnings(stages: Sequence[Stage], config: LlamaConfig, param_dtype: str = 'float32') -> list[str]:
    """One sentence for every problem of stages that follow the base model of config.

    The supported length follows from the scaling law of arXiv 2310.05209: beyond the period of the first dim
    that completed no full period in training, this dim meets angles that it was not trained on.
    """
    group = config.num_heads // config.num_kv_heads
    found = [_rounding_warning(stages)] if param_dtype == 'bfloat16' else []
    for stage, stage_config in zip(stages, stage_plans.configs(stages, config)):
        found += [_chunk_warning(stage, group), _theta_warning(stage, stage_config, config)]
    return [text for text in found if text]


def _rounding_warning(stages):
    rate = max(stage.learning_rate for stage in stages)
    # half a unit in the last place of w is between |w| / 512 and |w| / 256; AdamW moves by the rate
    return (f'param_dtype bfloat16: steps of the learning rate {rate:g} are rounded away from weights larger '
            f'than {512 * rate:.2g}, which stand still; use param_dtype float32, with memory dtype bfloat16')


def _chunk_warning(stage, group):
    size = _degenerate_chunk(stage, stage.seq_len, group)
    if not size:
        return ''
    return (f'stage {stage.name}: seq_len {stage.seq_len:,} gives a device '
            f'{stage.seq_len // stage.mesh[2]:,} tokens, which attention can only cut into chunks of {size}, '
            f'and is slow; the nearest length without that is {_nearest_length(stage, group):,}')


def _theta_warning(stage, stage_config, base):
    native = base.rope.original_max_position or base.max_position_embeddings
    turned = laws.critical_dimension(base.rope.theta, native, base.head_dim) // 2
    inv_freq, _ = rope.frequencies(stage_config.rope, base.head_dim, stage.seq_len)
    if stage.seq_len <= native or turned == len(inv_freq):
        return ''
    bound = 2 * math.pi / inv_freq[turned]
    if bound >= stage.seq_len - 0.5:
        return ''
    return (
        f'stage {stage.name}: seq_len {stage.seq_len:,} is beyond the {bound:,.0f} tokens that theta '
        f'{stage_config.rope.theta:,.0f} ({stage_config.rope.type}) supports by the scaling law of RoPE; it '
        'takes a theta of '
        f'{laws.theta_for_bound(stage.seq_len, base.rope.theta, native, base.head_dim):,.0f}, and to '
        'extrapolate further the critical base '
        f'{laws.critical_base(base.rope.theta, native, stage.seq_len):,.0f}')


def _degenerate_chunk(stage, seq_len, group):
    """Tokens of the smaller attention chunk if a long shard of seq_len has no better divisor; else 0."""
    chunks, shard = stage.memory.attention.chunks, seq_len // stage.mesh[2]
    pairs = (chunks.queries(group), shard // stage.memory.query_passes), (chunks.key, shard)
    # below half of the configured chunk: shards that are multiples of 32 always have at least that
    small = [size for wanted, length in pairs if 2 * (size := fit(wanted, length)) < min(wanted, 64)]
    return min(small) if small and shard > 1024 else 0


def _nearest_length(stage, group):
    """The length nearest to the stage's that is a valid seq_len without degenerate chunks."""
    ring = stage.mesh[2]
    step = math.lcm(2 * ring * stage.memory.query_passes, ring * stage.memory.ffn_chunks)
    down = stage.seq_len // step * step
    lengths = (n for i in itertools.count() for n in (down - i * step, down + (i + 1) * step))
    return min(itertools.islice((n for n in lengths if not _degenerate_chunk(stage, n, group)), 2),
               key=lambda n: abs(n - stage.seq_len))
