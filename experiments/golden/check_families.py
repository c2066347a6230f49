"""Compare every family with Hugging Face transformers, on meshes, under remat, with adapters and in decoding.

    python experiments/golden/check_families.py [--cases qwen3_0,phi3_1] [--export DIR]

Reads tests/golden/families.npz, which make_golden_families.py writes; its --check-export opens the
folders that --export writes. The tests run an extract.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault(
    'XLA_FLAGS', '--xla_force_host_platform_device_count=8 --xla_cpu_opt_preset=fast_compile')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np
import tiny_families

from lct import sharding
from lct.cli.main import run_script
from lct.data.layout import permutation
from lct.models import decode, llama, lora
from lct.models.memory import Memory
from lct.models.session import Session
from lct.ops import rope
from lct.ops.blockwise_attention import Chunks
from lct.ops.strategies import Attention
from lct.text import table
from lct.weights import llama_hf, mapping

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / 'tests' / 'golden' / 'families.npz'
LOGITS, GRADIENTS = 2e-5, 1e-4  # largest difference relative to the largest value
SMALL = Attention(chunks=Chunks(8, 8))
TRAINED = {(1, 1, 8, 1): Memory(remat='full', attention=SMALL, ffn_chunks=2),
           (1, 2, 2, 2): Memory(remat='attention', attention=SMALL)}


def relative(found, expected):
    """The largest difference relative to the largest value."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def load(name, dtype='float32'):
    """(LlamaConfig, Params) of a case on the current mesh."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_families.write_case(name, folder)
        return llama_hf.load(folder, dtype)


def golden(name):
    """{array name: array} of a case."""
    with np.load(GOLDEN) as file:
        return {key.removeprefix(f'{name}/'): file[key] for key in file.files if key.startswith(f'{name}/')}


def logits_error(name):
    """Relative error of the logits on the current mesh."""
    config, params = load(name)
    return relative(llama.logits(params, config, tiny_families.tokens(name)[0]), golden(name)['logits'])


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _gradient(params, batch, tables, config, memory):
    return jax.grad(
        lambda p: llama.loss_sum(p, config, batch, tables, memory) / batch['loss_mask'].sum())(params)


def batch_of(name):
    """(batch on the current mesh, in the zigzag layout; tables) of a case."""
    tokens, targets = tiny_families.tokens(name)
    order = permutation('zigzag', tiny_families.LENGTH, sharding.axis_size('sequence'))
    arrays = dict(
        tokens=tokens, targets=targets, segment_ids=np.ones_like(tokens),
        positions=np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        loss_mask=np.ones(tokens.shape, np.float32))
    config = load_config(name)
    return ({key: sharding.put(np.ascontiguousarray(x[:, order]), sharding.spec('BT'))
             for key, x in arrays.items()},
            rope.make_tables(config.rope, config.head_dim, tiny_families.LENGTH))


def load_config(name):
    """LlamaConfig of a case."""
    return llama_hf.config_from_json(tiny_families.CASES[name])


def gradient_error(name, memory):
    """The largest error of a gradient relative to the largest value of its parameter in any layer, on the
    current mesh: in a layer that does not rotate the gradient of k_bias is exactly zero."""
    config, params = load(name)
    batch, tables = batch_of(name)
    gradients = jax.device_get(_gradient(params, batch, tables, config.architecture(), memory))
    gradients = {'.'.join(key.name for key in path): leaf
                 for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    expected = {key.removeprefix('grad/'): x for key, x in golden(name).items() if key.startswith('grad/')}
    entries, differences, sizes = mapping.parameter_table(config), {}, {}
    for tensor, shape in mapping.checkpoint_shapes(config, llama_hf.NAMES).items():
        parameter, layer = llama_hf.tensor_names(config)[tensor]
        stored, start = expected_rows(tensor, expected, shape)
        rows, letters = stored[start:start + shape[0]], entries[parameter].letters.replace('L', '')
        found = gradients[parameter] if layer is None else gradients[parameter][layer]
        difference = np.abs(found - mapping.from_checkpoint(rows, config, letters)).max()
        differences[parameter] = max(difference, differences.get(parameter, 0))
        sizes[parameter] = max(np.abs(rows).max(), sizes.get(parameter, 0))
    return float(max(differences[parameter] / sizes[parameter] for parameter in differences))


def expected_rows(tensor, expected, shape):
    """(the golden array that holds the gradient of a Llama's tensor, its first row)."""
    if tensor in expected:
        return expected[tensor], 0
    for whole, parts in (('qkv_proj', ('q_proj', 'k_proj', 'v_proj')),
                         ('gate_up_proj', ('gate_proj', 'up_proj'))):
        for i, part in enumerate(parts):
            if f'.{part}.' in tensor:
                array = expected[tensor.replace(part, whole)]
                before = {0: 0, 1: len(array) - (len(parts) - 1) * shape[0], 2: len(array) - shape[0]}
                return array, before[i]
    raise KeyError(tensor)


def far_adapter(config, params):
    """(Trained, frozen) whose adapters and norms have moved far from their start."""
    rng = np.random.default_rng(0)
    adapter = lora.Adapter(rank=2, alpha=4.0)
    whole, frozen = lora.freeze(params, adapter)
    trained = lora.Trained(lora.init(config, adapter), whole)

    def move(x):
        noise = 0.3 * rng.standard_normal(x.shape, np.float32)
        return x + sharding.put(noise, getattr(x.sharding, 'spec', None))

    return jax.tree.map(move, trained), frozen


_adapted_loss = jax.jit(lora.loss_sum, static_argnames=('config', 'memory'))
_loss = jax.jit(llama.loss_sum, static_argnames=('config', 'memory'))


def adapter_error(name, memory):
    """Relative difference of the loss with adapters and of the merged model, on the current mesh."""
    config, params = load(name)
    trained, frozen = far_adapter(config, params)
    batch, tables = batch_of(name)
    loss = _adapted_loss(trained, frozen, config.architecture(), batch, tables, memory)
    merged = _loss(lora.merge(trained, frozen), config.architecture(), batch, tables, memory)
    return relative(loss, np.asarray(merged))


def greedy_differences(name):
    """The number of greedy tokens that differ from transformers', on the current mesh."""
    config, params = load(name)
    found = decode.generate(params, config, tiny_families.prompts(name), tiny_families.NEW_TOKENS,
                            memory=Memory(attention=SMALL))
    return int((found != golden(name)['greedy']).sum())


def session_differences(name):
    """As greedy_differences, with prompts read in chunks into a session."""
    config, params = load(name)
    prompts, new = tiny_families.prompts(name), tiny_families.NEW_TOKENS
    unit = 2 * sharding.axis_size('sequence')
    seq_len = -(-(max(map(len, prompts)) + new) // unit) * unit
    longest = max(map(len, prompts)) + new - 1
    session = Session(params, config, len(prompts), seq_len, memory=Memory(attention=SMALL), longest=longest)
    session.read(prompts, prefill_chunk=unit)
    found = session.ask([[]] * len(prompts), [new] * len(prompts), new)
    return int((np.array(found) != golden(name)['greedy']).sum())


def check(name):
    """{what was compared: (figure, limit)} of a case."""
    with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1))):
        found = {'logits': (logits_error(name), LOGITS)}
    for degrees, memory in TRAINED.items():
        with jax.set_mesh(sharding.make_mesh(degrees)):
            column = ','.join(map(str, degrees))
            found[f'grad {column} {memory.remat}'] = gradient_error(name, memory), GRADIENTS
            if degrees[3] > 1:
                found[f'adapter {column}'] = adapter_error(name, memory), 1e-5
                found[f'greedy {column}'] = greedy_differences(name), 0
            else:
                found[f'chunks {column}'] = session_differences(name), 0
    return found


def export(name, folder):
    """Write a case as a folder again."""
    config, params = load(name)
    llama_hf.save(folder / name, config, params, dtype='float32', overwrite=True)
    if llama_hf.read_config(folder / name) != config:
        raise ValueError(f'{folder / name} was read with another config than it was written with')


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', default=','.join(tiny_families.CASES))
    parser.add_argument('--export', type=pathlib.Path, metavar='DIR')
    args = parser.parse_args()
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        for name in args.cases.split(','):
            export(name, args.export)
        print(f'{len(args.cases.split(","))} folders under {args.export}')
        return
    rows, failed = [], []
    for name in args.cases.split(','):
        found = check(name)
        rows.append((name, *(f'{figure:.1e}' if limit else str(figure) for figure, limit in found.values())))
        failed += [f'{name} {key}' for key, (figure, limit) in found.items() if not figure <= limit]
        print(*rows[-1], flush=True)
        jax.clear_caches()
    print(table(('case', *found), rows))
    if failed:
        sys.exit(f'above the limit: {", ".join(failed)}')


if __name__ == '__main__':
    run_script(main)
