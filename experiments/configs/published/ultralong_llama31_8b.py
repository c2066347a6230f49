"""UltraLong's Llama-3.1-8B-Instruct from 131,072 to 4,194,304 tokens in one stage of 1.26B tokens.

    python experiments/extend.py --config experiments/configs/published/ultralong_llama31_8b.py \\
        --workdir runs/ultralong_8b --set model_folder=/models/llama3.1-8b --set corpus=/data/long_store

Source: the card of nvidia/Llama-3.1-8B-UltraLong-4M-Instruct (length, 150 iterations, global batch of 2, 1B
tokens) and Xu et al. 2025, "From 128K to 4M" (arXiv:2504.06214): YaRN with alpha 1, beta 4 and scale factors
128, 256 and 512 for 1M, 2M and 4M, in place of the model's own scaling; documents one after the other with a
separator between them and no mask between documents; documents below 4K tokens drawn less often, those above
8K more often. Their shorter models are ultralong_llama31_8b_1m.py and ultralong_llama31_8b_2m.py.

What differs: their separator lies between documents; here it is Llama-3's BOS, and the end of text is only
predicted. Not known to us, so ours: the learning rate, the mesh and the share of short documents. The
instruction tuning that follows is left out.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Llama-3.1-8B-Instruct
    config = published_config(name='llama3.1-8b-ultralong-4m', base='llama3.1-8b', license='llama3.1',
                              native=2**17, rope_theta=500000.0, checkpoint_every=25)
    config.sequences = 'joined'  # a document attends to those before it, from its BOS on
    config.upsample = ConfigDict({'at_least': 8192, 'keep': 0.25})
    config.stages = (
        published_stage(
            name='4M', seq_len=2**22, mesh=(1, 1, 64, 8), batch_size=1, accumulation=2, num_steps=150,
            learning_rate=3e-5, theta='keep', remat='offload', ffn_chunks=16,
            scaling={'type': 'yarn', 'factor': 512.0, 'original_max_position': 8192, 'beta_fast': 4.0,
                     'beta_slow': 1.0},
            published={'factor': 512, 'iterations': 150, 'batch': 2, 'total_tokens': 1_000_000_000}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(17, 23)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
