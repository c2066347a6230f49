"""The suite 'loss': every number that is made of the losses of held-out windows, one line of a file per window."""

import functools
import math
import time

import numpy as np

from lct import sharding
from lct.eval import long_perplexity, perplexity, repository, runner
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
    return _run(_windows(plan, documents, seq_len), path, 'loss', seq_len, functools.partial(_measure, model),
                progress)


def run_short(model, plan, documents, path, seq_len, progress=None):
    """The mean loss of as many windows of seq_len tokens, for a comparison with another model."""
    def measure(window):
        return {'mean': float(_loss(model, window[None]).mean(dtype=np.float64))}

    seq_len = _whole(model, seq_len)
    return _run(_windows(plan, documents, seq_len), path, 'short', seq_len, measure, progress)


def run_identifiers(model, plan, path, progress=None):
    """The loss on identifiers of as many bundles of Python files, by the distance to their first use."""
    bos, seq_len = plan.tokenizer.bos_id, _whole(model, max(plan.lengths))

    def measure(files):
        ids, occurrences = repository.identifier_distances(files, plan.tokenizer)
        window = np.array([*([] if bos is None else [bos]), *ids][:seq_len + 1])
        losses = _loss(model, window[None])[0]
        if bos is None:
            losses = np.concatenate([losses[:1], losses])  # no loss of the first token; that is no second use
        edges = [1, *perplexity.doubling_edges(seq_len)[1:]]
        sums, counts = repository.identifier_losses(losses, occurrences, edges)
        return {'edges': edges, 'sums': sums.tolist(), 'counts': counts.tolist()}

    bundles = [repository.overfull(plan.material, seq_len + 1, i) for i in range(plan.counts[max(plan.lengths)])]
    if not all(bundles):
        raise ValueError(f'the Python files of the haystack hold less than the {seq_len} tokens of a window; give a larger '
                         'repository, or leave identifiers out')
    return _run(bundles, path, 'identifiers', seq_len, measure, progress)


def _whole(model, length):
    """The longest windows up to length that the mesh can hold."""
    unit = decode.length_unit(sharding.axis_size('sequence'), model.memory.ffn_chunks)
    return length // unit * unit


def _windows(plan, documents, seq_len):
    count = plan.counts[max(plan.lengths)]
    return perplexity.windows(documents, seq_len, count, plan.material.seed, plan.tokenizer.bos_id)


def _run(windows, path, task, seq_len, measure, progress):
    found, problems = runner.read(path)
    runner.write(path, found)
    start, made, count = time.monotonic(), 0, len(windows)
    for i, window in enumerate(windows):
        if (task, seq_len, i) not in found:
            found[task, seq_len, i] = {'task': task, 'length': seq_len, 'index': i, 'text': '', 'outputs': [],
                                       'meta': measure(window)}
            runner.write(path, found)
            made += 1
        if progress is not None:
            progress(i + 1, count, (time.monotonic() - start) / max(made, 1) * (count - i - 1))
    return [found[task, seq_len, i] for i in range(count)], problems


def _loss(model, windows):
    return perplexity.loss_by_position(model.params, model.config, windows, layout=LAYOUT, memory=model.memory)


def _measure(model, window):
    """Everything about one window [S + 1], as plain values."""
    unit = decode.length_unit(sharding.axis_size('sequence'), model.memory.ffn_chunks)
    loss, windows, bos = functools.partial(_loss, model), window[None], model.tokenizer.bos_id
    full, seq_len = loss(windows), len(window) - 1
    out = {'edges': list(perplexity.doubling_edges(seq_len))}
    out['means'] = perplexity.bins(full, out['edges']).mean.tolist()
    first = math.lcm(64, unit)
    targets = max(seq_len // TARGETS // unit, 1) * unit
    if seq_len - targets >= first:
        sizes = long_perplexity.contexts(seq_len, targets, first)
        growing = long_perplexity.growing_context(loss, windows, targets, sizes, bos)
        out |= {'targets': targets, 'contexts': list(sizes), 'growing': growing[:, 0].tolist()}
    context = min(SHORT_CONTEXT, seq_len // SHORT) // unit * unit
    stride = context // 4 // unit * unit
    if stride:
        short = long_perplexity.short_losses(loss, windows, full, context, stride, bos)
        key = long_perplexity.key_tokens(full, short)
        out |= {'short_context': context, 'key': int(key.sum()), 'key_loss': float(full[key].sum(dtype=np.float64))}
    if sharding.axis_size('sequence') > 1:
        distance = long_perplexity.border_distance(LAYOUT, seq_len, sharding.axis_size('sequence'))
        bins = long_perplexity.by_distance(full, distance)
        out |= {'border_edges': list(bins.edges), 'border': bins.mean.tolist()}
    return out


def scores(rows):
    """perplexity.Bins as a dict, and what else the windows give: 'growing', 'long_ppl', 'border'."""
    meta = [row['meta'] for row in rows]
    out = _bins(meta, 'edges', 'means')
    if 'growing' in meta[0]:
        values = np.array([one['growing'] for one in meta]).T
        error, means = long_perplexity.standard_error(values), values.mean(1)
        out['growing'] = {'contexts': meta[0]['contexts'], 'targets': meta[0]['targets'], 'mean': means.tolist(),
                          'stderr': error.tolist(),
                          'effective_context': long_perplexity.effective_context(meta[0]['contexts'], means)}
    if 'key' in meta[0]:
        key = sum(one['key'] for one in meta)
        out['long_ppl'] = {'key_tokens': key, 'of': len(rows) * rows[0]['length'], 'context': meta[0]['short_context'],
                           'value': math.exp(sum(one['key_loss'] for one in meta) / key) if key else None}
    if 'border' in meta[0]:
        out['border'] = _bins(meta, 'border_edges', 'border')
    return out


def _bins(meta, edges, means):
    values = np.array([one[means] for one in meta]).T
    return perplexity.Bins(tuple(meta[0][edges]), values.mean(1), long_perplexity.standard_error(values),
                           len(meta)).to_dict()


def regression(rows, base_rows):
    """long_perplexity.regression of the rows of run_short of two models."""
    return {'length': rows[0]['length'], **long_perplexity.regression(
        *([row['meta']['mean'] for row in one] for one in (rows, base_rows)))}


def identifier_scores(rows):
    """Mean nats of an identifier by the distance to its first use, over all rows; None where there was none."""
    sums, counts = (np.sum([row['meta'][name] for row in rows], 0) for name in ('sums', 'counts'))
    return {'edges': rows[0]['meta']['edges'], 'counts': counts.tolist(),
            'mean': [float(x / n) if n else None for x, n in zip(sums, counts, strict=True)]}
