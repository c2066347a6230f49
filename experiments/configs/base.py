"""The first half of the recipe of the base that the project ships: a small real Llama-3, native context 512.

    python experiments/studies/pretrain_base.py --config experiments/configs/base.py --workdir runs/base
    python experiments/studies/grow_base.py runs/base/model runs/grown
    python experiments/studies/pretrain_base.py --config experiments/configs/base_grown.py --workdir runs/more

The first stages teach reading back (copies and facts) at short lengths, where the one earlier place that
matters is easy to find, then stretch it to 512; the last ones teach it in many forms. The shipped weights
went through these stages in three runs, the fourth and fifth stage with data of seed 1 and the last with
seed 2, so this config gives an equal recipe but other weights.

theta: Llama-3 pairs 500,000 with 8,192 tokens. The base of the RoPE scaling law that puts the same share of
dims past one full turn at 512 tokens is 500000^(ln(512 / 2 pi) / ln(8192 / 2 pi)) = 3,134.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import stage


def get_config():
    config = ConfigDict()
    config.seed = 0
    config.start_folder = ''  # of a model to continue, with its tokenizer; empty: random weights
    config.corpus = 'embedded'
    config.corpus_bytes = 12_000_000
    config.held_out = 0.1
    config.model = ConfigDict({
        'vocab_size': 1024, 'embed_dim': 128, 'mlp_dim': 320, 'num_layers': 3, 'num_heads': 4,
        'num_kv_heads': 2, 'head_dim': 32, 'max_position_embeddings': 512, 'rope_theta': 3134.0,
        'tie_embeddings': True,
    })
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.01, 'clip_norm': 1.0})
    config.checkpoint_every = 250
    config.keep_checkpoints = 2
    config.max_skips_in_row = 5  # non-finite steps in a row after which the run gives up
    config.param_dtype = 'float32'

    common = {
        'warmup_steps': 50, 'theta': 'keep', 'mesh': (2, 1, 1, 1),
        'memory': {'remat': 'none', 'query_chunk': 128, 'key_chunk': 128, 'loss_chunk': 512},
    }
    config.stages = (
        stage(name='read back 128', seq_len=128, batch_size=16, num_steps=1800, learning_rate=2e-3,
              final_fraction=1.0, mixture={'text': 0.15, 'recall': 0.4, 'copy': 0.45}, **common),
        stage(name='read back 256', seq_len=256, batch_size=10, num_steps=800, learning_rate=2e-3,
              final_fraction=0.8, mixture={'text': 0.25, 'recall': 0.5, 'copy': 0.25}, **common),
        stage(name='native 512', seq_len=512, batch_size=8, num_steps=1800, learning_rate=1.6e-3,
              final_fraction=0.05, mixture={'text': 0.45, 'recall': 0.5, 'copy': 0.05}, **common),
        stage(name='forms 256', seq_len=256, batch_size=16, num_steps=700, learning_rate=1.6e-3,
              final_fraction=0.9, mixture={'text': 0.1, 'recall': 0.1, 'copy': 0.1, 'forms': 0.7}, **common),
        stage(name='forms 512', seq_len=512, batch_size=8, num_steps=1100, learning_rate=1.5e-3,
              final_fraction=0.05,
              mixture={'text': 0.15, 'recall': 0.1, 'copy': 0.05, 'forms': 0.7}, **common),
        stage(name='forms 256 again', seq_len=256, batch_size=16, num_steps=465, learning_rate=1.6e-3,
              final_fraction=1.0, mixture={'text': 0.1, 'recall': 0.1, 'copy': 0.1, 'forms': 0.7}, **common),
    )
    return config
