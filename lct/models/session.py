"""Texts that are read once and asked about many times; long prompts that are read in prefill chunks.

The text stays in the cache; a question is written behind it, answered, and dropped again.

Letters: B batch (one text a row), T tokens of a chunk, S cache slots, V vocab.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lct import sharding
from lct.deferred_signals import deferred
from lct.models import decode, llama, row_linear
from lct.models.config import LlamaConfig
from lct.models.kv_cache import KVCache, empty_cache, named_arrays
from lct.models.memory import Memory
from lct.models.prompt_layout import (
    arrange,
    check_ids,
    common_prefix,
    length_unit,
    place,
    place_chunk,
    rope_at,
)
from lct.models.sampling import Sampling, next_token, token_logprob
from lct.ops import rope

SMALLEST_CHUNK = 32  # shorter questions share one compiled program
Rows = Sequence[Sequence[int]]  # lists of token ids, one for each row from the first
Progress = Callable[[int, int], None]


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
        self._cache_dtype = memory.cache_dtype or params.layers.wk.dtype
        self.rows, self.seq_len, self.indices = rows, seq_len, indices
        self.rope = rope_at(config.rope, config.head_dim, longest or seq_len)
        self.tables = rope.make_tables(self.rope, config.head_dim, seq_len)
        self.lengths = np.zeros(rows, np.int32)
        self.cache = self.logits = self.step_logits = self._streaming = None
        self._cached = [[] for _ in range(rows)]  # token ids in the cache: the texts and what followed them
        slot_of = np.arange(seq_len) if indices is None else np.argsort(indices)
        self.slots, self.slot_of = slot_of, sharding.put(slot_of.astype(np.int32), P(None))

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of the text of each row."""
        return [ids[:length] for ids, length in zip(self._cached, self.lengths, strict=True)]

    def read(self, texts: Rows, prefill_chunk: int | None = None, progress: Progress | None = None) -> None:
        """Refill the cache with up to `rows` texts.

        Args:
          prefill_chunk: tokens of one forward, a multiple of length_unit; None for the whole text at once.
          progress: called as progress(done, total) with the tokens of the longest text after every chunk.
        Raises:
          ValueError: for texts that do not fit; the texts before are then kept.
        """
        texts = self._check_texts(texts, prefill_chunk)
        self._end_stream()
        if prefill_chunk is None:
            batch = arrange(texts, self.seq_len, self.indices)
            cache, logits = _prefill(self.params, self.config.architecture(), place(batch), self.tables,
                                     self.memory)
            self._assign(cache, logits, [list(text) for text in texts])
        else:
            self.lengths, self._cached = np.zeros(self.rows, np.int32), [[] for _ in range(self.rows)]
            self._update(texts, prefill_chunk, progress)

    def update(self, texts: Rows, prefill_chunk: int, progress: Progress | None = None) -> list[int]:
        """Make the cache hold up to `rows` texts. What they begin with and the cache holds already is kept,
        the rest is read in prefill chunks. After an interrupt the same call continues.

        Args: as of read.
        Returns:
          how many tokens of each text were in the cache.
        """
        padded = self._check_texts(texts, prefill_chunk)
        self._end_stream()
        return self._update(padded, prefill_chunk, progress)[:len(texts)]

    def restore(self, arrays: Mapping[str, jax.Array], texts: Rows) -> None:
        """Take the cache of a text of each row: its kv_cache.named_arrays, in the layout of this session."""
        self._end_stream()
        self._check_room(np.zeros(self.rows, np.int32), texts, 0)
        places = place(arrange(texts, self.seq_len, self.indices))
        content = self.abstract_cache().replace(positions=None, segment_ids=None)
        leaves = [arrays[name] for name in named_arrays(content)]
        cache = jax.tree.unflatten(jax.tree.structure(content), leaves)
        cache = cache.replace(positions=places.positions, segment_ids=places.segment_ids)
        self._assign(cache, None, [list(map(int, text)) for text in texts])

    def abstract_cache(self) -> KVCache:
        """The shapes and dtypes of the cache."""
        positions = jax.ShapeDtypeStruct((self.rows, self.seq_len), np.int32)
        return _empty_cache.eval_shape(self.config.architecture(), positions, self._cache_dtype)

    def _assign(self, cache, logits, texts):
        with deferred():
            self.cache, self.logits, self._cached = cache, logits, texts
            self.lengths = np.array([len(text) for text in texts], np.int32)

    def _update(self, texts, size, progress):
        if self.cache is None or self.cache.segment_ids.is_deleted():  # deleted: the device was out of memory
            self._assign(self._new_cache(), None, [[] for _ in texts])
        kept = [common_prefix(*pair) for pair in zip(self._cached, texts, strict=True)]
        is_read = [self.logits is not None and n == len(text) == length
                   for n, text, length in zip(kept, texts, self.lengths, strict=True)]
        # The logits after a text come from reading its last token.
        kept = [n - (n == len(text) and not done) for n, text, done in zip(kept, texts, is_read, strict=True)]
        if all(is_read):
            return kept
        logits = self._no_logits() if self.logits is None else self.logits
        with deferred():
            self.lengths, self.logits = np.array(kept, np.int32), None
        rest = [text[n:] for n, text in zip(kept, texts, strict=True)]
        longest = max(map(len, rest))
        size = min(size, self._chunk_size(longest))
        for start in range(0, longest, size):
            chunk = [ids[start:start + size] for ids in rest]
            with deferred():
                logits = self._extend(self.lengths, chunk, size, logits)
                self.lengths = self.lengths + np.array([len(ids) for ids in chunk], np.int32)
            if progress is not None:
                jax.block_until_ready(logits)
                progress(min(start + size, longest), longest)
        self.logits = logits
        return kept

    def _new_cache(self):
        positions = place(arrange([[]] * self.rows, self.seq_len, self.indices)).positions
        return _empty_cache(self.config.architecture(), positions, self._cache_dtype)

    def _no_logits(self):
        return sharding.put(np.zeros((self.rows, self.config.vocab_size), np.float32), sharding.spec('BV'))

    def _check_texts(self, texts, prefill_chunk):
        """The texts with one token for each row without a text."""
        check_ids(texts, self.config.vocab_size)
        if prefill_chunk is not None and (prefill_chunk < 1 or prefill_chunk % self.unit):
            raise ValueError(f'prefill chunk {prefill_chunk} is not a multiple of {self.unit}; use '
                             f'{max(prefill_chunk // self.unit, 1) * self.unit}')
        texts = [*texts, *[[0]] * (self.rows - len(texts))]
        if empty_rows := [i for i, text in enumerate(texts) if not len(text)]:
            raise ValueError(f'text {empty_rows[0]} is empty; give it a token at least, such as its BOS')
        self._check_room(np.zeros(self.rows, np.int32), texts, 0)
        return texts

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
        count = len(questions)
        limits = np.array([*limits, *[0] * (self.rows - count)], np.int32)
        logits, lengths = self._write_questions(questions, limits)
        stop = np.zeros(self.config.vocab_size, bool) if stop is None else stop
        request = decode.place_request(limits, stop, max_new_tokens, sampling, key)
        last = sharding.put(lengths - 1, sharding.spec('B'))
        with self._writing(lengths):
            self.cache, tokens, counts = _decode(self.params, self.config.architecture(), self.cache, logits,
                                                 last, self.slot_of, request, self.tables)
        tokens, counts = sharding.fetch(tokens), sharding.fetch(counts)
        answers = [row[:n].tolist() for row, n in zip(tokens, counts, strict=True)]
        return [ids[:-1] if ids and stop[ids[-1]] else ids for ids in answers[:count]]

    def stream(self, questions: Rows, limit: int, sampling: Sampling | None = None,
               key: jax.Array | None = None) -> Iterator[np.ndarray]:
        """Iterator over the tokens of the answers as they are decoded, numpy int32 [questions] each, up to
        limit of them. At its end, or when it is closed, or when the session is used otherwise, the cache
        holds the texts alone again.

        questions, sampling, key: as in ask. After every step, step_logits are the float32 logits [B, V] that
        its tokens were chosen from.
        """
        self._end_stream()
        self._streaming = self._stream(questions, limit, sampling, key)
        return self._streaming

    def _stream(self, questions, limit, sampling, key):
        count = len(questions)
        logits, lengths = self._write_questions(questions, np.full(self.rows, limit, np.int32))
        params = None  # the first token needs no weights
        for i in range(limit):
            with deferred():
                tokens, self.step_logits = _next_token(logits, i, sampling, key), logits
                ids = sharding.fetch(tokens)
            yield ids[:count]
            if i + 1 < limit:  # the last one is never fed back
                params = params or row_linear.placed(self.params, self.config.architecture())
                logits = self._append(params, tokens, lengths + i, ids=ids.tolist())

    def loglikelihood(self, questions: Rows, alternatives: Sequence[Rows]) -> list[list[tuple[float, bool]]]:
        """For each alternative, [(log-likelihood in nats, whether it is the greedy answer)] of the questions,
        computed token by token by the decoding program. Afterwards the cache holds the texts alone again.

        questions: as in ask. alternatives: lists with an answer of at least one token to each question.
        """
        self._end_stream()
        for answers in alternatives:
            check_ids(answers, self.config.vocab_size)
        longest = np.max([list(map(len, answers)) for answers in alternatives], 0)
        limits = np.array([*longest, *[1] * (self.rows - len(questions))])
        logits, lengths = self._write_questions(questions, limits)
        params = None  # first tokens need no weights
        if longest.max() > 1:
            params = row_linear.placed(self.params, self.config.architecture())
        return [self._loglikelihood(params, logits, lengths, answers) for answers in alternatives]

    def _loglikelihood(self, params, logits, lengths, answers):
        """[(nats, whether greedy)] of an answer behind the first lengths [rows] tokens of each row, which
        logits follow."""
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
                logits = self._append(params, tokens, lengths + i, i + 1 < sizes)
        return list(zip(nats[:count].tolist(), greedy[:count].tolist(), strict=True))

    def rewind(self, lengths: Sequence[int]) -> None:
        """Drop all but the first lengths [rows] tokens of the rows. The next call must bring questions,
        because the logits are those after the whole texts."""
        self._end_stream()
        with deferred():
            self.lengths, self.logits = np.asarray(lengths, np.int32), None

    def _end_stream(self):
        """Close an abandoned stream, which would otherwise write into the next question."""
        if self._streaming is not None:
            self._streaming.close()
            self._streaming = None

    def _write_questions(self, questions, limits):
        """Write the questions behind the texts -> (the logits after them, the lengths with them)."""
        count = len(questions)
        questions = [*questions, *[[]] * (self.rows - count)]
        self._check_room(self.lengths, questions, np.maximum(limits - 1, 0))
        if not any(questions):
            if self.logits is None:
                raise ValueError('the text was cut or not read to its end, so nothing follows it yet; ask a '
                                 'question, or read the text')
            return self.logits, self.lengths
        check_ids(questions, self.config.vocab_size)
        if not all(questions[:count]):
            raise ValueError('a question is empty and others are not; give every row its own')
        logits = self._no_logits() if self.logits is None else self.logits
        logits = self._extend(self.lengths, questions, self._chunk_size(max(map(len, questions))), logits)
        return logits, self.lengths + np.array([len(ids) for ids in questions], np.int32)

    def _append(self, params, tokens, lengths, kept=True, ids=()):
        """Write one token [B] behind the first lengths [rows] tokens of each kept row -> the logits after
        it. ids: the tokens on the host, to remember that the cache has them."""
        put = lambda x: sharding.put(x.astype(np.int32), sharding.spec('B'))
        slots = np.where(kept, self.slots[np.minimum(lengths, self.seq_len - 1)], self.seq_len)
        with self._writing(lengths):
            self.cache, logits = _step(params, self.config.architecture(), self.cache, tokens,
                                       put(lengths), put(slots), self.tables)
            for cached, token in zip(self._cached, ids, strict=False):
                cached.append(token)
        return logits

    @contextlib.contextmanager
    def _writing(self, lengths):
        """Around a program that is given the cache and writes behind the first lengths [rows] tokens."""
        with deferred():
            for ids, length in zip(self._cached, lengths, strict=True):
                del ids[length:]
            yield

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

    def _extend(self, lengths, texts, size, logits):
        """Write a chunk of up to `size` tokens behind the first lengths [rows] tokens of each row -> the
        logits after it, which are those given for a row without new tokens."""
        chunk = place_chunk(texts, lengths, size, self.slots)
        with self._writing(lengths):
            config, stationary = self.config.architecture(), row_linear.is_stationary(size)
            params = row_linear.placed_for_chunks(self.params, config) if stationary else self.params
            self.cache, logits = _extend(params, config, self.cache, chunk, logits, self.tables, self.memory,
                                         stationary)
            for ids, text in zip(self._cached, texts, strict=True):
                ids.extend(text)
        return logits


_prefill = jax.jit(decode.prefill, static_argnames=('config', 'memory'))
_empty_cache = jax.jit(empty_cache, static_argnames=('config', 'dtype'))
_extend = jax.jit(decode.extend, static_argnames=('config', 'memory', 'stationary'), donate_argnames='cache')
_decode = jax.jit(decode.decode, static_argnames='config', donate_argnames='cache')
_step = jax.jit(decode.decode_step, static_argnames='config', donate_argnames='cache')
_next_token = jax.jit(next_token)
_token_logprob = jax.jit(token_logprob)
