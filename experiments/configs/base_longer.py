"""The last part of the recipe of the base that the project ships: 37M more tokens of forms.

    python experiments/studies/pretrain_base.py --config experiments/configs/base_longer.py \\
        --workdir runs/longer

It continues the model of base_grown.py, written there by its own command.
"""

import pathlib

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('base_grown.py'))
    config.seed = 4
    config.start_folder = 'runs/more/model'
    common = {
        'batch_size': 16, 'warmup_steps': 50, 'theta': 'keep', 'mesh': (1, 1, 1, 1),
        'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 128, 'loss_chunk': 512},
    }
    config.stages = (
        stage(name='forms 256 on', seq_len=256, num_steps=4000, learning_rate=1.4e-3, final_fraction=0.8,
              mixture={'text': 0.06, 'recall': 0.05, 'copy': 0.04, 'entries': 0.25, 'forms': 0.6}, **common),
        stage(name='forms 512 on', seq_len=512, num_steps=2500, learning_rate=1.2e-3, final_fraction=0.03,
              mixture={'text': 0.1, 'recall': 0.05, 'copy': 0.03, 'entries': 0.12, 'forms': 0.7}, **common),
    )
    return config
