"""Write tests/golden/hlo_*.txt: scheduled HLO of small programs, as the CUDA and TPU compilers print it.

    python experiments/golden/make_golden_hlo.py l40s:8             # needs the extra 'aot-cuda'
    python experiments/golden/make_golden_hlo.py v5e:2x4            # needs the extra 'aot-tpu'
    python experiments/golden/make_golden_hlo.py l40s:8 --offload   # layer inputs on the host

tests/test_hlo.py lists by hand the collectives and the copies of the programs, which the parser must find in
the files.
"""

import argparse
import os
import re

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from lct.cli.main import run_script
from lct.cli.paths import experiments_folder


def program(x, w):
    """Ring steps, matmuls and collectives on a mesh (1, 2, 4, 1).

    Three ring steps over 'sequence' are overlapped with a loop of five matmuls; one ring step is exposed. A
    sum over 'fsdp' and a gather over 'fsdp' and 'sequence' follow.

    x [8, 128] and w [128, 128] on each device.
    """
    import jax
    from jax import lax

    def ring_step(carry, _):
        block, total = carry
        arriving = lax.ppermute(block, 'sequence', [(i, (i + 1) % 4) for i in range(4)])
        total = lax.fori_loop(0, 5, lambda _, y: jax.numpy.tanh(y @ w), total + block)
        return (arriving, total), None

    (block, total), _ = lax.scan(ring_step, (x, x), length=3)
    total = lax.ppermute(total, 'sequence', [(i, (i + 1) % 4) for i in range(4)]) + block
    return lax.all_gather(lax.psum(total * total, 'fsdp'), ('fsdp', 'sequence'))


def offloaded(x, w):
    """The gradient of four layers whose inputs, 4096 bytes on a device, are kept on the host."""
    import jax

    from lct.models.memory import Memory, scan_layers

    layer = lambda x, scale: jax.numpy.tanh(x @ (scale * w))
    scales = jax.numpy.arange(4.0)
    return jax.grad(lambda x: scan_layers(layer, x, scales, Memory('offload')).sum())(x)


def compile_for(target, function):
    """The text of a program of x [64, 128] and w [128, 128], without the names of source files."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lct.plan import targets

    mesh = targets.mesh(target, (1, 2, 4, 1))
    array = lambda shape, spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec))
    layouts = P(('fsdp', 'sequence'), None), P(None, None)
    outputs = P(None, 'fsdp') if function is program else layouts[0]
    sharded = jax.shard_map(function, mesh=mesh, in_specs=layouts, out_specs=outputs, check_vma=False)
    compiled = jax.jit(sharded).lower(array((64, 128), layouts[0]), array((128, 128), layouts[1])).compile(
        compiler_options=targets.options(target))
    text = re.sub(r', metadata=\{[^}]*\}', '', compiled.as_text())
    head, *rest = re.split(r'\n(?=(?:ENTRY )?%[\w.-]+ \()', text)  # head: with the tables of source files
    return '\n'.join([head.split('\n')[0], *rest]) + '\n'


def run():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('target', help='l40s:8 or v5e:2x4')
    parser.add_argument('--offload', action='store_true', help='the program with layer inputs on the host')
    args = parser.parse_args()

    from lct.plan import targets

    target = targets.parse(args.target)
    path = experiments_folder().parent / 'tests' / 'golden' / (
        f'hlo_{target.platform}{"_offload" * args.offload}.txt')
    path.write_text(compile_for(target, offloaded if args.offload else program))
    print(f'{path}: {path.stat().st_size} bytes')


if __name__ == '__main__':
    run_script(run)
