"""The published Llama-3 sizes as LlamaConfig literals, named like their checkpoints.

Sources: widths, layers and heads from meta-llama/llama-models (models/sku_list.py, the params.json of
each size); the MLP width is its multiple_of * ceil(int(ffn_dim_multiplier * int(8 D / 3)) / multiple_of);
positions and RoPE scaling from the config.json that Hugging Face distributes with each checkpoint.
All share vocab 128256, theta 500000, norm eps 1e-5 and 8 key/value heads. An instruct model has the size of
its base model; Llama-3.2's head is its embedding, counted once.

    name           layers  embed_dim    mlp_dim  heads       parameters
    llama3-8b          32       4096      14336     32    8,030,261,248
    llama3-70b         80       8192      28672     64   70,553,706,496
    llama3.1-8b        32       4096      14336     32    8,030,261,248
    llama3.1-70b       80       8192      28672     64   70,553,706,496
    llama3.1-405b     126      16384      53248    128  405,853,388,800
    llama3.2-1b        16       2048       8192     32    1,235,814,400
    llama3.2-3b        28       3072       8192     24    3,212,749,824
    llama3.3-70b       80       8192      28672     64   70,553,706,496
"""

from lct.models.llama import LlamaConfig
from lct.ops.rope import RopeConfig

# Llama 3.1: trained at 8192, then scaled by 8 (llama-models, apply_scaling).
_ROPE_31 = RopeConfig(
    theta=500000.0, type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position=8192,
)
# Llama 3.2: the distributed config.json says 32, unlike the constant 8 in llama-models.
_ROPE_32 = RopeConfig(
    theta=500000.0, type='llama3', factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position=8192,
)

LLAMA3_8B = LlamaConfig(  # meta-llama/Meta-Llama-3-8B; ffn_dim_multiplier 1.3, multiple_of 1024
    vocab_size=128256, embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=8192, rope=RopeConfig(theta=500000.0),
)
LLAMA3_70B = LlamaConfig(  # meta-llama/Meta-Llama-3-70B; ffn_dim_multiplier 1.3, multiple_of 4096
    vocab_size=128256, embed_dim=8192, mlp_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=8192, rope=RopeConfig(theta=500000.0),
)
LLAMA31_8B = LlamaConfig(  # meta-llama/Llama-3.1-8B
    vocab_size=128256, embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=131072, rope=_ROPE_31,
)
LLAMA31_70B = LlamaConfig(  # meta-llama/Llama-3.1-70B
    vocab_size=128256, embed_dim=8192, mlp_dim=28672, num_layers=80, num_heads=64, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=131072, rope=_ROPE_31,
)
LLAMA31_405B = LlamaConfig(  # meta-llama/Llama-3.1-405B; ffn_dim_multiplier 1.2, multiple_of 4096
    vocab_size=128256, embed_dim=16384, mlp_dim=53248, num_layers=126, num_heads=128, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, max_position_embeddings=131072, rope=_ROPE_31,
)
LLAMA32_1B = LlamaConfig(  # meta-llama/Llama-3.2-1B; ffn_dim_multiplier 1.5, multiple_of 256
    vocab_size=128256, embed_dim=2048, mlp_dim=8192, num_layers=16, num_heads=32, num_kv_heads=8,
    head_dim=64, norm_eps=1e-5, tie_embeddings=True, max_position_embeddings=131072, rope=_ROPE_32,
)
LLAMA32_3B = LlamaConfig(  # meta-llama/Llama-3.2-3B; ffn_dim_multiplier 1.0, multiple_of 256
    vocab_size=128256, embed_dim=3072, mlp_dim=8192, num_layers=28, num_heads=24, num_kv_heads=8,
    head_dim=128, norm_eps=1e-5, tie_embeddings=True, max_position_embeddings=131072, rope=_ROPE_32,
)
LLAMA33_70B = LLAMA31_70B  # meta-llama/Llama-3.3-70B-Instruct: trained further, the same architecture

SIZES = {
    'llama3-8b': LLAMA3_8B,
    'llama3-70b': LLAMA3_70B,
    'llama3.1-8b': LLAMA31_8B,
    'llama3.1-70b': LLAMA31_70B,
    'llama3.1-405b': LLAMA31_405B,
    'llama3.2-1b': LLAMA32_1B,
    'llama3.2-3b': LLAMA32_3B,
    'llama3.3-70b': LLAMA33_70B,
}
