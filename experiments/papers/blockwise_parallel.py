"""Blockwise Parallel Transformer (Liu & Abbeel 2023, arXiv 2305.19370): compiled memory of a layer.

    python experiments/papers/blockwise_parallel.py                   prints the earlier results
    python experiments/papers/blockwise_parallel.py --compile cpu     a minute
    python experiments/papers/blockwise_parallel.py --compile a100    (extra 'aot-cuda')

One layer of LLaMA 7B in float32, forward and backward from its checkpointed input, with attention that builds
its scores, attention in chunks, the FFN in chunks as well, and a ring of eight with the same tokens per
device. The memory that the compiler allots, less the input and its gradient, is counted in arrays of [tokens,
width]: the unit of table 1 of Ring Attention (arXiv 2310.01889), which has the figures that the first paper
gives in prose.
"""

import functools
import os

import claims
from llama1_sizes import SIZES

from lct.cli.main import run_script
from lct.eval.report import svg
from lct.plan import buffers

K = 2**10
METHODS = ('vanilla', 'chunked attention', 'chunked attention and FFN', 'ring')
RING, FFN_CHUNKS, LENGTHS = 8, 16, (4 * K, 8 * K, 16 * K)
# arrays of [tokens, width] by table 1, at two bytes per element; for vanilla the scores alone would be
# heads * tokens / width
TABLE_1 = {'chunked attention': 4, 'chunked attention and FFN': 1, 'ring': 3}


def layer_bytes(target, method, tokens):
    """Bytes that the compiler allots for the backward of one layer on a device with `tokens` tokens."""
    import jax
    import jax.numpy as jnp

    from lct import sharding
    from lct.models import llama
    from lct.ops import rope
    from lct.plan import hlo, targets

    config = SIZES['7B']
    ring = RING if method == 'ring' else 1
    degrees = (1, 1, ring, 1)
    machine = None if target == 'cpu' else targets.parse(f'{target}:{ring}')
    mesh = targets.mesh(machine, degrees) if machine else sharding.make_mesh(degrees)

    def array(letters, shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, sharding.spec(letters)))

    def weight(leaf, entry):
        placed = jax.NamedSharding(mesh, sharding.weight_spec(entry.letters[1:]))
        return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=placed)

    layer = layer_program(config, method)

    def backward(x, dout, *rest):
        return jax.vjp(lambda x: jax.checkpoint(layer)(x, *rest), x)[1](dout)

    length = tokens * ring
    with jax.set_mesh(mesh):
        x = array('BTD', (1, length, config.embed_dim))
        index = array('BT', (1, length), jnp.int32)  # positions, and segments
        weights = jax.tree.map(weight, llama.abstract(config).layers, llama.param_table(config).layers)
        tables = jax.eval_shape(lambda: rope.make_tables(config.rope, config.head_dim, length))
        lowered = jax.jit(backward).lower(x, x, weights, tables, index, index)
        compiled = lowered.compile(compiler_options=targets.options(machine) if machine else {})
        return hlo.memory_of(compiled)['temporaries']


def layer_program(config, method):
    """One layer: (x, weights, tables, positions, segments) -> x, on the current mesh."""
    import jax

    from lct import sharding
    from lct.models import llama
    from lct.ops import attention, rope
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.masks import Tokens
    from lct.ops.strategies import Attention

    def dense(q, k, v, positions, segments):
        def local(q, k, v, *tokens):
            return attention.attention(q, k, v, Tokens(*tokens), Tokens(*tokens))[0]

        heads, tokens = sharding.spec('BTNH'), sharding.spec('BT')
        sharded = jax.shard_map(local, in_specs=(heads,) * 3 + (tokens,) * 2, out_specs=heads)
        return sharded(q, k, v, positions, segments)

    chunked = functools.partial(llama.attention, split=Attention('ring', 1, Chunks(512, 512)))
    attend = dense if method == 'vanilla' else chunked
    feed_forward = functools.partial(llama.ffn, num_chunks=1 if method in METHODS[:2] else FFN_CHUNKS)

    def layer(x, weights, tables, positions, segments):
        angles = rope.angles(tables, positions)
        return llama.block(x, weights, angles, config, lambda q, k, v: attend(q, k, v, positions, segments),
                           feed_forward=feed_forward)[0]

    return layer


