"""Empirical theta optimisation: short runs over a grid of thetas, ranked by long-context loss and needle score.

    python experiments/studies/theta_search.py --config experiments/configs/theta_4k.py --workdir runs/theta_4k

Every theta gets the same steps, and of one seed the same rows; the grid must hold 'keep', the control, because
longer training alone already helps. Writes theta_search.json, theta_search.svg and chosen.py, a config for
experiments/extend.py. Stop it whenever you like: the same command continues.
"""

import dataclasses
import json
import pathlib
import platform
import pprint
import shlex
import statistics
import sys
import time

from lct.cli.config import as_plain, make_run, parse_args, setup_devices, windowed
from lct.cli.corpus import tokenize_documents
from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.cli.paths import experiments_folder
from lct.files import write_atomically
from lct.text import table

CHOSEN = '''"""The theta that experiments/studies/theta_search.py chose for {target:,} tokens, with the settings of its runs.

    python experiments/extend.py --config THIS_FILE --workdir runs/chosen
"""

from ml_collections import ConfigDict

FIELDS = {fields}
STAGES = {stages}


def get_config():
    config = ConfigDict(FIELDS)
    config.stages = tuple(map(ConfigDict, STAGES))
    return config
'''


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'theta_4k.py', 'runs/theta_4k')
    check(config)
    setup_devices(config)
    import jax
    import numpy as np

    from lct.data import tokenizer
    from lct.data.batches.memory_source import MemorySource
    from lct.data.corpus import documents
    from lct.eval import recall_probe
    from lct.eval.loss import by_position
    from lct.sharding import make_mesh
    from lct.train import loop, stages, stopping
    from lct.train.checkpoint import lock_workdir
    from lct.train.metrics import log
    from lct.weights import llama_hf

    workdir = pathlib.Path(args.workdir)
    folder = find_model(config.model_folder)
    base = windowed(llama_hf.read_config(folder), config)
    words = tokenizer.load(folder)
    run_config = make_run(config)
    stage = run_config.stages[0]
    grid = {}  # theta -> its Run; a rule and a number may be the same theta
    for theta in config.search.thetas:
        chosen = dataclasses.replace(run_config, stages=(dataclasses.replace(stage, theta=theta),))
        grid.setdefault(stages.configs(chosen.stages, base)[0].rope_theta, chosen)
    training, held_out = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
    encoded, unseen = tokenize_documents(words, training), tokenize_documents(words, held_out)
    haystack = np.concatenate(unseen)
    if not any(base.max_position_embeddings < length <= stage.seq_len for length in config.needle.lengths):
        raise ValueError(f'needle.lengths {config.needle.lengths} has none above the trained '
                         f'{base.max_position_embeddings} and up to the target {stage.seq_len}; add {stage.seq_len}')
    recall_probe.check(config.needle.lengths, config.needle.depths, config.needle.samples, len(haystack))
    windows, sources = by_position.evaluation_windows(
        unseen, config.loss.seq_len, config.loss.windows, config.seed, words.bos_id, config.loss.rotations)
    lock = lock_workdir(workdir, as_plain(config))  # noqa: F841  held while the process lives
    # The runs differ in the values of RoPE's tables alone, so one compiled program serves them all.
    jax.config.update('jax_compilation_cache_dir', str(workdir / 'xla'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)

    def load():
        return llama_hf.load(folder, dtype=run_config.param_dtype)[1]

    def evaluate(model_config, params):
        """Loss by position and needle grid, of the same windows and prompts for every model."""
        how = {'layout': stage.layout, 'memory': stage.memory}
        losses = by_position.loss_by_position(params, model_config, windows, batch_size=4, **how)
        stopping.check_stop(stop_requested)
        wanted = config.needle
        result = recall_probe.run(params, model_config, words, haystack, wanted.lengths, wanted.depths, wanted.samples,
                            seed=config.seed, progress=lambda *_: stopping.check_stop(stop_requested), **how)
        return {'loss': by_position.bin_losses(losses, documents=sources).to_dict(), 'needle': result.scores.mean(0).tolist()}

    def one(name, theta, seed):
        """The result of one run; kept in a file once done."""
        path = workdir / f'{name}.json'
        if not path.exists():
            start = time.monotonic()
            if seed is None:
                model_config, params, summary = base, load(), {'seconds': 0.0}
            else:
                mixture = MemorySource(encoded, words, seed=seed)
                model_config, params, summary = loop.train(
                    grid[theta], base, load, mixture, workdir / name, stop_requested)
            result = {'theta': theta, 'seed': seed, **evaluate(model_config, params),
                      'training_seconds': summary['seconds'], 'seconds': time.monotonic() - start}
            write_atomically(path, json.dumps(result))
        return json.loads(path.read_text())

    jobs = [(f'theta{theta:.0f}_seed{seed}', theta, seed) for seed in config.search.seeds for theta in grid]
    results = []
    with stopping.catch_signals() as stop_requested:
        try:
            with jax.set_mesh(make_mesh(stage.mesh)):
                untrained = one('untrained', base.rope_theta, None)
            for i, job in enumerate(jobs):
                log(f'run {i + 1} of {len(jobs)}: theta {job[1]:,.0f}, seed {job[2]}{left(results, len(jobs))}')
                with jax.set_mesh(make_mesh(stage.mesh)):
                    results.append(one(*job))
        except stopping.Interrupted as stop:
            log(str(stop))
            sys.exit(130)

    summary = summarise(config, base, untrained, results)
    summary['tokens_per_run'] = stage.num_steps * stage.tokens_per_step
    summary['command'] = 'python ' + ' '.join(map(shlex.quote, sys.argv))
    summary['versions'] = {'jax': jax.__version__, 'python': platform.python_version()}
    summary['device'] = jax.devices()[0].device_kind
    (workdir / 'theta_search.json').write_text(json.dumps(summary, indent=1) + '\n')
    figure(summary, config, workdir / 'theta_search.svg')
    (workdir / 'chosen.py').write_text(chosen_config(config, summary['chosen']))
    log(summary_table(summary))
    log(f'wrote {workdir}/theta_search.json, theta_search.svg, chosen.py')


def check(config):
    """Refuse a search that could prove nothing."""
    if len(config.stages) != 1:
        raise ValueError(f'a theta search has one stage, this config has {len(config.stages)}; keep the longest')
    if 'keep' not in config.search.thetas:
        raise ValueError(f"search.thetas {config.search.thetas} lacks the control; add 'keep', the same training "
                         'with theta unchanged')
    if len(set(config.search.seeds)) < 2:
        raise ValueError(f'search.seeds {config.search.seeds} gives no spread; use at least two seeds')


def summarise(config, base, untrained, results):
    """The JSON of a search: a row a theta in order of merit, the untrained model, and what the laws say."""
    from lct.ops import theta as laws
    from lct.ops.rope import critical_base, extrapolation_bound, frequencies

    target, native = config.stages[0].seq_len, base.max_position_embeddings
    edges, lengths = untrained['loss']['edges'], list(config.needle.lengths)
    last = [high for high in edges if high <= target][-1]
    far = [length for length in lengths if native < length <= target]
    rows = []
    for value in dict.fromkeys(result['theta'] for result in results):
        mine = [result for result in results if result['theta'] == value]
        losses, needles = ([result['loss']['mean'] for result in mine], [result['needle'] for result in mine])
        inv_freq = frequencies(dataclasses.replace(base.rope, theta=value), base.head_dim)[0]
        rows.append({
            'theta': value, 'control': value == base.rope_theta, 'seeds': [result['seed'] for result in mine],
            'loss': means(losses), 'loss_sd': spreads(losses), 'needle': means(needles), 'needle_sd': spreads(needles),
            'long_loss': means(losses)[edges.index(last) - 1], 'long_loss_sd': spreads(losses)[edges.index(last) - 1],
            'long_needle': statistics.mean(means(needles)[lengths.index(length)] for length in far),
            'training_seconds': statistics.mean(result['training_seconds'] for result in mine),
            'law': extrapolation_bound(value, base.rope_theta, native, base.head_dim),
            'similar': laws.similar_len(inv_freq, 64 * target),
        })
    for name, key in (('rank_loss', lambda row: row['long_loss']), ('rank_needle', lambda row: -row['long_needle'])):
        for row in rows:
            row[name] = 1 + sum(key(other) < key(row) for other in rows)
    rows.sort(key=lambda row: (row['rank_loss'] + row['rank_needle'], row['long_loss']))
    return {
        'model': str(config.model_folder), 'native': native, 'target': target, 'edges': edges, 'lengths': lengths,
        'long_loss_of': [last // 2, last], 'long_needle_of': far,
        'chosen': rows[0]['theta'], 'rows': rows, 'untrained': {
            'theta': base.rope_theta, 'loss': untrained['loss']['mean'], 'needle': untrained['needle']},
        'laws': {
            'critical_base': critical_base(base.rope_theta, native, target),
            'theta_for_bound': laws.theta_for_bound(target, base.rope_theta, native, base.head_dim),
            'lower_bound': laws.lower_bound(target, base.head_dim),
            'critical_dimension': laws.critical_dimension(base.rope_theta, native, base.head_dim),
        },
        'config': as_plain(config),
    }


def means(lists):
    return [statistics.mean(column) for column in zip(*lists, strict=True)]


def spreads(lists):
    """Standard deviations over seeds."""
    return [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*lists, strict=True)]


def summary_table(summary):
    """Text for the terminal: thetas in order of merit, then the laws and the choice."""
    low, high = summary['long_loss_of']
    lengths = ', '.join(f'{length:,}' for length in summary['long_needle_of'])
    header = ('theta', 'rank by loss', 'by needles', f'loss {low:,}-{high:,}', 'sd', f'needles found at {lengths}', 'law',
              'similar keys', '')
    rows = [(f"{row['theta']:,.0f}", row['rank_loss'], row['rank_needle'], f"{row['long_loss']:.3f}",
             f"{row['long_loss_sd']:.3f}", f"{row['long_needle']:.0%}", f"{row['law']:,.0f}", f"{row['similar']:,}",
             'control' if row['control'] else '') for row in summary['rows']]
    laws = summary['laws']
    return '\n'.join([
            table(header, rows, left=(8,)),
            f"laws for {summary['target']:,}: critical base {laws['critical_base']:,.0f}, bound reached from "
            f"{laws['theta_for_bound']:,.0f}, lower bound {laws['lower_bound']:,.0f}",
            f"chosen: {summary['chosen']:,.0f}"])


def figure(summary, config, path):
    """Loss by position and needles by length of every theta, mean over seeds with one standard deviation."""
    from lct.eval.report import svg

    at = [(low * high) ** 0.5 for low, high in zip(summary['edges'][1:], summary['edges'][2:])]  # not the first bin
    rows = sorted(summary['rows'], key=lambda row: row['theta'])
    named = {f"theta {row['theta']:,.0f}" + (', control' if row['control'] else ''): row for row in rows}
    losses = {name: (at, row['loss'][1:], row['loss_sd'][1:]) for name, row in named.items()}
    needles = {name: (summary['lengths'], row['needle'], row['needle_sd']) for name, row in named.items()}
    steps = config.stages[0].num_steps
    svg.panels([
        svg.Panel(f'loss by position after {steps} steps', 'nats per token', losses),
        svg.Panel('needles found', 'fraction', needles),
    ], {summary['native']: 'trained', summary['target']: 'target'},
        controls=[name for name, row in named.items() if row['control']]).save(path)


def chosen_config(config, theta):
    """Source of a config for extend.py: that of the search with the chosen theta."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ('search', 'stages')}
    stages = [{**config.stages[0].to_dict(), 'theta': theta}]
    return CHOSEN.format(target=stages[0]['seq_len'], fields=pprint.pformat(fields, width=110, sort_dicts=False),
                         stages=pprint.pformat(stages, width=110, sort_dicts=False))


def left(results, total):
    """', about 12m00s left' once a run is finished."""
    from lct.train.metrics import clock

    if not results:
        return ''
    return f', about {clock(statistics.mean(r["seconds"] for r in results) * (total - len(results)))} left'


if __name__ == '__main__':
    run_script(run, resumes=True)
