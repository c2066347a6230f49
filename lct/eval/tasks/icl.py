"""Many-shot in-context learning of rules that no training text holds, with one shot to thousands.

An episode is one hidden rule with its stream of shots. The first n of the stream make the prompt of n shots,
so prompts of an episode are nested and a curve over n compares like with like. Every prompt depends on (task,
shots, index, seed) alone.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from lct.data.tokenizer import Tokenizer
from lct.eval import samples, scoring
from lct.eval.tasks import prompt_fitting
from lct.eval.tasks.icl_tasks import (
    Chain,
    Cipher,
    Example,
    Linear,
    Lookup,
    Parity,
    Regression,
    Sentiment,
    Task,
    Topics,
)

# The episode of a sample is index // QUERIES. Its shots are read once for all of its queries, but rules
# differ more than the queries of one rule do: 20 samples give 5 rules, for a quarter of the prefill that 20
# rules would take.
QUERIES = 4
MEASURED = 16, 64  # episodes, and shots of each, that determine how long the prompts of a task are
ORDERS = ('drawn', 'balanced', 'grouped')
TASKS = {config.task: config for config in (
    Linear(), Linear('linear_64', 64), Topics(), Topics('topics_16', 16),
    Topics('topics_balanced', order='balanced'), Topics('topics_grouped', order='grouped'),
    Sentiment(), Sentiment('sentiment', flipped=False), Cipher(), Parity(),
    Parity('parity_running', hidden=0), Lookup(), Chain(), Regression(),
)}


def task(name: str) -> Task:
    """The config of a task by name."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; the tasks in context are {', '.join(TASKS)}")
    return TASKS[name]


