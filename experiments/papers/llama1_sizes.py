"""The sizes that the papers of 2023 trained: LLaMA (Touvron et al. 2023) and smaller ones of open_llama.

Widths as in the table of EasyLM, on which the code of Ring Attention, Blockwise Parallel Transformer, Striped
Attention and LWM is built. None of them groups its heads.
"""

from lct.models.llama import LlamaConfig
from lct.ops.rope import RopeConfig


def _llama(embed_dim, mlp_dim, num_layers, num_heads):
    return LlamaConfig(vocab_size=32000, embed_dim=embed_dim, mlp_dim=mlp_dim, num_layers=num_layers,
                       num_heads=num_heads,
                       num_kv_heads=num_heads, head_dim=embed_dim // num_heads, max_position_embeddings=2048,
                       rope=RopeConfig(theta=10000.0))


SIZES = {
    '1B': _llama(2048, 5504, 22, 16),
    '3B': _llama(3200, 8640, 26, 32),
    '7B': _llama(4096, 11008, 32, 32),
    '13B': _llama(5120, 13824, 40, 40),
    '30B': _llama(6656, 17920, 60, 52),
    '65B': _llama(8192, 22016, 80, 64),
}
