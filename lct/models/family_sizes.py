"""Published sizes of other families as LlamaConfig literals, named like their checkpoints.

Base models of Qwen2.5, Qwen3 and Mistral, SmolLM3-3B and Phi-3-mini-4k-instruct. The tests hold their numbers
of parameters against the published ones, in which a head that is the embedding counts once; a folder's own
config.json decides about eps, positions and RoPE.

    name             layers  embed_dim    mlp_dim  heads       parameters
    qwen2.5-0.5b         24        896       4864     14      494,032,768
    qwen2.5-1.5b         28       1536       8960     12    1,543,714,304
    qwen2.5-3b           36       2048      11008     16    3,085,938,688
    qwen2.5-7b           28       3584      18944     28    7,615,616,512
    qwen2.5-14b          48       5120      13824     40   14,770,033,664
    qwen2.5-32b          64       5120      27648     40   32,763,876,352
    qwen2.5-72b          80       8192      29568     64   72,706,203,648
    qwen3-0.6b           28       1024       3072     16      596,049,920
    qwen3-1.7b           28       2048       6144     16    1,720,574,976
    qwen3-4b             36       2560       9728     32    4,022,468,096
    qwen3-8b             36       4096      12288     32    8,190,735,360
    qwen3-14b            40       5120      17408     40   14,768,307,200
    qwen3-32b            64       5120      25600     64   32,762,123,264
    mistral-7b-v0.1      32       4096      14336     32    7,241,732,096
    mistral-7b-v0.3      32       4096      14336     32    7,248,023,552
    smollm3-3b           36       2048      11008     16    3,075,098,624
    phi3-mini-4k         32       3072       8192     32    3,821,079,552
"""

from lct.models import llama_sizes
from lct.models.config import LlamaConfig
from lct.ops.rope import RopeConfig


def _qwen25(embed_dim, mlp_dim, layers, heads, kv_heads, positions, eps=1e-6):
    """A base model of Qwen2.5; up to 3B the head is the embedding, whose rows are fewer."""
    small = embed_dim <= 2048
    return LlamaConfig(
        vocab_size=151936 if small else 152064, embed_dim=embed_dim, mlp_dim=mlp_dim, num_layers=layers,
        num_heads=heads, num_kv_heads=kv_heads, head_dim=embed_dim // heads, norm_eps=eps,
        tie_embeddings=small, max_position_embeddings=positions, rope=RopeConfig(theta=1e6), family='qwen2',
        qkv_bias=True)


def _qwen3(embed_dim, mlp_dim, layers, heads, *, tied=False):
    return LlamaConfig(
        vocab_size=151936, embed_dim=embed_dim, mlp_dim=mlp_dim, num_layers=layers, num_heads=heads,
        num_kv_heads=8, head_dim=128, norm_eps=1e-6, tie_embeddings=tied, max_position_embeddings=32768,
        rope=RopeConfig(theta=1e6), family='qwen3', qk_norm=True)


def _mistral(vocab_size, theta, window):
    return LlamaConfig(
        vocab_size=vocab_size, embed_dim=4096, mlp_dim=14336, num_layers=32, num_heads=32, num_kv_heads=8,
        head_dim=128, norm_eps=1e-5, max_position_embeddings=32768, rope=RopeConfig(theta=theta),
        window=window, family='mistral')


SIZES = {
    'qwen2.5-0.5b': _qwen25(896, 4864, 24, 14, 2, 32768),
    'qwen2.5-1.5b': _qwen25(1536, 8960, 28, 12, 2, 131072),
    'qwen2.5-3b': _qwen25(2048, 11008, 36, 16, 2, 32768),
    'qwen2.5-7b': _qwen25(3584, 18944, 28, 28, 4, 131072),
    'qwen2.5-14b': _qwen25(5120, 13824, 48, 40, 8, 131072, 1e-5),
    'qwen2.5-32b': _qwen25(5120, 27648, 64, 40, 8, 131072, 1e-5),
    'qwen2.5-72b': _qwen25(8192, 29568, 80, 64, 8, 131072, 1e-5),
    'qwen3-0.6b': _qwen3(1024, 3072, 28, 16, tied=True),
    'qwen3-1.7b': _qwen3(2048, 6144, 28, 16, tied=True),
    'qwen3-4b': _qwen3(2560, 9728, 36, 32, tied=True),
    'qwen3-8b': _qwen3(4096, 12288, 36, 32),
    'qwen3-14b': _qwen3(5120, 17408, 40, 40),
    'qwen3-32b': _qwen3(5120, 25600, 64, 64),
    'mistral-7b-v0.1': _mistral(32000, 10000.0, 4096),
    'mistral-7b-v0.3': _mistral(32768, 1e6, None),
    'smollm3-3b': LlamaConfig(
        vocab_size=128256, embed_dim=2048, mlp_dim=11008, num_layers=36, num_heads=16, num_kv_heads=4,
        head_dim=128, norm_eps=1e-6, tie_embeddings=True, max_position_embeddings=65536,
        rope=RopeConfig(theta=5e6), family='smollm3', rope_layers=(True, True, True, False) * 9),
    'phi3-mini-4k': LlamaConfig(
        vocab_size=32064, embed_dim=3072, mlp_dim=8192, num_layers=32, num_heads=32, num_kv_heads=32,
        head_dim=96, norm_eps=1e-5, max_position_embeddings=4096, rope=RopeConfig(theta=10000.0),
        window=2047, family='phi3'),
}
ALL = {**llama_sizes.SIZES, **SIZES}
