"""A model answers samples on the current mesh, batch by batch, and every finished answer is kept.

The answers are lines of a JSONL file. An interrupted run continues where it stopped, and its file ends the
same: its batches have the same shapes, and the finished file is in the order of its keys.
"""

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data import tokenizer as tokenizers
from lct.data.chat_template import ChatTemplate
from lct.eval import answers, batching
from lct.eval.prefixes import Prefixes, shared_prefixes
from lct.eval.queries import Group, answer_queries
from lct.eval.samples import ChatOverhead, Sample
from lct.models import llama, prompt_layout
from lct.models.session import Session

SMALLEST_CACHE = 256  # slots; shorter prompts share one compiled program
SHARED_CHUNK = 512  # tokens of a forward pass behind what a prompt shares with the one before it
PROBES = (('A question.\nAnswer:', ' The answer is'), ('A question.\n', 'Answer:'))  # prompt, answer prefix
TURNS = 'One', 'Two', 'Three', 'Four', 'Five'  # of a chat that shows whether a template writes them all


# ---------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Model:
    """Weights on the current mesh, their tokenizer and, for an instruct model, its chat template.

    eos_ids: tokens that end an answer, besides the tokenizer's. prefill_chunk: tokens of one forward pass
    over a prompt, for prompts that do not fit into memory at once; None for all at once. batch_tokens: cache
    slots of one batch. prefixes: what prompts begin with, kept for later evaluations.
    """

    params: Any
    config: llama.LlamaConfig
    tokenizer: tokenizers.Tokenizer
    template: ChatTemplate | None = None
    eos_ids: tuple[int, ...] = ()
    memory: llama.Memory = llama.Memory(remat='none')
    layout: str = 'striped'
    prefill_chunk: int | None = None
    batch_tokens: int = 65536
    prefixes: Prefixes | None = None

    def __post_init__(self):
        tokenizers.check_vocab_size(self.tokenizer, self.config.vocab_size)

    def prompt_ids(self, sample: Sample) -> list[int]:
        """The token ids that the model continues: of its messages, or of a user's turn and the answer prefix;
        of the plain text without a template."""
        if self.template is None:
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return bos + self.tokenizer.encode(sample.text)
        messages = list(sample.messages) or [{'role': 'user', 'content': sample.prompt}]
        ids = self.template.encode(self.tokenizer, messages, add_generation_prompt=True)
        return ids + self.tokenizer.encode(self._answer_prefix(sample))

    def _answer_prefix(self, sample):
        return '' if sample.messages and self.template else sample.answer_prefix

    def answer_ids(self, sample: Sample, answer: str) -> list[int]:
        """The token ids of an answer after the answer prefix."""
        prefix, both = (self.tokenizer.encode(self._answer_prefix(sample) + text) for text in ('', answer))
        return both[len(os.path.commonprefix([prefix, both])):]

    def overhead(self) -> int:
        """Tokens that the template adds to a prompt, beyond the BOS of a plain one."""
        bos = int(self.tokenizer.bos_id is not None)
        probes = [Sample('', 0, 0, *probe, [''], 1, {}) for probe in PROBES]
        return max(len(self.prompt_ids(one)) - bos - len(self.tokenizer.encode(one.text)) for one in probes)

    def chat_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Tokens of a chat up to the answer, for a model with a template."""
        return len(self.template.encode(self.tokenizer, messages, add_generation_prompt=True))

    def chat_overhead(self) -> ChatOverhead:
        """What the template adds to prompts, and how it counts chats if it writes several turns."""
        messages = [{'role': ('user', 'assistant')[i % 2], 'content': word} for i, word in enumerate(TURNS)]
        try:
            text = self.template.render(messages, add_generation_prompt=True) if self.template else ''
        except ValueError:  # it takes one turn
            text = ''
        count = self.chat_tokens if re.search('.*'.join(TURNS), text, re.DOTALL) else None
        return ChatOverhead(self.overhead(), self.overhead_before(), count)

    def overhead_before(self) -> int:
        """Tokens of the overhead that precede the prompt."""
        probes = [Sample('', 0, 0, prompt, '', [''], 1, {}) for prompt in ('Question', '1')]
        shared = os.path.commonprefix([self.prompt_ids(one) for one in probes])
        return len(shared) - int(self.tokenizer.bos_id is not None)

    @functools.cached_property
    def newline_ids(self) -> frozenset[int]:
        """Tokens that contain a line end."""
        return frozenset(i for i in range(self.tokenizer.vocab_size) if '\n' in self.tokenizer.decode([i]))

    def stop_mask(self, one_line: bool) -> np.ndarray:
        """bool [V]: the tokens that end an answer; line ends are among them if the answer is one line."""
        ids = {*self.eos_ids, self.tokenizer.eos_id} - {None}
        if one_line:
            ids |= self.newline_ids
        out = np.zeros(self.config.vocab_size, bool)
        out[[i for i in ids if i < self.config.vocab_size]] = True
        return out

    def session(self, rows: int, seq_len: int, longest: int) -> Session:
        """A Session with a cache of [rows, seq_len] in the model's layout."""
        indices = layouts.permutation(self.layout, seq_len, sharding.axis_size('sequence'))
        return Session(self.params, self.config, rows, seq_len, indices, self.memory, longest)


