"""Gradient's Llama-3-70B-Instruct from 8,192 to 1,048,576 tokens, as their model card prints it.

    python experiments/extend.py --config experiments/configs/published/gradient_llama3_70b.py \\
        --workdir runs/gradient_70b --set model_folder=/models/llama3-70b --set corpus=/data/long_documents

Source: the table of gradientai/Llama-3-70B-Instruct-Gradient-1048k on Hugging Face: lengths, thetas, steps,
batches, learning rate, GPUs and minutes. `published` repeats what it prints and is not an input of the run.

Thetas: dynamic NTK with alpha 4, from stage to stage, and the critical base of (500,000; 8,192) at 1048K.
The card names neither rule; the rules are inferred from the figures, which they meet to the integer.

Mesh: 8,192 tokens on a GPU, so the ring has seq_len / 8,192 GPUs, and the row "ring parallelism" of an
earlier version of the card counts the rings side by side: 64, 16, 8, 1. They lie here on the fsdp axis,
which splits rows as data does, and also the weights. `--mesh` puts all stages on the devices that you have.

What differs: the card gives no optimizer beyond the learning rate, so it is EasyContext's, which they built
on, without warm-up. They trained in bfloat16; here the computation is bfloat16, but the weights that the
optimizer updates and its moments are float32 (16 bytes a parameter over 128 GPUs or more: 9 GB each). Their
text is SlimPajama, augmented to long documents. Their chat fine-tuning is left out.
"""

import functools

from ml_collections import ConfigDict

from lct.cli.stage_config import published_config, published_stage


def get_config():
    # set model_folder to your folder of meta-llama/Meta-Llama-3-70B-Instruct,
    # and corpus to your long documents
    config = published_config(
        name='llama3-70b-1048k', base='llama3-70b', license='llama3', native=8192,
        rope_theta=500000.0, checkpoint_every=5)

    stage = functools.partial(published_stage, learning_rate=2e-5, alpha=4.0)
    config.stages = (
        stage(name='65K', seq_len=2**16, mesh=(1, 64, 8, 1), batch_size=64, accumulation=1, num_steps=20,
              theta='dynamic_ntk', remat='offload', ffn_chunks=4, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '15,296,098', 'devices': 512, 'rings': 64,
                  'minutes': 100, 'total_tokens': 83_886_080}),
        stage(name='262K', seq_len=2**18, mesh=(1, 16, 32, 1), batch_size=16, accumulation=1, num_steps=25,
              theta='dynamic_ntk', remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '207,112,184', 'devices': 512, 'rings': 16,
                  'minutes': 170, 'total_tokens': 104_857_600}),
        stage(name='524K', seq_len=2**19, mesh=(1, 8, 64, 1), batch_size=8, accumulation=2, num_steps=25,
              theta='dynamic_ntk', remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '1,062,356,830', 'devices': 512, 'rings': 8,
                  'minutes': 284, 'total_tokens': 209_715_200}),
        stage(name='1048K', seq_len=2**20, mesh=(1, 1, 128, 1), batch_size=1, accumulation=4, num_steps=8,
              theta='critical_base', remat='offload', ffn_chunks=8, published={
                  'device': 'NVIDIA L40S', 'rope_theta': '3,580,165,449', 'devices': 128, 'rings': 1,
                  'minutes': 516, 'total_tokens': 33_554_432}),
    )
    config.needle = ConfigDict({
        'lengths': tuple(2**n for n in range(13, 21)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2,
    })
    return config
