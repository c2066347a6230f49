"""Qwen2.5-1M's 7B from 32,768 to 262,144 tokens: the last three of its five stages.

    python experiments/extend.py --config experiments/configs/published/qwen25_1m_7b.py \\
        --workdir runs/qwen25_1m_7b --set model_folder=/models/Qwen2.5-7B --set corpus=/data/qwen_store

Source: Yang et al. 2025, "Qwen2.5-1M Technical Report" (arXiv:2501.15383, section 3): lengths and RoPE bases
of 65,536, 131,072 and 262,144 tokens, three quarters of the text at the full length and a quarter shorter.
Their first two stages, 4,096 and 32,768 tokens with the base raised from 10,000 to 1,000,000, are the
pretraining of Qwen2.5, whose released weights this config starts from (its config.json says 131,072
positions; it was trained to 32,768). RULER's mean over 4K to 128K after each stage: 82.3 before, 86.8, 92.5
and 92.7.

What differs: their corpus is augmented with text to fill in, paragraphs to find by keyword or position, and
paragraphs to reorder. Not known to us, so ours: tokens, batch, learning rate, optimizer and mesh. Their
further step to a million tokens needs no training (dual chunk attention), and neither it nor their
fine-tuning is part of this project.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage

MIXTURE = {'full length': 0.75, 'shorter': 0.25}


def get_config():
    # set model_folder to your folder of Qwen/Qwen2.5-7B
    config = published_config(name='qwen2.5-7b-1m', base='qwen2.5-7b', license='apache-2.0', native=2**17,
                              rope_theta=1e6, checkpoint_every=50)
    config.sequences = 'packed'
    stage = functools.partial(published_stage, batch_size=1, num_steps=500, learning_rate=1e-5,
                              warmup_steps=25, remat='offload', ffn_chunks=8, published={'mixture': MIXTURE})
    config.stages = (
        stage(name='64K', seq_len=2**16, mesh=(1, 2, 4, 1), batch_size=2, accumulation=32, theta=1_000_000),
        stage(name='128K', seq_len=2**17, mesh=(1, 1, 8, 1), accumulation=32, theta=5_000_000),
        stage(name='256K', seq_len=2**18, mesh=(1, 1, 8, 1), accumulation=16, theta=10_000_000),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(12, 19)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
