"""One-shot extension: the main job's tokens and evaluations in a single stage, from 512 straight to 8,192.

    python experiments/extend.py --config experiments/configs/laptop_one_shot.py \\
        --workdir runs/laptop_one_shot

The stage of 8,192 tokens takes all 160 steps that laptop.py shares between 2,048 and 8,192; a step has as
many tokens in both.
"""

import pathlib

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('laptop.py'))
    config.name = 'lct-base-8k-one-shot'
    first, last = config.stages
    last.num_steps += first.num_steps
    config.stages = (last,)
    return config
