"""Gradient's Llama-3-8B-Instruct from 8,192 to 4,194,304 tokens, as their model cards print it.

    python experiments/extend.py --config experiments/configs/published/gradient_llama3_8b.py \\
        --workdir runs/gradient_8b --set model_folder=/models/llama3-8b --set corpus=/data/long_documents

Source: the tables of gradientai/Llama-3-8B-Instruct-Gradient-1048k and -4194k on Hugging Face: lengths,
thetas, steps, batches, learning rate, GPUs and minutes. `published` repeats what they print and is not an
input of the run.

Thetas: dynamic NTK with alpha 4, from stage to stage, and the critical base at 4,194,304. The cards name
neither rule; the rules are inferred from the figures, which they meet to every printed digit. The 1048K
stage was trained from the weights of 524K, yet its theta follows from 262K's: 207,112,184 * 13^(128/126) =
2,804,339,835. No rule from stage to stage gives that, so it stands below as a number. (The released 1048K
weights are reported to carry 3,580,165,449, the critical base, and not the 2.80B of the table.)

Mesh: 8,192 tokens on a GPU, so the ring has seq_len / 8,192 GPUs and the others are more rings beside it
(16,384 tokens at 1048K), from a row "ring parallelism" of an earlier version of the card. 4194K has no such
row; one ring of 512 is our reading. The rings side by side lie on the fsdp axis, which splits rows as data
does, and also the weights. `--mesh` puts all stages on the devices that you have.

What differs: the batch of 1048K (see there). The cards give no optimizer beyond the learning rate, so it is
EasyContext's, which they built on, without warm-up. They trained in bfloat16; here the computation is
bfloat16, but the weights that the optimizer updates and its moments are float32 (16 bytes a parameter on a
ring of eight: 16 GB a GPU), because a step of 2e-5 is below the last digit of a bfloat16 weight. Their text
is SlimPajama, augmented to long documents. Their chat fine-tuning is left out.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Meta-Llama-3-8B-Instruct,
    # and corpus to your long documents
    config = published_config(
        name='llama3-8b-4194k', base='llama3-8b', license='llama3', native=8192,
        rope_theta=500000.0, checkpoint_every=10)

    stage = functools.partial(published_stage, learning_rate=2e-5, alpha=4.0)
    config.stages = (
        stage(name='65K', seq_len=2**16, mesh=(1, 1, 8, 1), batch_size=1, accumulation=32, num_steps=30,
              theta='dynamic_ntk', remat='full', ffn_chunks=1, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '15.3M', 'devices': 8, 'rings': 1,
                  'minutes': 202, 'total_tokens': 62_914_560}),
        stage(name='262K', seq_len=2**18, mesh=(1, 1, 32, 1), batch_size=1, accumulation=16, num_steps=24,
              theta='dynamic_ntk', remat='full', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '207.1M', 'devices': 32, 'rings': 1,
                  'minutes': 555, 'total_tokens': 100_663_296}),
        stage(name='524K', seq_len=2**19, mesh=(1, 8, 64, 1), batch_size=16, accumulation=1, num_steps=50,
              theta='dynamic_ntk', remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '1.06B', 'devices': 512, 'rings': 8,
                  'minutes': 61, 'total_tokens': 419_430_400}),
        # Its column contradicts itself: batch 8 (corrected from 16), yet 838,860,800 tokens, the product with
        # 16. That many in 87 minutes would be 75% of the peak of 512 L40S; 419,430,400 are 38%. So batch 8.
        stage(name='1048K', seq_len=2**20, mesh=(1, 8, 64, 1), batch_size=8, accumulation=1, num_steps=50,
              theta=2_804_339_835, remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '2.80B', 'devices': 512, 'rings': 8,
                  'minutes': 87, 'total_tokens': 838_860_800}),
        # "stopped early"
        stage(name='4194K', seq_len=2**22, mesh=(1, 1, 512, 1), batch_size=2, accumulation=2, num_steps=12,
              theta='critical_base', remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '45.2B', 'devices': 512,
                  'minutes': 433, 'total_tokens': 201_326_592}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(13, 23)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
