"""The main job with gates: a stage ends once recall at its length is good and short loss has recovered.

    python experiments/extend.py --config experiments/configs/laptop_gated.py --workdir runs/laptop_gated

As in the Llama-3 report, training goes on to the next length when the short evaluations have recovered and
the facts hidden at this length are found. The numbers of steps of laptop.py are now the most that a stage may
take; each evaluation costs ten prompts of the recall probe and 32 windows of 512 tokens.
"""

import pathlib

from ml_collections import ConfigDict

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('laptop.py'))
    config.name = 'lct-base-8k-gated'
    for stage in config.stages:
        stage.gate = ConfigDict({'every': 10, 'needle': 0.9, 'short_loss_rise': 0.05, 'otherwise': 'advance'})
    return config