# ---------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Item:
    """A sample that is made when it is needed: make() -> the Sample named (task, length, index).

    group: items of equal groups share the beginning of their prompts, which is read once for all of them.
    one_line: the answer ends with its line. teacher_forced: also measure the likelihood of the right answer.
    tokens: that prompt and answer take, where it is known and not bounded by length.
    """

    task: str
    length: int
    index: int
    make: Callable[[], Sample]
    group: Hashable = None
    one_line: bool = False
    teacher_forced: bool = False
    tokens: int | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        return self.task, self.length, self.index


def run(model: Model, items: Sequence[Item], path: str | Path,
        progress: Callable[[int, int, float], None] | None = None,
        identity: str = '', number: int = 0) -> tuple[list[dict], list[str]]:
    """Answer the items that the file at path does not answer yet.

    Args:
      items: each key occurs once.
      path: JSONL of the answers, created if it does not exist. Lines of other items stay as they are.
      progress: called as progress(done, total, seconds left) after every batch.
      identity: of the evaluation; lines with another one are answered again.
      number: of this call, for the new lines.
    Returns:
      ([row of each item, in their order], [a sentence for each invalid line of the file]).
    Raises:
      ValueError: if a prompt is longer than the model's positions, or if the file is deleted meanwhile.
    """
    path = Path(path)
    longest = max((item.length for item in items), default=0)
    positions = model.config.max_position_embeddings
    if longest > positions:
        raise ValueError(f'length {longest} is more than the {positions} positions of the model; use shorter '
                         'lengths, or raise max_position_embeddings in its config.json')
    rows, problems = answers.read(path, identity)
    answers.write(path, rows, identity)
    pending = [batch for batch in make_batches(model, items)
               if any(item.key not in rows for item in batch.items)]
    total, spent, start = sum(batch.cost for batch in pending), 0, time.monotonic()
    with path.open('a', encoding='ascii', newline='\n') as file:
        for batch in pending:
            for row in answer(model, batch, rows):
                row['run'] = number
                rows[answers.key_of(row)] = row
                answers.append(file, row, identity)
            spent += batch.cost
            if progress is not None:
                done = sum(item.key in rows for item in items)
                progress(done, len(items), (time.monotonic() - start) / spent * (total - spent))
    answers.write(path, rows, identity)
    return [rows[item.key] for item in items], problems


