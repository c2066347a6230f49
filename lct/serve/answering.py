"""A model answers the jobs of the queue, and keeps what it has read for the next ones."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lct import sharding
from lct.data.detokenizer import Detokenizer
from lct.eval.runner import Model, cache_slots
from lct.models import prompt_layout
from lct.models.sampling import token_logprob, top_logprobs
from lct.models.session import Session
from lct.out_of_memory import is_out_of_memory
from lct.serve.errors import ApiError, invalid
from lct.serve.jobs import Cancelled, Job
from lct.serve.kept_texts import KeptTexts
from lct.serve.requests import MAX_LOGPROBS, Query
from lct.serve.responses import End, Text, Token
from lct.weights.disk_texts import DiskTexts


class Limits(NamedTuple):
    """length: tokens of a prompt with its answer. max_new_tokens: of a chat that does not set them.
    prefill_chunk: tokens of one forward; a cancelled request ends after it. cache_bytes: of all kept texts.
    """

    length: int
    max_new_tokens: int = 1024
    prefill_chunk: int = 512
    cache_bytes: int = 2**31


class ModelAnswerer:
    """An Answerer (see jobs) with a model on the current mesh."""

    def __init__(self, model: Model, limits: Limits, disk: Callable[[Session], DiskTexts] | None = None):
        """disk: makes the texts on disk, from a Session with the settings of all others."""
        self._model, self._limits = model, limits
        self._stop = model.stop_mask(one_line=False)
        self._rows = sharding.axis_size('data') * sharding.axis_size('fsdp')
        on_disk = disk and disk(self._make_session(self._slots(1)))
        self.texts = KeptTexts(self._make_session, limits.cache_bytes, on_disk)

    def _make_session(self, slots):
        # One scaling of RoPE for all requests, so that each may continue the others' texts.
        return self._model.session(self._rows, slots, self._limits.length)

    def answer(self, job: Job) -> Iterator[Text | End]:
        ids = encode(self._model, job.query)
        limit = self._new_tokens(job.query, len(ids))
        job.prompt, job.state = len(ids), 'reading'
        text = None
        try:
            text = self.texts.take(ids, self._slots(len(ids) + limit))
            self._read(text.session, ids, job)
            job.state = 'answering'
            yield from self._generate(text.session, job, limit)
        except (Cancelled, GeneratorExit):
            self.texts.keep(text)  # it holds what was read by now
            raise
        except Exception as error:
            if is_out_of_memory(error):
                self.texts.drop_all()
                raise ApiError(503, 'out of memory; ask again, or for less') from error
            raise  # without the text, whose cache may be lost
        self.texts.keep(text)

    def idle(self) -> bool:
        """Write a text to disk. Returns whether to call again."""
        return self.texts.save_one()

    def close(self) -> None:
        self.texts.save_all()

    def _new_tokens(self, query, prompt):
        """The most new tokens of an answer. Raises ApiError where prompt and answer do not fit."""
        length = self._limits.length
        room = length - prompt
        wanted = query.max_new_tokens or min(self._limits.max_new_tokens, max(room, 1))
        if wanted > room:
            raise ApiError(400, f'This model has a maximum context length of {length} tokens, but the prompt '
                           f'takes {prompt} and the answer up to {wanted}; send less',
                           'messages' if query.chat else 'prompt', 'context_length_exceeded')
        return wanted

    def _slots(self, needed):
        chunks = self._model.memory.ffn_chunks
        most = prompt_layout.cache_len(self._limits.length, sharding.axis_size('sequence'), chunks)
        return min(cache_slots(needed, chunks), most)

    def _read(self, session, ids, job):
        def progress(done, total):
            job.read, job.reused = len(ids) - total + done, len(ids) - total
            job.check()

        # Not the length of this prompt: shorter chunks are powers of two, of which there are few programs.
        chunk = -(-self._limits.prefill_chunk // session.unit) * session.unit
        job.check()
        job.reused = session.update([ids], chunk, progress)[0]
        job.read = len(ids)

    def _generate(self, session: Session, job: Job, limit: int) -> Iterator[Text | End]:
        query = job.query
        seed = np.random.SeedSequence().entropy if query.seed is None else query.seed
        key = jax.random.key(seed % 2**63)
        out, waiting, reason = Detokenizer(self._model.tokenizer.decode, query.stops), [], 'length'
        tokens = session.stream([[]], limit, query.sampling, key)
        try:
            for (token,) in tokens:
                job.check()
                job.answered += 1
                if self._stop[token]:
                    reason = 'stop'
                    break
                if query.logprobs is not None:
                    waiting.append(self._token(session.step_logits, token, query.logprobs))
                if text := out.push(token):
                    yield Text(text, waiting)
                    waiting = []
                if out.stopped:
                    break
        finally:
            tokens.close()
        if (text := out.finish()) or waiting:
            yield Text(text, waiting)
        yield End('stop' if out.stopped else reason, job.prompt, job.reused, job.answered)

    def _token(self, logits, token, count):
        """The Token of row 0 with the `count` most likely ones."""
        decode = lambda i: self._model.tokenizer.decode([int(i)])
        batch = sharding.put(np.full(self._rows, token, np.int32), sharding.spec('B'))
        computed = _token_logprob(logits, batch)[0], *_top(logits, MAX_LOGPROBS)
        logprob, top, ids = map(sharding.fetch, computed)
        most_likely = {}
        for i, x in list(zip(ids[0], top[0], strict=True))[:count]:
            most_likely.setdefault(decode(i), float(x))  # parts of characters look alike
        return Token(decode(token), float(logprob[0]), most_likely)


def encode(model: Model, query: Query) -> list[int]:
    """The token ids that a Query wants continued. Special tokens that are spelled in a text to complete are
    meant as such; those in the messages of a chat are plain text. Raises ApiError."""
    if query.chat:
        if model.template is None:
            raise ApiError(400, 'this model has no chat template; use /v1/completions', 'messages')
        try:
            return model.template.encode(model.tokenizer, query.messages, add_generation_prompt=True)
        except ValueError as error:
            raise invalid('messages', f'cannot be rendered: {error}') from None
    if isinstance(query.prompt, list):
        last = model.config.vocab_size - 1
        if bad := [i for i in query.prompt if not 0 <= i <= last]:
            raise invalid('prompt', f'has the token id {bad[0]}, which is not in 0..{last}')
        return query.prompt
    ids, bos = model.tokenizer.encode_special(query.prompt), model.tokenizer.bos_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise invalid('prompt', 'is empty; send a text of one token at least')
    return ids


_token_logprob = jax.jit(token_logprob)
_top = jax.jit(top_logprobs, static_argnums=1)
