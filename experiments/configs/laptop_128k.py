"""The base from 512 to 131,072 tokens, 256 times its native length, on two cores in about two hours.

    python experiments/extend.py --config experiments/configs/laptop_128k.py --workdir runs/laptop_128k

The lengths of laptop.py, then 32,768 and 131,072 tokens, each with the critical base. A step of the last
stage takes minutes, so a checkpoint is written after each: stop it at any time, and the same command
continues.
"""

import pathlib

from ml_collections import ConfigDict

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('laptop.py'))
    config.name = 'lct-base-128k'
    config.evaluate = 'after'
    config.checkpoint_every = 1
    common = {
        'batch_size': 1, 'learning_rate': 1e-3, 'final_fraction': 0.1, 'theta': 'critical_base',
        'layout': 'zigzag', 'mesh': (1, 1, 2, 1),
        'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 256, 'ffn_chunks': 4, 'loss_chunk': 256},
    }
    config.stages += (
        stage(name='32K', seq_len=2**15, num_steps=16, warmup_steps=2,
              mixture={'text': 0.1, 'long': 0.2, 'recall': 0.4, 'forms': 0.3}, **common),
        stage(name='128K', seq_len=2**17, num_steps=5, warmup_steps=1,
              mixture={'long': 0.2, 'recall': 0.5, 'forms': 0.3}, **common),
    )
    for each in config.stages:
        each.theta, each.mesh = 'critical_base', (1, 1, 2, 1)
    config.needle = ConfigDict({
        'lengths': (512, 2**13, 2**15, 2**16, 2**17), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 1})
    config.loss = ConfigDict({'seq_len': 2**15, 'windows': 8, 'rotations': 1})
    return config
