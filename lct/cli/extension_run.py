"""The run of extend.py: evaluate, train, evaluate again, and write all results."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence

import jax

from lct import processes, sharding, watchdog
from lct.cli import extension_report, memory_check
from lct.cli.config import as_plain, measured_models
from lct.cli.extension import Job, export_problem
from lct.eval import before_after
from lct.eval.before_after import Measurements
from lct.models.config import LlamaConfig
from lct.models.llama import Params
from lct.text import clock
from lct.train import changes, loop, stopping
from lct.train.metrics import log
from lct.weights import llama_hf


class MissingWeights(Exception):
    """The weights after a stage that an earlier call trained, of which only measurements may be kept."""


def finish(job: Job, stop_requested: Sequence[str], began: float) -> None:
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


def extend(job: Job, stop_requested: Sequence[str],
           ) -> tuple[dict[str, Measurements], LlamaConfig, Params, dict]:
    """Evaluate, train, and evaluate again, as far as config.evaluate asks for it.

    Returns:
      ({name of a model: Measurements}, LlamaConfig, Params, summary).
    """
    evaluation, measured = job.evaluation, {}
    before, between, after = measured_models(job.config)
    trained = {'training': changes.training_fields(as_plain(job.config))}
    if evaluation:
        evaluation = dataclasses.replace(
            evaluation, check_stop=lambda: stopping.check_stop(stop_requested))

    def measure(name, config, params, mesh, inputs):
        with watchdog.phase('evaluation'):
            measured[name] = before_after.measure(
                evaluation, re.sub(r'[^\w.-]', '_', name), config, params, job.workdir, mesh, inputs)

    def load(convert=None):
        with watchdog.phase('set_up'):
            return llama_hf.load(job.folder, dtype=job.settings.param_dtype, convert=convert)[1]

    def gate_scores(stage, config, params):
        return evaluation.gate_scores(stage, config, params, measured['base'].short_loss)

    def after_stage(stage, config, params):
        measure(stage.name, config, lambda: params, jax.sharding.get_mesh(), trained)

    def missing():
        raise MissingWeights

    observers = job.observers._replace(after_stage=after_stage if between else None)
    if before:
        measure('base', job.base, load, job.mesh, None)
    with memory_check.explained(job.settings, job.start):
        config, params, summary = loop.train(
            job.settings, job.start, load, job.rows, job.workdir, stop_requested, gate_scores, observers)
    for stage in job.settings.stages[:-1] if between else ():  # of an earlier call
        with contextlib.suppress(MissingWeights):
            if stage.name not in measured:
                measure(stage.name, config, missing, job.mesh, trained)
    if after:
        measure('extended', config, lambda: params, job.mesh, trained)
    return measured, config, params, summary
