"""LongRoPE2's Llama-3-8B from 8,192 to 131,072 tokens, 10B tokens in one stage.

    python experiments/extend.py --config experiments/configs/published/longrope2_llama3_8b.py \\
        --workdir runs/longrope2_8b --set model_folder=/models/llama3-8b --set corpus=/data/longrope2_store

Source: Shang et al. 2025, "LongRoPE2: Near-Lossless LLM Context Window Scaling" (arXiv:2502.20082): length,
tokens, GPUs (64 A100), and the sources in `published.tokens`, documents of 8K to 200K and short ones; windows
of both lengths, short ones with the original RoPE. Its divisors of RoPE's frequencies come from a search
around those below, which the authors' repository prints (llama3-ntk-cd-init-128k.csv): 1 up to dimension 18,
16 from the critical dimension on, which is the first whose wavelength at 8,192 tokens was never seen whole.
What the search found is not printed: run studies/rope_factors.py on your model and set stages.0.scaling.

What differs: every row has 131,072 tokens here and the longer divisors, with documents that attend only to
themselves. Not known to us, so ours: batch, learning rate and mesh.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage

RAMP = 18, 35  # the last dimension whose divisor is 1, the critical dimension
FACTORS = tuple(1 + 15 * min(max(i - RAMP[0], 0) / (RAMP[1] - RAMP[0]), 1) for i in range(64))


def get_config():
    # set model_folder to your folder of meta-llama/Meta-Llama-3-8B
    config = published_config(name='llama3-8b-longrope2-128k', base='llama3-8b', license='llama3',
                              native=8192, rope_theta=500000.0, checkpoint_every=250)
    config.sequences = 'packed'
    config.stages = (
        published_stage(
            name='128K', seq_len=2**17, mesh=(1, 8, 8, 1), batch_size=8, num_steps=9537, learning_rate=1e-5,
            warmup_steps=100, theta='keep', remat='full', ffn_chunks=4,
            scaling={'type': 'longrope', 'factor': 16.0, 'original_max_position': 8192,
                     'long_factor': FACTORS, 'short_factor': (1.0,) * 64},
            published={'devices': 64, 'total_tokens': 10_000_000_000, 'factor': 16,
                       'tokens': {'RedPajama-v1': 4.5e9, 'RedPajama-v2': 2.5e9, 'StarCoder': 2e9,
                                  'FineWeb-Edu, short': 1e9}}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(12, 18)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
