"""Losses of evaluation windows, measured window by window, and the numbers of the suite 'loss' made of them.

A line of the file identifies its window by a hash of the token ids, and its document (or bundle) by a number.
A line about another window than the one to be measured is measured again.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lct import sharding
from lct.eval import answers
from lct.eval.loss import by_position, long_context
from lct.eval.runner import Model
from lct.eval.tasks import code_questions
from lct.models import prompt_layout

if TYPE_CHECKING:  # the suites import this module
    from lct.eval.suites import Plan

LAYOUT = 'zigzag'  # striped puts a border between devices after every token
TARGETS = 16  # the last sixteenth of a window is read with more and more context
SHORT = 4  # key tokens are those that a quarter of the window, up to SHORT_CONTEXT, does not predict
SHORT_CONTEXT = 4096

Progress = Callable[[int, int, float], None]


class Bundle(NamedTuple):
    """window: int32 [S + 1] of source files; occurrences: as in code_questions.identifier_distances."""

    window: np.ndarray
    occurrences: list


# ---------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------


def run(model: Model, plan: 'Plan', documents: Sequence[Sequence[int]], path: Path,
        progress: Progress | None = None) -> tuple[list[dict], list[str]]:
    """Measure counts[longest] windows of the longest length.

    Args:
      documents: token ids.
      path: JSONL, one line per window; windows that it holds are not measured again.
      progress: as in runner.run.
    Returns:
      (rows, problems) as runner.run does.
    """
    measure = functools.partial(_measure, model)
    return _run(*windows(model, plan, documents), path, 'loss', measure, progress, plan)


def windows(model: Model, plan: 'Plan', documents: Sequence[Sequence[int]]) -> by_position.EvaluationWindows:
    """The windows that run measures."""
    return _windows(plan, documents, _window_length(model, max(plan.lengths)))


def run_short(model: Model, plan: 'Plan', documents: Sequence[Sequence[int]], path: Path, seq_len: int,
              progress: Progress | None = None) -> tuple[list[dict], list[str]]:
    """Measure the mean loss of as many windows of seq_len tokens, for a comparison with another model."""
    def measure(window):
        return {'mean': float(_loss(model, window[None]).mean(dtype=np.float64))}

    chosen = _windows(plan, documents, _window_length(model, seq_len))
    return _run(*chosen, path, 'short', measure, progress, plan)


def make_bundles(model: Model, plan: 'Plan') -> tuple[list[Bundle], list[str]]:
    """The windows of run_identifiers: counts[longest] bundles of the Python files of the haystack.

    Returns:
      (bundles, problems): no bundles and a sentence why where the Python files do not fill a window; neither
      where there are no such files.
    """
    bos, seq_len = plan.tokenizer.bos_id, _window_length(model, max(plan.lengths))
    if not any(document.name.endswith('.py') for document in plan.material.documents):
        return [], []
    out = []
    try:
        for i in range(plan.counts[max(plan.lengths)]):
            files = code_questions.oversized_bundle(plan.material, seq_len + 1, i)
            ids, occurrences = [], []
            if files:
                ids, occurrences = code_questions.identifier_distances(files, plan.tokenizer)
            window = np.array([*([] if bos is None else [bos]), *ids][:seq_len + 1], np.int32)
            if len(window) <= seq_len:
                raise ValueError(f'the Python files of the haystack do not fill a window of {seq_len} '
                                 'tokens; give a larger repository (--haystack) or shorter lengths')
            out.append(Bundle(window, occurrences))
    except ValueError as error:
        return [], [f'no loss on identifiers: {error}']
    return out, []


def run_identifiers(model: Model, plan: 'Plan', bundles: Sequence[Bundle], path: Path,
                    progress: Progress | None = None) -> tuple[list[dict], list[str]]:
    """Measure the loss on identifiers of bundles, by the distance to their first use."""
    chosen, sources = [bundle.window for bundle in bundles], range(len(bundles))
    occurrences = {answers.digest(bundle.window): bundle.occurrences for bundle in bundles}

    def measure(window):
        losses, seq_len = _loss(model, window[None])[0], len(window) - 1
        if model.tokenizer.bos_id is None:
            # The first token has no loss, and as a first use it needs none.
            losses = np.concatenate([losses[:1], losses])
        edges = [1, *by_position.doubling_edges(seq_len)[1:]]
        sums, counts = code_questions.identifier_losses(losses, occurrences[answers.digest(window)], edges)
        return {'edges': edges, 'sums': sums.tolist(), 'counts': counts.tolist()}

    return _run(chosen, sources, path, 'identifiers', measure, progress, plan)


def run_key_tokens(evaluator: Model, plan: 'Plan', documents: Sequence[Sequence[int]], path: Path,
                   progress: Progress | None = None) -> tuple[list[dict], list[str]]:
    """Find the key tokens of the windows of run: those whose prediction by the evaluator needs the window."""
    def measure(window):
        context, key = _key_tokens(evaluator, window, _loss(evaluator, window[None]))
        return {'short_context': context, 'positions': np.flatnonzero(key[0]).tolist()}

    return _run(*windows(evaluator, plan, documents), path, 'key_tokens', measure, progress, plan)


def check_key_tokens(model: Model, plan: 'Plan') -> None:
    """Raise ValueError for windows that are too short to find key tokens in."""
    longest, unit = max(plan.lengths), _unit(model)
    if not _short_context(longest, unit)[1]:
        raise ValueError(f'windows of {longest} tokens are too short to find key tokens in; use lengths of '
                         f'{4 * SHORT * unit} or more, a smaller sequence axis or fewer FFN chunks, or leave '
                         '--evaluator out')


def run_on_key_tokens(model: Model, plan: 'Plan', documents: Sequence[Sequence[int]], chosen: Sequence[dict],
                      path: Path, progress: Progress | None = None) -> tuple[list[dict], list[str]]:
    """Measure the loss of a model on key tokens; chosen: the rows of run_key_tokens of an evaluator."""
    positions = {row['window']: row['meta']['positions'] for row in chosen}

    def measure(window):
        key = positions[answers.digest(window)]
        loss = float(_loss(model, window[None])[0, key].sum(dtype=np.float64))
        return {'short_context': chosen[0]['meta']['short_context'], 'key': len(key), 'key_loss': loss}

    facts = [{'key_tokens': answers.digest(row['meta']['positions'])} for row in chosen]
    return _run(*windows(model, plan, documents), path, 'long_ppl', measure, progress, plan, facts)


def _unit(model):
    """The number of tokens that windows are a multiple of, on the current mesh."""
    return prompt_layout.length_unit(sharding.axis_size('sequence'), model.memory.ffn_chunks)


def _window_length(model, length):
    """The longest windows up to length that the mesh can hold."""
    return length // _unit(model) * _unit(model)


def _windows(plan, documents, seq_len):
    count, seed = plan.counts[max(plan.lengths)], plan.material.seed
    return by_position.evaluation_windows(documents, seq_len, count, seed, plan.tokenizer.bos_id)


def _run(windows, sources, path, task, measure, progress, plan, facts=None):
    """Add measure(window) to the file for each window that it lacks -> (rows, problems).

    facts: what else the row of each window depends on.
    """
    identity = plan.identity
    found, problems = answers.read(path, identity)
    rows = [{'task': task, 'length': len(window) - 1, 'index': i, 'text': '', 'outputs': [],
             'window': answers.digest(window), 'document': int(source), **fact}
            for i, (window, source, fact) in enumerate(
                zip(windows, sources, facts or [{}] * len(windows), strict=True))]
    stale = [row for row in rows if not row.items() <= found.get(answers.key_of(row), row).items()]
    if stale:
        problems.append(f'{path} holds {len(stale)} lines of the task {task} about other windows than those '
                        'to be measured now; they are measured again')
    stale_keys = {answers.key_of(row) for row in stale}
    found = {key: row for key, row in found.items() if key not in stale_keys}
    answers.write(path, found, identity)
    start, measured, count = time.monotonic(), 0, len(windows)
    for i, (row, window) in enumerate(zip(rows, windows, strict=True)):
        key = answers.key_of(row)
        if key not in found:
            found[key] = {**row, 'meta': measure(window), 'run': plan.run}
            answers.write(path, found, identity)
            measured += 1
        if progress is not None:
            progress(i + 1, count, (time.monotonic() - start) / max(measured, 1) * (count - i - 1))
    return [found[answers.key_of(row)] for row in rows], problems


def _loss(model, windows):
    return by_position.loss_by_position(
        model.params, model.config, windows, layout=LAYOUT, memory=model.memory)


def _measure(model, window):
    """Everything about one window [S + 1], as plain values."""
    unit, bos = _unit(model), model.tokenizer.bos_id
    loss, windows = functools.partial(_loss, model), window[None]
    full, seq_len = loss(windows), len(window) - 1
    out = {'edges': list(by_position.doubling_edges(seq_len))}
    out['means'] = by_position.bin_losses(full, out['edges']).mean.tolist()
    first = math.lcm(64, unit)
    targets = max(seq_len // TARGETS // unit, 1) * unit
    if seq_len - targets >= first:
        sizes = long_context.context_sizes(seq_len, targets, first)
        growing = long_context.growing_context(loss, windows, targets, sizes, bos)
        out |= {'targets': targets, 'contexts': list(sizes), 'growing': growing[:, 0].tolist()}
    if found := _key_tokens(model, window, full):
        context, key = found
        key_loss = float(full[key].sum(dtype=np.float64))
        out |= {'short_context': context, 'key': int(key.sum()), 'key_loss': key_loss}
    if sharding.axis_size('sequence') > 1:
        distance = long_context.border_distance(LAYOUT, seq_len, sharding.axis_size('sequence'))
        bins = long_context.bin_by_distance(full, distance)
        out |= {'border_edges': list(bins.edges), 'border': bins.mean.tolist()}
    return out


def _key_tokens(model, window, full):
    """(short context, bool [1, S]) of a window with the losses full [1, S]; None if it is too short."""
    context, stride = _short_context(len(window) - 1, _unit(model))
    if not stride:
        return None
    short = long_context.short_context_losses(
        functools.partial(_loss, model), window[None], full, context, stride, model.tokenizer.bos_id)
    return context, long_context.key_tokens(full, short)


def _short_context(seq_len, unit):
    """(short context, stride) in tokens for windows of seq_len; a stride of 0 where they are too short."""
    context = min(SHORT_CONTEXT, seq_len // SHORT) // unit * unit
    return context, context // 4 // unit * unit


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------


def scores(rows: Sequence[Mapping]) -> dict:
    """by_position.LossBins as a dict, and what else the rows of run give: 'growing', 'long_ppl', 'border'."""
    meta, sources = [row['meta'] for row in rows], [row['document'] for row in rows]
    stacked = lambda name: np.array([one[name] for one in meta]).T
    # What lengths a window is read with depends on the mesh, and calls may differ in it.
    agree = lambda *names: all(name in one and one[name] == meta[0].get(name)
                               for one in meta for name in names)
    out = by_position.bin_means(meta[0]['edges'], stacked('means'), sources).to_dict()
    if agree('contexts', 'targets'):
        means, error = by_position.mean_over_documents(stacked('growing'), sources)
        contexts = meta[0]['contexts']
        out['growing'] = {'contexts': contexts, 'targets': meta[0]['targets'], 'mean': means.tolist(),
                          'stderr': error.tolist(),
                          'effective_context': long_context.effective_context(contexts, means)}
    if agree('short_context'):
        out['long_ppl'] = long_ppl(rows)
    if agree('border_edges'):
        out['border'] = by_position.bin_means(meta[0]['border_edges'], stacked('border'), sources).to_dict()
    return out


def long_ppl(rows: Sequence[Mapping]) -> dict:
    """LongPPL over the rows of run, on key tokens of the model's own, or of run_on_key_tokens."""
    key, loss = (np.array([row['meta'][name] for row in rows]) for name in ('key', 'key_loss'))
    ((nats,), (error,), (documents,)) = by_position.ratio_over_documents(
        loss[None], key[None], [row['document'] for row in rows])
    return {'key_tokens': int(key.sum()), 'of': len(rows) * rows[0]['length'],
            'context': rows[0]['meta']['short_context'],
            'value': float(np.exp(nats)) if key.any() else None, 'nats': float(nats), 'stderr': float(error),
            'documents': int(documents)}


