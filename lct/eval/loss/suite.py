"""The suite 'loss': every number that is made of the losses of held-out windows, one line of a file per window.

A line names its window by a hash of the tokens, and its document (or bundle) by its number: a line of another window
than the one that is asked for now is measured again.
"""

import functools
import math
import time

import numpy as np

from lct import sharding
from lct.eval import runner
from lct.eval.loss import by_position, long_context
from lct.eval.tasks import code_questions
from lct.models import decode

LAYOUT = 'zigzag'  # striped puts a border between devices after every token
TARGETS = 16  # the last sixteenth of a window is read with more and more context
SHORT = 4  # key tokens are those that a quarter of the window, up to SHORT_CONTEXT, does not make known
SHORT_CONTEXT = 4096


def run(model, plan, documents, path, progress=None):
    """Measure counts[longest] windows of the longest length.

    Args:
      documents: lists of token ids.
      path: JSONL, one line a window; windows that it holds are not measured again.
      progress: as in runner.run.
    Returns:
      (rows, problems) as runner.run does.
    """
    seq_len = _whole(model, max(plan.lengths))
    return _run(*_windows(plan, documents, seq_len), path, 'loss', functools.partial(_measure, model), progress)


def run_short(model, plan, documents, path, seq_len, progress=None):
    """The mean loss of as many windows of seq_len tokens, for a comparison with another model."""
    def measure(window):
        return {'mean': float(_loss(model, window[None]).mean(dtype=np.float64))}

    return _run(*_windows(plan, documents, _whole(model, seq_len)), path, 'short', measure, progress)


def bundles(model, plan):
    """The windows of run_identifiers: as many bundles of the Python files of the haystack.

    Returns:
      ([(window int32 [S + 1], its occurrences as of repository.identifier_distances)], problems): no windows, and
      one sentence why, where the Python files do not fill one; neither where there are no such files.
    """
    bos, seq_len = plan.tokenizer.bos_id, _whole(model, max(plan.lengths))
    if not any(document.name.endswith('.py') for document in plan.material.documents):
        return [], []
    out = []
    try:
        for i in range(plan.counts[max(plan.lengths)]):
            files = code_questions.oversized_bundle(plan.material, seq_len + 1, i)
            ids, occurrences = code_questions.identifier_distances(files, plan.tokenizer) if files else ([], [])
            window = np.array([*([] if bos is None else [bos]), *ids][:seq_len + 1], np.int32)
            if len(window) <= seq_len:
                raise ValueError(f'the Python files of the haystack do not fill a window of {seq_len} tokens; give a '
                                 'larger repository (--haystack) or shorter lengths')
            out.append((window, occurrences))
    except ValueError as error:
        return [], [f'no loss on identifiers: {error}']
    return out, []


def run_identifiers(model, bundles, path, progress=None):
    """The loss on identifiers of bundles, by the distance to their first use."""
    windows, sources = [window for window, _ in bundles], range(len(bundles))
    occurrences = {runner.digest(window): found for window, found in bundles}

    def measure(window):
        losses, seq_len = _loss(model, window[None])[0], len(window) - 1
        if model.tokenizer.bos_id is None:
            losses = np.concatenate([losses[:1], losses])  # no loss of the first token; that is no second use
        edges = [1, *by_position.doubling_edges(seq_len)[1:]]
        sums, counts = code_questions.identifier_losses(losses, occurrences[runner.digest(window)], edges)
        return {'edges': edges, 'sums': sums.tolist(), 'counts': counts.tolist()}

    return _run(windows, sources, path, 'identifiers', measure, progress)


def _whole(model, length):
    """The longest windows up to length that the mesh can hold."""
    unit = decode.length_unit(sharding.axis_size('sequence'), model.memory.ffn_chunks)
    return length // unit * unit


def _windows(plan, documents, seq_len):
    count = plan.counts[max(plan.lengths)]
    return by_position.evaluation_windows(documents, seq_len, count, plan.material.seed, plan.tokenizer.bos_id)


def _run(windows, sources, path, task, measure, progress):
    found, problems = runner.read(path)
    rows = [{'task': task, 'length': len(window) - 1, 'index': i, 'text': '', 'outputs': [],
             'window': runner.digest(window), 'document': int(source)}
            for i, (window, source) in enumerate(zip(windows, sources, strict=True))]
    others = [row for row in rows if not row.items() <= found.get(runner.key_of(row), row).items()]
    if others:
        problems.append(f'{path} holds {len(others)} lines of the task {task} about other windows than those that are '
                        'asked for now; they are measured again')
    found = {key: row for key, row in found.items() if key not in {runner.key_of(row) for row in others}}
    runner.write(path, found)
    start, made, count = time.monotonic(), 0, len(windows)
    for i, (row, window) in enumerate(zip(rows, windows, strict=True)):
        if runner.key_of(row) not in found:
            found[runner.key_of(row)] = {**row, 'meta': measure(window)}
            runner.write(path, found)
            made += 1
        if progress is not None:
            progress(i + 1, count, (time.monotonic() - start) / max(made, 1) * (count - i - 1))
    return [found[runner.key_of(row)] for row in rows], problems


