"""Extend the context of a Llama checkpoint in progressive stages, and measure it before and after.

    python experiments/extend.py --config experiments/configs/laptop.py --workdir runs/laptop

Evaluates the base (recall probe, loss by position), trains through the stages, evaluates again, and writes
figures, results.json, TensorBoard metrics and a Hugging Face folder. Stop it at any time: the same command
continues.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lct import environment, exit_status, processes, sharding, watchdog
from lct.cli import memory_check, observe, run_record
from lct.cli.config import as_plain, make_run, parse_args, setup_devices, windowed
from lct.cli.corpus import check_documents, corpus_identity, open_corpus, record_documents
from lct.cli.main import run_script
from lct.cli.model import find_model, model_fingerprint, warn_of_edits
from lct.cli.paths import experiments_folder
from lct.cli.urls import work_folder
from lct.data import tokenizer as tokenizers
from lct.eval import before_after, quick_ruler, recall_probe
from lct.eval.loss import by_position
from lct.eval.report import figures, model_card
from lct.files import write_atomically
from lct.models import llama, lora
from lct.models.llama import LlamaConfig
from lct.text import clock
from lct.train import changes, loop, stages, stopping
from lct.train.metrics import log, write_images
from lct.train.observers import Observers
from lct.train.warnings import stage_warnings
from lct.train.workdir import lock_workdir, recorded_changes
from lct.weights import llama_hf
from lct.weights.tensors import check_dtype

SHORT_WINDOWS = 32  # of the native length, for the gates of stages
CARRIES_OVER = 0.2  # of the needle prompts; below it a closing line says that recall is bound to its wording


class Job(NamedTuple):
    """A checked run.

    mesh: of the last stage, for evaluations. base: config of the checkpoint in folder. start: config that
    training starts from. rows: of the corpus. size, trained: number of parameters, in total and trained.
    """

    config: ConfigDict
    workdir: Path
    settings: loop.Run
    mesh: jax.sharding.Mesh
    folder: Path
    base: LlamaConfig
    start: LlamaConfig
    rows: Any
    evaluation: before_after.Evaluation
    size: int
    trained: int
    recorded: dict  # the config and the hashes of the inputs, as plain values
    lock: Any  # held while the process lives
    observers: Observers = Observers()

    @property
    def native(self):
        """Context length of the base model in tokens."""
        return self.base.max_position_embeddings

    @property
    def target(self):
        """Context length of the extended model in tokens."""
        return self.settings.stages[-1].seq_len


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'laptop.py', 'runs/laptop',
                              observe.add_flags)
    observe.check(args)
    setup_devices(config)
    began = time.monotonic()
    with (work_folder(args.workdir, processes.is_first(), processes.wait_for_all) as workdir,
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
    base, extended, model, params, summary = extend(job, stop_requested)
    with watchdog.phase('save'):
        params = sharding.collect(params)
        if processes.is_first():  # the others have given their shards of the model
            report = report_of(job, base, extended, summary, time.monotonic() - began)
            write_report(job, base, extended, report)
            if exported := not export_problem(model):
                export(job, base, extended, report, model, params)
            log_results(job, report, exported=exported)
        processes.wait_for_all()
    log(f'{job.native:,} -> {job.target:,} tokens; this call took {clock(time.monotonic() - began)}')


def export_problem(config):
    """Why transformers could not compute a model of this config, or ''."""
    try:
        llama_hf.config_to_json(config)
    except ValueError as error:
        return str(error)
    return ''


def check(config, workdir):
    """The Job of a config. Everything that can be wrong is found before anything is computed."""
    settings = make_run(config)
    for stage in settings.stages:
        mesh = sharding.make_mesh(stage.mesh)
    folder = find_model(config.model_folder)
    base = llama_hf.read_config(folder)
    llama_hf.check(folder)
    warn_of_edits(folder)
    tokenizer = tokenizers.load(folder)
    tokenizers.check_vocab_size(tokenizer, base.vocab_size)
    start = windowed(base, config)
    if problem := export_problem(stages.configs(settings.stages, start)[-1]):
        log(f'WARNING: {problem}; the extended model is evaluated but not exported, and its weights stay in '
            'the checkpoints')
    if config.get('check_memory', True):
        memory_check.check(settings, start)
    for warning in stage_warnings(settings.stages, base, settings.param_dtype):
        log(f'WARNING: {warning}')
    rows, held_out = open_corpus(config, tokenizer)
    for stage in settings.stages:
        rows.weights = dict(stage.mixture)
        rows.check_length(stage.seq_len)
    if not held_out:
        raise ValueError(f'held_out {config.held_out} leaves no document to evaluate on; use for example 0.1')
    evaluation = check_evaluation(config, settings.stages, base, tokenizer, held_out)
    size = trained = llama.num_params(base)
    if settings.adapter:
        trained = lora.num_trained(base, settings.adapter)
    # float32 weights and two moments in each checkpoint, one more than are kept; then the model itself
    nbytes = 12 * (settings.keep_checkpoints + 1) * trained + 4 * size
    check_dtype(config.get('save_dtype', 'bfloat16'))
    workdir.mkdir(parents=True, exist_ok=True)
    llama_hf.check_writable(workdir / 'model', nbytes, overwrite=True)
    check_documents(rows, workdir)
    recorded = {'config': as_plain(config), 'inputs': {
        'model': model_fingerprint(folder, workdir), 'tokenizer': tokenizer.fingerprint,
        'architecture': dataclasses.asdict(base), **corpus_identity(rows, held_out),
    }}
    lock = lock_workdir(workdir, {**recorded['config'], 'inputs': recorded['inputs']}, may_change=True)
    if lock:  # the first process
        record_documents(rows, workdir)
    job = Job(config, workdir, settings, mesh, folder, base, start, rows, evaluation, size, trained, recorded,
              lock)
    log(
        f'{folder.name}: {size:,} parameters, {trained:,} of them trained ({trained / size:.2%}), native '
        f'context {job.native:,} -> {job.target:,}; {rows.num_tokens:,} training tokens, {len(held_out)} '
        f'held-out documents; {jax.default_backend()}, {jax.process_count()} process(es), '
        f'mesh {dict(mesh.shape)}'
    )
    return job


def check_evaluation(config, run_stages, base, tokenizer, held_out):
    """The before_after.Evaluation over held_out [ids of a document]."""
    last, gated = run_stages[-1], [stage for stage in run_stages if stage.gate]
    haystack, native = np.concatenate(held_out), base.max_position_embeddings
    probe, loss = config.needle, config.loss
    grid = recall_probe.RecallGrid(probe.lengths, probe.depths, probe.samples, config.seed)
    grid.check_haystack(len(haystack))
    by_position.check_window_length(loss.seq_len, last.mesh[2], last.memory.ffn_chunks)
    for stage in gated:
        dataclasses.replace(grid, lengths=(stage.seq_len,)).check_haystack(len(haystack))
        by_position.check_window_length(native, stage.mesh[2], stage.memory.ffn_chunks)
    windows = by_position.evaluation_windows(
        held_out, loss.seq_len, loss.windows, config.seed, tokenizer.bos_id, loss.rotations)
    short = None
    if gated:
        short = by_position.evaluation_windows(held_out, native, SHORT_WINDOWS, config.seed, tokenizer.bos_id)
    decoding = recall_probe.Decoding(last.layout, last.memory)
    needle = before_after.make_needle_plan(tokenizer, haystack, last.seq_len, config.seed)
    ruler = quick_ruler.make_plan(tokenizer, haystack, last.seq_len, config.seed)
    return before_after.Evaluation(
        tokenizer, haystack, grid, windows, short, needle, ruler, decoding, log=log)


def extend(job, stop_requested):
    """Evaluate, train, and evaluate again.

    Returns:
      (Measurements of the base, Measurements of the extended model, LlamaConfig, Params, summary).
    """
    evaluation = dataclasses.replace(job.evaluation, check_stop=lambda: stopping.check_stop(stop_requested))

    def load():
        with watchdog.phase('set_up'):
            return llama_hf.load(job.folder, dtype=job.settings.param_dtype)[1]

    def gate_scores(stage, config, params):
        return evaluation.gate_scores(stage, config, params, base.short_loss)

    with watchdog.phase('evaluation'):
        base = before_after.measure(evaluation, 'base', job.base, load, job.workdir, job.mesh)
    with memory_check.explained(job.settings, job.start):
        config, params, summary = loop.train(
            job.settings, job.start, load, job.rows, job.workdir, stop_requested, gate_scores,
            job.observers)
    trained = {'training': changes.training_fields(as_plain(job.config))}
    with watchdog.phase('evaluation'):
        extended = before_after.measure(
            evaluation, 'extended', config, lambda: params, job.workdir, job.mesh, trained)
    return base, extended, config, params, summary


def report_of(job, base, extended, summary, seconds):
    """The content of results.json."""
    measured = {'base': base, 'extended': extended}
    planned = stages.configs(job.settings.stages, job.start)
    rows = [
        {'length': stage.seq_len, 'theta': config.rope.theta, 'rule': describe_theta(stage), 'steps': steps,
         'tokens': steps * stage.tokens_per_step}
        for stage, config, steps in zip(job.settings.stages, planned, summary['stage_steps'])
    ]
    return {
        'name': job.config.name, 'native': job.native, 'target': job.target, 'stages': rows,
        'summary': {
            **summary, 'trained': job.trained, 'parameters': job.size,
            **{name: recall_probe.summary(one.recall, job.native) for name, one in measured.items()},
        },
        'needle': {name: json.loads(one.recall.to_json()) for name, one in measured.items()},
        'needle_suite': {name: one.needle for name, one in measured.items()},
        'ruler_suite': {name: one.ruler for name, one in measured.items()},
        'loss_by_position': {name: one.loss.to_dict() for name, one in measured.items()},
        'config': as_plain(job.config), 'config_changes': recorded_changes(job.workdir),
        'command': environment.command(), 'versions': environment.versions(),
        'device': jax.devices()[0].device_kind, 'num_devices': job.mesh.size,
        'num_processes': jax.process_count(), 'seconds_of_this_call': seconds,
    }


def write_report(job, base, extended, report):
    """Write results.json and the figures."""
    tests = {f'recall probe ({recall_probe.DESCRIPTION})': (base.recall, extended.recall)}
    if base.needle:
        tests[f'needle ({before_after.NEEDLE_DESCRIPTION})'] = (base.needle_grid, extended.needle_grid)
    if base.ruler:
        tests[f'RULER ({quick_ruler.DESCRIPTION})'] = (base.ruler_grid, extended.ruler_grid)
    pictures = {'recall and needle': job.workdir / 'needle.png', 'loss by position': job.workdir / 'loss.png'}
    figures.recall_figure(tests, job.native, pictures['recall and needle'])
    figures.loss_figure({'base': base.loss, 'extended': extended.loss}, job.native,
                        pictures['loss by position'])
    write_images(job.workdir / 'metrics', report['summary']['steps'], pictures, job.observers.trackers)
    write_atomically(job.workdir / 'results.json', json.dumps(report, indent=1))


def export(job, base, extended, report, model, params):
    """Write the extended model as a Hugging Face folder with its card."""
    config, measured = job.config, {'base': base, 'extended': extended}
    kinds = sorted({kind for stage in job.settings.stages for kind, share in stage.mixture if share})
    card = model_card.model_card(
        model_card.Extension(
            name=config.name, base_model=job.folder.name, native=job.native, stages=report['stages'],
            data=f'Corpus `{config.corpus}`: {job.rows.num_tokens:,} tokens in documents packed with segment '
                 f'ids and restarting positions; {config.held_out:.0%} of the documents were held out for '
                 f'the evaluations below. Kinds of rows: {", ".join(kinds)} (see '
                 '`lct.data.batches.memory_source`).',
            command=report['command'], license=config.license or None,
            trained='low-rank adapters, merged' if job.settings.adapter else 'full training',
        ),
        recall={name: one.recall for name, one in measured.items()},
        needle={name: one.needle_grid for name, one in measured.items()} if base.needle else None,
        ruler={name: one.ruler_grid for name, one in measured.items()} if base.ruler else None,
        losses={name: one.loss for name, one in measured.items()})
    llama_hf.save(job.workdir / 'model', model, params, dtype=config.get('save_dtype', 'bfloat16'),
                  tokenizer_from=job.folder, card=card, overwrite=True)


def log_results(job, report, exported):
    for path in ('needle.png', 'loss.png', 'results.json', 'metrics', *(['model'] if exported else [])):
        log(f'wrote {job.workdir / path}')
    log(f'recall probe ({recall_probe.DESCRIPTION}):')
    for name in ('base', 'extended'):
        scores = report['summary'][name]
        log(
            f'{name}: cells right {scores["inside"][0]}/{scores["inside"][1]} up to {job.native:,}, '
            f'{scores["beyond"][0]}/{scores["beyond"][1]} beyond {2 * job.native:,}; worst length '
            f'{scores["worst_length"]:,} with {scores["worst_mean"]:.0%}'
        )
    needle = report['needle_suite']
    if needle['base']:
        log(f'needle ({before_after.NEEDLE_DESCRIPTION}):')
        for name, result in needle.items():
            log(f'{name}: {describe_needle(result, job.native)}')
    if report['ruler_suite']['base']:
        log(f'RULER ({quick_ruler.DESCRIPTION}):')
        for name, result in report['ruler_suite'].items():
            log(f'{name}: {quick_ruler.describe(result)}')


def describe_needle(result, native):
    """The result of the suite 'needle' in one line: prompts right up to the native length and beyond it."""
    inside = [record['correct'] for record in result['records'] if record['length'] <= native]
    beyond = [record['correct'] for record in result['records'] if record['length'] > native]
    text = f'prompts right {sum(inside)}/{len(inside)} up to {native:,}, {sum(beyond)}/{len(beyond)} beyond'
    if result['mean'] < CARRIES_OVER:
        text += '; what the recall probe shows does not carry over to this wording'
    return text


def describe_theta(stage):
    """The rule that gave a stage's theta, in words."""
    theta = {'dynamic_ntk': f'dynamic NTK, alpha {stage.alpha:g}', 'critical_base': 'critical base',
             'keep': 'unchanged'}.get(stage.theta, 'given')
    return f'{theta}, scaled by {dict(stage.scaling)["type"]}' if stage.scaling else theta


if __name__ == '__main__':
    run_script(run, resumes=True, urls=('--workdir',))
