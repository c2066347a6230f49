"""Compute with Hugging Face transformers the inverse frequencies and attention factors of the RoPE scalings.

    pip install '.[oracle]'
    python experiments/golden/make_golden_rope.py        writes tests/golden/rope_scalings.json

Every case of the file holds its inputs (rope_parameters, max_position_embeddings, head_dim, seq_len) and its
result, so that the test needs no list of cases of its own.
"""

import argparse
import json
import pathlib

from lct.cli.main import needs, run_script

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'rope_scalings.json'

# theta, factor, head_dim, trained length
LINEAR = [
    (1e4, 2.0, 128, 4096), (1e4, 4.0, 128, 16384), (1e4, 8.0, 128, 32768), (1e4, 1.0, 64, 2048),
    (1e4, 2.5, 64, 8192), (1e5, 2.0, 64, 8192), (5e5, 8.0, 128, 65536), (5e5, 32.0, 64, 131072),
    (1e6, 4.0, 80, 32768), (3134.0, 16.0, 32, 512), (5e6, 3.0, 96, 4096), (1e4, 1000.0, 256, 8192),
]
# theta, factor, head_dim, trained length, seq_len
DYNAMIC = [
    (1e4, 2.0, 128, 4096, 8192), (1e4, 2.0, 128, 4096, 4096), (1e4, 4.0, 128, 2048, 2049),
    (1e4, 8.0, 64, 2048, 30000), (1e5, 2.0, 64, 8192, 16384), (5e5, 4.0, 128, 8192, 65536),
    (5e5, 4.0, 128, 8192, 262144), (5e5, 1.0, 128, 8192, 65536), (5e5, 4.0, 64, 8192, None),
    (3134.0, 4.0, 32, 512, 2048), (1e6, 1.5, 96, 32768, 100000), (1e4, 3.0, 80, 2048, 777),
]
# theta, factor, head_dim, original length, further fields
YARN = [
    (1e4, 16.0, 128, 4096, {}), (1e4, 32.0, 128, 4096, {}), (1e4, 2.0, 64, 2048, {}),
    (1e5, 2.0, 64, 8192, {}), (1e6, 4.0, 128, 32768, {}),
    (5e5, 8.0, 128, 8192, {'beta_fast': 16, 'beta_slow': 2}),
    (5e5, 128.0, 128, 8192, {'attention_factor': 1.0}),
    (1e4, 40.0, 64, 4096, {'mscale': 1.0, 'mscale_all_dim': 1.0}),
    (1e4, 40.0, 64, 4096, {'mscale': 1.0, 'mscale_all_dim': 0.707}),
    (1.5e5, 32.0, 64, 4096, {'truncate': False}), (3134.0, 4.0, 32, 512, {}),
    (5e6, 4.0, 96, 262144, {'beta_fast': 64, 'beta_slow': 0.5}), (1e4, 1.0, 80, 2048, {}),
]
# theta, factor, head_dim, original length, low_freq_factor, high_freq_factor
LLAMA3 = [
    (5e5, 8.0, 128, 8192, 1.0, 4.0), (5e5, 32.0, 64, 8192, 1.0, 4.0), (5e5, 32.0, 128, 8192, 1.0, 4.0),
    (5e5, 16.0, 128, 8192, 1.0, 1.5), (1e4, 4.0, 128, 4096, 1.0, 4.0), (1e4, 2.0, 64, 2048, 0.5, 8.0),
    (1e5, 2.0, 64, 8192, 1.0, 4.0), (1e6, 4.0, 80, 32768, 2.0, 32.0), (3134.0, 16.0, 32, 512, 1.0, 4.0),
    (5e5, 1.0, 96, 8192, 1.0, 4.0), (2e7, 128.0, 128, 8192, 1.0, 2.0),
]
# theta, factor (None: of the two lengths), head_dim, original length, seq_len, largest long divisor
LONGROPE = [
    (1e4, 32.0, 96, 4096, 131072, 64.0), (1e4, 32.0, 96, 4096, 4096, 64.0), (1e4, None, 96, 4096, 8000, 64.0),
    (1e4, None, 96, 4096, None, 64.0), (1e4, 32.0, 128, 4096, 100000, 50.0),
    (5e5, 8.0, 128, 8192, 65536, 8.0), (5e5, 128.0, 128, 8192, 1048576, 128.0),
    (1e5, 2.0, 64, 8192, 16384, 2.0), (1e5, 2.0, 64, 8192, 8192, 2.0), (3134.0, 4.0, 32, 512, 2048, 4.0),
    (1e6, 4.0, 80, 32768, 131072, 4.5),
]


def divisors(head_dim, last):
    """head_dim/2 numbers rising from 1 to last, fastest at the end, as LongRoPE's search finds them."""
    half = head_dim // 2
    return [round(1 + (last - 1) * (i / (half - 1)) ** 3, 3) for i in range(half)]


def cases():
    """Yields (rope_parameters, max_position_embeddings, head_dim, seq_len)."""
    for theta, factor, head_dim, trained in LINEAR:
        yield {'rope_type': 'linear', 'rope_theta': theta, 'factor': factor}, trained, head_dim, None
    for theta, factor, head_dim, trained, seq_len in DYNAMIC:
        yield {'rope_type': 'dynamic', 'rope_theta': theta, 'factor': factor}, trained, head_dim, seq_len
    for theta, factor, head_dim, original, more in YARN:
        fields = {'rope_type': 'yarn', 'rope_theta': theta, 'factor': factor,
                  'original_max_position_embeddings': original, **more}
        yield fields, int(original * factor), head_dim, None
    for theta, factor, head_dim, original, low, high in LLAMA3:
        fields = {'rope_type': 'llama3', 'rope_theta': theta, 'factor': factor, 'low_freq_factor': low,
                  'high_freq_factor': high, 'original_max_position_embeddings': original}
        yield fields, int(original * factor), head_dim, None
    for theta, factor, head_dim, original, seq_len, last in LONGROPE:
        fields = {'rope_type': 'longrope', 'rope_theta': theta, 'original_max_position_embeddings': original,
                  'short_factor': divisors(head_dim, 1.25), 'long_factor': divisors(head_dim, last)}
        fields |= {} if factor is None else {'factor': factor}
        yield fields, int(original * (factor or 32)), head_dim, seq_len


def compute(fields, max_position, head_dim, seq_len):
    """A case with its result."""
    import transformers

    config = transformers.LlamaConfig(
        rope_parameters=dict(fields), max_position_embeddings=max_position, head_dim=head_dim,
        hidden_size=4 * head_dim, num_attention_heads=4)
    init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[fields['rope_type']]
    inv_freq, factor = init(config, seq_len=seq_len)
    return {'rope_parameters': fields, 'max_position_embeddings': max_position, 'head_dim': head_dim,
            'seq_len': seq_len, 'inv_freq': [float(f'{x:.9g}') for x in inv_freq.tolist()],
            'attention_factor': float(factor)}


def main():
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with needs("'.[oracle]'"):
        import transformers
        import transformers.modeling_rope_utils

    results = [compute(*case) for case in cases()]
    lines = ',\n'.join(json.dumps(result) for result in results)
    GOLDEN.write_text(f'{{"transformers": "{transformers.__version__}", "cases": [\n{lines}\n]}}\n')
    print(f'{GOLDEN}: {len(results)} cases, {GOLDEN.stat().st_size / 1e3:.0f} kB')


if __name__ == '__main__':
    run_script(main)
