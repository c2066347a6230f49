"""The main job: 512 to 8,192 tokens on a ring of eight virtual devices, in minutes on two cores.

    python experiments/extend.py --config experiments/configs/laptop.py --workdir runs/laptop

It extends the shipped base model in two stages: dynamic NTK with alpha 4 to 2,048 tokens, then the critical
base to 8,192. The model's theta stands to 512 tokens as Llama-3's 500,000 stands to 8,192, so the second
stage ends at Llama-3's own theta and length.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import stage


def get_config():
    config = ConfigDict()
    config.name = 'lct-base-8k'
    config.model_folder = 'base'  # relative to experiments/; any Hugging Face Llama folder
    config.license = 'apache-2.0'  # of the base model, which the extended one inherits
    config.save_dtype = 'float32'
    config.seed = 1
    config.corpus = 'embedded'  # the standard library of this Python; or a folder, glob, JSONL, text file
    config.corpus_bytes = 12_000_000
    config.held_out = 0.1
    config.fit_ring = True  # with fewer accelerators than eight, a shorter ring
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.01, 'clip_norm': 1.0})
    config.checkpoint_every = 10
    config.keep_checkpoints = 2
    config.max_skips_in_row = 5  # non-finite steps in a row after which the run gives up
    config.max_failed_saves = 5  # checkpoints in a row that could not be written, likewise
    config.param_dtype = 'float32'

    common = {
        'learning_rate': 1e-3, 'warmup_steps': 5, 'final_fraction': 0.1, 'accumulation': 1, 'alpha': 4.0,
        'mesh': (1, 1, 8, 1), 'layout': 'zigzag',
        'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 256, 'ffn_chunks': 4, 'loss_chunk': 256},
    }
    config.stages = (
        stage(name='2K', seq_len=2048, batch_size=4, num_steps=70, theta='dynamic_ntk',
              mixture={'text': 0.3, 'long': 0.15, 'recall': 0.2, 'forms': 0.35}, **common),
        stage(name='8K', seq_len=8192, batch_size=1, num_steps=90, theta='critical_base',
              mixture={'text': 0.1, 'long': 0.3, 'recall': 0.2, 'forms': 0.4}, **common),
    )
    config.needle = ConfigDict({
        'lengths': (128, 256, 384, 512, 1024, 2048, 4096, 8192), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0),
        'samples': 2,
    })
    config.loss = ConfigDict({'seq_len': 8192, 'windows': 64, 'rotations': 16})
    return config
