"""An arm of studies/recipe_study.py: YaRN of the final length at once, 14 of 15 tokens in rows of 2,048."""

import pathlib

from lct.cli.config import load_config
from lct.cli.stage_config import stage


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('one_stage.py'))
    one = config.stages[0].to_dict()
    native = 512  # of the base
    config.stages = tuple(
        stage(**{**one, 'name': f'{seq_len // 1024}K', 'seq_len': seq_len, 'batch_size': 8192 // seq_len,
                 'num_steps': num_steps, 'warmup_steps': warmup_steps, 'theta': 'keep',
                 'scaling': {'type': 'yarn', 'factor': 8192 / native, 'original_max_position': native}})
        for seq_len, num_steps, warmup_steps in ((2048, 56, 5), (8192, 4, 1)))
    return config
