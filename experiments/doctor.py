"""Check whether a machine can train: versions, flags, devices, links, disk, and two steps of a tiny model.

    python experiments/doctor.py --workdir runs    # this machine
    srun ... python experiments/doctor.py          # a cluster, all processes together; also launch.py

One line per check: ok, warn (it works, but may not be what you want) or FAIL, with the remedy. The exit
status is 1 if any check failed in any process.
"""

import argparse
import contextlib
import fcntl
import glob
import importlib.metadata
import io
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

from lct.cli.main import run_script

GB = 1e9
PLUGINS = ('jaxlib', 'jax-cuda12-plugin', 'jax-cuda12-pjrt', 'jax-cuda13-plugin', 'jax-cuda13-pjrt')
DEBUG_SETTINGS = {  # for debugging; slow if they are still set
    'JAX_DISABLE_JIT': '1', 'JAX_DEBUG_NANS': '1', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
    'JAX_ENABLE_X64': '1',
    'XLA_PYTHON_CLIENT_ALLOCATOR': 'platform', 'NCCL_P2P_DISABLE': '1', 'NCCL_IB_DISABLE': '1',
}


class Unfit(Exception):
    """A check failed; the message gives the reason and the remedy."""


def versions(warn):
    """Python and the packages that this project requires."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires('lct') or ()]
    except importlib.metadata.PackageNotFoundError:
        raise Unfit('the package lct is not installed here; run pip install . in its folder') from None
    for requirement in requirements:
        if not requirement.marker or requirement.marker.evaluate({'extra': ''}):
            check_requirement(requirement)
    jax = importlib.metadata.version('jax')
    for name in PLUGINS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if (found := importlib.metadata.version(name)) != jax:
                raise Unfit(f'{name} {found} beside jax {jax}; run pip install "{name}=={jax}"')
    return f'Python {sys.version.split()[0]}, jax {jax}, {len(requirements)} requirements met'


def check_requirement(requirement):
    """Raises Unfit unless the package is installed in a version that meets the requirement."""
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        raise Unfit(f'{requirement.name} is missing; run pip install "{requirement}"') from None
    if not requirement.specifier.contains(found, prereleases=True):
        raise Unfit(f'{requirement.name} {found} is not {requirement.specifier}; '
                    f'run pip install "{requirement}"')


def flags(warn):
    """XLA_FLAGS (an unknown flag ends a process without an explanation) and leftover debugging settings."""
    xla_flags = os.environ.get('XLA_FLAGS', '').strip()
    if xla_flags:
        env = {**os.environ, 'JAX_PLATFORMS': 'cpu'}  # the flags are parsed on any platform
        for name in ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'):
            env.pop(name, None)
        probe = subprocess.run([sys.executable, '-c', 'import jax; jax.devices()'], env=env,
                               capture_output=True,
                               text=True, timeout=300)
        if probe.returncode:
            unknown = re.search(r'Unknown flags? in XLA_FLAGS: (.*)', probe.stderr)
            reason = f'unknown {unknown[1]}' if unknown else probe.stderr.strip().splitlines()[-1:]
            raise Unfit(f'XLA_FLAGS: {reason}; take that out, or use the jax that has it')
    for name, value in DEBUG_SETTINGS.items():
        if os.environ.get(name, '').lower() in (value, 'true' if value == '1' else value):
            warn(f'{name}={os.environ[name]} slows everything down or changes the numbers; unset it to train')
    return f'XLA_FLAGS={xla_flags!r}'


def neighbours(warn):
    """Other processes on the GPUs, before jax allocates memory on them."""
    query = ['nvidia-smi', '--query-gpu=memory.used', '--format=csv,noheader,nounits']
    try:
        used = [int(row) for row in subprocess.check_output(query, text=True, timeout=60).split()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return 'nvidia-smi is not available'
    if max(used) > 1024:
        warn(f'MiB in use on the GPUs: {used}; end what uses them (nvidia-smi), '
             'or less will fit than planned')
    return f'{len(used)} GPU(s), {max(used)} MiB in use at most'


def present_accelerators():
    """The extra of jax for the accelerators of this machine, by their device files; '' if there are none."""
    if glob.glob('/dev/nvidia[0-9]*'):
        return 'cuda13'
    if glob.glob('/dev/kfd'):
        return 'rocm7-local'
    return 'tpu' if glob.glob('/dev/accel[0-9]*') + glob.glob('/dev/vfio/[0-9]*') else ''


def devices(warn):
    """Whether jax finds the accelerators of the machine."""
    import jax

    backend, extra = jax.default_backend(), present_accelerators()
    if extra and backend == 'cpu':
        if os.environ.get('JAX_PLATFORMS', '') != 'cpu':
            raise Unfit('this machine has accelerators but jax computes on its CPU; run pip install '
                        f'"jax[{extra}]", and check the driver (nvidia-smi)')
        warn('JAX_PLATFORMS=cpu hides the accelerators of this machine; unset it to use them')
    if backend == 'gpu' and jax.device_count() > 1:
        warn_of_missing_options(warn)
    local = jax.local_devices()
    stats = [device.memory_stats() or {} for device in local]
    memory = [one['bytes_limit'] for one in stats if 'bytes_limit' in one]
    size = f' with {min(memory) / GB:.1f} GB each' if memory else ''
    return (f'{len(local)} x {local[0].device_kind}{size} here, {jax.device_count()} in '
            f'{jax.process_count()} process(es)')


def warn_of_missing_options(warn):
    """The compiler options of GPUs that should be in XLA_FLAGS."""
    from lct.plan.targets import CUDA_OPTIONS

    missing = [f'--{name}={str(value).lower()}' for name, value in CUDA_OPTIONS.items()
               if name not in os.environ.get('XLA_FLAGS', '')]
    if missing:
        warn(f'transfers will not overlap with compute; add {" ".join(missing)} to XLA_FLAGS')


def links(warn):
    """Six passes around a ring of all devices: whether the data arrives, and the speed."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from lct import sharding

    count, cpu = jax.device_count(), jax.default_backend() == 'cpu'
    if count == 1:
        return 'none with one device'
    width = 2**18 if cpu else 2**25
    with jax.set_mesh(sharding.make_mesh((1, 1, count, 1))):
        @jax.jit
        @jax.shard_map(in_specs=P('sequence'), out_specs=P('sequence'))
        def rotate(x):
            return jax.lax.ppermute(x, 'sequence', [(i, (i + 1) % count) for i in range(count)])

        x = jax.jit(lambda: jnp.repeat(jnp.arange(count, dtype=jnp.float32)[:, None], width, 1),
                    out_shardings=P('sequence'))()
        y = rotate(x).block_until_ready()
        start = time.perf_counter()
        for _ in range(5):
            y = rotate(y)
        y.block_until_ready()
        seconds = (time.perf_counter() - start) / 5
        extremes = sharding.fetch(jax.jit(lambda y: jnp.stack([y.min(1), y.max(1)]), out_shardings=P())(y))
    expected = [(i - 6) % count for i in range(count)]
    if extremes.tolist() != [expected, expected]:
        raise Unfit(f'after six passes of a ring the devices hold {extremes[0].tolist()[:16]}, not '
                    f'{expected[:16]}: the links of this machine corrupt data; set NCCL_P2P_DISABLE=1 to see '
                    'whether it is the direct ones')
    rate = 4 * width / seconds / GB
    if not cpu and rate < 5:
        warn(f'{rate:.1f} GB/s around the ring is slow; look at nvidia-smi topo -m, and with NCCL_DEBUG=INFO '
             'at the network in use')
    return f'a ring of {count} rotates at {rate:.2f} GB/s per device'


