"""What the suite 'loss' measured, for reading: cells for a CSV, tables and sentences. A result is what results.json
holds under 'loss': nats per token, None where a loss was NaN or infinite.
"""

import math

from scipy.special import stdtrit

from lct.text import short_length

FEW = 5  # documents; of fewer the intervals are wide


def interval(mean, error, documents, least=0.0):
    """(low, high) of a 95% interval by Student's t of so many documents; (mean, mean) where the error is unknown.
    least: what a mean cannot fall below."""
    half = 0 if error is None else error * float(stdtrit(documents - 1, 0.975))
    return max(mean - half, least), mean + half


def cells(result):
    """Iterator of (suite, task, at, score, low, high, count), as in html_report.cells."""
    def known(mean, error, *more):
        return ('', '') if error is None else interval(mean, error, *more)

    count, documents = result['num_windows'], result['documents']
    for task, at, name in (('loss', 'edges', None), ('growing', 'contexts', 'growing'), ('border', 'edges', 'border')):
        one = result if name is None else result.get(name)
        for place, mean, error in zip(one[at], one['mean'], one['stderr'], strict=False) if one else ():
            if mean is not None:
                yield 'loss', task, place, mean, *known(mean, error, documents), count
    if one := result.get('identifiers'):
        for place, mean, number, pair in zip(one['edges'], one['mean'], one['counts'], errors_of(one), strict=False):
            if number and mean is not None:
                yield 'loss', 'identifiers', place, mean, *known(mean, *pair), number
    if (one := result.get('long_ppl')) and one['value']:
        yield 'loss', 'long_ppl', one['context'], one['value'], *(perplexities(one) or ('', '')), one['key_tokens']
    if (one := result.get('short')) and one['difference'] is not None:
        yield ('loss', 'short', one['length'], one['difference'],
               *known(one['difference'], one['stderr'], one['documents'], -math.inf), one['num_windows'])


def errors_of(identifiers):
    """[(standard error, bundles)] of every bin; results of earlier versions know none."""
    none = [None] * len(identifiers['mean'])
    return list(zip(identifiers.get('stderr', none), identifiers.get('bundles', none), strict=True))


def perplexities(long_ppl):
    """(low, high) of a 95% interval of LongPPL, None where it is unknown."""
    if long_ppl.get('stderr') is None:
        return None
    return tuple(map(math.exp, interval(long_ppl['nats'], long_ppl['stderr'], long_ppl['documents'])))


def tables(result):
    """Iterator of (header, rows) of text."""
    yield ['positions', *_spans(result['edges'])], [['nats per token', *_nats(result['mean'])]]
    if one := result.get('growing'):
        yield (['context', *map(short_length, one['contexts'])],
               [[f"nats per token, the same {one['targets']}", *_nats(one['mean'])]])
    if one := result.get('identifiers'):
        yield (['tokens since the first use', *_spans(one['edges'])], [
            ['nats per identifier', *_nats(one['mean'])], ['identifiers', *(f'{n:,}' for n in one['counts'])]])
    if one := result.get('border'):
        yield ['tokens to a border between devices', *_spans(one['edges'])], [['nats per token', *_nats(one['mean'])]]


def _spans(edges):
    return [f'{short_length(low)}-{short_length(high)}' for low, high in zip(edges[:-1], edges[1:], strict=True)]


def _nats(values):
    return ['' if value is None else f'{value:.3f}' for value in values]


def sentences(result):
    """What the losses come to, and how far they can be trusted."""
    out = []
    if (one := result.get('growing')) and one['effective_context'] is not None:
        out.append(f"within 1% of the loss with the longest context: {short_length(one['effective_context'])} tokens of it")
    if one := result.get('long_ppl'):
        value = f"perplexity {one['value']:.2f}" if one['value'] else 'no perplexity'
        if ends := perplexities(one):
            value += ' (95% interval {:.2f} to {:.2f})'.format(*ends)
        out.append(f"LongPPL: {value} on {one['key_tokens']:,} of {one['of']:,} tokens, those that {one['context']:,} tokens "
                   'of context do not make known and the whole window does, as this model finds them')
    if one := result.get('short'):
        where = f"on the same windows of {short_length(one['length'])} tokens (documents: {one['documents']})"
        if one['difference'] is None:
            out.append(f'{where}: a loss of this or of the base model is NaN or infinite')
        else:
            error = ', its error unknown' if one['stderr'] is None else f" ± {one['stderr']:.4f}"
            out.append(f"{where}: {one['extended']:.4f} nats, the base model {one['base']:.4f}, "
                       f"difference {one['difference']:+.4f}{error}")
    if result['documents'] == 1:
        out.append('all windows come from one document, so the error of these means is unknown')
    elif result['documents'] < FEW:
        out.append(f"the windows come from {result['documents']} documents: of so few the intervals are wide")
    means = [mean for one in (result, result.get('growing'), result.get('border')) if one for mean in one['mean']]
    if one := result.get('identifiers'):
        means += [mean for mean, count in zip(one['mean'], one['counts'], strict=True) if count]
    if None in means:
        out.append('some losses are NaN or infinite: means with them are left out')
    return out
