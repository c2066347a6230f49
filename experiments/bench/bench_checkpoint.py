"""Seconds of saving and restoring a checkpoint of 1 GB, with and without fingerprints.

    python experiments/bench/bench_checkpoint.py FOLDER [--output FILE] [--rounds 5]

FOLDER is new, on a disk with 4 GB free. The state, random weights and two moments of them, lies on eight
virtual devices. Each round saves and restores once with and once without fingerprints, in alternating order,
and measures the seconds of wall clock and of CPU; then it measures the fingerprints alone.
"""

import argparse
import json
import pathlib
import shutil
import statistics
import time

KINDS = ('with', 'without')


def make_state(gigabytes):
    """A tree of the shapes of a TrainState: weights of 8 layers and an embedding, and two moments of each."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh, rng = jax.sharding.get_mesh(), np.random.default_rng(0)
    width = int((gigabytes * 1e9 / 12 / 8 / 12) ** 0.5) // 128 * 128
    shapes = {'embed': ((8 * width, width), P('tensor', 'fsdp')),
              'wq': ((8, width, width // 64, 64), P(None, 'fsdp', 'tensor')),
              'wo': ((8, width // 64, 64, width), P(None, 'tensor', None, 'fsdp')),
              'w_up': ((8, width, 4 * width), P(None, 'fsdp', 'tensor')),
              'w_down': ((8, 4 * width, width), P(None, 'tensor', 'fsdp')), 'norm': ((8, width), P())}
    return {kind: {name: jax.device_put(rng.standard_normal(shape, np.float32), NamedSharding(mesh, spec))
                   for name, (shape, spec) in shapes.items()} for kind in ('params', 'mu', 'nu')}


def timed(function):
    """(result, seconds of wall clock, seconds of CPU)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def save_and_restore(folder, state, target, fingerprinted):
    """{save, restore: (wall, CPU) seconds}; the save until its files are complete."""
    from lct.train import checkpoint, fingerprints

    originals = fingerprints.describe_bits, fingerprints.check
    if not fingerprinted:
        fingerprints.describe_bits, fingerprints.check = fingerprints.describe, lambda *args: None
    try:
        checkpoints = checkpoint.Checkpoints(folder)
        _, *save = timed(lambda: (checkpoints.save(1, state, {'cursor': {}}), checkpoints.wait()))
        _, *restore = timed(lambda: checkpoints.restore_newest_valid(lambda step: target))
        checkpoints.close()
    finally:
        fingerprints.describe_bits, fingerprints.check = originals
        shutil.rmtree(folder)
    return {'save': save, 'restore': restore}


def medians(pairs):
    """The medians of seconds and of CPU seconds."""
    return [statistics.median(values) for values in zip(*pairs)]


def summarize(rounds, nbytes):
    """Print the medians; returns the share of the fingerprints in a save and a restore: [time, CPU]."""
    from lct.text import table

    found = {(name, kind): medians(one[kind][name] for one in rounds)
             for name in ('save', 'restore') for kind in KINDS}
    alone = medians(one['alone'] for one in rounds)
    rows = [(f'{name} {kind} fingerprints', *(f'{x:.2f}' for x in pair))
            for (name, kind), pair in found.items()]
    rows.append(('fingerprints of the state', *(f'{x:.3f}' for x in alone)))
    print(table((f'{nbytes / 1e9:.2f} GB', 'seconds', 'CPU seconds'), rows))
    share = [2 * x / (save + restore) for x, save, restore in zip(
        alone, found['save', 'without'], found['restore', 'without'])]
    print(f'two fingerprints / (save + restore): {share[0]:.1%} of the time, {share[1]:.1%} of the CPU')
    return share


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('--output', type=pathlib.Path)
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--gigabytes', type=float, default=1.0)
    args = parser.parse_args()
    import jax

    from lct.sharding import make_mesh
    from lct.train.fingerprints import fingerprints

    jax.config.update('jax_num_cpu_devices', 8)
    with jax.set_mesh(make_mesh((1, 4, 1, 2))):
        state = make_state(args.gigabytes)
        nbytes = sum(x.nbytes for x in jax.tree.leaves(state))
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        fingerprints(state)  # compiles
        rounds = []
        for index in range(args.rounds):
            one = {kind: save_and_restore(args.folder / kind, state, target, kind == 'with')
                   for kind in KINDS[::1 if index % 2 else -1]}
            _, *alone = timed(lambda: fingerprints(state))
            rounds.append({**one, 'alone': alone})
            print(json.dumps(rounds[-1]), flush=True)
    share = summarize(rounds, nbytes)
    if args.output:
        content = {'bytes': nbytes, 'devices': 8, 'jax': jax.__version__, 'rounds': rounds, 'share': share}
        args.output.write_text(json.dumps(content, indent=1))


if __name__ == '__main__':
    main()
