"""An arm of studies/recipe_study.py: a quarter of the tokens at each of 1,024, 2,048, 4,096 and 8,192, as a
schedule of windows has it (SkyLadder, Zhu et al. 2025, arXiv:2503.15450)."""

import pathlib

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('one_stage.py'))
    one = config.stages[0].to_dict()
    config.stages = tuple(
        stage(**{**one, 'name': f'{seq_len // 1024}K', 'seq_len': seq_len, 'batch_size': 8192 // seq_len,
                 'num_steps': 15, 'warmup_steps': 2}) for seq_len in (1024, 2048, 4096, 8192))
    return config
