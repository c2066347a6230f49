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

import setup_run


def run():
    config, args = setup_run.parse(__doc__, setup_run.HERE / 'configs' / 'laptop.py', 'runs/laptop')
    setup_run.devices(config)
    import jax
    import numpy as np

    from lct import sharding
    from lct.data import documents, tokenizer
    from lct.data.mixture import Mixture
    from lct.eval import needle, perplexity, report
    from lct.models import llama
    from lct.train import loop, stages
    from lct.train.checkpoint import claim
    from lct.weights import llama_hf

    began = time.monotonic()
    workdir = pathlib.Path(args.workdir)
    run_config = setup_run.run_of(config)
    last = run_config.stages[-1]

    # -- everything that can be wrong is found before anything is computed ------------------------------
    for stage in run_config.stages:
        mesh = sharding.make_mesh(stage.mesh)
    folder = setup_run.model_folder(config.model_folder)
    base_config = llama_hf.read_config(folder)
    llama_hf.check(folder)
    words = tokenizer.load(folder)
    tokenizer.check_vocab(words, base_config.vocab_size)
    plan = stages.configs(run_config.stages, base_config)
    native = base_config.max_position_embeddings
    training, held_out = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
    mixture = Mixture(setup_run.encode(words, training), words, seed=config.seed)
    for stage in run_config.stages:
        mixture.weights = dict(stage.mixture)
        mixture.check_length(stage.seq_len)
    unseen = setup_run.encode(words, held_out)
    if not unseen:
        raise ValueError(f'held_out {config.held_out} leaves no document to evaluate on; use for example 0.1')
    haystack = np.concatenate(unseen)
    needle.check(config.needle.lengths, config.needle.depths, config.needle.samples, len(haystack))
    perplexity.check(config.loss.seq_len, last.mesh[2], last.memory.ffn_chunks)
    windows = perplexity.windows(
        unseen, config.loss.seq_len, config.loss.windows, config.seed, words.bos_id, config.loss.rotations
    )
    # float32 weights and two moments in each checkpoint, one more than are kept; then the model itself
    nbytes = (12 * (run_config.keep_checkpoints + 1) + 4) * llama.num_params(base_config)
    workdir.mkdir(parents=True, exist_ok=True)
    llama_hf.check_writable(workdir / 'model', nbytes, overwrite=True)
    lock = claim(workdir, {  # noqa: F841  held while the process lives
        **setup_run.plain(config), 'inputs': {
            'model': setup_run.fingerprint(folder), 'tokenizer': words.fingerprint, 'tokens': mixture.num_tokens,
            'held_out': zlib.crc32(haystack.tobytes()),
        },
    })
    loop.say(
        f'{folder.name}: {llama.num_params(base_config):,} parameters, native context {native:,} -> '
        f'{last.seq_len:,}; {mixture.num_tokens:,} training tokens, {len(unseen)} held-out documents; '
        f'{jax.default_backend()}, mesh {dict(mesh.shape)}'
    )

    def load():
        return llama_hf.load(folder, dtype=run_config.param_dtype)[1]

    def evaluate(name, model_config, load_params):
        """Needle grid and loss by position of one model, each kept in a file once done."""
        params = None
        results = []
        for kind, compute, read in (
            ('needle', needle_grid, needle.NeedleResult.from_json),
            ('loss', loss_curve, perplexity.Bins.from_json),
        ):
            path = workdir / f'{kind}_{name}.json'
            if not path.exists():
                params = load_params() if params is None else params
                write(path, compute(name, model_config, params).to_json())
            results.append(read(path.read_text()))
        return results

    def needle_grid(name, model_config, params):
        start = time.monotonic()

        def progress(done, total, length):
            left = (time.monotonic() - start) / done * (total - done)
            loop.say(f'needles, {name} | {done}/{total} prompts | up to {length:,} tokens | {loop.clock(left)} left')
            loop.check(asked)

        wanted = config.needle
        result = needle.run(
            params, model_config, words, haystack, wanted.lengths, wanted.depths, wanted.samples,
            layout=last.layout, memory=last.memory, seed=config.seed, progress=progress,
        )
        loop.say(f'{name}: needles found in percent, depth downwards, length rightwards\n'
                 f'{report.needle_table(result)}')
        return result

    def loss_curve(name, model_config, params):
        def progress(done, total):
            if done % 8 == 0 or done == total:
                loop.say(f'loss by position, {name} | {done}/{total} windows')
            loop.check(asked)

        losses = perplexity.loss_by_position(
            params, model_config, windows, layout=last.layout, memory=last.memory, progress=progress
        )
        return perplexity.bins(losses)

    with loop.stop_requests() as asked:
        try:
            with jax.set_mesh(mesh):
                base_needle, base_loss = evaluate('base', base_config, load)
            extended_config, params, summary = loop.train(
                run_config, base_config, load, mixture, workdir, asked
            )
            with jax.set_mesh(mesh):
                needle_result, loss_result = evaluate('extended', extended_config, lambda: params)
        except loop.Interrupted as stop:
            loop.say(str(stop))
            sys.exit(130)

    # -- pictures, numbers, and the model ----------------------------------------------------------------
    report.needle_figure(base_needle, needle_result, native, workdir / 'needle.png')
    report.loss_figure({'base': base_loss, 'extended': loss_result}, native, workdir / 'loss.png')
    stage_rows = [
        {'length': s.seq_len, 'theta': c.rope.theta, 'rule': rule(s), 'steps': s.num_steps,
         'tokens': s.num_steps * s.tokens_per_step}
        for s, c in zip(run_config.stages, plan)
    ]
    summary |= {name: needle.summary(result, native)
                for name, result in (('base', base_needle), ('extended', needle_result))}
    command = 'python ' + ' '.join(map(shlex.quote, sys.argv))
    write(workdir / 'results.json', json.dumps({
        'name': config.name, 'native': native, 'target': last.seq_len, 'stages': stage_rows, 'summary': summary,
        'needle': {'base': json.loads(base_needle.to_json()), 'extended': json.loads(needle_result.to_json())},
        'loss_by_position': {'base': base_loss.to_dict(), 'extended': loss_result.to_dict()},
        'config': setup_run.plain(config), 'command': command,
        'versions': {'jax': jax.__version__, 'python': platform.python_version()},
        'device': jax.devices()[0].device_kind, 'num_devices': mesh.size,
        'seconds_of_this_call': time.monotonic() - began,
    }, indent=1))
    kinds = ', '.join(sorted({kind for stage in run_config.stages for kind, share in stage.mixture if share}))
    card = report.model_card(
        name=config.name, base_model=folder.name, native=native, stages=stage_rows,
        data=f'Corpus `{config.corpus}`: {mixture.num_tokens:,} tokens in documents packed with segment ids and '
             f'restarting positions; {config.held_out:.0%} of the documents were held out for the evaluations '
             f'below. Kinds of rows: {kinds} (see `lct.data.mixture`).',
        command=command, needle={'base': base_needle, 'extended': needle_result},
        losses={'base': base_loss, 'extended': loss_result}, license=config.license or None,
    )
    llama_hf.save(workdir / 'model', extended_config, params, dtype=config.save_dtype,
                  tokenizer_from=folder, card=card, overwrite=True)
    for path in ('needle.png', 'loss.png', 'results.json', 'metrics', 'model'):
        loop.say(f'wrote {workdir / path}')
    for name in ('base', 'extended'):
        one = summary[name]
        loop.say(
            f'{name}: needle cells right {one["inside"][0]}/{one["inside"][1]} up to {native:,}, '
            f'{one["beyond"][0]}/{one["beyond"][1]} beyond {2 * native:,}; worst length '
            f'{one["worst_length"]:,} with {one["worst_mean"]:.0%}'
        )
    loop.say(f'{native:,} -> {last.seq_len:,} tokens; this call took {loop.clock(time.monotonic() - began)}')


def rule(stage):
    """Where a stage's theta comes from, in words."""
    return {'dynamic_ntk': f'dynamic NTK, alpha {stage.alpha:g}', 'critical_base': 'critical base',
            'keep': 'unchanged'}.get(stage.theta, 'given')


def write(path, text):
    """Write a file whole or not at all."""
    part = path.with_suffix('.part')
    part.write_text(text)
    part.replace(path)


if __name__ == '__main__':
    setup_run.main(run)
