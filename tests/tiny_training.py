"""Train a tiny model through two stages and print a hash of every bit of the result.

    python tests/tiny_training.py WORKDIR [STEP SIGNAL [DELAY]]

With STEP it sends itself the signal, DELAY seconds after that step was reported and its first checkpoint lies
on the disk: a tiny step takes milliseconds, so a signal from outside would come anywhere.
"""

import dataclasses
import hashlib
import os
import pathlib
import sys
import time

os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=4')

import jax
import numpy as np
import tiny

from lct.data.batches.memory_source import MemorySource
from lct.data.tokenizer import load
from lct.models import llama
from lct.train import loop, metrics, stopping
from lct.train.optimizer import OptimizerConfig
from lct.train.stages import Stage

CONFIG = dataclasses.replace(tiny.CONFIG, vocab_size=258)


def stage(name, seq_len, mesh, **more):
    return Stage(name=name, seq_len=seq_len, num_steps=6, batch_size=2, learning_rate=1e-3, warmup_steps=2,
                 mesh=mesh, memory=tiny.MEMORY, **more)


def run():
    return loop.Run(
        stages=(stage('short', 64, (1, 1, 2, 1)), stage('long', 128, (2, 1, 2, 1), theta='dynamic_ntk')),
        optimizer=OptimizerConfig(weight_decay=0.01), checkpoint_every=4,
        line_every_s=0,
    )


def mixture(seed=0):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, int(n)).astype(np.int32) for n in rng.integers(20, 400, 30)]
    return MemorySource(documents, load('bytes'), seed=seed)


def digest(tree):
    """sha256 over the bits of all leaves."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.ascontiguousarray(leaf).tobytes())
    return total.hexdigest()


def signal_after(step, number, delay, workdir):
    """Send this process a signal after the progress line of a step."""
    progress = metrics.Metrics.progress

    def then_signal(self, text, force=False):
        progress(self, text, force)
        if f'| step {step}/' in text:
            first, patience = pathlib.Path(workdir) / 'checkpoints' / '4', time.monotonic() + 60
            while step > 4 and not first.exists() and time.monotonic() < patience:
                time.sleep(0.01)
            time.sleep(delay)
            os.kill(os.getpid(), number)

    metrics.Metrics.progress = then_signal


def main(workdir, step=None, number=None, delay=0):
    if step:
        signal_after(int(step), int(number), float(delay), workdir)
    with stopping.catch_signals() as stop_requested:
        try:
            _, params, _ = loop.train(
                run(), CONFIG, lambda: llama.init(CONFIG, jax.random.key(0)), mixture(), workdir,
                stop_requested,
            )
        except stopping.Interrupted as stop:
            print(stop)
            sys.exit(130)
    print('weights', digest(jax.device_get(params)))


if __name__ == '__main__':
    main(*sys.argv[1:])
