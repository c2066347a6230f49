"""Large World Model (Liu et al. 2024, arXiv 2402.08268), the text stages: Llama-2-7B from 4,096 to 1,048,576.

    python experiments/extend.py --config experiments/configs/published/lwm_text_7b.py \\
        --workdir runs/lwm --set model_folder=/models/llama2-7b --set corpus=/data/books

Source: Table 11 of the paper: lengths, thetas, tokens, steps, learning rate, warm-up, meshes. `published`
repeats what it prints and is not an input of the run. No rule from length to length explains these thetas;
they are numbers.

Mesh: theirs, (dp, fsdp, tp, sp) written in our order and with fsdp's -1 filled in for a TPU v4-512. That
name counts the two cores of a chip, so 256 devices: then every shard of dp * fsdp has one row or two, while
512 devices would leave shards without a row at 128K. Little of it is a ring: they used up to 16-way tensor
parallelism first, and rings of 2 and 4 in the last two stages.

What differs: a batch of "4M tokens" is 4,194,304 in complete rows, where their totals count 4.0M a step, so a
stage takes up to 5% more than its printed total. The table has no betas and no weight decay, so they are
EasyContext's. They trained in float32, which a TPU multiplies in one pass of bfloat16 unless configured
otherwise; here the computation is bfloat16, and the weights that the optimizer updates are float32. Their
data is Books3. Their chat and vision stages are left out.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Llama-2-7b-hf, and corpus to your long documents
    config = published_config(
        name='llama2-7b-lwm-1m', base='llama2-7b', license='llama2', native=4096,
        rope_theta=10000.0, checkpoint_every=50)

    table = {'device': 'TPU v4-512', 'tokens_per_batch': '4M'}
    stage = functools.partial(published_stage, learning_rate=4e-5)
    config.stages = (
        stage(name='32K', seq_len=2**15, mesh=(1, 64, 1, 4), batch_size=2**22 // 2**15, num_steps=1200,
              warmup_steps=100, theta=1_000_000, remat='full', ffn_chunks=4,
              published={**table, 'mesh_dim': '1,-1,4,1', 'total_tokens': 4.8e9}),
        stage(name='128K', seq_len=2**17, mesh=(1, 32, 1, 8), batch_size=2**22 // 2**17, num_steps=3000,
              warmup_steps=200, theta=10_000_000, remat='offload', ffn_chunks=16,
              published={**table, 'mesh_dim': '1,-1,8,1', 'total_tokens': 12e9}),
        stage(name='256K', seq_len=2**18, mesh=(1, 16, 1, 16), batch_size=2**22 // 2**18, num_steps=3000,
              warmup_steps=200, theta=10_000_000, remat='offload', ffn_chunks=32,
              published={**table, 'mesh_dim': '1,-1,16,1', 'total_tokens': 12e9}),
        stage(name='512K', seq_len=2**19, mesh=(1, 8, 2, 16), batch_size=2**22 // 2**19, num_steps=720,
              warmup_steps=50, theta=25_000_000, remat='offload', ffn_chunks=32,
              published={**table, 'mesh_dim': '1,-1,16,2', 'total_tokens': 3e9}),
        stage(name='1M', seq_len=2**20, mesh=(1, 4, 4, 16), batch_size=2**22 // 2**20, num_steps=450,
              warmup_steps=25, theta=50_000_000, remat='offload', ffn_chunks=32,
              published={**table, 'mesh_dim': '1,-1,16,4', 'total_tokens': 1.8e9}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(12, 21)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
