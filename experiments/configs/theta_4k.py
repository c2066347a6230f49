"""A theta for 4,096 tokens: short runs of the base model over a grid, the unchanged theta among them.

    python experiments/studies/theta_search.py --config experiments/configs/theta_4k.py \\
        --workdir runs/theta_4k

The base model has theta 3,134, 512 tokens and heads of 32 dims. Besides 'keep', the control, the grid holds
T / (2 pi), the scaling law's other regime; NTK-aware interpolation; the critical base; and two far above it.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import stage


def get_config():
    config = ConfigDict()
    config.name = 'lct-base-4k'
    config.model_folder = 'base'  # relative to experiments/; any Hugging Face Llama folder
    config.license = 'apache-2.0'
    config.save_dtype = 'float32'
    config.seed = 1  # of the evaluation: every run answers the same prompts and reads the same windows
    config.corpus = 'embedded'
    config.corpus_bytes = 12_000_000
    config.held_out = 0.1
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.01, 'clip_norm': 1.0})
    config.checkpoint_every = 12
    config.keep_checkpoints = 1
    config.param_dtype = 'float32'
    config.stages = (stage(
        name='4K', seq_len=4096, batch_size=2, num_steps=24, learning_rate=1e-3, warmup_steps=4,
        final_fraction=0.1, theta='keep', mesh=(1, 1, 1, 1), layout='contiguous',
        mixture={'text': 0.4, 'long': 0.3, 'recall': 0.3},
        memory={'remat': 'none', 'query_chunk': 128, 'key_chunk': 256, 'ffn_chunks': 1, 'loss_chunk': 512},
    ),)
    config.search = ConfigDict({
        'thetas': ('keep', 652.0, 28_800.0, 'critical_base', 1_000_000.0, 20_000_000.0),
        'seeds': (1, 2, 3),  # of the training data and their order
    })
    config.needle = ConfigDict({
        'lengths': (512, 1024, 2048, 4096, 8192), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 3,
    })
    config.loss = ConfigDict({'seq_len': 8192, 'windows': 16, 'rotations': 8})
    return config