def disk(warn, workdir):
    """Space, speed and locks of the folder, and whether all processes share it."""
    from lct import processes

    probe = pathlib.Path(workdir) / '.doctor'
    problem, rate = None, 0
    if processes.is_first():
        try:
            rate = write_speed(probe, warn)
        except OSError as error:
            problem = error
    written = processes.from_first(problem is None)
    shared = probe.exists()
    processes.wait_for_all()
    if processes.is_first():
        with contextlib.suppress(OSError):
            probe.unlink()
    if not written:
        reason = problem or 'it prints the reason'
        raise Unfit(f'{workdir} cannot be written by the first process ({reason}); choose another')
    if not shared:
        raise Unfit(f'{workdir} of this process is not the folder of the first process; use a folder on a '
                    'file system that all share')
    free = shutil.disk_usage(workdir).free
    if free < GB:
        raise Unfit(f'{workdir} has {free / GB:.2f} GB free; free some, or choose another --workdir')
    if free < 20 * GB:
        warn(f'{free / GB:.0f} GB free: a checkpoint takes 12 bytes per parameter, 96 GB for 8B')
    return f'{workdir}: {free / GB:.0f} GB free, {rate / GB:.2f} GB/s written'


def write_speed(probe, warn):
    """Bytes per second of 64 MB written to a file and its disk."""
    probe.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with probe.open('wb') as file:
        file.write(os.urandom(2**20) * 64)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            warn(f'{probe.parent} has no locks: two runs in one folder would not notice each other')
    return 2**26 / seconds


