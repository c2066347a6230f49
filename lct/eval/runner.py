"""A model answers samples on the current mesh, batch by batch, and every finished answer is kept.

The answers are lines of a JSONL file. A run that was interrupted goes on where it stopped, and its file ends the
same: batches have the same shapes then, and the finished file is in the order of its keys.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import time
from typing import Any

import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data import tokenizer as tokenizers
from lct.eval import batching, samples
from lct.models import llama
from lct.models.session import Session

SMALLEST_ANSWER = 128  # tokens; shorter limits share one compiled program
QUESTIONS = (('A question.\nAnswer:', ' The answer is'), ('A question.\n', 'Answer:'))  # prompts and answers begun
FIELDS = {'task': str, 'length': int, 'index': int, 'text': str, 'outputs': list, 'meta': dict}


@dataclasses.dataclass(frozen=True)
class Model:
    """What reads: weights on the current mesh, their tokenizer and, of an instruct model, its ChatTemplate.

    eos_ids: tokens that end an answer, besides the tokenizer's. piece: tokens of one forward, for prompts that
    need more memory than there is; None for all at once. batch_tokens: cache slots of one batch.
    """

    params: Any
    config: llama.LlamaConfig
    tokenizer: tokenizers.Tokenizer
    template: Any = None
    eos_ids: tuple = ()
    memory: llama.Memory = llama.Memory(remat='none')
    layout: str = 'striped'
    piece: int | None = None
    batch_tokens: int = 65536

    def __post_init__(self):
        tokenizers.check_vocab_size(self.tokenizer, self.config.vocab_size)

    def prompt_ids(self, sample):
        """The tokens that the model goes on from: a user's turn and the begun answer, or the plain text."""
        if self.template is None:
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            return bos + self.tokenizer.encode(sample.text)
        turn = [{'role': 'user', 'content': sample.prompt}]
        ids = self.template.encode(self.tokenizer, turn, add_generation_prompt=True)
        return ids + self.tokenizer.encode(sample.answer_prefix)

    def answer_ids(self, sample, answer):
        """The tokens of an answer behind the begun one."""
        begun, whole = (self.tokenizer.encode(sample.answer_prefix + text) for text in ('', answer))
        return whole[len(os.path.commonprefix([begun, whole])):]

    def overhead(self):
        """Tokens that the template adds to a prompt, beyond the BOS of a plain one."""
        bos = int(self.tokenizer.bos_id is not None)
        asked = [samples.Sample('', 0, 0, *question, [''], 1, {}) for question in QUESTIONS]
        return max(len(self.prompt_ids(one)) - bos - len(self.tokenizer.encode(one.text)) for one in asked)

    def overhead_before(self):
        """Those of the overhead's tokens that stand before the prompt."""
        asked = [samples.Sample('', 0, 0, prompt, '', [''], 1, {}) for prompt in ('Question', '1')]
        return len(os.path.commonprefix([self.prompt_ids(one) for one in asked])) - int(self.tokenizer.bos_id is not None)

    @functools.cached_property
    def line_ends(self):
        """Tokens with a line end in them."""
        return frozenset(i for i in range(self.tokenizer.vocab_size) if '\n' in self.tokenizer.decode([i]))

    def stop(self, one_line):
        """bool [V]: the tokens that end an answer; of a one-line answer also those with a line end in them."""
        ids = {*self.eos_ids, self.tokenizer.eos_id} - {None}
        if one_line:
            ids |= self.line_ends
        out = np.zeros(self.config.vocab_size, bool)
        out[[i for i in ids if i < self.config.vocab_size]] = True
        return out

    def session(self, rows, seq_len, length):
        indices = layouts.permutation(self.layout, seq_len, sharding.axis_size('sequence'))
        return Session(self.params, self.config, rows, seq_len, indices, self.memory, length)


@dataclasses.dataclass(frozen=True)
class Item:
    """A sample to come: (task, length, index) names it and make() -> Sample makes it when its turn comes.

    group: items of equal groups share the beginning of their prompts, which is read once for all of them.
    one_line: the answer ends with its line. forced: whether the right answer is scored too, as the model would have
    to write it.
    """

    task: str
    length: int
    index: int
    make: Any
    group: Any = None
    one_line: bool = False
    forced: bool = False

    @property
    def key(self):
        return self.task, self.length, self.index


