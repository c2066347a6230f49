"""Train a tiny model on a ring of two devices, shared by however many processes there are.

    python tests/tiny_processes.py WORKDIR [STEP]

Prints the hash of the initial weights as the first process collects them. With STEP the last process sends
itself a SIGTERM after that step.
"""

import os
import sys

import jax
import tiny_training

from lct import processes, sharding
from lct.models import llama
from lct.train import loop, progress, stopping
from lct.train.metrics import log
from lct.train.workdir import lock_workdir

DEVICES = 2
STAGE = tiny_training.stage('ring', 64, (1, 1, DEVICES, 1))
RUN = loop.Run(stages=(STAGE,), checkpoint_every=4, line_every_s=0)


def train(workdir, stop_requested=()):
    config = tiny_training.CONFIG
    lock = lock_workdir(workdir, {'what': 'tiny'})  # noqa: F841
    start = lambda: llama.init(config, jax.random.key(0))
    return loop.train(RUN, config, start, tiny_training.mixture(), workdir, stop_requested)


def initial_weights():
    with jax.set_mesh(sharding.make_mesh(RUN.stages[0].mesh)):
        return tiny_training.digest(sharding.collect(llama.init(tiny_training.CONFIG, jax.random.key(0))))


def main(workdir, step=None):
    count = processes.join()
    jax.config.update('jax_num_cpu_devices', DEVICES // count)
    weights = initial_weights()
    log(f'weights {weights}')
    if step and jax.process_index() == count - 1:
        write = progress.StageProgress.write

        def then_signal(self, device_metrics, number, *others):
            write(self, device_metrics, number, *others)
            if number == int(step):
                os.kill(os.getpid(), 15)

        progress.StageProgress.write = then_signal
    with stopping.catch_signals() as stop_requested:
        try:
            train(workdir, stop_requested)
        except stopping.Interrupted as stop:
            log(str(stop))
            sys.exit(130)


if __name__ == '__main__':
    main(*sys.argv[1:])
