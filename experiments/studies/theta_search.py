"""Empirical theta optimisation: short runs over a grid of thetas, ranked by long-context loss and recall.

    python experiments/studies/theta_search.py --config experiments/configs/theta_4k.py \\
        --workdir runs/theta_4k

Every theta gets the same steps, and for one seed the same rows. The grid must hold 'keep', the control,
because longer training alone already helps. Writes theta_search.json, theta_search.svg and chosen.py, a
config for experiments/extend.py. Stop it at any time: the same command continues.
"""

import dataclasses
import json
import platform
import pprint
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lct import exit_status, sharding
from lct.cli.config import as_plain, make_run, parse_args, setup_devices, windowed
from lct.cli.corpus import tokenize_documents
from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.cli.paths import experiments_folder
from lct.data import tokenizer as tokenizers
from lct.data.batches.memory_source import MemorySource
from lct.data.corpus import documents
from lct.eval import before_after, recall_probe
from lct.eval.loss import by_position
from lct.eval.report import svg
from lct.files import write_atomically
from lct.models.llama import LlamaConfig
from lct.ops import theta as laws
from lct.ops.rope import critical_base, extrapolation_bound, frequencies
from lct.text import clock, table
from lct.train import loop, stages, stopping
from lct.train.metrics import log
from lct.train.workdir import lock_workdir
from lct.weights import llama_hf

