"""The base from 512 to 131,072 tokens, 256 times its native length, on a ring of two devices.

    python experiments/extend.py --config experiments/configs/laptop_128k.py --workdir runs/laptop_128k

The stages of laptop.py, then 32,768 and 131,072 tokens. Every stage has the YaRN scaling of the final length,
so what short steps train holds at long ones, and few long steps do. A step of the last stage takes minutes:
a checkpoint is written after each, and the same command continues.
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
    common = {'batch_size': 1, 'learning_rate': 1e-3, 'final_fraction': 0.1, 'theta': 'keep',
              'layout': 'zigzag', 'mesh': (1, 1, 2, 1), 'memory': dict(config.stages[-1].memory)}
    mixture = {'text': 0.1, 'long': 0.2, 'recall': 0.4, 'forms': 0.3}
    config.stages[-1].mixture = mixture
    config.stages += (
        stage(name='32K', seq_len=2**15, num_steps=12, warmup_steps=2, mixture=mixture, **common),
        stage(name='128K', seq_len=2**17, num_steps=4, warmup_steps=1,
              mixture={'long': 0.2, 'recall': 0.5, 'forms': 0.3}, **common),
    )
    for each in config.stages:
        each.theta, each.mesh = 'keep', (1, 1, 2, 1)
        each.scaling = {'type': 'yarn', 'factor': 256.0, 'original_max_position': 512}
    config.needle = ConfigDict({
        'lengths': (512, 2**13, 2**15, 2**16, 2**17), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 1})
    config.loss = ConfigDict({'seq_len': 2**15, 'windows': 8, 'rotations': 1})
    return config
