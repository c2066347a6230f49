"""SelfLong's Llama-3.1-8B-Instruct from 131,072 to 1,048,576 tokens in three stages.

    python experiments/extend.py --config experiments/configs/published/selflong_llama31_8b.py \\
        --workdir runs/selflong_8b --set model_folder=/models/llama3.1-8b --set corpus=/data/selflong_store

Source: Wang et al. 2024, "Bootstrap Your Own Context Length" (arXiv:2412.18860, sections 3.2 and 4.1): every
stage doubles the length and quadruples the base of RoPE; about 8.3B tokens in total, of which 4.6B are 69K
instructions with retrieved documents of up to a million tokens and 77M are 10K long answers, beside Tulu v2,
Infinity-Instruct and ProLong's texts. The loss is over all tokens of the long samples.

What differs: their instructions are written by agents of a short model, which is not part of this project;
write a store of such rows, or train on long documents alone (without their instructions the paper's RULER at
1M falls from 69.6 to 63.5). Short samples train on all their tokens here, theirs on the answers alone. Not
known to us, so ours: how the tokens divide over the stages (evenly), batch, learning rate, optimizer, mesh,
and that the llama3 scaling of the base model stays.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Llama-3.1-8B-Instruct
    config = published_config(name='llama3.1-8b-selflong-1m', base='llama3.1-8b', license='llama3.1',
                              native=2**17, rope_theta=500000.0, checkpoint_every=50)
    config.sequences = 'packed'
    stage = functools.partial(published_stage, batch_size=1, num_steps=660, learning_rate=1e-5,
                              warmup_steps=30, remat='offload', ffn_chunks=8)
    config.stages = (
        stage(name='256K', seq_len=2**18, mesh=(1, 1, 8, 1), accumulation=16, theta=2_000_000,
              published={'theta_factor': 4, 'total_tokens': 8_300_000_000}),
        stage(name='512K', seq_len=2**19, mesh=(1, 1, 16, 1), accumulation=8, theta=8_000_000,
              published={'theta_factor': 4, 'total_tokens': 8_300_000_000}),
        stage(name='1M', seq_len=2**20, mesh=(1, 1, 32, 1), accumulation=4, theta=32_000_000,
              published={'theta_factor': 4, 'total_tokens': 8_300_000_000}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(15, 21)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
