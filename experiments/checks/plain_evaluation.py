"""Evaluations written out plainly: one sample and one whole forward pass at a time.

Nothing of lct's runner is used: no batches, no cache, no shared prompts, no file of answers. What the two
have in common are the samples, the tokenizer and the forward pass.
"""

import functools
import os
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lct.data import tokenizer as tokenizers
from lct.eval import answers
from lct.eval.loss import by_position, long_context
from lct.eval.runner import Item
from lct.eval.suites import Plan
from lct.models import llama
from lct.ops import rope
from lct.weights import llama_hf

TIE = 1e-3  # logits; a nearer second choice may win where sums are in another order
PADDED = 256  # a forward pass is padded to a multiple, so that few programs are compiled


class Answer(NamedTuple):
    """row: as in the file of answers. margin: how much the nearest second choice was behind, in logits."""

    row: dict
    margin: float


class PlainModel:
    """A checkpoint on one device. Answers and losses are kept, since many evaluations share samples."""

    def __init__(self, folder: pathlib.Path):
        self.config, self.params = llama_hf.load(folder, 'float32')
        self.tokenizer = tokenizers.load(folder)
        self._answers, self._losses, self._tables = {}, {}, {}

    def answer(self, evaluation: Hashable, item: Item, guess: str) -> Answer:
        """evaluation: what the samples of equal keys depend on. guess: of the text; it saves time alone."""
        key = evaluation, item.key
        if key not in self._answers:
            self._answers[key] = self._answer(item, guess)
        return self._answers[key]

    def _answer(self, item, guess):
        sample = item.make()
        prompt = [self.tokenizer.bos_id, *self.tokenizer.encode(sample.prompt + sample.answer_prefix)]
        ids, margin = self._greedy(prompt, item.one_line, sample.max_new_tokens, self.tokenizer.encode(guess))
        row = answers.make_row(sample, prompt, self.tokenizer.decode(ids), len(ids))
        if item.teacher_forced:
            wanted = self._continuation(sample, ' ' + ', '.join(sample.outputs))
            nats, greedy, gap = self._likelihood(prompt, wanted)
            row['forced'], margin = {'nats': nats, 'tokens': len(wanted), 'greedy': greedy}, min(margin, gap)
        if choices := sample.meta.get('choices'):
            nats = [self._likelihood(prompt, self._continuation(sample, f' {name}\n'))[0] for name in choices]
            second, first = sorted(nats)[-2:]
            row['chosen'], margin = choices[int(np.argmax(nats))], min(margin, first - second)
        return Answer(row, float(margin))

    def _greedy(self, prompt, one_line, limit, guess):
        """(token ids, distance to the nearest second choice) of greedy decoding.

        A pass looks at all tokens of the guess; what follows the first that differs is computed again.
        """
        ids, margin = [], np.inf
        while True:
            ahead = guess[len(ids):limit - 1] if guess[:len(ids)] == ids else []
            for i, logits in enumerate(self._logits(prompt + ids + ahead)[len(prompt) + len(ids) - 1:]):
                second, first = np.sort(logits)[-2:]
                margin, token = min(margin, first - second), int(logits.argmax())
                if token == self.tokenizer.eos_id or one_line and '\n' in self.tokenizer.decode([token]):
                    return ids, margin
                ids.append(token)
                if len(ids) == limit:
                    return ids, margin
                if i < len(ahead) and token != ahead[i]:
                    break

    def _continuation(self, sample, text):
        """The token ids that a text adds behind the answer prefix."""
        before = self.tokenizer.encode(sample.answer_prefix)
        after = self.tokenizer.encode(sample.answer_prefix + text)
        return after[len(os.path.commonprefix([before, after])):]

    def _likelihood(self, prompt, ids):
        """(nats, whether greedy decoding gives ids, the smallest distance to another choice)."""
        logits = self._logits(prompt + ids)[len(prompt) - 1:-1]
        nats = float(_log_probs(logits)[range(len(ids)), ids].sum())
        wanted = logits[range(len(ids)), ids]
        logits[range(len(ids)), ids] = -np.inf
        gaps = wanted - logits.max(1)
        return nats, bool((gaps > 0).all()), float(np.abs(gaps).min())

    def _logits(self, ids):
        """float64 [T, V] of token ids; the padding behind them changes nothing."""
        length = -(-len(ids) // PADDED) * PADDED
        if length not in self._tables:
            self._tables[length] = rope.make_tables(self.config.rope, self.config.head_dim, length)
        tokens = np.zeros((1, length), np.int32)
        tokens[0, :len(ids)] = ids
        logits = _logits(self.params, self.config.architecture(), tokens, self._tables[length])
        return np.array(logits, np.float64)[:len(ids)]

    # -----------------------------------------------------------------------------------------------
    # Losses
    # -----------------------------------------------------------------------------------------------

    def loss_rows(self, plan: Plan) -> list[dict]:
        """The rows of the suite 'loss' for the longest length of a plan."""
        length = max(plan.lengths)
        encoded = [self.tokenizer.encode(document.text) for document in plan.material.documents]
        chosen = by_position.evaluation_windows(encoded, length, plan.counts[length], plan.material.seed,
                                                self.tokenizer.bos_id)
        rows = []
        for i, (window, document) in enumerate(zip(*chosen, strict=True)):
            digest = answers.digest(window)
            if digest not in self._losses:
                self._losses[digest] = self._measure(window)
            rows.append({'task': 'loss', 'length': length, 'index': i, 'text': '', 'outputs': [],
                         'window': digest, 'document': int(document), 'meta': self._losses[digest]})
        return rows

    def _measure(self, window):
        full, length = self._loss(window), len(window) - 1
        edges = [0, 64]
        while edges[-1] < length:
            edges.append(min(2 * edges[-1], length))
        targets, context = length // 16, length // 4
        contexts = [64]
        while 2 * contexts[-1] < length - targets:
            contexts.append(2 * contexts[-1])
        contexts.append(length - targets)
        growing = [self._loss(self._cut(window, length - targets - size))[-targets:].mean()
                   for size in contexts]
        short, stride = full.copy(), context // 4
        for start in range(context, length, stride):
            cut = self._cut(window, start - context)[:context + stride + 1]
            short[start:start + stride] = self._loss(cut)[context:]
        key = (short - full > long_context.ALPHA) & (full < long_context.BETA)
        return {'edges': edges, 'means': [full[a:b].mean() for a, b in zip(edges, edges[1:], strict=False)],
                'targets': targets, 'contexts': contexts, 'growing': growing, 'short_context': context,
                'key': int(key.sum()), 'key_loss': full[key].sum()}

    def _cut(self, window, start):
        return np.concatenate([[self.tokenizer.bos_id], window[start + 1:]])

    def _loss(self, window):
        """float64 [S] of a window [S + 1]."""
        window = list(map(int, window))
        return -_log_probs(self._logits(window[:-1]))[range(len(window) - 1), window[1:]]


@functools.partial(jax.jit, static_argnames='config')
def _logits(params, config, tokens, tables):
    """float32 [T, V]: the logits behind all tokens of one text [1, T]."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    x = llama.hidden_states(params, config, tokens, positions, jnp.ones_like(positions), tables)
    return x[0].astype(jnp.float32) @ llama.head(params).astype(jnp.float32)


def _log_probs(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# ---------------------------------------------------------------------------------------------------
# Comparison
# ---------------------------------------------------------------------------------------------------


def difference(found: object, plain: object, tolerance: float = 1e-3, name: str = '') -> str | None:
    """Where and how two JSON values differ; numbers may by the tolerance, and what only `found` has may."""
    if isinstance(plain, Mapping) and isinstance(found, Mapping):
        pairs = [(f'{name}.{key}', found.get(key), value) for key, value in plain.items()]
    elif isinstance(plain, Sequence) and isinstance(found, list) and not isinstance(plain, str):
        if len(plain) != len(found):
            return f'{name} has {len(found)} entries, plainly {len(plain)}'
        pairs = [(f'{name}[{i}]', a, b) for i, (a, b) in enumerate(zip(found, plain, strict=True))]
    elif isinstance(plain, (int, float)) and isinstance(found, (int, float)):
        close = np.isclose(found, plain, rtol=tolerance, atol=tolerance, equal_nan=True)
        return None if close else f'{name} is {found}, plainly {plain}'
    else:
        return None if found == plain else f'{name} is {found!r}, plainly {plain!r}'
    return next(filter(None, (difference(a, b, tolerance, place) for place, a, b in pairs)), None)
