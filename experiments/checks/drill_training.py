"""Train a tiny random Llama through two stages and print a hash of the weights: what the drills break.

    python experiments/checks/drill_training.py WORKDIR [--steps 6] [--checkpoint-every 4] [--mesh 1,1,2,1]

Everything apart from the model and the data is what experiments/extend.py uses.
"""

import argparse
import dataclasses
import hashlib
import math
import pathlib
import resource
import sys

from lct.cli.main import run_script


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('workdir', type=pathlib.Path)
    parser.add_argument('--steps', type=int, default=6, help='of each of the two stages')
    parser.add_argument('--checkpoint-every', type=int, default=4)
    parser.add_argument('--keep-checkpoints', type=int, default=2)
    parser.add_argument('--mesh', default='1,1,2,1', help='of both stages')
    parser.add_argument('--embed-dim', type=int, default=32, help='width of the model')
    parser.add_argument('--seed', type=int, default=0, help='of the initial weights')
    parser.add_argument('--store', help='a token store of the bytes tokenizer; default: documents in memory')
    parser.add_argument('--rows', type=int, default=2, help='of a batch of the second stage')
    parser.add_argument('--accumulation', type=int, default=1, help='of the second stage')
    parser.add_argument('--spike-factor', type=float, default=0.0)
    parser.add_argument('--bad-batches', default='', help='see broken_batches.py, such as nan@1,spike@12-13')
    parser.add_argument('--address-space', type=float, help='GiB that the process may take after its set-up')
    parser.add_argument('--check-memory', action='store_true', help='compare the plan with the memory first')
    parser.add_argument('--watchdog', default='', help='budgets in seconds, such as step=5,data=3')
    parser.add_argument('--fault', default='', help='NAME@PLACE, see faults.py')
    return parser.parse_args()


def run():
    args = parse_args()
    mesh = tuple(map(int, args.mesh.split(',')))
    import jax

    from lct import cpu_devices, exit_status, processes

    count = processes.join()
    cpu_devices.provide(-(-math.prod(mesh) // count))

    import faults
    import numpy as np
    from broken_batches import break_batches

    from lct import sharding, watchdog
    from lct.cli import host_memory, memory_check
    from lct.data.batches.memory_source import MemorySource
    from lct.data.batches.store_source import StoreSource
    from lct.data.corpus.store import Store
    from lct.data.tokenizer import load
    from lct.models import llama
    from lct.ops import rope
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention
    from lct.train import loop, stopping
    from lct.train.metrics import log
    from lct.train.optimizer import OptimizerConfig
    from lct.train.stages import Stage
    from lct.train.workdir import lock_workdir

    model = llama.LlamaConfig(
        vocab_size=258, embed_dim=args.embed_dim, mlp_dim=2 * args.embed_dim, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=8, max_position_embeddings=64, tie_embeddings=True,
        rope=rope.RopeConfig(theta=1000.0))
    common = {
        'num_steps': args.steps, 'learning_rate': 1e-3, 'warmup_steps': 2, 'mesh': mesh,
        'memory': llama.Memory(remat='none', attention=Attention(chunks=Chunks(8, 8)), loss_chunk=8)}
    settings = loop.Run(
        stages=(Stage(name='short', seq_len=64, batch_size=2, **common),
                Stage(name='long', seq_len=128, batch_size=args.rows, accumulation=args.accumulation,
                      theta='dynamic_ntk', **common)),
        spike_factor=args.spike_factor, spike_window=8,
        optimizer=OptimizerConfig(weight_decay=0.01), checkpoint_every=args.checkpoint_every,
        keep_checkpoints=args.keep_checkpoints, line_every_s=0)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, int(n)).astype(np.int32) for n in rng.integers(20, 400, 30)]
    source = MemorySource(documents, load('bytes'), seed=0)
    if args.store:
        source = StoreSource(Store(args.store), load('bytes'), seed=0)
    identity = {'model': dataclasses.asdict(model), 'steps': args.steps, 'seed': args.seed}
    lock = lock_workdir(args.workdir, identity)  # noqa: F841  held while the process lives
    budgets = dict(item.split('=') for item in args.watchdog.split(',') if item)
    budgets = {name: float(seconds) for name, seconds in budgets.items()}
    faults.install(args.fault, jax.process_index())
    break_batches(args.bad_batches)
    if args.address_space:
        limit = host_memory.address_space() + int(args.address_space * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if args.check_memory:
        memory_check.check(settings, model)
    with (memory_check.explained(settings, model), watchdog.watch(budgets, args.workdir, jax.process_index()),
          stopping.catch_signals() as stop_requested):
        try:
            _, params, _ = loop.train(
                settings, model, lambda: llama.init(model, jax.random.key(args.seed)),
                source, args.workdir, stop_requested)
        except stopping.Interrupted as stop:
            log(str(stop))
            processes.leave(exit_status.STOPPED)
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(sharding.collect(params))):
        total.update(np.ascontiguousarray(leaf).tobytes())
    log(f'weights {total.hexdigest()}')
    processes.wait_for_all()
    sys.stdout.flush()


if __name__ == '__main__':
    run_script(run, resumes=True)
