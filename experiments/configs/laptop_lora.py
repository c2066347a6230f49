"""The main job with low-rank adapters: the same stages, data and evaluations, 1.8% of the parameters trained.

    python experiments/extend.py --config experiments/configs/laptop_lora.py --workdir runs/laptop_lora

Adapters of rank 4 on the attention projections, and the complete norms, are trained: LongLoRA without its
embedding, which is a fifth of this small model. Adapters need a larger learning rate than full weights.
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
