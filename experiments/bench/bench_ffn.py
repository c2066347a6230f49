"""The FFN, forward and backward on CPUs, as a fraction of the matmul peak of the same process.

    python experiments/bench/bench_ffn.py --output experiments/results/bench_ffn.json

The layer is the one of bench_step.py (embed_dim 512, mlp_dim 1408, float32, one row of 4,096 tokens) on a
ring of two virtual devices. Its FLOPs are those of all matmuls that it runs: three forward, two of them again
in the backward, six for the gradients. The peak is that of a matmul of 4,096 x 512 x 1,408, the rows of which
are split over the devices. Both are timed in turns; the fraction is the median over the rounds.
"""

import argparse
import pathlib
import statistics
import time

TOKENS, EMBED, MLP, RING = 4096, 512, 1408, 2
MATMUL = 2 * TOKENS * EMBED * MLP
FFN = 11 * MATMUL
REPEATS = 4  # of the matmul in a round, so that both sides take about as long


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    from lct import cpu_devices

    cpu_devices.provide(RING)
    import jax
    import numpy as np
    from jax.sharding import PartitionSpec as P

    from lct import environment, json_files, sharding

    with jax.set_mesh(sharding.make_mesh((1, 1, RING, 1))):
        ffn, inputs = ffn_and_inputs()
        w = sharding.put(np.random.default_rng(1).standard_normal((EMBED, MLP), np.float32), P())
        rows, matmul = jax.reshard(inputs[0][0], P('sequence')), jax.jit(lambda x, w: x @ w)
        rates = {'matmul': [], 'ffn': []}
        for number in range(args.rounds + 1):
            peak = max(rate(matmul, (rows, w), MATMUL) for _ in range(REPEATS))
            reached = rate(ffn, inputs, FFN)
            if number:  # the first round compiles
                rates['matmul'].append(peak)
                rates['ffn'].append(reached)
    fraction = statistics.median(b / a for a, b in zip(*rates.values(), strict=True))
    for name, values in rates.items():
        print(f'{name}: {statistics.median(values):.0f} GFLOP/s')
    print(f'the FFN reaches {fraction:.0%} of the matmul')
    if args.output:
        json_files.write_json(args.output, {
            'versions': environment.versions(), 'command': environment.command(),
            'gflops': {name: [round(value, 1) for value in values] for name, values in rates.items()},
            'fraction': round(fraction, 4)})


def ffn_and_inputs():
    """Forward and backward of the FFN as a function, and its inputs on the current mesh."""
    import jax
    import numpy as np

    from lct import sharding
    from lct.models import llama

    config = llama.LlamaConfig(vocab_size=64, embed_dim=EMBED, mlp_dim=MLP, num_layers=1, num_heads=8,
                               num_kv_heads=2, head_dim=64, max_position_embeddings=TOKENS)
    layer = jax.tree.map(lambda w: w[0], llama.init(config, jax.random.key(2)).layers)
    rng = np.random.default_rng(0)
    x, dout = (sharding.put(rng.standard_normal((1, TOKENS, EMBED), np.float32), sharding.spec('BTD'))
               for _ in range(2))

    def loss(x, layer, dout):
        return (llama.ffn(x, layer, config, 1) * dout).sum()

    return jax.jit(jax.value_and_grad(loss, (0, 1))), (x, layer, dout)


def rate(function, inputs, flops):
    """GFLOP/s of one call."""
    import jax

    began = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    return flops / (time.perf_counter() - began) / 1e9


if __name__ == '__main__':
    main()
