"""The main job in miniature, to see that everything runs: two short stages and a small grid in a minute.

    python experiments/extend.py --config experiments/configs/smoke.py --workdir runs/smoke
"""

import pathlib

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('laptop.py'))
    config.corpus_bytes = 2_000_000
    for stage, seq_len in zip(config.stages, (512, 1024)):
        stage.name, stage.seq_len, stage.batch_size, stage.num_steps = f'{seq_len}', seq_len, 1, 3
        stage.warmup_steps = 1
    config.needle.lengths, config.needle.depths, config.needle.samples = (256, 1024), (0.0, 0.5, 1.0), 1
    config.loss.seq_len, config.loss.windows, config.loss.rotations = 1024, 4, 2
    return config
