"""Many-shot learning in context: rules that no training text holds, from one shot to thousands.

A set is one hidden rule with its stream of shots; the first n of a stream make the prompt of n shots, so sets
are nested and a curve over n compares like with like. Every prompt depends on (task, shots, index, seed) alone.
"""

import functools
import itertools

import numpy as np

from lct.eval import samples, scoring
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.icl_tasks import Chain, Cipher, Linear, Lookup, Parity, Regression, Sentiment, Topics

# Sets are index // QUERIES. A set is read once, whatever is asked of it, but rules differ more than queries of one
# rule do: of 20 samples this makes 5 rules, for a quarter of the reading that 20 would take.
QUERIES = 4
MEASURED = 16, 64  # sets and shots of each that tell how long a task's prompts are
ORDERS = ('drawn', 'balanced', 'grouped')
TASKS = {config.task: config for config in (
    Linear(), Linear('linear_64', 64), Topics(), Topics('topics_16', 16), Topics('topics_balanced', order='balanced'),
    Topics('topics_grouped', order='grouped'), Sentiment(), Sentiment('sentiment', flipped=False), Cipher(), Parity(),
    Parity('parity_running', hidden=0), Lookup(), Chain(), Regression(),
)}


def task(name):
    """The config of a task by name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks in context are {', '.join(TASKS)}")
    return TASKS[name]


@functools.lru_cache(maxsize=1)  # the queries of a set are made one after the other
def episode(config, seed, number, shots):
    """-> ((Example,) * shots, (Example,) * QUERIES) of set `number`.

    A task's order is 'drawn' at random, 'balanced' in rounds of every label once, or 'grouped' by label, which is
    the hardest to learn from; grouped sets are nested as sets only.
    """
    order, name = getattr(config, 'order', 'drawn'), type(config).__name__
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; use one of {', '.join(ORDERS)}")
    if shots < 1:
        raise ValueError(f'{shots} shots must be at least 1')
    rule, rng = _rule(config, seed, number), samples.rng(seed, 'shots', name, number)
    stream = (config.example(rule, rng, i) for i in itertools.count())
    if order == 'balanced':
        stream = _rounds(stream)
    chosen = list(itertools.islice(stream, shots))
    if order == 'grouped':
        chosen.sort(key=lambda example: example.label)
    rng, which = samples.rng(seed, 'queries', name, number), samples.rng(seed, 'which', number)
    return tuple(chosen), tuple(config.example(rule, rng, which.randrange(shots)) for _ in range(QUERIES))


@functools.lru_cache(maxsize=1)
def _rule(config, seed, number):
    return config.rule(samples.rng(seed, 'rule', type(config).__name__, number))


def _rounds(stream, look=512):
    """The examples of a stream in rounds of every label once; labels are those of its first `look` examples."""
    first = list(itertools.islice(stream, look))
    waiting = {example.label: [] for example in first}
    for example in itertools.chain(first, stream):
        if example.label in waiting:
            waiting[example.label].append(example)
        while all(waiting.values()):
            yield from [queue.pop(0) for queue in waiting.values()]


def sample(config, shots, index, seed, tokenizer, overhead=0):
    """Sample number index, query index % QUERIES of set index // QUERIES; overhead: tokens of a chat template."""
    number, query = divmod(index, QUERIES)
    text, tokens = _shown(config, seed, number, shots, tokenizer)
    query = episode(config, seed, number, shots)[1][query]
    counter = prompt_fitting.TokenCounter(tokenizer)
    prompt, prefix = f'Input: {query.text}\n', 'Output:'
    answers, choices = list(query.answers or [query.label]), config.choices(_rule(config, seed, number))
    new = max(_measures(config, seed, tokenizer)[-1], *_answer_tokens(counter, {*answers, *choices}))
    used = overhead + counter.bos + tokens + int(counter.count_each([prompt + prefix])[0]) + new
    meta = {'shots': shots, 'set': number, 'tokens': used, 'label': query.label, 'choices': choices}
    return samples.Sample(config.task, length(config, shots, seed, tokenizer, overhead), index, text + prompt, prefix,
                          answers, new, meta)


