"""The arms of studies/recipe_study.py with one stage: the base to 8,192 tokens in 491,520 training tokens.

    python experiments/studies/recipe_study.py --workdir runs/study
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import stage

TARGET = 8192
COMMON = {
    'learning_rate': 1e-3, 'final_fraction': 0.1, 'mesh': (1, 1, 2, 1), 'layout': 'zigzag',
    'mixture': {'text': 0.1, 'long': 0.3, 'recall': 0.2, 'forms': 0.4},
    'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 256, 'ffn_chunks': 4, 'loss_chunk': 256},
}


def get_config():
    config = ConfigDict()
    config.name = 'study'
    config.model_folder = 'base'
    config.license = 'apache-2.0'
    config.save_dtype = 'float32'
    config.seed = 1
    config.corpus = 'embedded'
    config.corpus_bytes = 12_000_000
    config.held_out = 0.1
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.01, 'clip_norm': 1.0})
    config.checkpoint_every = 20
    config.keep_checkpoints = 1
    config.param_dtype = 'float32'
    config.stages = (stage(name='8K', seq_len=TARGET, batch_size=1, num_steps=60, warmup_steps=5,
                           theta='critical_base', **COMMON),)
    config.needle = ConfigDict({
        'lengths': (512, 1024, 2048, 4096, 8192), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2})
    config.loss = ConfigDict({'seq_len': TARGET, 'windows': 48, 'rotations': 8})
    return config
