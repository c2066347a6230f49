"""Arms of studies/recipe_study.py that differ in what a row of text is: the base to 8,192 tokens with YaRN,
over a token store that the study makes.

    python experiments/studies/recipe_study.py --arms document_mask,joined,hard_negatives
"""

import pathlib

from lct.cli.config import load_config


def get_config():
    config = load_config(pathlib.Path(__file__).with_name('one_stage.py'))
    config.corpus = 'runs/study/corpora/training'
    config.evaluation_corpus = 'runs/study/corpora/held_out.jsonl'
    config.sequences = 'packed'
    config.stages[0].theta = 'keep'
    config.stages[0].scaling = {'type': 'yarn'}
    config.stages[0].mixture = {'text': 0.6, 'recall': 0.2, 'forms': 0.2}
    return config
