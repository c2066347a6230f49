"""The second half of the recipe of the base that the project ships: more tokens, a layer, and more forms.

    python experiments/studies/grow_base.py runs/base/model runs/grown
    python experiments/studies/pretrain_base.py --config experiments/configs/base_grown.py --workdir runs/more

It continues the model of base.py, in which the words of names have become one token each and a layer was
added. The first 877 steps of the shipped weights had a learning rate of 1.6e-3 and fewer questions per text.
"""

import pathlib

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('base.py'))
    config.seed = 3
    config.start_folder = 'runs/grown'
    config.model.vocab_size, config.model.num_layers = 1392, 4
    common = {
        'warmup_steps': 50, 'theta': 'keep', 'mesh': (2, 1, 1, 1),
        'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 128, 'loss_chunk': 512},
    }
    config.stages = (
        stage(name='more forms 256', seq_len=256, batch_size=16, num_steps=1648, learning_rate=2e-3,
              final_fraction=1.0,
              mixture={'text': 0.08, 'recall': 0.06, 'copy': 0.06, 'forms': 0.8}, **common),
        stage(name='entries 256', seq_len=256, batch_size=16, num_steps=240, learning_rate=2e-3,
              final_fraction=1.0,
              mixture={'text': 0.06, 'recall': 0.05, 'copy': 0.04, 'entries': 0.25, 'forms': 0.6}, **common),
        stage(name='more forms 512', seq_len=512, batch_size=8, num_steps=1160, learning_rate=1.6e-3,
              final_fraction=0.05,
              mixture={'text': 0.1, 'recall': 0.05, 'copy': 0.03, 'entries': 0.17, 'forms': 0.65}, **common),
    )
    return config
