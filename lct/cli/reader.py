"""Whole files in the cache of a model: read once, from disk where an earlier process has read them, and asked
any number of questions."""

import dataclasses
import os
import sys
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lct.cli import sessions
from lct.cli.progress import Progress, status
from lct.data.corpus import bundle
from lct.data.corpus.documents import Document
from lct.data.detokenizer import Detokenizer
from lct.data.prefix_tokenizer import PrefixTokenizer

if TYPE_CHECKING:  # imported late, so that --help is fast
    import jax

    from lct.eval.runner import Model
    from lct.models.sampling import Sampling

QUESTION_ROOM = 512  # tokens reserved for questions that are typed later
PREFILL_CHUNK = 512  # tokens of one forward pass, so that progress shows
PROBE_QUESTIONS = ('What', '0', '(', 'é')  # their prompts share what precedes any question
SAVE_EVERY_S = 60.0  # of a long read, so that a killed process loses little
CITE = '\nName the files above that the answer is taken from.'


@dataclasses.dataclass(frozen=True)
class Saved:
    """A folder that keeps the text. facts: of the model, as sessions.model_facts. name: of the model."""

    folder: Path
    facts: Mapping[str, Any]
    name: str


class Reader:
    """A model with a bundle of files in its cache.

    Args:
      questions: to be answered, if they are known before the files are read.
      length: most tokens of prompt and answer; None for all positions of the model.
      cite: whether questions ask for the names of files.
      saved: where the text is kept for other processes.
    Raises:
      ValueError: if the files with questions and answers do not fit.
    """

    def __init__(self, model: 'Model', files: Sequence[Document], questions: Sequence[str] = (),
                 length: int | None = None, max_new_tokens: int = 256, cite: bool = False,
                 saved: Saved | None = None):
        encoding = Progress('encoding', 'characters') if sys.stderr.isatty() else None
        self.model = dataclasses.replace(model, tokenizer=PrefixTokenizer(model.tokenizer, encoding))
        self.files = files if saved is None else in_saved_order(files, saved.folder)
        self.max_new_tokens, self.cite, self.saved = max_new_tokens, cite, saved
        positions = model.config.max_position_embeddings
        self.length = length or positions
        if not 1 <= self.length <= positions:
            raise ValueError(f'--length {self.length} is not within the {positions} positions of the model; '
                             f'use {positions} or less')
        bundle.check_estimate(self.files, model.tokenizer, self.length)
        self.text = bundle.text(self.files)
        self.prefix = os.path.commonprefix([self.prompt(question) for question in PROBE_QUESTIONS])
        longest = max(len(self.prompt(question)) for question in questions or PROBE_QUESTIONS)
        self.needed = longest + max_new_tokens
        bundle.check_fits(self.files, model.tokenizer, self.needed, self.length)
        self.session = self._new_session(0 if questions else QUESTION_ROOM)
        self.reused, self.seconds_to_read = 0, 0.0  # tokens from disk, time of the others
        self.num_tokens = 0, 0  # of the last question, and of its answer so far

    def _new_session(self, room):
        from lct import sharding
        from lct.models import prompt_layout

        total = min(self.needed + room, self.length)
        seq_len = prompt_layout.cache_len(total, sharding.axis_size('sequence'), self.model.memory.ffn_chunks)
        rows = sharding.axis_size('data') * sharding.axis_size('fsdp')
        # A kept text serves questions of all lengths, so a RoPE that depends on the length has the longest.
        return self.model.session(rows, seq_len, total if self.saved is None else self.length)

    def prompt(self, question: str) -> list[int]:
        """Token ids of the files, the question after them, and the answer prefix."""
        from lct.eval.samples import Sample

        plain = self.model.template is None
        text = f'{self.text}\n{"Question: " * plain}{question}{CITE * self.cite}{chr(10) * plain}'
        return self.model.prompt_ids(Sample('', 0, 0, text, 'Answer:' * plain, [], 0, {}))

    @property
    def chunk(self) -> int:
        """Most tokens of one forward pass; the session takes a smaller power of two for a shorter text."""
        unit = self.session.unit
        return self.model.prefill_chunk or -(-PREFILL_CHUNK // unit) * unit

    @property
    def num_read(self) -> int:
        """Tokens of the files that are in the cache."""
        return min(int(self.session.lengths[0]), len(self.prefix))

    @property
    def is_read(self) -> bool:
        return self.num_read == len(self.prefix)

    def restore(self) -> str:
        """Take from disk what an earlier process has read -> '' or a sentence on what could not be used."""
        if self.saved is None:
            return ''
        self.reused, problem = sessions.restore(
            self.session, self.saved.folder, self.saved.facts, self.prefix)
        return problem

    def read(self) -> None:
        """Fill the cache with the files, and keep them on disk. A call after an interrupt continues."""
        import jax

        if self.is_read:
            return
        start, progress = time.monotonic(), Progress('reading', 'tokens')
        progress(0, len(self.prefix) - self.num_read)
        last_saved = start

        def report(done, total):
            nonlocal last_saved
            progress(done, total)
            if time.monotonic() - last_saved > SAVE_EVERY_S and done < total:
                self._save()
                last_saved = time.monotonic()

        try:
            self.session.update([self.prefix], self.chunk, report)
            jax.block_until_ready(self.session.logits)
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            self.seconds_to_read += time.monotonic() - start
        self._save()

    def _save(self):
        """Keep the text that was read so far, unless the disk is full."""
        from lct.weights import session_writer

        if self.saved is None or not self.session.texts[0]:
            return
        about = {'model': self.saved.name, 'files': [[one.name, _crc32(one)] for one in self.files]}
        try:
            session_writer.save(self.saved.folder, self.session, self.saved.facts, about=about)
        except OSError as error:
            status('session', f'not saved: {error}')

    def answer(self, question: str, sampling: 'Sampling | None' = None, key: 'jax.Array | None' = None,
               stops: Sequence[str] = ()) -> Iterator[str]:
        """Iterator of the pieces of an answer as they are decoded. It may be left at any time.

        Raises:
          ValueError: for a question that leaves no room for an answer.
        """
        ids = self.prompt(question)
        room = min(self.length, self.session.seq_len)
        limit = min(self.max_new_tokens, room - len(ids))
        if limit < 1:
            raise ValueError(f'the question takes the prompt to {len(ids):,} tokens, which leaves no room '
                             f'for an answer within {room:,}; ask a shorter one')
        (kept,) = self.session.update([ids], self.chunk)
        out, stop = Detokenizer(self.model.tokenizer.decode, stops), self.model.stop_mask(one_line=False)
        for count, (token,) in enumerate(self.session.stream([[]], limit, sampling, key), 1):
            self.num_tokens = len(ids) - kept, count
            if stop[token]:
                break
            yield out.push(token)
            if out.stopped:
                break
        yield out.finish()


def in_saved_order(files: Sequence[Document], folder: Path) -> list[Document]:
    """The files in the order in which they were read into a saved text, those that have changed since or are
    new at the end: what changes again then has little after it."""
    from lct.weights import saved_session

    try:
        order = saved_session.describe(folder)['about']['files']
        places = {(name, crc32): i for i, (name, crc32) in enumerate(order)}
    except (ValueError, KeyError, TypeError, OSError):  # none yet, or one that restore() will report
        return list(files)
    return sorted(files, key=lambda one: places.get((one.name, _crc32(one)), len(places)))


def _crc32(document):
    return zlib.crc32(document.text.encode())