# ---------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Items that are answered together.

    groups: up to `rows` lists of items that share a text. longest: tokens of the longest prompt with answer.
    """

    groups: list[list[Item]]
    rows: int
    seq_len: int
    longest: int
    one_line: bool

    @property
    def items(self) -> list[Item]:
        return [item for group in self.groups for item in group]

    @property
    def cost(self) -> int:
        """Prompt tokens that are read."""
        return sum(group[0].length for group in self.groups)


def cache_slots(length: int, ffn_chunks: int = 1) -> int:
    """Cache slots for prompts of length tokens with their answers, on the current mesh."""
    return batching.power_of_two_slots(length, SMALLEST_CACHE, ffn_chunks)


def make_batches(model: Model, items: Iterable[Item]) -> Iterator[Batch]:
    """Batches of all items, finished or not, so that shapes do not depend on what is finished."""
    groups = _make_groups(items, batching.replicas(), model.config.rope.type in batching.ROPE_BY_LENGTH)
    lengths = [max(item.tokens or item.length for item in group) for group in groups]
    seq_lens = [cache_slots(length, model.memory.ffn_chunks) for length in lengths]
    kinds = [(len(group) > 1, group[0].one_line) for group in groups]
    # A batch lasts as long as its longest answer, and answers to one task are of one length.
    order = lambda i, rows: (groups[i][0].index // rows, groups[i][0].task)
    for batch in batching.batches(lengths, seq_lens, model.config.rope, model.batch_tokens, kinds, order):
        members = [groups[i] for i in batch.indices]
        yield Batch(members, batch.rows, batch.seq_len, batch.longest, members[0][0].one_line)


def _make_groups(items, replicas, of_one_length=False):
    """Lists of items that one row answers. Where replicas are more than those, each list is split.

    of_one_length: whether prompts of different lengths share no row, as their RoPE would differ.
    """
    by_length = {}
    for item in items:
        key = item.key if item.group is None else ('group', item.group, item.tokens if of_one_length else 0)
        by_length.setdefault((item.length, item.one_line), {}).setdefault(key, []).append(item)
    out = []
    for groups in by_length.values():
        parts = -(-replicas // len(groups))
        out += [group[i::parts] for group in groups.values() for i in range(min(parts, len(group)))]
    return out


# ---------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------


def answer(model: Model, batch: Batch, finished: Collection | Mapping = ()) -> Iterator[dict]:
    """The rows of a batch, without those whose keys are finished. Their prompts are read all the same: how a
    prompt is cut into chunks does not depend on what is finished, so neither does the rounding."""
    groups = [_make_group(model, items, batch.seq_len) for items in batch.groups]
    session = model.session(batch.rows, batch.seq_len, batch.longest)
    stop = model.stop_mask(batch.one_line)
    longest = max(len(group.items) for group in groups)
    rounds = [[group.query(number, finished) for group in groups] for number in range(longest)]
    while not any(query.active for query in rounds[-1]):
        rounds.pop()
    for number, queries in enumerate(rounds):
        prompts = [query.prompt for query in queries]
        _read(model, session, prompts, number == 0)
        if any(query.active for query in queries):
            yield from answer_queries(model, session, queries, stop)
        if number == 0 and model.prefixes is not None:
            following = [group.prompts[1] for group in groups if len(group.prompts) > 1]
            model.prefixes.keep(session, shared_prefixes([*prompts, *following])[:len(prompts)])


def _read(model, session, prompts, first):
    """Make the session hold the prompts. first: it is empty."""
    prefixes, chunk = model.prefixes, model.prefill_chunk
    loaded = first and prefixes is not None and any(prefixes.load(session, prompts))
    if first and not loaded:
        session.read(prompts, chunk)
        kept = [0] * len(prompts)
    else:
        kept = session.update(prompts, chunk or -(-SHARED_CHUNK // session.unit) * session.unit)
    if prefixes is not None:
        prefixes.read += sum(map(len, prompts)) - sum(kept)
        prefixes.reused += sum(kept) * loaded


def _make_group(model, items, seq_len):
    made = [item.make() for item in items]
    prompts = [model.prompt_ids(sample) for sample in made]
    for sample, prompt in zip(made, prompts, strict=True):
        if len(prompt) + sample.max_new_tokens - 1 > seq_len:
            raise ValueError(f'{sample.task} {sample.index} takes {len(prompt)} tokens and '
                             f'{sample.max_new_tokens} for its answer, more than the {seq_len} of its length '
                             f"{sample.length}; state the chat template's overhead when samples are made")
    order = prompt_layout.reading_order(prompts)
    return Group(*([values[i] for i in order] for values in (items, made, prompts)))