def _loss(model, windows):
    return by_position.loss_by_position(model.params, model.config, windows, layout=LAYOUT, memory=model.memory)


def _measure(model, window):
    """Everything about one window [S + 1], as plain values."""
    unit = decode.length_unit(sharding.axis_size('sequence'), model.memory.ffn_chunks)
    loss, windows, bos = functools.partial(_loss, model), window[None], model.tokenizer.bos_id
    full, seq_len = loss(windows), len(window) - 1
    out = {'edges': list(by_position.doubling_edges(seq_len))}
    out['means'] = by_position.bin_losses(full, out['edges']).mean.tolist()
    first = math.lcm(64, unit)
    targets = max(seq_len // TARGETS // unit, 1) * unit
    if seq_len - targets >= first:
        sizes = long_context.context_sizes(seq_len, targets, first)
        growing = long_context.growing_context(loss, windows, targets, sizes, bos)
        out |= {'targets': targets, 'contexts': list(sizes), 'growing': growing[:, 0].tolist()}
    context = min(SHORT_CONTEXT, seq_len // SHORT) // unit * unit
    stride = context // 4 // unit * unit
    if stride:
        short = long_context.short_context_losses(loss, windows, full, context, stride, bos)
        key = long_context.key_tokens(full, short)
        out |= {'short_context': context, 'key': int(key.sum()), 'key_loss': float(full[key].sum(dtype=np.float64))}
    if sharding.axis_size('sequence') > 1:
        distance = long_context.border_distance(LAYOUT, seq_len, sharding.axis_size('sequence'))
        bins = long_context.bin_by_distance(full, distance)
        out |= {'border_edges': list(bins.edges), 'border': bins.mean.tolist()}
    return out


def scores(rows):
    """by_position.LossBins as a dict, and what else the windows give: 'growing', 'long_ppl', 'border'."""
    meta, sources = [row['meta'] for row in rows], [row['document'] for row in rows]
    stacked = lambda name: np.array([one[name] for one in meta]).T
    out = by_position.bin_means(meta[0]['edges'], stacked('means'), sources).to_dict()
    if 'growing' in meta[0]:
        means, error = by_position.mean_over_documents(stacked('growing'), sources)
        out['growing'] = {'contexts': meta[0]['contexts'], 'targets': meta[0]['targets'], 'mean': means.tolist(),
                          'stderr': error.tolist(),
                          'effective_context': long_context.effective_context(meta[0]['contexts'], means)}
    if 'key' in meta[0]:
        key = stacked('key')
        ((nats,), (error,), (documents,)) = by_position.ratio_over_documents(stacked('key_loss')[None], key[None], sources)
        out['long_ppl'] = {'key_tokens': int(key.sum()), 'of': len(rows) * rows[0]['length'],
                           'context': meta[0]['short_context'], 'value': float(np.exp(nats)) if key.any() else None,
                           'nats': float(nats), 'stderr': float(error), 'documents': int(documents)}
    if 'border' in meta[0]:
        out['border'] = by_position.bin_means(meta[0]['border_edges'], stacked('border'), sources).to_dict()
    return out


def regression(rows, base_rows):
    """long_context.regression of the rows of run_short of two models; ValueError if their windows differ."""
    ours, base = ([row['window'] for row in one] for one in (rows, base_rows))
    if ours != base:
        raise ValueError(f'the model was read on {len(ours)} windows and the base model on {len(base)}, of which '
                         f'{len({*ours} & {*base})} are the same, so their losses do not compare; measure both with the same '
                         'documents, seed, length and count')
    means = ([row['meta']['mean'] for row in one] for one in (rows, base_rows))
    return {'length': rows[0]['length'], **long_context.regression(*means, [row['document'] for row in rows])}


def identifier_scores(rows):
    """Mean nats of an identifier by the distance to its first use, over all rows, with the error over bundles of the
    same repository; None where there was none."""
    sums, counts = (np.array([row['meta'][name] for row in rows]).T for name in ('sums', 'counts'))
    # Bundles are the same where the repository hardly fills one.
    mean, error, bundles = by_position.ratio_over_documents(sums, counts, [row['window'] for row in rows])
    return {'edges': rows[0]['meta']['edges'], 'counts': counts.sum(1).tolist(), 'stderr': error.tolist(),
            'bundles': bundles.tolist(), 'mean': [float(x) if n else None for x, n in zip(mean, counts.sum(1), strict=True)]}