def regression(rows: Sequence[Mapping], base_rows: Sequence[Mapping]) -> dict:
    """long_context.regression of the rows of run_short of two models.

    Raises:
      ValueError: if their windows differ.
    """
    windows, base = ([row['window'] for row in one] for one in (rows, base_rows))
    if windows != base:
        shared = len({*windows} & {*base})
        raise ValueError(f'the model was read on {len(windows)} windows and the base model on {len(base)}, '
                         f'of which {shared} are the same, so their losses do not compare; measure both with '
                         'the same documents, seed, length and count')
    means = ([row['meta']['mean'] for row in one] for one in (rows, base_rows))
    return {'length': rows[0]['length'], **long_context.regression(*means, [row['document'] for row in rows])}


def identifier_scores(rows: Iterable[Mapping]) -> dict:
    """Mean nats of an identifier by the distance to its first use, over the rows of run_identifiers.

    The error is over bundles of the same repository; bins without identifiers have None.
    """
    rows = list(rows)
    sums, counts = (np.array([row['meta'][name] for row in rows]).T for name in ('sums', 'counts'))
    # Bundles are the same where the repository hardly fills one.
    mean, error, bundles = by_position.ratio_over_documents(sums, counts, [row['window'] for row in rows])
    return {'edges': rows[0]['meta']['edges'], 'counts': counts.sum(1).tolist(), 'stderr': error.tolist(),
            'bundles': bundles.tolist(),
            'mean': [float(x) if n else None for x, n in zip(mean, counts.sum(1), strict=True)]}
