"""Extend the context of a Llama checkpoint in progressive stages, and measure it before and after.

    python experiments/extend.py --config experiments/configs/laptop.py --workdir runs/laptop

Evaluates the base (recall probe, loss by position), trains through the stages, evaluates again, and writes
figures, results.json, TensorBoard metrics and a Hugging Face folder. Stop it at any time: the same command
continues. --check does everything short of training, for the hardware that the config names, on any machine.
"""

import sys
import time

from lct.cli import observe
from lct.cli.config import parse_args, setup_devices
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder


def add_flags(parser):
    observe.add_flags(parser)
    parser.add_argument('--check', action='store_true',
                        help='check model, corpus, evaluations and the plan of the memory, and stop')


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'laptop.py', 'runs/laptop',
                              add_flags)
    observe.check(args)
    if args.check:
        from lct.cli.extension_check import print_check

        return print_check(config)
    train(config, args)


def train(config, args):
    """Train and measure. Imports come after the flags are checked, which takes a second that way."""
    import jax

    from lct import exit_status, processes, watchdog
    from lct.cli import run_record
    from lct.cli.extension import attention_blocks, check
    from lct.cli.extension_run import finish
    from lct.cli.urls import work_folder
    from lct.train import stopping
    from lct.train.metrics import log

    setup_devices(config)
    began = time.monotonic()
    with (work_folder(args.workdir, jax.process_index(), processes.wait_for_all) as workdir,
          watchdog.watch(config.watchdog, workdir, jax.process_index())):
        job = check(config, workdir)
        plain = job.recorded['config']
        resolved = {'attention_blocks': attention_blocks(job.settings, job.base)}
        with (run_record.call(job.workdir, plain, job.recorded['inputs'], resolved) as run_id,
              observe.observers(args, job.workdir, config.name, run_id, plain) as observers):
            try:
                with stopping.catch_signals() as stop_requested:
                    finish(job._replace(observers=observers), stop_requested, began)
            except stopping.Interrupted as stop:
                log(str(stop))
                sys.exit(exit_status.STOPPED)


if __name__ == '__main__':
    run_script(run, resumes=True, urls=('--workdir',))
