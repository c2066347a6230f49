"""The main job with low-rank adapters: the same stages, data and evaluations, 1.8% of the parameters trained.

    python experiments/extend.py --config experiments/configs/laptop_lora.py --workdir runs/laptop_lora

Rank 4 on the attention projections and the norms whole, as LongLoRA without its embedding: that is a fifth of
this small model. Adapters want a larger learning rate than weights do.
"""

import pathlib

from ml_collections import ConfigDict

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('laptop.py'))
    config.name = 'lct-base-8k-lora'
    config.adapter = ConfigDict({
        'rank': 4, 'alpha': 16.0, 'also_train': ('attn_norm', 'mlp_norm', 'final_norm'),
    })
    for stage in config.stages:
        stage.learning_rate = 4e-3
    return config