def length(config, shots, seed, tokenizer, overhead=0):
    """Tokens that hold the prompt of so many shots and its answer in every set, without making one of them.

    Of n shots there are at most n (mean + 5 sd of the sets' means) + 5 sd of a shot sqrt(n), and a query is no longer
    than a shot.
    """
    mean, of_sets, of_shots, new = _measures(config, seed, tokenizer)
    shots += 1
    most = shots * (mean + 5 * of_sets) + 5 * of_shots * shots ** 0.5
    return overhead + prompt_fitting.TokenCounter(tokenizer).bos + int(np.ceil(most)) + new


def shot_counts(config, seed, tokenizer, longest, overhead=0):
    """(1, 2, 4, ...): the powers of two of shots that fit into longest tokens."""
    counts = tuple(itertools.takewhile(lambda shots: length(config, shots, seed, tokenizer, overhead) <= longest,
                                       (2 ** power for power in itertools.count())))
    if not counts:
        raise ValueError(f'length {longest} is too small for one shot of {config.task}; use a larger length')
    return counts


def _shot(example):
    return f'Input: {example.text}\nOutput: {example.label}\n'


def _answer_tokens(counter, labels):
    return [len(counter.tokenizer.encode(f' {label}\n')) + 1 for label in labels]


@functools.lru_cache(maxsize=1)
def _shown(config, seed, number, shots, tokenizer):
    """(text, tokens) of the shots of a set."""
    text = ''.join(map(_shot, episode(config, seed, number, shots)[0]))
    return text, prompt_fitting.TokenCounter(tokenizer).count(text)


@functools.cache
def _measures(config, seed, tokenizer):
    """(mean tokens of a shot, sd of the sets' means, sd of a shot, tokens of the longest answer)."""
    counter, (sets, count) = prompt_fitting.TokenCounter(tokenizer), MEASURED
    shots = [episode(config, seed, number, count)[0] for number in range(sets)]
    tokens = np.array([counter.count_each(map(_shot, one)) for one in shots])  # [sets, count]
    new = max(_answer_tokens(counter, {example.label for one in shots for example in one}))
    return tokens.mean(), tokens.mean(1).std(ddof=1), tokens.std(), new


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------


def score(text, outputs):
    """1.0 if the first line of a reply is one of outputs, else 0.0."""
    return float(text.strip().split('\n')[0].strip() in outputs)


def curve(pairs):
    """{shots: {'accuracy', 'interval', 'macro', 'gain', 'count', 'sets', 'tokens'}} of (Sample, text) pairs of one task.

    interval: 95%, over rules as well as queries; None of one set. macro: mean over labels of the accuracy on each.
    gain: accuracy beyond that of the fewest shots that can show every label once; None up to these, and for answers
    that are not chosen out of a few. tokens: mean of a prompt and its answer.
    """
    cells = {}
    for one, text in pairs:
        cells.setdefault(one.meta['shots'], []).append((one, score(text, one.outputs)))
    out = {}
    for shots, rows in sorted(cells.items()):
        by_set, by_label = {}, {}
        for one, value in rows:
            by_set.setdefault(one.meta['set'], []).append(value)
            by_label.setdefault((one.meta['set'], one.meta['label']), []).append(value)
        interval = scoring.clustered_interval(list(by_set.values()))
        out[shots] = {
            'accuracy': sum(value for _, value in rows) / len(rows), 'interval': interval and list(interval),
            'macro': sum(sum(x) / len(x) for x in by_label.values()) / len(by_label),
            'count': len(rows), 'sets': len(by_set), 'tokens': sum(one.meta['tokens'] for one, _ in rows) / len(rows),
        }
        labels = max(len(one.meta.get('choices', [])) for one, _ in rows)
        start = next((n for n in out if 1 < labels <= n < shots), None)
        out[shots]['gain'] = None if start is None else out[shots]['accuracy'] - out[start]['accuracy']
    return out


def references(config, seed, shots, indices):
    """{learner: accuracy} of the reference learners on the shots and queries of the samples of these numbers."""
    right, indices = dict.fromkeys(config.learners, 0), sorted(indices)
    for number, asked in itertools.groupby(indices, lambda index: index // QUERIES):
        chosen, queries = episode(config, seed, number, shots)
        queries = [queries[index % QUERIES] for index in asked]
        xs, names = [example.x for example in chosen], [example.label for example in chosen]
        for learner, learn in config.learners.items():
            answers = learn(xs, names, [query.x for query in queries])
            right[learner] += sum(
                answer in (query.answers or (query.label,))
                for answer, query in zip(answers, queries, strict=True))
    return {learner: count / len(indices) for learner, count in right.items()}
