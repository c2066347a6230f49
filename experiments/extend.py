"""Extend the context of a Llama checkpoint in progressive stages, and show that the result reads.

    python experiments/extend.py --config experiments/configs/laptop.py --workdir runs/laptop

Evaluates the base (needle grid, loss by position), trains through the stages, evaluates again, and writes
pictures, results.json, TensorBoard metrics and a Hugging Face folder. Stop it whenever you like: the same
command continues.
"""

import json
import pathlib
import platform
import shlex
import sys
import time
import zlib

from lct.cli.config import as_plain, make_run, parse_args, run_identity, setup_devices, windowed
from lct.cli.corpus import open_corpus
from lct.cli.main import run_script
from lct.cli.model import find_model, model_fingerprint
from lct.cli.paths import experiments_folder
from lct.files import write_atomically

SHORT_WINDOWS = 32  # of the native length, for the gates of stages


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'laptop.py', 'runs/laptop')
    setup_devices(config)
    import jax
    import numpy as np

    from lct import processes, sharding
    from lct.data import tokenizer
    from lct.eval import recall_probe
    from lct.eval.loss import by_position
    from lct.eval.report import figures, model_card
    from lct.eval.report.text import recall_table
    from lct.models import llama, lora
    from lct.train import loop, stages, stopping
    from lct.train.checkpoint import lock_workdir
    from lct.train.metrics import clock, log
    from lct.train.warnings import stage_warnings
    from lct.weights import llama_hf
    from lct.weights.tensors import check_dtype

    began = time.monotonic()
    workdir = pathlib.Path(args.workdir)
    run_config = make_run(config)
    last = run_config.stages[-1]

    # -- everything that can be wrong is found before anything is computed ------------------------------
    for stage in run_config.stages:
        mesh = sharding.make_mesh(stage.mesh)
    folder = find_model(config.model_folder)
    base_config = llama_hf.read_config(folder)
    llama_hf.check(folder)
    words = tokenizer.load(folder)
    tokenizer.check_vocab_size(words, base_config.vocab_size)
    start_config = windowed(base_config, config)
    plan = stages.configs(run_config.stages, start_config)
    for warning in stage_warnings(run_config.stages, base_config, run_config.param_dtype):
        log(f'WARNING: {warning}')
    if start_config.window is not None:
        log(f'WARNING: window {start_config.window}: a Hugging Face Llama has no sliding window, so the extended model '
            'is evaluated but not exported; its weights stay in the checkpoints')
    native = base_config.max_position_embeddings
    mixture, unseen = open_corpus(config, words)
    for stage in run_config.stages:
        mixture.weights = dict(stage.mixture)
        mixture.check_length(stage.seq_len)
    if not unseen:
        raise ValueError(f'held_out {config.held_out} leaves no document to evaluate on; use for example 0.1')
    haystack = np.concatenate(unseen)
    recall_probe.check(config.needle.lengths, config.needle.depths, config.needle.samples, len(haystack))
    by_position.check_window_length(config.loss.seq_len, last.mesh[2], last.memory.ffn_chunks)
    gated = [stage for stage in run_config.stages if stage.gate]
    for stage in gated:
        recall_probe.check((stage.seq_len,), config.needle.depths, config.needle.samples, len(haystack))
        by_position.check_window_length(native, stage.mesh[2], stage.memory.ffn_chunks)
    windows, sources = by_position.evaluation_windows(
        unseen, config.loss.seq_len, config.loss.windows, config.seed, words.bos_id, config.loss.rotations
    )
    if gated:
        short, short_sources = by_position.evaluation_windows(unseen, native, SHORT_WINDOWS, config.seed, words.bos_id)
    size = trained = llama.num_params(base_config)
    if run_config.adapter:
        trained = lora.num_trained(base_config, run_config.adapter)
    # float32 weights and two moments in each checkpoint, one more than are kept; then the model itself
    nbytes = 12 * (run_config.keep_checkpoints + 1) * trained + 4 * size
    save_dtype = config.get('save_dtype', 'bfloat16')
    check_dtype(save_dtype)
    workdir.mkdir(parents=True, exist_ok=True)
    llama_hf.check_writable(workdir / 'model', nbytes, overwrite=True)
    lock = lock_workdir(workdir, {  # noqa: F841  held while the process lives
        **run_identity(config), 'inputs': {
            'model': model_fingerprint(folder), 'tokenizer': words.fingerprint, 'tokens': mixture.num_tokens,
            'held_out': zlib.crc32(haystack.tobytes()),
        },
    })
    log(
        f'{folder.name}: {size:,} parameters, {trained:,} of them trained ({trained / size:.2%}), native context '
        f'{native:,} -> {last.seq_len:,}; {mixture.num_tokens:,} training tokens, {len(unseen)} held-out documents; '
        f'{jax.default_backend()}, {jax.process_count()} process(es), mesh {dict(mesh.shape)}'
    )

    def load():
        return llama_hf.load(folder, dtype=run_config.param_dtype)[1]

    def evaluate(name, model_config, load_params):
        """Needle grid and loss by position of one model, and for gates its loss on short text, each kept in a file
        once done."""
        params = None
        results = []
        for kind, compute, read in (
            ('needle', needle_grid, recall_probe.NeedleResult.from_json),
            ('loss', loss_curve, by_position.LossBins.from_json),
            *([('short', short_loss, by_position.LossBins.from_json)] if gated else []),
        ):
            path = workdir / f'{kind}_{name}.json'
            if processes.from_first(path.exists()):
                text = path.read_text()
            else:
                params = load_params() if params is None else params
                text = compute(name, model_config, params).to_json()
                if processes.is_first():
                    write_atomically(path, text)
            results.append(read(text))
        return results

    def needle_grid(name, model_config, params):
        start = time.monotonic()

        def progress(done, total, length):
            left = (time.monotonic() - start) / done * (total - done)
            log(f'recall probe, {name} | {done}/{total} prompts | up to {length:,} tokens | {clock(left)} left')
            stopping.check_stop(stop_requested)

        wanted = config.needle
        result = recall_probe.run(
            params, model_config, words, haystack, wanted.lengths, wanted.depths, wanted.samples,
            layout=last.layout, memory=last.memory, seed=config.seed, progress=progress,
        )
        log(f'{name}: recall probe, percent right, depth downwards, length rightwards\n'
                 f'{recall_table(result)}')
        return result

    def loss_curve(name, model_config, params):
        def progress(done, total):
            if done % 8 == 0 or done == total:
                log(f'loss by position, {name} | {done}/{total} windows')
            stopping.check_stop(stop_requested)

        losses = by_position.loss_by_position(
            params, model_config, windows, layout=last.layout, memory=last.memory, progress=progress
        )
        return by_position.bin_losses(losses, documents=sources)

    def short_loss(name, model_config, params, stage=last):
        """One bin: the mean loss over held-out text of the native length."""
        losses = by_position.loss_by_position(
            params, model_config, short, layout=stage.layout, memory=stage.memory, batch_size=8,
            progress=lambda done, total: stopping.check_stop(stop_requested))
        return by_position.bin_losses(losses, (0, native), short_sources)

    def gate_scores(stage, stage_config, params):
        """What a gate looks at (lct.train.gates); its needles are not those of the grid that is reported."""
        found = recall_probe.run(
            params, stage_config, words, haystack, (stage.seq_len,), config.needle.depths, config.needle.samples,
            layout=stage.layout, memory=stage.memory, seed=config.seed + 1,
            progress=lambda done, total, length: stopping.check_stop(stop_requested))
        loss = short_loss(stage.name, stage_config, params, stage)
        return {'needle': found.scores.mean(), 'short_loss_rise': loss.mean[0] - base_short[0].mean[0]}

    with stopping.catch_signals() as stop_requested:
        try:
            with jax.set_mesh(mesh):
                base_needle, base_loss, *base_short = evaluate('base', base_config, load)
            extended_config, params, summary = loop.train(
                run_config, start_config, load, mixture, workdir, stop_requested, gate_scores
            )
            with jax.set_mesh(mesh):
                needle_result, loss_result, *_ = evaluate('extended', extended_config, lambda: params)
        except stopping.Interrupted as stop:
            log(str(stop))
            sys.exit(130)

    params = sharding.collect(params)
    if not processes.is_first():  # it has given its part of the model; the first process writes
        processes.wait_for_all()
        return

    # -- pictures, numbers, and the model ----------------------------------------------------------------
    figures.needle_figure(base_needle, needle_result, native, workdir / 'needle.png')
    figures.loss_figure({'base': base_loss, 'extended': loss_result}, native, workdir / 'loss.png')
    stage_rows = [
        {'length': s.seq_len, 'theta': c.rope.theta, 'rule': rule(s), 'steps': steps,
         'tokens': steps * s.tokens_per_step}
        for s, c, steps in zip(run_config.stages, plan, summary['stage_steps'])
    ]
    summary |= {'trained': trained, 'parameters': size}
    summary |= {name: recall_probe.summary(result, native)
                for name, result in (('base', base_needle), ('extended', needle_result))}
    command = 'python ' + ' '.join(map(shlex.quote, sys.argv))
    write_atomically(workdir / 'results.json', json.dumps({
        'name': config.name, 'native': native, 'target': last.seq_len, 'stages': stage_rows, 'summary': summary,
        'needle': {'base': json.loads(base_needle.to_json()), 'extended': json.loads(needle_result.to_json())},
        'loss_by_position': {'base': base_loss.to_dict(), 'extended': loss_result.to_dict()},
        'config': as_plain(config), 'command': command,
        'versions': {'jax': jax.__version__, 'python': platform.python_version()},
        'device': jax.devices()[0].device_kind, 'num_devices': mesh.size, 'num_processes': jax.process_count(),
        'seconds_of_this_call': time.monotonic() - began,
    }, indent=1))
    kinds = ', '.join(sorted({kind for stage in run_config.stages for kind, share in stage.mixture if share}))
    card = model_card.model_card(model_card.Extension(
        name=config.name, base_model=folder.name, native=native, stages=stage_rows,
        data=f'Corpus `{config.corpus}`: {mixture.num_tokens:,} tokens in documents packed with segment ids and '
             f'restarting positions; {config.held_out:.0%} of the documents were held out for the evaluations '
             f'below. Kinds of rows: {kinds} (see `lct.data.batches.memory_source`).',
        command=command, license=config.license or None,
        trained='low-rank adapters, merged' if run_config.adapter else 'full training',
    ), {'base': base_needle, 'extended': needle_result}, {'base': base_loss, 'extended': loss_result})
    exported = extended_config.window is None
    if exported:
        llama_hf.save(workdir / 'model', extended_config, params, dtype=save_dtype,
                      tokenizer_from=folder, card=card, overwrite=True)
    for path in ('needle.png', 'loss.png', 'results.json', 'metrics', *(['model'] if exported else [])):
        log(f'wrote {workdir / path}')
    for name in ('base', 'extended'):
        one = summary[name]
        log(
            f'{name}: needle cells right {one["inside"][0]}/{one["inside"][1]} up to {native:,}, '
            f'{one["beyond"][0]}/{one["beyond"][1]} beyond {2 * native:,}; worst length '
            f'{one["worst_length"]:,} with {one["worst_mean"]:.0%}'
        )
    processes.wait_for_all()
    log(f'{native:,} -> {last.seq_len:,} tokens; this call took {clock(time.monotonic() - began)}')


def rule(stage):
    """Where a stage's theta comes from, in words."""
    theta = {'dynamic_ntk': f'dynamic NTK, alpha {stage.alpha:g}', 'critical_base': 'critical base',
             'keep': 'unchanged'}.get(stage.theta, 'given')
    return f'{theta}, scaled by {dict(stage.scaling)["type"]}' if stage.scaling else theta


if __name__ == '__main__':
    run_script(run, resumes=True)
