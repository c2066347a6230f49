"""An arm of studies/recipe_study.py: half of the tokens at 2,048, half at 8,192."""

import pathlib

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('one_stage.py'))
    one = config.stages[0].to_dict()
    config.stages = tuple(
        stage(**{**one, 'name': f'{seq_len // 1024}K', 'seq_len': seq_len, 'batch_size': 8192 // seq_len,
                 'num_steps': 30, 'warmup_steps': 3}) for seq_len in (2048, 8192))
    return config
