"""EasyContext's Llama-2-7B from 4,096 to 512,000 tokens on eight A100, read to a million by a larger theta.

    python experiments/extend.py --config experiments/configs/published/easycontext_llama2_7b.py \\
        --workdir runs/easycontext --set model_folder=/models/llama2-7b --set corpus=/data/long_documents

Source: github.com/jzhang38/EasyContext, train_scripts/EasyContext-1M-Llama-2-7B.sh, for lengths, thetas,
steps, learning rates and accumulation; AdamW and the eight A100 from the same repository. `published` repeats
figures that are not inputs of the run. No rule explains these thetas; they are numbers. After training they
wrote rope_theta 1,000,000,000 into config.json by hand, which no stage does here: do the same to the folder
that the run writes.

Mesh: 32K and 64K are data parallel with sharded weights, one row to a GPU, here fsdp 8; from 256,000 on there
is one zigzag ring of the eight.

What differs: they trained in bfloat16 with the optimizer in host memory. Here the computation is bfloat16,
but the weights that the optimizer updates and its moments are float32 on the eight GPUs (16 bytes a
parameter: 14 GB each), because a step of 2e-5 is below the last digit of a bfloat16 weight. Their text was
tokenized SlimPajama, upsampled by length. Gradients are clipped here to norm 1.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Llama-2-7b-hf, and corpus to your long documents
    config = published_config(
        name='llama2-7b-easycontext-512k', base='llama2-7b', license='llama2', native=4096,
        rope_theta=10000.0, checkpoint_every=50)

    rows, ring = (1, 8, 1, 1), (1, 1, 8, 1)
    stage = functools.partial(published_stage, published={
        'device': 'NVIDIA A100', 'devices': 8, 'tokens_per_batch': '~1M'})
    config.stages = (
        stage(name='32K', seq_len=32768, mesh=rows, batch_size=8, accumulation=4, num_steps=1000,
              learning_rate=2e-5, theta=1_000_000, remat='full', ffn_chunks=4),
        stage(name='64K', seq_len=65536, mesh=rows, batch_size=8, accumulation=2, num_steps=1000,
              learning_rate=2e-5, theta=5_000_000, remat='offload', ffn_chunks=8),
        stage(name='256K theta 10M', seq_len=256_000, mesh=ring, batch_size=1, accumulation=4, num_steps=500,
              learning_rate=2e-5, theta=10_000_000, remat='offload', ffn_chunks=8),
        stage(name='256K theta 25M', seq_len=256_000, mesh=ring, batch_size=1, accumulation=4, num_steps=500,
              learning_rate=2e-5, theta=25_000_000, remat='offload', ffn_chunks=8),
        stage(name='256K theta 50M', seq_len=256_000, mesh=ring, batch_size=1, accumulation=4, num_steps=150,
              learning_rate=2e-5, theta=50_000_000, remat='offload', ffn_chunks=8),
        stage(name='512K theta 100M', seq_len=512_000, mesh=ring, batch_size=1, accumulation=2, num_steps=300,
              learning_rate=2e-5, theta=100_000_000, remat='offload', ffn_chunks=8),
        stage(name='512K theta 250M', seq_len=512_000, mesh=ring, batch_size=1, accumulation=2, num_steps=90,
              learning_rate=1e-5, theta=250_000_000, remat='offload', ffn_chunks=8),
    )
    config.needle = ConfigDict({  # their grid: every 50,000 tokens, every tenth of the depth, two samples
        'lengths': tuple(range(50_000, 1_000_001, 50_000)), 'depths': tuple(i / 10 for i in range(11)),
        'samples': 2,
    })
    return config
