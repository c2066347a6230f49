"""EasyContext's Llama-2-7B from 4,096 to 512,000 tokens on eight A100, read to a million by a larger theta.

    python experiments/extend.py --config experiments/configs/published/easycontext_llama2_7b.py \\
        --workdir runs/easycontext --set model_folder=/models/llama2-7b --set corpus=/data/long_documents

Source: github.com/jzhang38/EasyContext, train_scripts/EasyContext-1M-Llama-2-7B.sh, for lengths, thetas,
steps, learning rates and accumulation; AdamW and the eight A100 from the same repository. `published` repeats
what is no input to the run. No rule explains these thetas; they are numbers. After training they wrote
rope_theta 1,000,000,000 into config.json by hand, which no stage does here: do the same to the folder that
the run writes.

Mesh: 32K and 64K are data parallel with sharded weights, one row to a GPU, here fsdp 8; from 256,000 on one
zigzag ring of the eight.

What differs: they trained in bfloat16 with the optimizer in host memory; here what is computed is bfloat16,
and the weights that the optimizer moves and its moments are float32 on the eight GPUs (16 bytes a parameter:
14 GB each), as a step of 2e-5 is below the last digit of a bfloat16 weight; their text was tokenized
SlimPajama upsampled by length; gradients are clipped here to norm 1.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict()
    config.name = 'llama2-7b-easycontext-512k'
    config.model_folder = ''  # your folder of meta-llama/Llama-2-7b-hf
    config.base = ConfigDict({'max_position_embeddings': 4096, 'rope_theta': 10000.0})
    config.license = 'llama2'
    config.seed = 0
    config.corpus = ''  # your long documents: a folder, glob, JSONL or text file
    config.corpus_bytes = 2_000_000_000
    config.held_out = 0.01
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.95, 'eps': 1e-8, 'weight_decay': 0.1})
    config.checkpoint_every = 50

    def stage(name, seq_len, mesh, batch_size, accumulation, num_steps, learning_rate, theta, remat,
              ffn_chunks):
        return ConfigDict({
            'name': name, 'seq_len': seq_len, 'batch_size': batch_size, 'accumulation': accumulation,
            'num_steps': num_steps, 'learning_rate': learning_rate, 'warmup_steps': 0, 'final_fraction': 1.0,
            'theta': theta, 'mesh': mesh, 'layout': 'zigzag', 'mixture': {'text': 1.0},
            'memory': {'remat': remat, 'query_chunk': 512, 'key_chunk': 512, 'ffn_chunks': ffn_chunks,
                       'loss_chunk': 512, 'dtype': 'bfloat16'},
            'published': {'device': 'NVIDIA A100', 'devices': 8, 'tokens_per_batch': '~1M'},
        })

    rows, ring = (1, 8, 1, 1), (1, 1, 8, 1)
    # name, seq_len, mesh, batch_size, accumulation, num_steps, learning_rate, theta, remat, ffn_chunks
    config.stages = (
        stage('32K', 32768, rows, 8, 4, 1000, 2e-5, 1_000_000, 'full', 4),
        stage('64K', 65536, rows, 8, 2, 1000, 2e-5, 5_000_000, 'offload', 8),
        stage('256K theta 10M', 256_000, ring, 1, 4, 500, 2e-5, 10_000_000, 'offload', 8),
        stage('256K theta 25M', 256_000, ring, 1, 4, 500, 2e-5, 25_000_000, 'offload', 8),
        stage('256K theta 50M', 256_000, ring, 1, 4, 150, 2e-5, 50_000_000, 'offload', 8),
        stage('512K theta 100M', 512_000, ring, 1, 2, 300, 2e-5, 100_000_000, 'offload', 8),
        stage('512K theta 250M', 512_000, ring, 1, 2, 90, 1e-5, 250_000_000, 'offload', 8),
    )
    config.needle = ConfigDict({  # their grid: every 50,000 tokens, every tenth of the depth, two samples
        'lengths': tuple(range(50_000, 1_000_001, 50_000)), 'depths': tuple(i / 10 for i in range(11)),
        'samples': 2,
    })
    config.loss = ConfigDict({'seq_len': 2**17, 'windows': 16, 'rotations': 4})  # single documents must be as long as this
    return config
