"""The results of a run of extend.py: results.json, figures, the exported folder with its card, closing lines.

`measured` is {name of a model: its Measurements}: 'base', stages of the run by their names, 'extended', as
far as config.evaluate asks for them.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax

from lct import environment
from lct.cli.config import as_plain
from lct.cli.extension import Job
from lct.eval import before_after, quick_ruler, recall_probe
from lct.eval.before_after import Measurements
from lct.eval.report import figures, model_card
from lct.files import write_atomically
from lct.models.config import LlamaConfig
from lct.models.llama import Params
from lct.train import stages
from lct.train.metrics import log, write_images
from lct.train.workdir import recorded_changes
from lct.weights import llama_hf

CARRIES_OVER = 0.2  # of the needle prompts; below it a closing line says that recall is bound to its wording

TITLES = {'recall': f'recall probe ({recall_probe.DESCRIPTION})',
          'needle': f'needle ({before_after.NEEDLE_DESCRIPTION})',
          'ruler': f'RULER ({quick_ruler.DESCRIPTION})'}


def report_of(job: Job, measured: Mapping[str, Measurements], summary: dict,
              seconds: float) -> dict[str, Any]:
    """The content of results.json. summary: of loop.train. seconds: of this call."""
    planned = stages.configs(job.settings.stages, job.start)
    rows = [
        {'length': stage.seq_len, 'theta': config.rope.theta, 'rule': describe_theta(stage), 'steps': steps,
         'tokens': steps * stage.tokens_per_step}
        for stage, config, steps in zip(job.settings.stages, planned, summary['stage_steps'])
    ]
    recall, loss = _taken(measured, 'recall'), _taken(measured, 'loss')
    return {
        'name': job.config.name, 'native': job.native, 'target': job.target, 'stages': rows,
        'summary': {
            **summary, 'trained': job.trained, 'parameters': job.size,
            **{name: recall_probe.summary(one, job.native) for name, one in recall.items()},
        },
        'needle': {name: json.loads(one.to_json()) for name, one in recall.items()},
        'needle_suite': {name: one.needle for name, one in measured.items()},
        'ruler_suite': {name: one.ruler for name, one in measured.items()},
        'loss_by_position': {name: one.to_dict() for name, one in loss.items()},
        'config': as_plain(job.config), 'config_changes': recorded_changes(job.workdir),
        'command': environment.command(), 'versions': environment.versions(),
        'device': jax.devices()[0].device_kind, 'num_devices': job.mesh.size,
        'num_processes': jax.process_count(), 'seconds_of_this_call': seconds,
    }


def _taken(measured, kind):
    """{name: one kind of measurement} of the models that have it."""
    return {name: getattr(one, kind) for name, one in measured.items() if getattr(one, kind) is not None}


def write_report(job: Job, measured: Mapping[str, Measurements], report: Mapping[str, Any]) -> list[str]:
    """Write results.json and the figures -> the names of the files."""
    grids = {'recall': 'recall', 'needle': 'needle_grid', 'ruler': 'ruler_grid'}
    rows = {TITLES[kind]: list(_taken(measured, grid).values()) for kind, grid in grids.items()}
    rows = {title: row for title, row in rows.items() if row}
    pictures = {}
    if rows:
        names = {'base': 'before', 'extended': 'after'}
        pictures['recall and needle'] = job.workdir / 'needle.png'
        figures.recall_figure(rows, job.native, pictures['recall and needle'],
                              [names.get(name, f'after {name}') for name in measured])
    if loss := _taken(measured, 'loss'):
        pictures['loss by position'] = job.workdir / 'loss.png'
        figures.loss_figure(loss, job.native, pictures['loss by position'])
    write_images(job.workdir / 'metrics', report['summary']['steps'], pictures, job.observers.trackers)
    write_atomically(job.workdir / 'results.json', json.dumps(report, indent=1))
    return [*(path.name for path in pictures.values()), 'results.json']


def export(job: Job, measured: Mapping[str, Measurements], report: Mapping[str, Any], model: LlamaConfig,
           params: Params) -> None:
    """Write the extended model as a Hugging Face folder with its card."""
    config = job.config
    kinds = sorted({kind for stage in job.settings.stages for kind, share in stage.mixture if share})
    apart = config.get('evaluation_corpus')
    evaluated = (f'; the evaluations below are on `{apart}`' if apart else
                 f'; {config.held_out:.0%} of the documents were held out for the evaluations below')
    card = model_card.model_card(
        model_card.Extension(
            name=config.name, base_model=job.folder.name, native=job.native, stages=report['stages'],
            data=f'Corpus `{config.corpus}`: {job.rows.num_tokens:,} tokens in documents packed with segment '
                 f'ids and restarting positions{evaluated if measured else ""}. Kinds of rows: '
                 f'{", ".join(kinds)} (see `lct.data.batches.memory_source`).',
            command=report['command'], license=config.get('license') or None,
            trained='low-rank adapters, merged' if job.settings.adapter else 'full training',
        ),
        recall=_taken(measured, 'recall') or None, needle=_taken(measured, 'needle_grid') or None,
        ruler=_taken(measured, 'ruler_grid') or None, losses=_taken(measured, 'loss') or None)
    llama_hf.save(job.workdir / 'model', model, params, dtype=config.get('save_dtype', 'bfloat16'),
                  tokenizer_from=job.folder, card=card, overwrite=True)


def log_results(job: Job, measured: Mapping[str, Measurements], report: Mapping[str, Any],
                written: list[str]) -> None:
    """Lines on the files written, relative to the work directory, and on all scores."""
    for path in written:
        log(f'wrote {job.workdir / path}')
    describe = {'recall': lambda name: describe_recall(report['summary'][name], job.native),
                'needle': lambda name: describe_needle(measured[name].needle, job.native),
                'ruler': lambda name: quick_ruler.describe(measured[name].ruler)}
    for kind, title in TITLES.items():
        names = list(_taken(measured, kind))
        for text in [f'{title}:', *(f'{name}: {describe[kind](name)}' for name in names)] if names else ():
            log(text)


def describe_recall(scores: Mapping[str, Any], native: int) -> str:
    """A summary of the recall probe in one line."""
    return (f'{scores["inside"][0]}/{scores["inside"][1]} cells right up to {native:,}, '
            f'{scores["beyond"][0]}/{scores["beyond"][1]} beyond {2 * native:,}; worst length '
            f'{scores["worst_length"]:,} with {scores["worst_mean"]:.0%}')


def describe_needle(result: Mapping[str, Any], native: int) -> str:
    """The result of the suite 'needle' in one line: prompts right up to the native length and beyond it."""
    inside = [record['correct'] for record in result['records'] if record['length'] <= native]
    beyond = [record['correct'] for record in result['records'] if record['length'] > native]
    text = f'{sum(inside)}/{len(inside)} prompts right up to {native:,}, {sum(beyond)}/{len(beyond)} beyond'
    if result['mean'] < CARRIES_OVER:
        text += '; what the recall probe shows does not carry over to this wording'
    return text


def describe_theta(stage: stages.Stage) -> str:
    """The rule that gave a stage's theta, as text."""
    theta = {'dynamic_ntk': f'dynamic NTK, alpha {stage.alpha:g}', 'critical_base': 'critical base',
             'keep': 'unchanged'}.get(stage.theta, 'given')
    return f'{theta}, scaled by {dict(stage.scaling)["type"]}' if stage.scaling else theta
