"""Texts that are read once and asked about many times; prompts that are read in pieces.

The text stays in the cache; a question is written behind it, answered, and forgotten again.

Letters: B batch (one text a row), T tokens of a piece, S cache slots, V vocab.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lct import sharding
from lct.models import decode, llama
from lct.models.kv_cache import empty_cache
from lct.models.sampling import choose, judge
from lct.ops import rope

SMALLEST_PIECE = 32  # shorter questions share one compiled program


class Session:
    """A model with a cache of seq_len slots for each of `rows` texts, on the current mesh.

    longest: tokens of the longest text with question and answer, which 'dynamic' and 'longrope' scale by;
    default seq_len.
    """

    def __init__(self, params, config, rows, seq_len, indices=None, memory=None, longest=None):
        ring_size, replicas = sharding.axis_size('sequence'), sharding.axis_size('data') * sharding.axis_size('fsdp')
        memory = memory or llama.Memory()
        self.unit = decode.length_unit(ring_size, memory.ffn_chunks)
        if seq_len % self.unit or rows % replicas:
            raise ValueError(f'seq_len {seq_len} must be a multiple of {self.unit} and rows {rows} one of {replicas}; '
                             f'use {-(-seq_len // self.unit) * self.unit} and {-(-rows // replicas) * replicas}')
        self.params, self.config, self.memory = params, config, memory
        self.rows, self.seq_len, self.indices = rows, seq_len, indices
        self.tables = rope.make_tables(decode.rope_at(config.rope, config.head_dim, longest or seq_len),
                                       config.head_dim, seq_len)
        self.lengths = np.zeros(rows, np.int32)
        self._streaming = None

    def read(self, texts, piece=None, progress=None):
        """Fill the cache anew with up to `rows` texts, lists of token ids.

        Args:
          piece: tokens of one forward, a multiple of length_unit; None for all at once.
          progress: called as progress(done, total) with the tokens of the longest text after every piece.
        """
        decode.check_ids(texts, self.config.vocab_size)
        if piece is not None and (piece < 1 or piece % self.unit):
            raise ValueError(f'piece {piece} is not a multiple of {self.unit}; use {max(piece // self.unit, 1) * self.unit}')
        texts = [*texts, *[[0]] * (self.rows - len(texts))]
        if empty_rows := [i for i, text in enumerate(texts) if not text]:
            raise ValueError(f'text {empty_rows[0]} is empty; give it a token at least, such as its BOS')
        empty = np.zeros(self.rows, np.int32)
        self._check_room(empty, texts, 0)  # what is refused here leaves the texts before as they were
        self._end_stream()
        self.lengths = empty
        batch = decode.arrange(texts, self.seq_len, self.indices)
        placed = decode.place(batch)
        self._slot_of, self.slot_of = batch['slot_of'], placed['slot_of']
        if piece is None:
            self.cache, self.logits = _prefill(self.params, self.config.architecture(), placed, self.tables,
                                               self.memory)
            self.lengths = batch['last'] + 1
        else:
            dtype = self.params.layers.wk.dtype
            self.cache = jax.jit(empty_cache, static_argnums=(0, 2))(
                self.config.architecture(), placed['positions'], dtype)
            zeros = np.zeros((self.rows, self.config.vocab_size), np.float32)
            self.logits = sharding.put(zeros, sharding.spec('BV'))
            longest = max(map(len, texts))
            for start in range(0, longest, piece):
                self.logits = self._extend([text[start:start + piece] for text in texts], piece)
                if progress is not None:
                    jax.block_until_ready(self.logits)
                    progress(min(start + piece, longest), longest)

    def ask(self, questions, limits, max_new_tokens, stop=None, sampling=None, key=None):
        """[token ids] of the answer to each question, which follows the text of its row; the cache holds the texts
        alone again afterwards.

        Args:
          questions: lists of token ids, one for each row from the first; all empty to go on from the texts.
          limits: new tokens of each; max_new_tokens: their bound, of which the compiled program knows.
          stop: bool [V], tokens that end an answer and are left out of it.
          sampling, key: as in decode.decode.
        """
        if max(limits) > max_new_tokens:
            raise ValueError(f'limits of up to {max(limits)} new tokens are more than max_new_tokens {max_new_tokens}; '
                             'raise it')
        self._end_stream()
        lengths, count = self.lengths, len(questions)
        limits = np.array([*limits, *[0] * (self.rows - count)], np.int32)
        logits = self._put(questions, limits)
        stop = np.zeros(self.config.vocab_size, bool) if stop is None else stop
        self.cache, tokens, counts = _decode(
            self.params, self.config.architecture(), self.cache, logits,
            sharding.put(self.lengths - 1, sharding.spec('B')), self.slot_of, *decode.place_limits(limits, stop),
            self.tables, max_new_tokens, sampling, key)
        self._rewind(lengths)
        answers = [row[:n].tolist() for row, n in zip(sharding.fetch(tokens), sharding.fetch(counts), strict=True)]
        return [ids[:-1] if ids and stop[ids[-1]] else ids for ids in answers[:count]]

    def stream(self, questions, limit, sampling=None, key=None):
        """Iterator over the tokens of the answers as they are chosen, numpy int32 [questions] each, up to limit of
        them. At its end, or when it is closed, or when the session is asked something else, the cache holds the texts
        alone again.

        questions, sampling, key: as in ask.
        """
        self._end_stream()
        self._streaming = self._stream(questions, limit, sampling, key)
        return self._streaming

    def _stream(self, questions, limit, sampling, key):
        lengths, count = self.lengths, len(questions)
        logits = self._put(questions, np.full(self.rows, limit, np.int32))
        params = self._whole()
        try:
            for i in range(limit):
                tokens = _choose(logits, i, sampling, key)
                yield sharding.fetch(tokens)[:count]
                if i + 1 < limit:  # the last one is never fed back
                    logits = self._feed(params, tokens, i)
        finally:
            self._rewind(lengths)

    def force(self, questions, alternatives):
        """For each of the alternatives, which are an answer to each question, [(log-likelihood in nats, whether greedy
        decoding would write it)], token by token as decoding would write it; the cache holds the texts alone again
        afterwards.

        questions: as in ask; alternatives: lists of answers, which are lists of token ids, at least one each.
        """
        self._end_stream()
        for answers in alternatives:
            decode.check_ids(answers, self.config.vocab_size)
        lengths, longest = self.lengths, np.max([list(map(len, answers)) for answers in alternatives], 0)
        logits = self._put(questions, np.array([*longest, *[1] * (self.rows - len(questions))]))
        asked, params = self.lengths, self._whole()
        out = []
        for answers in alternatives:
            out.append(self._forced(params, logits, answers))
            self._rewind(asked)
        self._rewind(lengths)
        return out

    def _forced(self, params, logits, answers):
        """[(nats, whether greedy)] of what is written behind the rows, of which logits are the next."""
        count, put = len(answers), lambda x: sharding.put(x, sharding.spec('B'))
        sizes = np.array([*map(len, answers), *[1] * (self.rows - count)])
        fed = np.zeros((self.rows, sizes.max()), np.int32)
        for row, answer in zip(fed, answers, strict=False):
            row[:len(answer)] = answer
        nats, greedy = np.zeros(self.rows), np.ones(self.rows, bool)
        for i in range(sizes.max()):
            tokens = put(fed[:, i])
            likely, first = map(sharding.fetch, _judge(logits, tokens))
            nats += np.where(i < sizes, likely, 0)
            greedy &= first | (i >= sizes)
            if i + 1 < sizes.max():
                logits = self._feed(params, tokens, i, i + 1 < sizes)
        return list(zip(nats[:count].tolist(), greedy[:count].tolist(), strict=True))

    def rewind(self, lengths):
        """Forget what follows the first lengths [rows] tokens of the rows. What comes next must be a question: the
        logits are those after the whole texts."""
        self._end_stream()
        self._rewind(lengths)

    def _rewind(self, lengths):
        self.lengths = np.asarray(lengths, np.int32)
        self.cache = _forget(self.cache, sharding.put(self.lengths, sharding.spec('B')))

    def _end_stream(self):
        """One that nobody hears out any more would rewind the cache under the next question."""
        if self._streaming is not None:
            self._streaming.close()
            self._streaming = None

    def _put(self, questions, limits):
        """Write the questions behind the texts -> the logits that follow."""
        count = len(questions)
        questions = [*questions, *[[]] * (self.rows - count)]
        self._check_room(self.lengths, questions, np.maximum(limits - 1, 0))
        if not any(questions):
            return self.logits
        decode.check_ids(questions, self.config.vocab_size)
        if not all(questions[:count]):
            raise ValueError('a question is empty and others are not; give every row its own')
        return self._extend(questions, self._piece(max(map(len, questions))))

    def _feed(self, params, tokens, number, kept=True):
        """Write one token [B] behind each row that is kept, `number` tokens after its length -> the logits that follow."""
        at, put = self.lengths + np.int32(number), lambda x: sharding.put(x.astype(np.int32), sharding.spec('B'))
        slots = np.where(kept, self._slot_of[np.minimum(at, self.seq_len - 1)], self.seq_len)
        self.cache, logits = _step(params, self.config.architecture(), self.cache, tokens, put(at), put(slots),
                                   self.tables)
        return logits

    def _whole(self):
        """The weights as decoding steps use them; for one answer, as they take the memory that the next text needs."""
        return self.params if sharding.current_mesh() is None else _gathered(self.params, self.config.architecture())

    def _piece(self, length):
        size = -(-SMALLEST_PIECE // self.unit) * self.unit
        while size < length:
            size *= 2
        return size

    def _check_room(self, lengths, texts, new):
        if len(texts) > self.rows:
            raise ValueError(f'{len(texts)} texts do not fit into {self.rows} rows; use fewer, or more rows')
        needed = int((lengths + [len(text) for text in texts] + new).max())
        if needed > self.seq_len:
            raise ValueError(f'texts of up to {needed} tokens with answers do not fit into {self.seq_len} slots; '
                             'use fewer, or a longer cache')

    def _extend(self, texts, piece):
        """Write a piece of each text behind what the rows hold -> the logits that follow."""
        sizes = np.array([len(text) for text in texts])
        columns = np.arange(piece)
        positions = np.minimum(self.lengths[:, None] + columns, self.seq_len - 1)
        filled = columns < sizes[:, None]
        tokens = np.array([[*text, *[0] * (piece - len(text))] for text in texts], np.int32)
        slots = np.where(filled, self._slot_of[positions], self.seq_len)
        self.lengths = (self.lengths + sizes).astype(np.int32)
        put = lambda x, letters: sharding.put(x.astype(np.int32), sharding.spec(letters))
        self.cache, logits = _extend(
            self.params, self.config.architecture(), self.cache, put(tokens, 'BT'), put(positions, 'BT'),
            put(filled, 'BT'), put(slots, 'B'), put(self.lengths - 1, 'B'), self.logits, self.tables, self.memory)
        return logits


@functools.partial(jax.jit, static_argnames=('config', 'memory'))
def _prefill(params, config, batch, tables, memory):
    return decode.prefill(params, config, batch['tokens'], batch['positions'], batch['segment_ids'],
                          batch['last'], tables, memory)


_extend = jax.jit(decode.extend, static_argnames=('config', 'memory'), donate_argnames='cache')
_decode = jax.jit(decode.decode, static_argnames=('config', 'max_new_tokens', 'sampling'),
                  donate_argnames='cache')
_step = jax.jit(decode.decode_step, static_argnames='config', donate_argnames='cache')
_choose = jax.jit(choose, static_argnames='sampling')
_judge = jax.jit(judge)
_gathered = jax.jit(decode.gathered, static_argnames='config')


@functools.partial(jax.jit, donate_argnames='cache')
def _forget(cache, lengths):
    """The cache with everything from the positions lengths [B] on unseen."""
    return cache.replace(segment_ids=jnp.where(cache.positions < lengths[:, None], cache.segment_ids, 0))