def run(model, items, path, progress=None):
    """Answer what the file at path does not answer yet.

    Args:
      items: [Item], of which each key occurs once.
      path: JSONL of the answers, made if it does not exist. Lines of other items stay as they are.
      progress: called as progress(done, total, seconds left) after every batch.
    Returns:
      ([dict of each item, in their order], [one sentence for each line of the file that could not be read]).
    """
    path = pathlib.Path(path)
    longest = max((item.length for item in items), default=0)
    if longest > model.config.max_position_embeddings:
        raise ValueError(f'length {longest} is more than the {model.config.max_position_embeddings} positions of the '
                         "model; use shorter lengths, or raise max_position_embeddings in its config.json")
    rows, problems = read(path)
    write(path, rows)
    pending = [batch for batch in plan(model, items) if any(item.key not in rows for item in batch.items)]
    total, spent, start = sum(batch.cost for batch in pending), 0, time.monotonic()
    with path.open('a', encoding='ascii', newline='\n') as file:
        for batch in pending:
            for row in answer(model, batch, rows):
                rows[key_of(row)] = row
                file.write(json.dumps(row) + '\n')
                file.flush()
                os.fsync(file.fileno())
            spent += batch.cost
            if progress is not None:
                done = sum(item.key in rows for item in items)
                progress(done, len(items), (time.monotonic() - start) / spent * (total - spent))
    write(path, rows)
    return [rows[item.key] for item in items], problems


# ---------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """groups: lists of items that share a text, up to `rows` of them; length: that of the longest."""

    groups: list
    rows: int
    seq_len: int
    length: int
    one_line: bool

    @property
    def items(self):
        return [item for group in self.groups for item in group]

    @property
    def cost(self):
        """Tokens of texts that are read."""
        return sum(group[0].length for group in self.groups)


def slots(length, ffn_chunks=1):
    """Cache slots for prompts of length tokens with their answers: powers of two are few programs."""
    return batching.power_of_two_slots(length, 256, ffn_chunks)