def compile_rows(target, known):
    """Compile the rows that known lacks; adds each to known, then yields."""
    for method in METHODS:
        for tokens in LENGTHS:
            key = {'compiler': target, 'method': method, 'tokens of a device': tokens}
            if not any(key.items() <= row.items() for row in known):
                known.append({**key, 'GiB': layer_bytes(target, method, tokens) / 2**30})
                yield


def arrays(row):
    """The GiB of a row as arrays of [tokens, width] in float32."""
    return row['GiB'] * 2**30 / (row['tokens of a device'] * SIZES['7B'].embed_dim * 4)


def predicted(method):
    """Arrays of a layer's backward by lct.plan.buffers, scores excluded."""
    config = SIZES['7B']
    chunks = 1 if method in METHODS[:2] else FFN_CHUNKS
    return buffers.WORK + buffers.WORK_FFN / 2 * config.mlp_dim / config.embed_dim / chunks


def claims_of(rows):
    found = []
    for target in dict.fromkeys(row['compiler'] for row in rows):
        of = {(row['method'], row['tokens of a device']): row for row in rows if row['compiler'] == target}
        if len(of) < len(METHODS) * len(LENGTHS):
            continue
        short, long = LENGTHS[0], LENGTHS[-1]
        growth = {method: of[method, long]['GiB'] / of[method, short]['GiB'] for method in METHODS}
        size = {method: arrays(of[method, long]) for method in METHODS}
        linear = max(growth[method] for method in METHODS[1:])
        found += [
            claims.Claim(
                'memory of a layer grows with the square of its tokens, in chunks with their number '
                f'(compiled for {target})',
                'compiled', '16x and 4x for four times the tokens',
                f'{growth["vanilla"]:.1f}x and at most {linear:.1f}x',
                'yes' if growth['vanilla'] > 13 and linear < 4.5 else 'in part',
                'Scores of 32 heads alone are 32 GiB at 16K.'),
            claims.Claim(
                f'chunks of the FFN take 4 arrays of [tokens, width] down to 1 (compiled for {target})',
                'compiled',
                '4 and 1, a ring 3', ', '.join(f'{method} {size[method]:.0f}' for method in METHODS[1:]),
                'in part', 'The order is theirs and the FFN falls as they say. The rest of a layer, the '
                'residual stream, q, k, v, out and their gradients at once, is more than the one array that '
                f'they count; buffers.py has {buffers.WORK}. A ring adds the block that arrives, as theirs '
                'does, and the weights of the layer, gathered.'),
            claims.Claim(
                'sequences 32 times longer than vanilla, up to 4 times longer than chunked attention '
                f'(compiled for {target})',
                'compiled', '32x, 4x',
                f'a layer of 16K tokens takes {size["vanilla"] / size[METHODS[2]]:.0f} and '
                f'{size[METHODS[1]] / size[METHODS[2]]:.1f} times as much', 'in part',
                'Lengths that train follow from whole models: table 3 of Ring Attention in '
                'ring_attention.py.')]
    return found


def run(argv=None):
    args = claims.flags(__doc__, argv, compile={
        'choices': ('cpu', 'a100'), 'help': 'compile the missing rows for this'})
    known = [{key: row[key] for key in ('compiler', 'method', 'tokens of a device', 'GiB')}
             for row in claims.earlier(args.output, 'blockwise_parallel', 'memory of a layer')]
    if args.compile == 'cpu':
        flags = os.environ.get('XLA_FLAGS', '')
        os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={RING}'
    for _ in compile_rows(args.compile, known) if args.compile else ():
        write(args.output, known)
    write(args.output, known)


def write(out, known):
    rows = [{**row, 'arrays': arrays(row), 'their table 1': TABLE_1.get(row['method']), 'predicted arrays':
             None if row['method'] == 'vanilla' else predicted(row['method'])} for row in known]
    series = {}
    for row in rows:
        if row['compiler'] == rows[0]['compiler']:
            xs, ys = series.setdefault(row['method'], ([], []))
            xs.append(row['tokens of a device'])
            ys.append(row['GiB'])
    title = f'one layer of LLaMA 7B, float32, compiled for {rows[0]["compiler"]}' if rows else ''
    drawing = {'memory': svg.lines(series, 'tokens of a device', 'GiB', title, log_y=True)} if rows else {}
    claims.report(out, 'blockwise_parallel', 'Blockwise Parallel Transformer, arXiv 2305.19370',
                  {'memory of a layer': rows} if rows else {}, claims_of(rows), **drawing)


if __name__ == '__main__':
    run_script(run)
