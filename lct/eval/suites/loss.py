"""The suite 'loss': by position, with growing context, on key tokens, on identifiers, beside a base model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from lct.data.tokenizer import Tokenizer
from lct.eval.loss import long_context, measure
from lct.eval.report import svg
from lct.eval.runner import Model
from lct.eval.suites.suite import Cell, Figure, Outcome, Plan, Suite, Table
from lct.text import short_length

FEW = 5  # documents; with fewer the intervals are wide


class Encoded(Sequence):
    """The token ids of documents, each encoded when it is first read."""

    def __init__(self, tokenizer: Tokenizer, documents: Sequence):
        self._tokenizer, self._documents, self._ids = tokenizer, documents, {}

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, i: int) -> np.ndarray:
        if i not in self._ids:
            self._ids[i] = np.array(self._tokenizer.encode(self._documents[i].text), np.int32)
        return self._ids[i]


class LossSuite(Suite):
    name, title = 'loss', 'Loss'

    def check(self, model: Model, plan: Plan) -> Iterator[str]:
        try:
            measure.windows(model, plan, Encoded(model.tokenizer, plan.material.documents))
            if plan.evaluator is not None:
                measure.check_key_tokens(model, plan)
        except ValueError as error:
            yield f'loss: {error}'

    def run(self, model: Model, plan: Plan, path: Path,
            progress: Callable[[int, int, float], None] | None = None) -> Outcome:
        """Measure the windows of the longest length, and more where the inputs allow it.

        The identifiers are measured where the haystack is a large enough repository, the short windows where
        there is a base model, in the files short.jsonl and short_base.jsonl beside path; LongPPL on the key
        tokens of an evaluator, where there is one, in key_tokens.jsonl and long_ppl.jsonl.
        """
        documents = Encoded(model.tokenizer, plan.material.documents)
        bundles, problems = measure.make_bundles(model, plan)
        rows, more = measure.run(model, plan, documents, path, progress)
        result = {'count': len(rows), **measure.scores(rows)}
        problems += more
        if bundles:
            found, more = measure.run_identifiers(model, plan, bundles, path, progress)
            result['identifiers'] = measure.identifier_scores(found)
            problems += more
        if plan.load_base is not None:
            base = plan.load_base()
            length = min(base.config.max_position_embeddings, max(plan.lengths))
            both = [measure.run_short(one, plan, documents, path.with_name(name), length, progress)
                    for name, one in (('short.jsonl', model), ('short_base.jsonl', base))]
            result['short'] = measure.regression(*(found for found, _ in both))
            problems += [problem for _, more in both for problem in more]
        if plan.evaluator is not None:
            result['long_ppl'], more = _by_evaluator(model, plan, documents, path, progress)
            problems += more
        return Outcome(rows, problems, result)

    def outdated(self, result: Mapping) -> str | None:
        if 'documents' in result:
            return None
        return 'have errors over windows, not over documents'

    def cells(self, result: Mapping) -> Iterator[Cell]:
        count, documents = result['num_windows'], result['documents']
        curves = (('loss', 'edges', result), ('growing', 'contexts', result.get('growing')),
                  ('border', 'edges', result.get('border')))
        for task, places, one in curves:
            if one:
                for place, mean, error in zip(one[places], one['mean'], one['stderr'], strict=False):
                    if mean is not None:
                        yield Cell('loss', task, place, mean, *_interval_cells(mean, error, documents), count)
        if one := result.get('identifiers'):
            bins = zip(one['edges'], one['mean'], one['counts'], _bundle_errors(one), strict=False)
            for place, mean, number, error in bins:
                if number and mean is not None:
                    yield Cell('loss', 'identifiers', place, mean, *_interval_cells(mean, *error), number)
        if (one := result.get('long_ppl')) and one['value']:
            interval = _perplexity_interval(one) or ('', '')
            yield Cell('loss', 'long_ppl', one['context'], one['value'], *interval, one['key_tokens'])
        if (one := result.get('short')) and one['difference'] is not None:
            interval = _interval_cells(one['difference'], one['stderr'], one['documents'], -math.inf)
            yield Cell('loss', 'short', one['length'], one['difference'], *interval, one['num_windows'])

    def tables(self, result: Mapping) -> Iterator[Table]:
        yield Table(['positions', *_spans(result['edges'])], [['nats per token', *_nats(result['mean'])]])
        if one := result.get('growing'):
            yield Table(['context', *map(short_length, one['contexts'])],
                        [[f"nats per token, the same {one['targets']}", *_nats(one['mean'])]])
        if one := result.get('identifiers'):
            yield Table(['tokens since the first use', *_spans(one['edges'])],
                        [['nats per identifier', *_nats(one['mean'])],
                         ['identifiers', *(f'{n:,}' for n in one['counts'])]])
        if one := result.get('border'):
            yield Table(['tokens to a border between devices', *_spans(one['edges'])],
                        [['nats per token', *_nats(one['mean'])]])

    def figures(self, result: Mapping, trained: int) -> Iterator[Figure]:
        documents = result['documents']
        with_documents = lambda errors: [(error, documents) for error in errors]
        yield from _loss_figure(
            f"Loss over windows ({result['num_windows']} of them, from {documents} documents), 95% band",
            _middles(result['edges']), result['mean'], with_documents(result['stderr']), 'position (tokens)',
            trained)
        if one := result.get('growing'):
            yield from _loss_figure(
                f"Loss of the same {one['targets']} tokens of each window, "
                'with more and more context before them, 95% band',
                one['contexts'], one['mean'], with_documents(one['stderr']), 'context (tokens)', trained)
        if one := result.get('identifiers'):
            errors = _bundle_errors(one)
            known = any(error is not None for error, _ in errors)
            band = ', 95% band over bundles of this repository' if known else ''
            yield from _loss_figure(f'Loss of whole identifiers by the distance to their first use{band}',
                                    _middles(one['edges']), one['mean'], errors, 'distance (tokens)', trained)

    def sentences(self, result: Mapping) -> list[str]:
        out = []
        if (one := result.get('growing')) and one['effective_context'] is not None:
            out.append(_growing_sentence(one))
        if one := result.get('long_ppl'):
            out.append(_long_ppl_sentence(one))
        if one := result.get('short'):
            out.append(_short_sentence(one))
        if result['documents'] == 1:
            out.append('all windows come from one document, so the error of these means is unknown')
        elif result['documents'] < FEW:
            out.append(f"the windows come from {result['documents']} documents: "
                       'with so few the intervals are wide')
        if None in _known_means(result):
            out.append('some losses are NaN or infinite: means with them are left out')
        return out


def _by_evaluator(model, plan, documents, path, progress):
    """-> (LongPPL on the key tokens that the evaluator of the plan chooses, problems)."""
    # No name holds the evaluator: its weights are freed before the model is measured.
    chosen, problems = measure.run_key_tokens(
        plan.evaluator.load(), plan, documents, path.with_name('key_tokens.jsonl'), progress)
    rows, more = measure.run_on_key_tokens(
        model, plan, documents, chosen, path.with_name('long_ppl.jsonl'), progress)
    about = {'evaluator': plan.evaluator.name, 'is_model': plan.evaluator.is_model}
    return measure.long_ppl(rows) | about, problems + more


# ---------------------------------------------------------------------------------------------------
# Intervals
# ---------------------------------------------------------------------------------------------------


def interval(mean: float, error: float | None, documents: int, least: float = 0.0) -> tuple[float, float]:
    """(low, high) of a 95% interval by Student's t over so many documents.

    It is (mean, mean) where the error is unknown. least: what a mean cannot fall below.
    """
    half = 0 if error is None else error * float(stdtrit(documents - 1, 0.975))
    return max(mean - half, least), mean + half


def _interval_cells(mean, error, *more):
    return ('', '') if error is None else interval(mean, error, *more)


def _bundle_errors(identifiers):
    """[(standard error, bundles)] of every bin; results of earlier versions have neither."""
    unknown = [None] * len(identifiers['mean'])
    return list(zip(identifiers.get('stderr', unknown), identifiers.get('bundles', unknown), strict=True))


def _perplexity_interval(long_ppl):
    """(low, high) of a 95% interval of LongPPL, None where it is unknown."""
    if long_ppl.get('stderr') is None:
        return None
    return tuple(map(math.exp, interval(long_ppl['nats'], long_ppl['stderr'], long_ppl['documents'])))


# ---------------------------------------------------------------------------------------------------
# Text and figures
# ---------------------------------------------------------------------------------------------------


def _spans(edges: Sequence[int]):
    return [f'{short_length(low)}-{short_length(high)}'
            for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _nats(values):
    return ['' if value is None else f'{value:.3f}' for value in values]


def _growing_sentence(one):
    """How much of the context lowers the loss, and whether more of it raises the loss again."""
    contexts, means = one['contexts'], one['mean']
    best = min(range(len(means)), key=lambda i: math.inf if means[i] is None else means[i])
    text = (f"the loss of the same tokens is lowest, {means[best]:.3f} nats, after "
            f'{short_length(contexts[best])} tokens of context')
    if best < len(means) - 1:
        return f'{text}; longer contexts do not help: {means[-1]:.3f} after {short_length(contexts[-1])}'
    return f"{text}; {short_length(one['effective_context'])} tokens come within 1% of it"


def _long_ppl_sentence(one):
    value = f"perplexity {one['value']:.2f}" if one['value'] else 'no perplexity'
    if ends := _perplexity_interval(one):
        value += ' (95% interval {:.2f} to {:.2f})'.format(*ends)
    evaluator = one.get('evaluator')
    by_itself = evaluator is None or one['is_model']
    chooser = 'this model' if evaluator is None else f'the evaluator {evaluator}'
    text = (f"LongPPL: {value} on {one['key_tokens']:,} of {one['of']:,} tokens: the key tokens, which "
            f"{chooser} predicts from the whole window but not from {one['context']:,} tokens of context. ")
    if not by_itself:
        return text + 'Models compare on the same windows with the same evaluator'
    bound = f'Chosen by the model itself, it is at most {math.exp(long_context.BETA):.2f}'
    return f'{text}{bound} and no measure to compare models by; an --evaluator can choose them'


def _short_sentence(one):
    subject = f"on the same windows of {short_length(one['length'])} tokens (documents: {one['documents']})"
    if one['difference'] is None:
        return f'{subject}: a loss of this or of the base model is NaN or infinite'
    error = ', its error unknown' if one['stderr'] is None else f" ± {one['stderr']:.4f}"
    return (f"{subject}: {one['extended']:.4f} nats, the base model {one['base']:.4f}, difference "
            f"{one['difference']:+.4f}{error}")


def _known_means(result):
    """All means of a result that should be numbers; bins without identifiers have none."""
    curves = [result, result.get('growing'), result.get('border')]
    means = [mean for one in curves if one for mean in one['mean']]
    if one := result.get('identifiers'):
        means += [mean for mean, count in zip(one['mean'], one['counts'], strict=True) if count]
    return means


def _middles(edges):
    """The geometric middle of every bin."""
    return [math.sqrt(max(low, 1) * high) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _loss_figure(caption, places, means, errors, x_label, trained):
    """Iterator of one Figure of the means that are numbers, or of none where no mean is.

    errors: [(standard error, over how many documents)].
    """
    known = [i for i, mean in enumerate(means) if mean is not None]
    if not known:
        return
    xs, ys = [places[i] for i in known], [means[i] for i in known]
    band = [interval(mean, *errors[i]) for mean, i in zip(ys, known, strict=True)]
    ends = [*ys, *(end for pair in band for end in pair)]
    yield Figure(caption, svg.curves({'model': (xs, ys, band)}, x_label, 'nats', trained,
                                     (math.floor(min(ends)), math.floor(max(ends)) + 1)))