def plan(model, items):
    """[Batch] of all items, finished or not, so that shapes do not depend on what is finished."""
    groups = {}
    for item in items:
        groups.setdefault(item.key if item.group is None else ('group', item.group), []).append(item)
    groups = list(groups.values())
    lengths = [max(item.length for item in group) for group in groups]
    seq_lens = [slots(length, model.memory.ffn_chunks) for length in lengths]
    kinds = [(len(group) > 1, group[0].one_line) for group in groups]
    # A batch lasts as long as its longest answer, and answers to one task are of one length.
    order = lambda i, rows: (groups[i][0].index // rows, groups[i][0].task)
    for batch in batching.batches(lengths, seq_lens, model.config.rope, model.batch_tokens, kinds, order):
        chosen = [groups[i] for i in batch.indices]
        yield Batch(chosen, batch.rows, batch.seq_len, batch.longest, chosen[0][0].one_line)


def answer(model, batch, finished=()):
    """Iterator of the rows of a batch, without those whose keys are finished."""
    made = [[item.make() for item in group] for group in batch.groups]
    ids = [[model.prompt_ids(sample) for sample in group] for group in made]
    for group, prompts in zip(made, ids, strict=True):
        for sample, prompt in zip(group, prompts, strict=True):
            if len(prompt) + sample.max_new_tokens - 1 > batch.seq_len:
                raise ValueError(f'{sample.task} {sample.index} takes {len(prompt)} tokens and {sample.max_new_tokens} '
                                 f'for its answer, more than the {batch.seq_len} of its length {sample.length}; state '
                                 "the chat template's overhead when samples are made")
    shared = [len(os.path.commonprefix(prompts)) if len(prompts) > 1 else len(prompts[0]) for prompts in ids]
    # Every question has a token of its own.
    shared = [min(n, min(map(len, prompts)) - 1) if len(prompts) > 1 else n
              for n, prompts in zip(shared, ids, strict=True)]
    session = model.session(batch.rows, batch.seq_len, batch.length)
    session.read([prompts[0][:n] for n, prompts in zip(shared, ids, strict=True)], model.piece)
    stop = model.stop(batch.one_line)
    for turn in range(max(map(len, made))):
        # A group that has no more questions answers its last one again for nobody.
        at = [min(turn, len(group) - 1) for group in made]
        wanted = [turn < len(items) and items[turn].key not in finished for items in batch.groups]
        if not any(wanted):
            continue
        limits = [group[i].max_new_tokens * want for group, i, want in zip(made, at, wanted, strict=True)]
        bound = max(SMALLEST_ANSWER, 1 << (max(limits) - 1).bit_length())
        questions = [prompts[i][n:] for prompts, i, n in zip(ids, at, shared, strict=True)]
        answers = session.ask(questions, limits, bound, stop)
        asked = [group[i] for group, i in zip(made, at, strict=True)]
        forced = [items[i].forced and want for items, i, want in zip(batch.groups, at, wanted, strict=True)]
        choices = [sample.meta.get('choices', []) if want else [] for sample, want in zip(asked, wanted, strict=True)]
        likely = likelihoods(model, session, questions, asked, forced, choices)
        for j, (sample, new) in enumerate(zip(asked, answers, strict=True)):
            if wanted[j]:
                yield row_of(sample, ids[j][at[j]], model.tokenizer.decode(new), len(new)) | likely[j]


def likelihoods(model, session, questions, asked, forced, choices):
    """What a row of each sample says beyond its answer: where it is forced how likely the right one is, and the likeliest
    of its choices, which are labels scored as whole lines; '' where a likelihood of theirs is no number."""
    if not any(forced) and not any(choices):
        return [{}] * len(asked)
    right = [model.answer_ids(sample, sample.answer) for sample in asked]
    lines = [[model.answer_ids(sample, f' {name}\n') for name in names]
             for sample, names in zip(asked, choices, strict=True)]
    # A sample with fewer choices has one of them scored again for nobody, one without has its right answer.
    alternatives = [right] * any(forced) + [
        [own[i % len(own)] if own else answer for own, answer in zip(lines, right, strict=True)]
        for i in range(max(map(len, lines)))]
    scored, out = session.force(questions, alternatives), [{} for _ in asked]
    for j, (row, names) in enumerate(zip(out, choices, strict=True)):
        if forced[j]:
            nats, greedy = scored[0][j]
            row['forced'] = {'nats': nats, 'tokens': len(right[j]), 'greedy': greedy}
        if names:
            nats = [one[j][0] for one in scored[any(forced):][:len(names)]]
            row['chosen'] = names[int(np.argmax(nats))] if np.isfinite(nats).all() else ''
    return out


# ---------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------


def row_of(sample, ids, text, new_tokens):
    """A line of the file: what scoring needs, and the prompt as a hash of its tokens."""
    return {'task': sample.task, 'length': sample.length, 'index': sample.index, 'text': text,
            'outputs': list(sample.outputs), 'meta': sample.meta, 'prompt': digest(ids), 'prompt_tokens': len(ids),
            'new_tokens': new_tokens}


def digest(ids):
    """16 hexadecimal digits that stand for token ids."""
    return hashlib.sha256(np.asarray(ids, '<i4').tobytes()).hexdigest()[:16]


def sample_of(row):
    """The Sample of a row, without its prompt."""
    return samples.Sample(row['task'], row['length'], row['index'], '', '', row['outputs'], 0, row['meta'])


def key_of(row):
    return row['task'], row['length'], row['index']


def read(path):
    """-> ({key: row}, [one sentence for each line that is none]) of a file, which need not exist."""
    if not path.is_file():
        return {}, []
    rows = {}
    lines, problems = samples.read(path)
    for number, fields in lines:
        wrong = [name for name, kind in FIELDS.items() if not isinstance(fields.get(name), kind)]
        if wrong:
            problems.append(f"{path} line {number + 1} has no {' and no '.join(wrong)}; that sample is made again")
        else:
            rows[key_of(fields)] = fields
    return rows, problems


def write(path, rows):
    samples.write(path, [rows[key] for key in sorted(rows)])
