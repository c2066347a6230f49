"""Log-likelihoods of continuations, and free generation, in batches on the current mesh.

Letters: B batch, T tokens, D embed_dim, V vocab.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lct import sharding
from lct.data import layout as layouts
from lct.data.detokenizer import Detokenizer
from lct.eval import batching
from lct.eval.runner import Model
from lct.models import llama, prompt_layout
from lct.models.sampling import Sampling
from lct.ops import rope

SMALLEST = 64  # tokens; shorter texts share one compiled program
HONOURED = ('max_gen_toks', 'until', 'do_sample', 'temperature', 'top_p')
NEUTRAL = {  # values that change nothing
    'repetition_penalty': (None, 1), 'top_k': (None, 0, -1), 'min_p': (None, 0), 'num_beams': (None, 1),
    'length_penalty': (None, 1), 'use_cache': (None, True)}


class Likelihood(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would generate it."""

    nats: float
    is_greedy: bool


def score(
    model: Model, pairs: Sequence[tuple[list[int], list[int]]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Likelihood]:
    """The likelihoods of continuations.

    Args:
      pairs: [(context, continuation)], token ids, at least one of each.
      progress: called as progress(done, total) after every batch.
    """
    prompt_layout.check_ids([ids for pair in pairs for ids in pair], model.config.vocab_size)
    if short := sum(not (context and continuation) for context, continuation in pairs):
        raise ValueError(f'{short} of {len(pairs)} pairs have an empty context or continuation; '
                         'begin with the BOS')
    out, done = [None] * len(pairs), 0
    sizes = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    for batch in _batches(model, sizes):
        nats, is_argmax = _score_batch(model, [pairs[i] for i in batch.indices], batch)
        for i, row_nats, row_is_argmax in zip(batch.indices, nats, is_argmax, strict=False):
            continuation = slice(len(pairs[i][0]) - 1, sizes[i])
            out[i] = Likelihood(float(row_nats[continuation].sum(dtype=np.float64)),
                                bool(row_is_argmax[continuation].all()))
        done += len(batch.indices)
        if progress is not None:
            progress(done, len(pairs))
    return out


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of generation that would change the answers and that this model does not have.

    Raises:
      ValueError: naming them.
    """
    ignored = {name: value for name, value in settings.items()
               if name not in HONOURED and value not in NEUTRAL.get(name, (None,))}
    if ignored:
        raise ValueError(f"generation_kwargs {', '.join(f'{name} = {x!r}' for name, x in ignored.items())} "
                         f"cannot be honoured; the task may set {', '.join(HONOURED)}, so take the others "
                         'out of it')


def generate(
    model: Model, prompts: Sequence[list[int]], limit: int, stops: Sequence[str] = (),
    sampling: Sampling | None = None, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Generated texts after prompts.

    Args:
      prompts: token ids.
      limit: tokens of a text at most; a token that ends a turn or a stop string ends it earlier.
      stops: stop strings, which are not part of the text.
      sampling: None for greedy decoding.
      progress: called as progress(done, total) after every batch.
    """
    out, done = [None] * len(prompts), 0
    stop_mask = model.stop_mask(one_line=False)
    for batch in _batches(model, [len(prompt) + limit - 1 for prompt in prompts]):
        session = model.session(batch.rows, batch.seq_len, batch.longest)
        session.read([prompts[i] for i in batch.indices], model.prefill_chunk)
        key = jax.random.fold_in(jax.random.key(seed), done)
        tokens = session.stream([[] for _ in batch.indices], limit, sampling, key)
        texts = [Detokenizer(model.tokenizer.decode, stops) for _ in batch.indices]
        for i, text in zip(batch.indices, _detokenize(tokens, texts, stop_mask), strict=True):
            out[i] = text
        done += len(batch.indices)
        if progress is not None:
            progress(done, len(prompts))
    return out


def _detokenize(tokens, texts, stop_mask):
    """[text] of the stream of tokens [rows], which is closed once all texts have ended."""
    unfinished = set(range(len(texts)))
    for new in tokens:
        for row in list(unfinished):
            if not stop_mask[new[row]]:
                texts[row].push(new[row])
            if stop_mask[new[row]] or texts[row].stopped:
                unfinished.remove(row)
        if not unfinished:
            tokens.close()
    for text in texts:
        text.finish()
    return [text.text for text in texts]


def _batches(model: Model, sizes: Sequence[int]) -> Iterator[batching.Batch]:
    """Batches of texts of similar sizes, the longest first, so that running out of memory shows at once."""
    descending = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    lengths = [sizes[i] for i in descending]
    seq_lens = [batching.power_of_two_slots(length, SMALLEST, model.memory.ffn_chunks) for length in lengths]
    for batch in batching.batches(lengths, seq_lens, model.config.rope, model.batch_tokens):
        yield batch._replace(indices=[descending[i] for i in batch.indices])


def _score_batch(model, pairs, shape):
    """(log-likelihood, is argmax) of every target: numpy [rows, seq_len] in the order of the texts.

    shape: batching.Batch.
    """
    rows, seq_len = shape.rows, shape.seq_len
    texts = [[*context, *continuation] for context, continuation in pairs] + [[0, 0]] * (rows - len(pairs))
    indices = layouts.permutation(model.layout, seq_len, sharding.axis_size('sequence'))
    placed = prompt_layout.arrange([text[:-1] for text in texts], seq_len, indices)
    targets = prompt_layout.arrange([text[1:] for text in texts], seq_len, indices).tokens
    batch = {name: sharding.put(x, sharding.spec('BT')) for name, x in (
        ('tokens', placed.tokens), ('positions', placed.positions), ('segments', placed.segment_ids),
        ('targets', targets))}
    fixed_rope = prompt_layout.rope_at(model.config.rope, model.config.head_dim, shape.longest)
    tables = rope.make_tables(fixed_rope, model.config.head_dim, seq_len)
    local_len = seq_len // sharding.axis_size('sequence')
    num_chunks = math.gcd(local_len, max(rows * seq_len // model.memory.loss_chunk, 1))
    scored = _score(model.params, model.config.architecture(), batch, tables, model.memory, num_chunks)
    return [sharding.fetch(x)[:, placed.slot_of] for x in scored]


@functools.partial(jax.jit, static_argnames=('config', 'memory', 'num_chunks'))
def _score(params, config, batch, tables, memory, num_chunks):
    """Float32 [B, T] log-likelihood of the targets, bool [B, T] whether they are the argmax.

    The logits of one strided chunk of the sequence exist at a time.
    """
    x = llama.hidden_states(
        params, config, batch['tokens'], batch['positions'], batch['segments'], tables, memory)
    head = llama.head(params).astype(jnp.float32)

    def score_chunk(inputs):
        x, targets = inputs
        logits = sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), head)
        logits = sharding.reshard(logits, sharding.spec('BTD'))
        hit = jnp.arange(logits.shape[-1]) == targets[:, :, None]
        picked = jnp.where(hit, logits, 0).sum(-1)
        return picked - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets

    split = lambda x: jnp.moveaxis(
        x.reshape(x.shape[0], x.shape[1] // num_chunks, num_chunks, *x.shape[2:]), 2, 0)
    nats, is_argmax = lax.map(score_chunk, (split(x), split(batch['targets'])))
    join = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch['tokens'].shape)
    return join(nats), join(is_argmax)
