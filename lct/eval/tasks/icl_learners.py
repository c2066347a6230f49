"""Reference learners, which show what the shots of a task determine.

Each is a function (inputs, labels, queries) -> labels of the queries.
"""

import collections
from collections.abc import Sequence

import numpy as np


def logistic(xs: Sequence, labels: Sequence[str], queries: Sequence) -> list[str]:
    """Logistic regression for two labels with a little weight decay, by Newton's method."""
    names = sorted(set(labels))
    if len(names) == 1:
        return names * len(queries)
    mean, scale = np.mean(xs, 0), np.std(xs, 0) + 1e-9
    x = np.column_stack([(np.array(xs) - mean) / scale, np.ones(len(xs))])
    y = np.array([label == names[1] for label in labels], float)
    w = np.zeros(x.shape[1])
    decay = np.eye(len(w))
    for _ in range(25):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + decay
        w -= np.linalg.solve(hessian, x.T @ (p - y) + decay @ w)
    scores = np.column_stack([(np.array(queries) - mean) / scale, np.ones(len(queries))]) @ w
    return [names[int(score > 0)] for score in scores]


def nearest(xs: Sequence, labels: Sequence[str], queries: Sequence, count: int = 5) -> list[str]:
    """The most common label of the `count` nearest inputs."""
    xs = np.array(xs)
    out = []
    for query in queries:
        order = np.argsort(((xs - query) ** 2).sum(1), kind='stable')[:count]
        out.append(collections.Counter(labels[i] for i in order).most_common(1)[0][0])
    return out


def naive_bayes(xs: Sequence, labels: Sequence[str], queries: Sequence) -> list[str]:
    """Multinomial naive Bayes over words with additive smoothing of 0.5; an input is a list of words."""
    counts = {label: collections.Counter() for label in labels}
    for words, label in zip(xs, labels, strict=True):
        counts[label].update(words)
    vocab_size = len({word for words in xs for word in words}) + 1
    frequency = collections.Counter(labels)

    def log_odds(label, words):
        of_label = counts[label]
        total = sum(of_label.values()) + 0.5 * vocab_size
        return np.log(frequency[label]) + sum(np.log((of_label[word] + 0.5) / total) for word in words)

    return [max(sorted(counts), key=lambda label: log_odds(label, words)) for words in queries]


def letters(xs: Sequence[str], labels: Sequence[str], queries: Sequence[str]) -> list[str]:
    """Letter by letter; '?' for letters that are in no shot."""
    known = {a: b for x, label in zip(xs, labels, strict=True) for a, b in zip(x, label, strict=True)}
    return [''.join(known.get(letter, '?') for letter in query) for query in queries]


def parity(xs: Sequence, labels: Sequence[str], queries: Sequence) -> list[str]:
    """Gaussian elimination over the field of two elements.

    It is exact once the shots determine the rule; before that it is one rule that agrees with them. Running
    parities, one for each bit, need no shots.
    """
    if len(labels[0].split()) > 1:
        return [' '.join(map(str, np.cumsum(query) % 2)) for query in queries]
    rows = np.column_stack([np.array(xs), [int(label) for label in labels]]) % 2
    width, rank = rows.shape[1] - 1, 0
    weights = np.zeros(width, int)
    pivots = []
    for column in range(width):
        found = np.flatnonzero(rows[rank:, column])
        if not len(found):
            continue
        rows[[rank, rank + found[0]]] = rows[[rank + found[0], rank]]
        others = np.flatnonzero(rows[:, column])
        rows[others[others != rank]] ^= rows[rank]
        pivots.append(column)
        rank += 1
        if rank == len(rows):
            break
    weights[pivots] = rows[:rank, -1]
    return [str(int(query @ weights % 2)) for query in np.array(queries)]


def table(xs: Sequence[str], labels: Sequence[str], queries: Sequence[str]) -> list[str]:
    """The label of the same input."""
    known = dict(zip(xs, labels, strict=True))
    return [known.get(query, '') for query in queries]


def bigrams(xs: Sequence, labels: Sequence[str], queries: Sequence) -> list[str]:
    """The most common successor in the walks of the shots.

    Inputs and queries are complete walks; the last symbol of a query is ignored.
    """
    successors = collections.defaultdict(collections.Counter)
    for walk in xs:
        for before, after in zip(walk, walk[1:], strict=False):
            successors[before][after] += 1
    return [successors[walk[-2]].most_common(1)[0][0] if successors[walk[-2]] else '' for walk in queries]


def least_squares(xs: Sequence, labels: Sequence[str], queries: Sequence) -> list[str]:
    """The linear function of least norm through the shots, rounded."""
    w, *_ = np.linalg.lstsq(np.array(xs, float), np.array(labels, float), rcond=None)
    return [str(round(float(value))) for value in np.array(queries) @ w]
