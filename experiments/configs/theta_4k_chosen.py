"""The theta that experiments/studies/theta_search.py chose for 4,096 tokens, with the settings of its runs.

    python experiments/extend.py --config THIS_FILE --workdir runs/chosen
"""

from ml_collections import ConfigDict

FIELDS = {'checkpoint_every': 12,
 'corpus': 'embedded',
 'corpus_bytes': 12000000,
 'held_out': 0.1,
 'keep_checkpoints': 1,
 'license': 'apache-2.0',
 'loss': {'rotations': 8, 'seq_len': 8192, 'windows': 16},
 'model_folder': 'base',
 'name': 'lct-base-4k',
 'needle': {'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'lengths': (512, 1024, 2048, 4096, 8192), 'samples': 3},
 'optimizer': {'b1': 0.9, 'b2': 0.98, 'clip_norm': 1.0, 'weight_decay': 0.01},
 'param_dtype': 'float32',
 'save_dtype': 'float32',
 'seed': 1}
STAGES = [{'batch_size': 2,
  'final_fraction': 0.1,
  'layout': 'contiguous',
  'learning_rate': 0.001,
  'memory': {'ffn_chunks': 1, 'key_chunk': 256, 'loss_chunk': 512, 'query_chunk': 128, 'remat': 'none'},
  'mesh': (1, 1, 1, 1),
  'mixture': {'long': 0.3, 'recall': 0.3, 'text': 0.4},
  'name': '4K',
  'num_steps': 24,
  'seq_len': 4096,
  'theta': 140665.0,
  'warmup_steps': 4}]


def get_config():
    config = ConfigDict(FIELDS)
    config.stages = tuple(map(ConfigDict, STAGES))
    return config
