"""UltraLong's Llama-3.1-8B-Instruct from 131,072 to 1,048,576 tokens.

    python experiments/extend.py --config experiments/configs/published/ultralong_llama31_8b_1m.py \\
        --workdir runs/ultralong_1m --set model_folder=/models/llama3.1-8b --set corpus=/data/long_store

Source and deviations: ultralong_llama31_8b.py. Of this length the paper (section 3.1) prints YaRN's factor
and 1B tokens; the batch is that of the 4M card, and the steps follow from both.
"""

import pathlib

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('ultralong_llama31_8b.py'))
    config.name = 'llama3.1-8b-ultralong-1m'
    stage = config.stages[0]
    stage.name, stage.seq_len, stage.num_steps, stage.mesh = '1M', 2**20, 477, (1, 1, 16, 8)
    stage.scaling.factor = 128.0
    stage.published = {'factor': 128, 'total_tokens': 1_000_000_000}
    config.needle.lengths = tuple(2**n for n in range(17, 21))
    return config
