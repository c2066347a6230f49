"""A run of extend.py, checked: everything that can be wrong is found, all at once, before anything is
computed."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lct import sharding, storage
from lct.cli import memory_check
from lct.cli.config import as_plain, fill_defaults, make_run, measured_models, windowed
from lct.cli.corpus import (
    check_documents,
    check_exists,
    corpus_identity,
    open_corpus,
    record_documents,
)
from lct.cli.model import find_model, model_fingerprint, warn_of_edits
from lct.cli.problems import Problems
from lct.data import tokenizer as tokenizers
from lct.data.tokenizer import Tokenizer
from lct.eval import before_after, quick_ruler, recall_probe
from lct.eval.loss import by_position
from lct.models import llama, lora
from lct.models.config import LlamaConfig
from lct.ops.kernels import choice
from lct.plan.hardware import Hardware
from lct.train import loop, stages
from lct.train.metrics import log
from lct.train.observers import Observers
from lct.train.warnings import stage_warnings
from lct.train.workdir import lock_workdir
from lct.weights import llama_hf
from lct.weights.tensors import check_dtype

SHORT_WINDOWS = 32  # of the native length, for the gates of stages


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
    evaluation: before_after.Evaluation | None
    size: int
    trained: int
    recorded: dict  # the config and the hashes of the inputs, as plain values
    lock: Any  # held while the process lives
    observers: Observers = Observers()

    @property
    def native(self) -> int:
        """Context length of the base model in tokens."""
        return self.base.max_position_embeddings

    @property
    def target(self) -> int:
        """Context length of the extended model in tokens."""
        return self.settings.stages[-1].seq_len


class Checked(NamedTuple):
    """What checks without devices find; the fields are those of Job."""

    settings: loop.Run
    folder: Path
    base: LlamaConfig
    start: LlamaConfig
    tokenizer: Tokenizer
    rows: Any
    held_out: list
    evaluation: before_after.Evaluation | None

    @property
    def num_parameters(self) -> tuple[int, int]:
        """(in total, trained)."""
        size = llama.num_params(self.base)
        adapter = self.settings.adapter
        return size, lora.num_trained(self.base, adapter) if adapter else size


def check(config: ConfigDict, workdir: Path) -> Job:
    """The Job of a config on the devices of this process.

    Raises:
      ValueError: for everything that is wrong, each with its remedy.
    """
    problems = Problems()
    with problems.collect():
        for stage in config.stages:
            mesh = sharding.make_mesh(tuple(stage.mesh))
    with problems.collect():
        checked = check_without_devices(config)
    problems.check()
    settings, size, trained = checked.settings, *checked.num_parameters
    workdir.mkdir(parents=True, exist_ok=True)
    # float32 weights and two moments in each checkpoint, one more than are kept; then the model itself
    kept = 0 if storage.elsewhere(workdir / 'checkpoints') else settings.keep_checkpoints + 1
    nbytes = 12 * kept * trained + 4 * size
    llama_hf.check_writable(workdir / 'model', nbytes, overwrite=True)
    check_documents(checked.rows, workdir)
    recorded = {'config': as_plain(config), 'inputs': {
        'model': model_fingerprint(checked.folder, workdir), 'tokenizer': checked.tokenizer.fingerprint,
        'architecture': dataclasses.asdict(checked.base), **corpus_identity(checked.rows, checked.held_out),
    }}
    lock = lock_workdir(workdir, {**recorded['config'], 'inputs': recorded['inputs']}, may_change=True)
    if lock:  # the first process
        record_documents(checked.rows, workdir)
    job = Job(config, workdir, settings, mesh, checked.folder, checked.base, checked.start, checked.rows,
              checked.evaluation, size, trained, recorded, lock)
    log(f'{describe(checked)}; {jax.default_backend()}, {jax.process_count()} process(es), '
        f'mesh {dict(mesh.shape)}')
    for chosen in dict.fromkeys(attention_blocks(settings, checked.base).values()):
        log(f'attention block: {chosen}')
    return job


def attention_blocks(settings: loop.Run, config: LlamaConfig) -> dict[str, str]:
    """{name of a stage: its inner block of attention on these devices, with the reason}."""
    dtype = lambda stage: stage.memory.dtype or settings.param_dtype
    return {stage.name: str(choice.choose(stage.memory.attention.kernel, config.head_dim, dtype(stage)))
            for stage in settings.stages}


def describe(checked: Checked) -> str:
    """Model and corpus in one line."""
    size, trained = checked.num_parameters
    return (f'{checked.folder.name}: {size:,} parameters, {trained:,} of them trained '
            f'({trained / size:.2%}), native context {checked.base.max_position_embeddings:,} -> '
            f'{checked.settings.stages[-1].seq_len:,}; {checked.rows.num_tokens:,} training tokens, '
            f'{len(checked.held_out)} held-out documents')


def check_without_devices(config: ConfigDict, hardware: Hardware | None = None) -> Checked:
    """All checks of a config that need neither its devices nor its work directory.

    Fields that the config does not spell get their defaults. hardware: the devices to plan the memory for;
    None for those of this process.

    Raises:
      ValueError: for everything that is wrong, each with its remedy.
    """
    fill_defaults(config)
    settings, problems = make_run(config), Problems()
    check_dtype(config.get('save_dtype', 'bfloat16'))
    folder = base = start = tokenizer = rows = evaluation = None
    held_out = []
    with problems.collect():
        folder = find_model(config.model_folder)
        base = llama_hf.read_config(folder)
        start = windowed(base, config)
        llama_hf.check(folder)
        warn_of_edits(folder)
    with problems.collect():
        if start:
            check_stages(config, settings, base, start, hardware)
    with problems.collect():
        if base:
            tokenizer = tokenizers.load(folder)
            tokenizers.check_vocab_size(tokenizer, base.vocab_size)
    with problems.collect():
        if tokenizer:
            rows, held_out = open_corpus(config, tokenizer)
        else:
            check_exists(config)
    with problems.collect():
        for stage in settings.stages if rows else ():
            rows.weights = dict(stage.mixture)
            rows.check_length(stage.seq_len)
        if rows and any(measured_models(config)):
            if not held_out:
                raise ValueError(f'held_out {config.held_out} leaves no document to evaluate on; use for '
                                 'example 0.1, or --set evaluate=off')
            evaluation = check_evaluation(config, settings.stages, base, tokenizer, held_out)
    with problems.collect():
        check_gates(config, settings.stages)
    problems.check()
    return Checked(settings, folder, base, start, tokenizer, rows, held_out, evaluation)


def check_stages(config: ConfigDict, settings: loop.Run, base: LlamaConfig, start: LlamaConfig,
                 hardware: Hardware | None = None) -> None:
    """Stages against the model and, unless config.check_memory is False, the memory of the devices.

    Raises:
      ValueError: for stages that cannot be trained.
    """
    settings.check(start)
    if problem := export_problem(stages.configs(settings.stages, start)[-1]):
        log(f'WARNING: {problem}; the extended model is evaluated but not exported, and its weights stay in '
            'the checkpoints')
    if config.get('check_memory', True):
        memory_check.check(settings, start, hardware)
    for warning in stage_warnings(settings.stages, base, settings.param_dtype):
        log(f'WARNING: {warning}')


def export_problem(config: LlamaConfig) -> str:
    """Why transformers could not compute a model of this config, or ''."""
    try:
        llama_hf.config_to_json(config)
    except ValueError as error:
        return str(error)
    return ''


def check_gates(config: ConfigDict, run_stages: tuple[stages.Stage, ...]) -> None:
    """Refuse gates without the measurements that they compare."""
    gated = [stage.name for stage in run_stages if stage.gate]
    if gated and not (measured_models(config)[0] and config.needle.lengths and config.loss.windows):
        raise ValueError(f'stage {gated[0]} has a gate, which compares with the base model, but '
                         f'config.evaluate is {config.get("evaluate")!r}, or config.needle or config.loss is '
                         "empty; use 'before_and_after', or take the gate away")


def check_evaluation(config: ConfigDict, run_stages: tuple[stages.Stage, ...], base: LlamaConfig,
                     tokenizer: Tokenizer, held_out: list[np.ndarray]) -> before_after.Evaluation:
    """The before_after.Evaluation over held_out, ids int [n] of each document.

    Raises:
      ValueError: if the held-out text does not suffice for it, or it does not divide over the mesh.
    """
    last, gated = run_stages[-1], [stage for stage in run_stages if stage.gate]
    haystack, native = np.concatenate(held_out), base.max_position_embeddings
    probe, loss, grid, windows, short = config.needle, config.loss, None, None, None
    if probe.lengths:
        grid = recall_probe.RecallGrid(probe.lengths, probe.depths, probe.samples, config.seed)
        grid.check_haystack(len(haystack))
    if loss.windows:
        by_position.check_window_length(loss.seq_len, last.mesh[2], last.memory.ffn_chunks)
        windows = by_position.evaluation_windows(
            held_out, loss.seq_len, loss.windows, config.seed, tokenizer.bos_id, loss.rotations)
    for stage in run_stages[:-1] if windows and measured_models(config)[1] else ():
        by_position.check_window_length(loss.seq_len, stage.mesh[2], stage.memory.ffn_chunks)
    for stage in gated if grid else ():
        dataclasses.replace(grid, lengths=(stage.seq_len,)).check_haystack(len(haystack))
        by_position.check_window_length(native, stage.mesh[2], stage.memory.ffn_chunks)
    if gated:
        short = by_position.evaluation_windows(held_out, native, SHORT_WINDOWS, config.seed, tokenizer.bos_id)
    decoding = recall_probe.Decoding(last.layout, last.memory.in_inference)
    needle = before_after.make_needle_plan(tokenizer, haystack, last.seq_len, config.seed)
    ruler = quick_ruler.make_plan(tokenizer, haystack, last.seq_len, config.seed)
    return before_after.Evaluation(
        tokenizer, haystack, grid, windows, short, needle, ruler, decoding, log=log)
