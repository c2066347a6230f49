"""Texts that are read once and asked about many times; long prompts that are read in prefill chunks.

The text stays in the cache; a question is written behind it, answered, and dropped again.

Letters: B batch (one text a row), T tokens of a chunk, S cache slots, V vocab.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lct import sharding
from lct.models import decode, llama
from lct.models.config import LlamaConfig
from lct.models.kv_cache import empty_cache
from lct.models.memory import Memory
from lct.models.prompt_layout import arrange, check_ids, length_unit, place, rope_at
from lct.models.sampling import Sampling, next_token, token_logprob
from lct.ops import rope

SMALLEST_CHUNK = 32  # shorter questions share one compiled program
Rows = Sequence[Sequence[int]]  # lists of token ids, one for each row from the first


class Session:
    """A model with a cache of seq_len slots for each of `rows` texts, on the current mesh.

    indices: [S], the permutation of the layout; None for contiguous.
    longest: tokens of the longest text with question and answer, to which 'dynamic' and 'longrope' scaling is
      fixed; default seq_len.

    Raises:
      ValueError: for a cache that does not divide over the mesh.
    """

    def __init__(self, params: llama.Params, config: LlamaConfig, rows: int, seq_len: int,
                 indices: np.ndarray | None = None, memory: Memory | None = None, longest: int | None = None):
        replicas = sharding.axis_size('data') * sharding.axis_size('fsdp')
        memory = memory or Memory()
        self.unit = length_unit(sharding.axis_size('sequence'), memory.ffn_chunks)
        if seq_len % self.unit or rows % replicas:
            raise ValueError(f'seq_len {seq_len} must be a multiple of {self.unit} and rows {rows} one of '
                             f'{replicas}; use {-(-seq_len // self.unit) * self.unit} and '
                             f'{-(-rows // replicas) * replicas}')
        self.params, self.config, self.memory = params, config, memory
        self.rows, self.seq_len, self.indices = rows, seq_len, indices
        self.tables = rope.make_tables(rope_at(config.rope, config.head_dim, longest or seq_len),
                                       config.head_dim, seq_len)
        self.lengths = np.zeros(rows, np.int32)
        self._streaming = None

    def read(self, texts: Rows, prefill_chunk: int | None = None,
             progress: Callable[[int, int], None] | None = None) -> None:
        """Refill the cache with up to `rows` texts.

        Args:
          prefill_chunk: tokens of one forward, a multiple of length_unit; None for the whole text at once.
          progress: called as progress(done, total) with the tokens of the longest text after every chunk.
        Raises:
          ValueError: for texts that do not fit; the texts before are then kept.
        """
        check_ids(texts, self.config.vocab_size)
        if prefill_chunk is not None and (prefill_chunk < 1 or prefill_chunk % self.unit):
            raise ValueError(f'prefill chunk {prefill_chunk} is not a multiple of {self.unit}; use '
                             f'{max(prefill_chunk // self.unit, 1) * self.unit}')
        texts = [*texts, *[[0]] * (self.rows - len(texts))]
        if empty_rows := [i for i, text in enumerate(texts) if not text]:
            raise ValueError(f'text {empty_rows[0]} is empty; give it a token at least, such as its BOS')
        empty = np.zeros(self.rows, np.int32)
        self._check_room(empty, texts, 0)
        self._end_stream()
        self.lengths = empty
        batch = arrange(texts, self.seq_len, self.indices)
        placed = place(batch)
        self._slot_of, self.slot_of = batch.slot_of, placed.slot_of
        if prefill_chunk is None:
            self.cache, self.logits = _prefill(self.params, self.config.architecture(), placed, self.tables,
                                               self.memory)
            self.lengths = batch.last + 1
        else:
            self._read_in_chunks(texts, placed.positions, prefill_chunk, progress)

    def _read_in_chunks(self, texts, positions, size, progress):
        dtype = self.params.layers.wk.dtype
        self.cache = jax.jit(empty_cache, static_argnums=(0, 2))(self.config.architecture(), positions, dtype)
        zeros = np.zeros((self.rows, self.config.vocab_size), np.float32)
        self.logits = sharding.put(zeros, sharding.spec('BV'))
        longest = max(map(len, texts))
        for start in range(0, longest, size):
            self.logits = self._extend([text[start:start + size] for text in texts], size)
            if progress is not None:
                jax.block_until_ready(self.logits)
                progress(min(start + size, longest), longest)

    def ask(self, questions: Rows, limits: Sequence[int], max_new_tokens: int, stop: np.ndarray | None = None,
            sampling: Sampling | None = None, key: jax.Array | None = None) -> list[list[int]]:
        """The token ids of the answer to each question, which follows the text of its row. Afterwards the
        cache holds the texts alone again.

        Args:
          questions: one for each row from the first; all empty to continue the texts.
          limits: new tokens of each; max_new_tokens: their bound, which is part of the compiled program.
          stop: bool [V], tokens that end an answer and are left out of it.
          sampling, key: as in sampling.next_token.
        Raises:
          ValueError: if the questions and their answers do not fit behind the texts.
        """
        if max(limits) > max_new_tokens:
            raise ValueError(f'limits of up to {max(limits)} new tokens are more than max_new_tokens '
                             f'{max_new_tokens}; raise it')
        self._end_stream()
        lengths, count = self.lengths, len(questions)
        limits = np.array([*limits, *[0] * (self.rows - count)], np.int32)
        logits = self._write_questions(questions, limits)
        stop = np.zeros(self.config.vocab_size, bool) if stop is None else stop
        request = decode.place_request(limits, stop, max_new_tokens, sampling, key)
        last = sharding.put(self.lengths - 1, sharding.spec('B'))
        architecture = self.config.architecture()
        self.cache, tokens, counts = _decode(
            self.params, architecture, self.cache, logits, last, self.slot_of, request, self.tables)
        self._rewind(lengths)
        tokens, counts = sharding.fetch(tokens), sharding.fetch(counts)
        answers = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
        return [ids[:-1] if ids and stop[ids[-1]] else ids for ids in answers[:count]]

    def stream(self, questions: Rows, limit: int, sampling: Sampling | None = None,
               key: jax.Array | None = None) -> Iterator[np.ndarray]:
        """Iterator over the tokens of the answers as they are decoded, numpy int32 [questions] each, up to
        limit of them. At its end, or when it is closed, or when the session is used otherwise, the cache
        holds the texts alone again.

        questions, sampling, key: as in ask.
        """
        self._end_stream()
        self._streaming = self._stream(questions, limit, sampling, key)
        return self._streaming

    def _stream(self, questions, limit, sampling, key):
        lengths, count = self.lengths, len(questions)
        logits = self._write_questions(questions, np.full(self.rows, limit, np.int32))
        params = self._gathered_params()
        try:
            for i in range(limit):
                tokens = _next_token(logits, i, sampling, key)
                yield sharding.fetch(tokens)[:count]
                if i + 1 < limit:  # the last one is never fed back
                    logits = self._append(params, tokens, i)
        finally:
            self._rewind(lengths)

    def loglikelihood(self, questions: Rows, alternatives: Sequence[Rows]) -> list[list[tuple[float, bool]]]:
        """For each alternative, [(log-likelihood in nats, whether it is the greedy answer)] of the questions,
        computed token by token by the decoding program. Afterwards the cache holds the texts alone again.

        questions: as in ask. alternatives: lists with an answer of at least one token to each question.
        """
        self._end_stream()
        for answers in alternatives:
            check_ids(answers, self.config.vocab_size)
        lengths, longest = self.lengths, np.max([list(map(len, answers)) for answers in alternatives], 0)
        logits = self._write_questions(questions, np.array([*longest, *[1] * (self.rows - len(questions))]))
        with_questions, params = self.lengths, self._gathered_params()
        out = []
        for answers in alternatives:
            out.append(self._loglikelihood(params, logits, answers))
            self._rewind(with_questions)
        self._rewind(lengths)
        return out

    def _loglikelihood(self, params, logits, answers):
        """[(nats, whether greedy)] of an answer behind each row; logits: those that follow the rows."""
        count, put = len(answers), lambda x: sharding.put(x, sharding.spec('B'))
        sizes = np.array([*map(len, answers), *[1] * (self.rows - count)])
        padded = np.zeros((self.rows, sizes.max()), np.int32)
        for row, answer in zip(padded, answers, strict=False):
            row[:len(answer)] = answer
        nats, greedy = np.zeros(self.rows), np.ones(self.rows, bool)
        for i in range(sizes.max()):
            tokens = put(padded[:, i])
            logprob, is_argmax = map(sharding.fetch, _token_logprob(logits, tokens))
            nats += np.where(i < sizes, logprob, 0)
            greedy &= is_argmax | (i >= sizes)
            if i + 1 < sizes.max():
                logits = self._append(params, tokens, i, i + 1 < sizes)
        return list(zip(nats[:count].tolist(), greedy[:count].tolist(), strict=True))

    def rewind(self, lengths: Sequence[int]) -> None:
        """Drop all but the first lengths [rows] tokens of the rows. The next call must bring questions,
        because the logits are those after the whole texts."""
        self._end_stream()
        self._rewind(lengths)

    def _rewind(self, lengths):
        self.lengths = np.asarray(lengths, np.int32)
        self.cache = _drop(self.cache, sharding.put(self.lengths, sharding.spec('B')))

    def _end_stream(self):
        """Close an abandoned stream, which would otherwise rewind the cache under the next question."""
        if self._streaming is not None:
            self._streaming.close()
            self._streaming = None

    def _write_questions(self, questions, limits):
        """Write the questions behind the texts -> the logits after them."""
        count = len(questions)
        questions = [*questions, *[[]] * (self.rows - count)]
        self._check_room(self.lengths, questions, np.maximum(limits - 1, 0))
        if not any(questions):
            return self.logits
        check_ids(questions, self.config.vocab_size)
        if not all(questions[:count]):
            raise ValueError('a question is empty and others are not; give every row its own')
        return self._extend(questions, self._chunk_size(max(map(len, questions))))

    def _append(self, params, tokens, step, kept=True):
        """Write one token [B] behind each kept row, `step` tokens after its length -> the logits after it."""
        at = self.lengths + np.int32(step)
        put = lambda x: sharding.put(x.astype(np.int32), sharding.spec('B'))
        slots = np.where(kept, self._slot_of[np.minimum(at, self.seq_len - 1)], self.seq_len)
        self.cache, logits = _step(
            params, self.config.architecture(), self.cache, tokens, put(at), put(slots), self.tables)
        return logits

    def _gathered_params(self):
        """The weights as decode_step uses them; kept for one answer: the next text needs the memory."""
        if sharding.current_mesh() is None:
            return self.params
        return _gathered(self.params, self.config.architecture())

    def _chunk_size(self, length):
        size = -(-SMALLEST_CHUNK // self.unit) * self.unit
        while size < length:
            size *= 2
        return size

    def _check_room(self, lengths, texts, new):
        if len(texts) > self.rows:
            raise ValueError(f'{len(texts)} texts do not fit into {self.rows} rows; use fewer, or more rows')
        needed = int((lengths + [len(text) for text in texts] + new).max())
        if needed > self.seq_len:
            raise ValueError(f'texts of up to {needed} tokens with answers do not fit into {self.seq_len} '
                             'slots; use fewer, or a longer cache')

    def _extend(self, texts, size):
        """Write a chunk of up to `size` tokens behind each row -> the logits after it."""
        sizes = np.array([len(text) for text in texts])
        columns = np.arange(size)
        positions = np.minimum(self.lengths[:, None] + columns, self.seq_len - 1)
        filled = columns < sizes[:, None]
        tokens = np.array([[*text, *[0] * (size - len(text))] for text in texts], np.int32)
        slots = np.where(filled, self._slot_of[positions], self.seq_len)
        self.lengths = (self.lengths + sizes).astype(np.int32)
        put = lambda x, letters: sharding.put(x.astype(np.int32), sharding.spec(letters))
        chunk = decode.Chunk(tokens=put(tokens, 'BT'), positions=put(positions, 'BT'),
                             segment_ids=put(filled, 'BT'), slots=put(slots, 'B'),
                             last=put(self.lengths - 1, 'B'))
        self.cache, logits = _extend(self.params, self.config.architecture(), self.cache, chunk, self.logits,
                                     self.tables, self.memory)
        return logits


_prefill = jax.jit(decode.prefill, static_argnames=('config', 'memory'))
_extend = jax.jit(decode.extend, static_argnames=('config', 'memory'), donate_argnames='cache')
_decode = jax.jit(decode.decode, static_argnames='config', donate_argnames='cache')
_step = jax.jit(decode.decode_step, static_argnames='config', donate_argnames='cache')
_next_token = jax.jit(next_token, static_argnames='sampling')
_token_logprob = jax.jit(token_logprob)
_gathered = jax.jit(decode.gathered, static_argnames='config')


@functools.partial(jax.jit, donate_argnames='cache')
def _drop(cache, lengths):
    """The cache with the slots of all positions >= lengths [B] emptied."""
    return cache.replace(segment_ids=jnp.where(cache.positions < lengths[:, None], cache.segment_ids, 0))
