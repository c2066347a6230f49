"""Extend the context of a Llama checkpoint in progressive stages, and measure it before and after.

    python experiments/extend.py --config experiments/configs/laptop.py --workdir runs/laptop

Evaluates the base (recall probe, loss by position), trains through the stages, evaluates again, and writes
figures, results.json, TensorBoard metrics and a Hugging Face folder. Stop it at any time: the same command
continues. --check does everything short of training, for the hardware that the config names, on any machine.
"""

import contextlib
import dataclasses
import re
import sys
import time

import jax

from lct import exit_status, processes, sharding, watchdog
from lct.cli import extension_report, memory_check, observe, run_record
from lct.cli.config import EVALUATE, as_plain, parse_args, setup_devices
from lct.cli.extension import check, export_problem
from lct.cli.extension_check import print_check
from lct.cli.main import run_script
from lct.cli.paths import experiments_folder
from lct.cli.urls import work_folder
from lct.eval import before_after
from lct.text import clock
from lct.train import changes, loop, stopping
from lct.train.metrics import log
from lct.weights import llama_hf


def add_flags(parser):
    observe.add_flags(parser)
    parser.add_argument('--check', action='store_true',
                        help='check model, corpus, evaluations and the plan of the memory, and stop')


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'laptop.py', 'runs/laptop',
                              add_flags)
    observe.check(args)
    if args.check:
        return print_check(config)
    setup_devices(config)
    began = time.monotonic()
    with (work_folder(args.workdir, jax.process_index(), processes.wait_for_all) as workdir,
          watchdog.watch(config.watchdog, workdir, jax.process_index())):
        job = check(config, workdir)
        plain = job.recorded['config']
        with (run_record.call(job.workdir, plain, job.recorded['inputs']) as run_id,
              observe.observers(args, job.workdir, config.name, run_id, plain) as observers):
            try:
                with stopping.catch_signals() as stop_requested:
                    finish(job._replace(observers=observers), stop_requested, began)
            except stopping.Interrupted as stop:
                log(str(stop))
                sys.exit(exit_status.STOPPED)


def finish(job, stop_requested, began):
    """Measure, train, measure and write all results. began: time.monotonic() at the start of this call."""
    measured, model, params, summary = extend(job, stop_requested)
    with watchdog.phase('save'):
        params = sharding.collect(params)
        if processes.is_first():  # the others have given their shards of the model
            report = extension_report.report_of(job, measured, summary, time.monotonic() - began)
            written = [*extension_report.write_report(job, measured, report), 'metrics']
            if not export_problem(model):
                extension_report.export(job, measured, report, model, params)
                written.append('model')
            extension_report.log_results(job, measured, report, written)
        processes.wait_for_all()
    log(f'{job.native:,} -> {job.target:,} tokens; this call took {clock(time.monotonic() - began)}')


def extend(job, stop_requested):
    """Evaluate, train, and evaluate again, as far as config.evaluate asks for it.

    Returns:
      ({name of a model: Measurements}, LlamaConfig, Params, summary).
    """
    evaluation, measured = job.evaluation, {}
    before, between, after = EVALUATE[job.config.get('evaluate', 'before_and_after')]
    trained = {'training': changes.training_fields(as_plain(job.config))}
    if evaluation:
        evaluation = dataclasses.replace(
            evaluation, check_stop=lambda: stopping.check_stop(stop_requested))

    def measure(name, config, params, mesh, inputs):
        with watchdog.phase('evaluation'):
            measured[name] = before_after.measure(
                evaluation, re.sub(r'[^\w.-]', '_', name), config, params, job.workdir, mesh, inputs)

    def load():
        with watchdog.phase('set_up'):
            return llama_hf.load(job.folder, dtype=job.settings.param_dtype)[1]

    def gate_scores(stage, config, params):
        return evaluation.gate_scores(stage, config, params, measured['base'].short_loss)

    def after_stage(stage, config, params):
        measure(stage.name, config, lambda: params, jax.sharding.get_mesh(), trained)

    def missing():
        raise LookupError

    observers = job.observers._replace(after_stage=after_stage if between else None)
    if before:
        measure('base', job.base, load, job.mesh, None)
    with memory_check.explained(job.settings, job.start):
        config, params, summary = loop.train(
            job.settings, job.start, load, job.rows, job.workdir, stop_requested, gate_scores, observers)
    for stage in job.settings.stages[:-1] if between else ():  # of an earlier call
        with contextlib.suppress(LookupError):
            if stage.name not in measured:
                measure(stage.name, config, missing, job.mesh, trained)
    if after:
        measure('extended', config, lambda: params, job.mesh, trained)
    return measured, config, params, summary


if __name__ == '__main__':
    run_script(run, resumes=True, urls=('--workdir',))