def training(warn, workdir):
    """Two steps of a tiny model on all devices with a checkpoint, and the same loss on one device alone."""
    import jax
    import numpy as np

    from lct.data.batches.memory_source import MemorySource
    from lct.data.tokenizer import load
    from lct.models import llama
    from lct.train.stages import Stage

    ring = math.gcd(jax.device_count(), 4)
    mesh = (jax.device_count() // ring, 1, ring, 1)
    config = llama.LlamaConfig(vocab_size=258, embed_dim=64, mlp_dim=128, num_layers=1, num_heads=4,
                               num_kv_heads=2,
                               head_dim=16, tie_embeddings=True)
    stage = Stage('doctor', seq_len=64 * ring, num_steps=2, batch_size=mesh[0], learning_rate=1e-3, mesh=mesh)
    text = np.random.default_rng(0).integers(0, 256, 4 * stage.tokens_per_step).astype(np.int32)
    source = lambda: MemorySource([text], load('bytes'))
    init = lambda: llama.init(config, jax.random.key(0))
    start = time.perf_counter()
    together = train_steps(stage, config, init, source(), workdir)
    seconds = time.perf_counter() - start
    alone = first_loss(stage, config, init(), source())
    if together is not None and not abs(alone - together) < 1e-4:
        raise Unfit(f'one device computes the loss {alone:.6f}, all together {together:.6f}; run '
                    'experiments/check_numerics.py to find where they differ')
    return (f'two steps on {"x".join(map(str, mesh))} and a checkpoint in {seconds:.0f}s; the loss of all '
            f'devices is {together or 0:.6f}, of one {alone:.6f}')


def train_steps(stage, config, init, source, workdir):
    """Train on all devices; returns the first loss on the first process, None on others."""
    from lct import processes
    from lct.train import loop

    folder = pathlib.Path(workdir) / f'.doctor-{processes.from_first(os.getpid())}'
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _, _, summary = loop.train(loop.Run((stage,)), config, init, source, folder)
        processes.wait_for_all()
        if summary['skipped']:
            raise Unfit('loss or gradient was not finite; run experiments/check_numerics.py to find where')
        if not processes.is_first():
            return None
        return json.loads((folder / 'metrics' / 'metrics.jsonl').read_text().splitlines()[0])['loss']
    finally:
        if processes.is_first():
            shutil.rmtree(folder, ignore_errors=True)


def first_loss(stage, config, params, source):
    """The loss of the first batch on one device."""
    import jax

    from lct.data.batches.loader import Loader
    from lct.models import llama
    from lct.ops import rope

    with Loader(source, stage.batch_size, stage.seq_len, 'contiguous') as loader:
        batch, _ = loader.next()
    tables = rope.make_tables(config.rope, config.head_dim, stage.seq_len)
    loss_sum = jax.jit(llama.loss_sum, static_argnames=('config', 'memory'))
    return float(loss_sum(params, config.architecture(), batch, tables,
                          stage.memory)) / batch['loss_mask'].sum()


def examine(check, *arguments):
    """Run one check. Returns (whether it passed, its lines for the terminal)."""
    warnings = []
    try:
        summary = check(warnings.append, *arguments)
    except Exception as error:
        message = str(error) if isinstance(error, Unfit) else f'{type(error).__name__}: {error}'
        return False, [f'FAIL  {check.__name__:10} {" ".join(message.split())}']
    return True, [f'ok    {check.__name__:10} {summary}',
                  *(f'warn  {check.__name__:10} {text}' for text in warnings)]


def show(lines, index):
    """Process 0 prints all lines; the others print warnings and failures."""
    for line in lines:
        if not index or not line.startswith('ok'):
            print(f'[process {index}] {line}' if index else line, flush=True)


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', default='runs', help='where runs will write')
    workdir = parser.parse_args().workdir

    # These run before jax: if they fail, jax would not start, or it would change what they examine.
    early = [examine(check) for check in (versions, flags, neighbours)]
    if not all(passed for passed, _ in early):
        show([line for _, lines in early for line in lines], 0)
        sys.exit(1)
    import jax

    from lct import processes

    processes.join()
    show([line for _, lines in early for line in lines], jax.process_index())
    fit = True
    for check, *arguments in ((devices,), (links,), (disk, workdir), (training, workdir)):
        passed, lines = examine(check, *arguments)
        show(lines, jax.process_index())
        fit = fit and not processes.anyone(not passed)
    if not fit:
        processes.leave(1)
    if processes.is_first():
        print('this machine can train', flush=True)


if __name__ == '__main__':
    run_script(run)