@functools.lru_cache(maxsize=1)  # the queries of an episode are made one after the other
def episode(
    config: Task, seed: int, number: int, shots: int,
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """(the first `shots` shots, the QUERIES queries) of an episode.

    A task's order is 'drawn' at random, 'balanced' in rounds of every label once, or 'grouped' by label, the
    hardest to learn from. The shots of fewer are among the shots of more, with 'grouped' at other positions.
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
    rng, shot_rng = samples.rng(seed, 'queries', name, number), samples.rng(seed, 'which', number)
    return tuple(chosen), tuple(config.example(rule, rng, shot_rng.randrange(shots)) for _ in range(QUERIES))


@functools.lru_cache(maxsize=1)
def _rule(config, seed, number):
    return config.rule(samples.rng(seed, 'rule', type(config).__name__, number))


def _rounds(stream: Iterator[Example], lookahead: int = 512) -> Iterator[Example]:
    """The examples of a stream in rounds of every label that its first `lookahead` examples have."""
    first = list(itertools.islice(stream, lookahead))
    waiting = {example.label: [] for example in first}
    for example in itertools.chain(first, stream):
        if example.label in waiting:
            waiting[example.label].append(example)
        while all(waiting.values()):
            yield from [queue.pop(0) for queue in waiting.values()]


def sample(
    config: Task, shots: int, index: int, seed: int, tokenizer: Tokenizer, overhead: int = 0,
) -> samples.Sample:
    """Query index % QUERIES of episode index // QUERIES; overhead: tokens of a chat template."""
    number, query = divmod(index, QUERIES)
    text, tokens = _shots_text(config, seed, number, shots, tokenizer)
    query = episode(config, seed, number, shots)[1][query]
    counter = prompt_fitting.TokenCounter(tokenizer)
    prompt, prefix = f'Input: {query.text}\n', 'Output:'
    answers, choices = list(query.answers or [query.label]), config.choices(_rule(config, seed, number))
    answer_tokens = max(
        _token_stats(config, seed, tokenizer)[-1], *_answer_tokens(counter, {*answers, *choices}))
    used = overhead + counter.bos + tokens + counter.count_one(prompt + prefix) + answer_tokens
    meta = {'shots': shots, 'set': number, 'tokens': used, 'label': query.label, 'choices': choices}
    return samples.Sample(config.task, length(config, shots, seed, tokenizer, overhead), index, text + prompt,
                          prefix, answers, answer_tokens, meta)


def length(config: Task, shots: int, seed: int, tokenizer: Tokenizer, overhead: int = 0) -> int:
    """Tokens that hold a prompt of `shots` shots and its answer in every episode, without making any.

    n shots have at most n (mean + 5 sd of the episodes' means) + 5 sd of a shot sqrt(n) tokens, and a query
    is no longer than a shot.
    """
    mean, episode_sd, shot_sd, answer_tokens = _token_stats(config, seed, tokenizer)
    shots += 1
    most = shots * (mean + 5 * episode_sd) + 5 * shot_sd * shots ** 0.5
    return overhead + prompt_fitting.TokenCounter(tokenizer).bos + int(np.ceil(most)) + answer_tokens


def shot_counts(
    config: Task, seed: int, tokenizer: Tokenizer, longest: int, overhead: int = 0,
) -> tuple[int, ...]:
    """(1, 2, 4, ...): the powers of two of shots that fit into longest tokens."""
    fits = lambda shots: length(config, shots, seed, tokenizer, overhead) <= longest
    counts = tuple(itertools.takewhile(fits, (2 ** power for power in itertools.count())))
    if not counts:
        raise ValueError(f'length {longest} is too small for one shot of {config.task}; use a larger length')
    return counts


def _shot(example):
    return f'Input: {example.text}\nOutput: {example.label}\n'


def _answer_tokens(counter, labels):
    return [counter.count(f' {label}\n') + 1 for label in labels]


@functools.lru_cache(maxsize=1)
def _shots_text(config, seed, number, shots, tokenizer):
    """(text, tokens) of the shots of an episode."""
    text = ''.join(map(_shot, episode(config, seed, number, shots)[0]))
    return text, prompt_fitting.TokenCounter(tokenizer).count(text)


@functools.cache
def _token_stats(config, seed, tokenizer):
    """(mean tokens of a shot, sd of the episodes' means, sd of a shot, tokens of the longest answer)."""
    counter, (episodes, count) = prompt_fitting.TokenCounter(tokenizer), MEASURED
    shots = [episode(config, seed, number, count)[0] for number in range(episodes)]
    tokens = np.array([counter.count_each(map(_shot, one)) for one in shots])  # [episodes, count]
    longest = max(_answer_tokens(counter, {example.label for one in shots for example in one}))
    return tokens.mean(), tokens.mean(1).std(ddof=1), tokens.std(), longest


# ---------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------


def score(text: str, outputs: list[str]) -> float:
    """1.0 if the first line of a reply is one of outputs, else 0.0."""
    return float(text.strip().split('\n')[0].strip() in outputs)


def curve(pairs: Iterable[tuple[samples.Sample, str]]) -> dict[int, dict]:
    """The learning curve of (Sample, text) pairs of one task.

    It is {shots: {'accuracy', 'interval', 'macro', 'gain', 'count', 'sets', 'tokens'}}.
    interval: 95%, over rules as well as queries; None for one episode. macro: mean accuracy over labels.
    gain: accuracy beyond the accuracy at the fewest shots that can show every label once; None up to there,
    and for answers that are not chosen from a few. sets: number of episodes. tokens: mean of a prompt with
    its answer.
    """
    cells = {}
    for sample, text in pairs:
        cells.setdefault(sample.meta['shots'], []).append((sample, score(text, sample.outputs)))
    out = {}
    for shots, rows in sorted(cells.items()):
        out[shots] = _curve_point(rows)
        labels = max(len(sample.meta.get('choices', [])) for sample, _ in rows)
        start = next((n for n in out if 1 < labels <= n < shots), None)
        out[shots]['gain'] = None if start is None else out[shots]['accuracy'] - out[start]['accuracy']
    return out


def _curve_point(rows):
    """A value of curve without its gain, of (Sample, score) pairs."""
    by_episode, by_label = {}, {}
    for sample, value in rows:
        by_episode.setdefault(sample.meta['set'], []).append(value)
        by_label.setdefault((sample.meta['set'], sample.meta['label']), []).append(value)
    interval = scoring.clustered_interval(list(by_episode.values()))
    return {
        'accuracy': sum(value for _, value in rows) / len(rows), 'interval': interval and list(interval),
        'macro': sum(sum(x) / len(x) for x in by_label.values()) / len(by_label),
        'count': len(rows), 'sets': len(by_episode),
        'tokens': sum(sample.meta['tokens'] for sample, _ in rows) / len(rows),
    }


def reference_accuracy(config: Task, seed: int, shots: int, indices: Iterable[int]) -> dict[str, float]:
    """{learner: accuracy} of the reference learners on the samples of these indices."""
    right, indices = dict.fromkeys(config.learners, 0), sorted(indices)
    for number, group in itertools.groupby(indices, lambda index: index // QUERIES):
        chosen, queries = episode(config, seed, number, shots)
        queries = [queries[index % QUERIES] for index in group]
        xs, labels = [example.x for example in chosen], [example.label for example in chosen]
        for learner, learn in config.learners.items():
            answers = learn(xs, labels, [query.x for query in queries])
            right[learner] += sum(
                answer in (query.answers or (query.label,))
                for answer, query in zip(answers, queries, strict=True))
    return {learner: count / len(indices) for learner, count in right.items()}
