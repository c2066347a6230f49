"""ProLong's Llama-3-8B-Instruct from 8,192 to 524,288 tokens, 40B tokens in two stages.

    python experiments/extend.py --config experiments/configs/published/prolong_llama3_8b.py \\
        --workdir runs/prolong_8b --set model_folder=/models/llama3-8b --set corpus=/data/prolong_store

Source: github.com/princeton-nlp/ProLong, train_64K.sh and train_512K.sh: lengths, thetas, steps, batches,
optimizer, learning rates, warm-up and the final tenth of a cosine, GPUs of the scripts, and the shares of
their sources in `published.mixture`; the README gives 20B tokens a stage. (Gao et al. 2024, "How to Train
Long-Context Language Models (Effectively)", arXiv:2410.02660.) `published` is not an input of the run: the
shares come from the store, so write one with these sources in these proportions. The second stage continues
with the optimizer of the first. Documents attend only to themselves.

Mesh: the scripts ask for one node of eight GPUs. 64K: a row on each, weights sharded over all. 512K: their
sequence parallelism of eight is Ulysses; here it is a zigzag ring.

What differs: the weights that the optimizer updates are float32 here, bfloat16 is for the computation. Their
short fine-tuning on UltraChat is left out.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage

SHORT = {'fineweb-edu': 0.1, 'fineweb-2023-50': 0.1, 'stackexchange': 0.04, 'dolmawiki': 0.04, 'tuluv2': 0.03,
         'arxiv': 0.03, 'openwebmath': 0.03, 'textbooks': 0.03}


def get_config():
    # set model_folder to your folder of meta-llama/Meta-Llama-3-8B-Instruct
    config = published_config(name='llama3-8b-prolong-512k', base='llama3-8b', license='llama3', native=8192,
                              rope_theta=500000.0, checkpoint_every=125)
    config.optimizer.clip_norm = 1.0
    config.sequences = 'packed'
    config.stages = (
        published_stage(
            name='64K', seq_len=2**16, mesh=(1, 8, 1, 1), batch_size=8, accumulation=8, num_steps=5000,
            learning_rate=1e-5, warmup_steps=500, final_fraction=0.1, theta=8_000_000, remat='offload',
            ffn_chunks=8, published={
                'devices': 8, 'total_tokens': 20_000_000_000,
                'mixture': {'code repositories': 0.3, 'books': 0.3, **SHORT}}),
        published_stage(
            name='512K', seq_len=2**19, mesh=(1, 1, 8, 1), batch_size=1, accumulation=16, num_steps=2500,
            learning_rate=5e-6, warmup_steps=250, final_fraction=0.1, theta=128_000_000, remat='offload',
            ffn_chunks=8, published={
                'devices': 8, 'total_tokens': 20_000_000_000,
                'mixture': {'code repositories of 512K': 0.15, 'code repositories of 64K': 0.15,
                            'books of 512K': 0.05, 'books of 64K': 0.25, **SHORT}}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(13, 20)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
