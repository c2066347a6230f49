"""How likely a model finds the continuation of a text, and what it would write itself, on the current mesh.

Letters: B batch, T tokens, D embed_dim, V vocab.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lct import sharding
from lct.data import layout as layouts
from lct.data.detokenizer import Detokenizer
from lct.eval import batching
from lct.models import llama, prompt_layout
from lct.ops import rope

SMALLEST = 64  # tokens; shorter texts share one compiled program


def score(model, pairs, progress=None):
    """[(log-likelihood in nats, whether greedy decoding would have written it)] of continuations.

    Args:
      model: runner.Model.
      pairs: [(context, continuation)], token ids, at least one of each.
      progress: called as progress(done, total) after every batch.
    """
    prompt_layout.check_ids([ids for pair in pairs for ids in pair], model.config.vocab_size)
    if short := sum(not (context and continuation) for context, continuation in pairs):
        raise ValueError(f'{short} of {len(pairs)} pairs have an empty context or continuation; begin with the BOS')
    out, done = [None] * len(pairs), 0
    sizes = [len(context) + len(continuation) - 1 for context, continuation in pairs]
    for chosen, rows, seq_len, longest in batches(model, sizes):
        likely, greedy = _batch(model, [pairs[i] for i in chosen], rows, seq_len, longest)
        for i, values, first in zip(chosen, likely, greedy, strict=False):
            scored = slice(len(pairs[i][0]) - 1, sizes[i])
            out[i] = float(values[scored].sum(dtype=np.float64)), bool(first[scored].all())
        done += len(chosen)
        if progress is not None:
            progress(done, len(pairs))
    return out


def write(model, prompts, limit, stops=(), sampling=None, seed=0, progress=None):
    """[text] that the model writes behind prompts (token ids): up to limit tokens, one that ends a turn, or a stop
    string, which is left out."""
    out, done = [None] * len(prompts), 0
    ends = model.stop_mask(one_line=False)
    for chosen, rows, seq_len, longest in batches(model, [len(prompt) + limit - 1 for prompt in prompts]):
        session = model.session(rows, seq_len, longest)
        session.read([prompts[i] for i in chosen], model.prefill_chunk)
        texts, open_ = [Detokenizer(model.tokenizer.decode, stops) for _ in chosen], set(range(len(chosen)))
        tokens = session.stream([[] for _ in chosen], limit, sampling, jax.random.fold_in(jax.random.key(seed), done))
        for new in tokens:
            for row in list(open_):
                if not ends[new[row]]:
                    texts[row].push(new[row])
                if ends[new[row]] or texts[row].stopped:
                    open_.remove(row)
            if not open_:
                tokens.close()
        for i, text in zip(chosen, texts, strict=True):
            text.finish()
            out[i] = text.text
        done += len(chosen)
        if progress is not None:
            progress(done, len(prompts))
    return out


def batches(model, sizes):
    """Iterator of ([index], rows, seq_len, longest): texts of like sizes together, the longest first, so that what does
    not fit into memory shows at once."""
    descending = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    lengths = [sizes[i] for i in descending]
    seq_lens = [batching.power_of_two_slots(length, SMALLEST, model.memory.ffn_chunks) for length in lengths]
    for batch in batching.batches(lengths, seq_lens, model.config.rope, model.batch_tokens):
        yield [descending[i] for i in batch.indices], batch.rows, batch.seq_len, batch.longest


def _batch(model, pairs, rows, seq_len, longest):
    """-> log-likelihood and greediness of every target, numpy [rows, seq_len] in the order of the texts."""
    texts = [[*context, *continuation] for context, continuation in pairs] + [[0, 0]] * (rows - len(pairs))
    indices = layouts.permutation(model.layout, seq_len, sharding.axis_size('sequence'))
    placed = prompt_layout.arrange([text[:-1] for text in texts], seq_len, indices)
    targets = prompt_layout.arrange([text[1:] for text in texts], seq_len, indices).tokens
    batch = {name: sharding.put(x, sharding.spec('BT')) for name, x in (
        ('tokens', placed.tokens), ('positions', placed.positions), ('segments', placed.segment_ids),
        ('targets', targets))}
    settled = prompt_layout.rope_at(model.config.rope, model.config.head_dim, longest)
    tables = rope.make_tables(settled, model.config.head_dim, seq_len)
    pieces = math.gcd(seq_len // sharding.axis_size('sequence'), max(rows * seq_len // model.memory.loss_chunk, 1))
    made = _score(model.params, model.config.architecture(), batch, tables, model.memory, pieces)
    return [sharding.fetch(x)[:, placed.slot_of] for x in made]


@functools.partial(jax.jit, static_argnames=('config', 'memory', 'pieces'))
def _score(params, config, batch, tables, memory, pieces):
    """Float32 [B, T] log-likelihood of the targets, bool [B, T] whether they are the likeliest words; the logits of one
    of so many strided pieces of the sequence exist at a time."""
    x = llama.hidden_states(params, config, batch['tokens'], batch['positions'], batch['segments'], tables, memory)
    head = llama.head(params).astype(jnp.float32)

    def piece(inputs):
        x, targets = inputs
        logits = sharding.einsum('BTD,DV->BTV', x.astype(jnp.float32), head)
        logits = sharding.reshard(logits, sharding.spec('BTD'))
        hit = jnp.arange(logits.shape[-1]) == targets[:, :, None]
        picked = jnp.where(hit, logits, 0).sum(-1)
        return picked - jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1) == targets

    strided = lambda x: jnp.moveaxis(x.reshape(x.shape[0], x.shape[1] // pieces, pieces, *x.shape[2:]), 2, 0)
    likely, greedy = lax.map(piece, (strided(x), strided(batch['targets'])))
    whole = lambda x: jnp.moveaxis(x, 0, 2).reshape(batch['tokens'].shape)
    return whole(likely), whole(greedy)