CHOSEN = '''"""The theta that studies/theta_search.py chose for {target:,} tokens, with its settings.

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


class Search(NamedTuple):
    """A checked search.

    runs: {theta: loop.Run}. training: [ids of a document]. stage: of every run, except for its theta.
    """

    config: ConfigDict
    workdir: Path
    folder: Path
    base: LlamaConfig
    tokenizer: tokenizers.Tokenizer
    runs: dict
    training: list
    evaluation: before_after.Evaluation

    @property
    def stage(self):
        return next(iter(self.runs.values())).stages[0]


def run():
    config, args = parse_args(__doc__, experiments_folder() / 'configs' / 'theta_4k.py', 'runs/theta_4k')
    check(config)
    setup_devices(config)
    search = prepare(config, Path(args.workdir))
    lock = lock_workdir(search.workdir, as_plain(config))  # noqa: F841  held while the process lives
    jobs = [(f'theta{theta:.0f}_seed{seed}', theta, seed)
            for seed in config.search.seeds for theta in search.runs]
    results, mesh = [], sharding.make_mesh(search.stage.mesh)
    with stopping.catch_signals() as stop_requested:
        try:
            with jax.set_mesh(mesh):
                untrained = run_one(search, 'untrained', search.base.rope_theta, None, stop_requested)
            for i, (name, theta, seed) in enumerate(jobs):
                log(f'run {i + 1} of {len(jobs)}: theta {theta:,.0f}, seed {seed}{left(results, len(jobs))}')
                with jax.set_mesh(mesh):
                    results.append(run_one(search, name, theta, seed, stop_requested))
        except stopping.Interrupted as stop:
            log(str(stop))
            sys.exit(exit_status.STOPPED)
    report(search, summarise(config, search.base, untrained, results))


def prepare(config, workdir):
    """The Search of a config. Everything that can be wrong is found before anything is computed."""
    folder = find_model(config.model_folder)
    base = windowed(llama_hf.read_config(folder), config)
    tokenizer = tokenizers.load(folder)
    settings = make_run(config)
    stage = settings.stages[0]
    runs = {}  # a rule and a number may give the same theta
    for theta in config.search.thetas:
        one = dataclasses.replace(settings, stages=(dataclasses.replace(stage, theta=theta),))
        runs.setdefault(stages.configs(one.stages, base)[0].rope_theta, one)
    training, held_out = documents.split(documents.read(config.corpus, config.corpus_bytes), config.held_out)
    training, held_out = tokenize_documents(tokenizer, training), tokenize_documents(tokenizer, held_out)
    haystack, probe, loss = np.concatenate(held_out), config.needle, config.loss
    if not any(base.max_position_embeddings < length <= stage.seq_len for length in probe.lengths):
        raise ValueError(f'needle.lengths {probe.lengths} has none above the trained '
                         f'{base.max_position_embeddings} and up to the target {stage.seq_len}; '
                         f'add {stage.seq_len}')
    grid = recall_probe.RecallGrid(probe.lengths, probe.depths, probe.samples, config.seed)
    grid.check_haystack(len(haystack))
    windows = by_position.evaluation_windows(
        held_out, loss.seq_len, loss.windows, config.seed, tokenizer.bos_id, loss.rotations)
    decoding = recall_probe.Decoding(stage.layout, stage.memory)
    evaluation = before_after.Evaluation(tokenizer, haystack, grid, windows, decoding=decoding, batch_size=4)
    return Search(config, workdir, folder, base, tokenizer, runs, training, evaluation)


def run_one(search, name, theta, seed, stop_requested):
    """The result of one run, kept in a file once done.

    seed: of the training data; None for the untrained model.
    """
    path = search.workdir / f'{name}.json'
    if path.exists():
        return json.loads(path.read_text())
    start = time.monotonic()

    def load():
        return llama_hf.load(search.folder, dtype=search.runs[theta].param_dtype)[1]

    if seed is None:
        config, params, seconds = search.base, load(), 0.0
    else:
        rows = MemorySource(search.training, search.tokenizer, seed=seed)
        config, params, summary = loop.train(
            search.runs[theta], search.base, load, rows, search.workdir / name, stop_requested)
        seconds = summary['seconds']
    evaluation = dataclasses.replace(
        search.evaluation, check_stop=lambda: stopping.check_stop(stop_requested))
    loss, recall = evaluation.loss(name, config, params), evaluation.recall(name, config, params)
    result = {'theta': theta, 'seed': seed, 'loss': loss.to_dict(), 'needle': recall.scores.mean(0).tolist(),
              'training_seconds': seconds, 'seconds': time.monotonic() - start}
    write_atomically(path, json.dumps(result))
    return json.loads(path.read_text())


def report(search, summary):
    """Write theta_search.json, the figure and the chosen config."""
    workdir = search.workdir
    summary['tokens_per_run'] = search.stage.num_steps * search.stage.tokens_per_step
    summary['command'] = 'python ' + ' '.join(map(shlex.quote, sys.argv))
    summary['versions'] = {'jax': jax.__version__, 'python': platform.python_version()}
    summary['device'] = jax.devices()[0].device_kind
    write_atomically(workdir / 'theta_search.json', json.dumps(summary, indent=1) + '\n')
    figure(summary, search.config, workdir / 'theta_search.svg')
    write_atomically(workdir / 'chosen.py', chosen_config(search.config, summary['chosen']))
    log(summary_table(summary))
    log(f'wrote {workdir}/theta_search.json, theta_search.svg, chosen.py')


def check(config):
    """Raise ValueError for a search that has no control, no spread or several stages."""
    if len(config.stages) != 1:
        raise ValueError(f'a theta search has one stage but this config has {len(config.stages)}; '
                         'keep the longest')
    if 'keep' not in config.search.thetas:
        raise ValueError(f"search.thetas {config.search.thetas} lacks the control; add 'keep', the same "
                         'training with theta unchanged')
    if len(set(config.search.seeds)) < 2:
        raise ValueError(f'search.seeds {config.search.seeds} gives no spread; use at least two seeds')


def summarise(config, base, untrained, results):
    """The JSON of a search: a row per theta, best first, the untrained model, and the scaling laws."""
    target, native = config.stages[0].seq_len, base.max_position_embeddings
    edges, lengths = untrained['loss']['edges'], list(config.needle.lengths)
    last = [high for high in edges if high <= target][-1]
    far = [length for length in lengths if native < length <= target]
    by_theta = {}
    for result in results:
        by_theta.setdefault(result['theta'], []).append(result)
    beyond = edges.index(last) - 1, [lengths.index(length) for length in far]
    rows = [summarise_theta(base, theta, same_theta, target, beyond)
            for theta, same_theta in by_theta.items()]
    for name, key in (('rank_loss', lambda row: row['long_loss']),
                      ('rank_needle', lambda row: -row['long_needle'])):
        for row in rows:
            row[name] = 1 + sum(key(other) < key(row) for other in rows)
    rows.sort(key=lambda row: (row['rank_loss'] + row['rank_needle'], row['long_loss']))
    return {
        'model': str(config.model_folder), 'native': native, 'target': target, 'edges': edges,
        'lengths': lengths,
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


def summarise_theta(base, theta, results, target, beyond):
    """The row of a theta. beyond: (loss bin, [indices of lengths]) past the trained length, which rank it."""
    losses, recall = [result['loss']['mean'] for result in results], [result['needle'] for result in results]
    inv_freq = frequencies(dataclasses.replace(base.rope, theta=theta), base.head_dim)[0]
    long_bin, long_lengths = beyond
    return {
        'theta': theta, 'control': theta == base.rope_theta, 'seeds': [result['seed'] for result in results],
        'loss': means(losses), 'loss_sd': spreads(losses),
        'needle': means(recall), 'needle_sd': spreads(recall),
        'long_loss': means(losses)[long_bin], 'long_loss_sd': spreads(losses)[long_bin],
        'long_needle': statistics.mean(means(recall)[i] for i in long_lengths),
        'training_seconds': statistics.mean(result['training_seconds'] for result in results),
        'law': extrapolation_bound(theta, base.rope_theta, base.max_position_embeddings, base.head_dim),
        'similar': laws.similar_len(inv_freq, 64 * target),
    }


def means(lists):
    return [statistics.mean(column) for column in zip(*lists, strict=True)]


def spreads(lists):
    """Standard deviations over seeds."""
    return [statistics.stdev(column) if len(column) > 1 else 0.0 for column in zip(*lists, strict=True)]


def summary_table(summary):
    """Text for the terminal: thetas, best first, then the laws and the choice."""
    low, high = summary['long_loss_of']
    lengths = ', '.join(f'{length:,}' for length in summary['long_needle_of'])
    header = ('theta', 'rank by loss', 'by recall', f'loss {low:,}-{high:,}', 'sd', f'recall at {lengths}',
              'law', 'similar keys', '')
    rows = [(f"{row['theta']:,.0f}", row['rank_loss'], row['rank_needle'], f"{row['long_loss']:.3f}",
             f"{row['long_loss_sd']:.3f}", f"{row['long_needle']:.0%}", f"{row['law']:,.0f}",
             f"{row['similar']:,}", 'control' if row['control'] else '') for row in summary['rows']]
    bounds = summary['laws']
    return '\n'.join([
        table(header, rows, left=(8,)),
        f"laws for {summary['target']:,}: critical base {bounds['critical_base']:,.0f}, bound reached from "
        f"{bounds['theta_for_bound']:,.0f}, lower bound {bounds['lower_bound']:,.0f}",
        f"chosen: {summary['chosen']:,.0f}"])


def figure(summary, config, path):
    """Loss by position and recall by length of every theta, mean over seeds with one standard deviation."""
    edges = summary['edges'][1:]  # without the first bin
    middles = [(low * high) ** 0.5 for low, high in zip(edges[:-1], edges[1:])]
    rows = sorted(summary['rows'], key=lambda row: row['theta'])
    named = {f"theta {row['theta']:,.0f}" + (', control' if row['control'] else ''): row for row in rows}
    losses = {name: (middles, row['loss'][1:], row['loss_sd'][1:]) for name, row in named.items()}
    recall = {name: (summary['lengths'], row['needle'], row['needle_sd']) for name, row in named.items()}
    steps = config.stages[0].num_steps
    svg.panels([
        svg.Panel(f'loss by position after {steps} steps', 'nats per token', losses),
        svg.Panel('recall probe', 'share of prompts right', recall),
    ], {summary['native']: 'trained', summary['target']: 'target'},
        controls=[name for name, row in named.items() if row['control']]).save(path)


def chosen_config(config, theta):
    """Source of a config for extend.py: the config of the search with the chosen theta."""
    fields = {key: value for key, value in config.to_dict().items() if key not in ('search', 'stages')}
    stage = {**config.stages[0].to_dict(), 'theta': theta}
    show = lambda value: pprint.pformat(value, width=110, sort_dicts=False)
    return CHOSEN.format(target=stage['seq_len'], fields=show(fields), stages=show([stage]))


def left(results, total):
    """', about 12m00s left' once a run is finished."""
    if not results:
        return ''
    return f', about {clock(statistics.mean(r["seconds"] for r in results) * (total - len(results)))} left'


if __name__ == '__main__':
    run_script(run, resumes=True)
