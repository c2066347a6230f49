"""Model FLOPs, counted in one way for training and plans (Chowdhery et al. 2022, PaLM, appendix B).

Letters: N query heads, H head_dim, L layers.
"""

import functools
import math

import jax

from lct.models import llama, lora
from lct.models.config import LlamaConfig
from lct.models.lora import Adapter


@functools.cache
def matmul_sizes(config: LlamaConfig) -> dict[str, int]:
    """{parameter: size} of the weights that multiply every token: all but norms, biases and an untied
    embedding."""
    leaves = jax.tree_util.tree_leaves_with_path(llama.shapes(config), is_leaf=lambda x: isinstance(x, tuple))
    sizes = {path[-1].name: math.prod(shape) for path, shape in leaves}
    return {name: size for name, size in sizes.items()
            if not name.endswith(('norm', 'bias')) and (name != 'embed' or config.tie_embeddings)}


def matmul_params(config: LlamaConfig) -> int:
    """The number of parameters that multiply every token."""
    return sum(matmul_sizes(config).values())


@functools.cache
def layer_matmul_params(config: LlamaConfig) -> tuple[int, int]:
    """(attention, FFN): parameters of one layer that multiply every token."""
    sizes = matmul_sizes(config)
    attention, ffn = (sum(sizes[name] for name in names) // config.num_layers
                      for names in (('wq', 'wk', 'wv', 'wo'), ('w_gate', 'w_up', 'w_down')))
    return attention, ffn


def visible_pairs(seq_len: int, window: int | None = None) -> int:
    """Query-key pairs of a row under a causal mask, each query with at most window keys."""
    full = min(seq_len, window or seq_len)
    return full * (full + 1) // 2 + (seq_len - full) * full


def train_flops(config: LlamaConfig, tokens: int, pairs: int, adapter: Adapter | None = None) -> int:
    """Model FLOPs of training on a number of tokens and of visible query-key pairs: 6 per token and matmul
    parameter (4 if a lora.Adapter leaves it frozen, without a gradient), and 12 L N H per pair."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * pairs
    if adapter is None:
        return 6 * matmul_params(config) * tokens + attention
    in_full = sum(size for name, size in matmul_sizes(config).items() if name in adapter.also_train)
    per_token = 4 * matmul_params(config) + 2 * in_full + 6 * lora.num_low_rank(config, adapter)
    return per_token * tokens + attention
