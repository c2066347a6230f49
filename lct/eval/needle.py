"""A needle in a haystack: one fact hidden in held-out text, at every length and depth, asked for at the end.

The facts are those of data.recall with the keys and values that no training row holds.
"""

import dataclasses
import json

import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data import recall
from lct.models import decode

SMALLEST_BUCKET = 1024  # shorter prompts share one cache of this length, so one compiled program


@dataclasses.dataclass(frozen=True)
class NeedleResult:
    """scores[i, j] is the mean over samples at depths[i] (0 the beginning of the text) and lengths[j].

    records: one dict per sample with length, depth, sample, key, answer, got, correct.
    """

    lengths: tuple
    depths: tuple
    scores: np.ndarray  # [depths, lengths]
    records: tuple
    seed: int = 0

    @property
    def samples(self):
        """Samples per cell."""
        return len(self.records) // max(self.scores.size, 1)

    def to_json(self):
        """The result as JSON text; from_json reads it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, 'scores': self.scores.tolist()}, indent=1)

    @classmethod
    def from_json(cls, text):
        fields = json.loads(text)
        for name in ('lengths', 'depths', 'records'):
            fields[name] = tuple(fields[name])
        return cls(**{**fields, 'scores': np.asarray(fields['scores'])})


def cells_right(result, lo=0, hi=float('inf')):
    """(cells whose every sample is right, cells) over the lengths with lo <= length <= hi."""
    columns = [lo <= length <= hi for length in result.lengths]
    cells = result.scores[:, columns]
    return int((cells == 1).sum()), cells.size


def is_correct(text, answer):
    """Whether text begins with exactly the digits of answer: '4829' is wrong and so is '4829131'."""
    text = text.lstrip(' ')
    return text.startswith(answer) and not text[len(answer):len(answer) + 1].isdigit()


def cache_len(length, ring_size, smallest):
    """Cache slots for prompts of length: a multiple of 2 * ring_size, and past the smallest bucket of 64
    times that, so that attention finds chunks that divide a device's share."""
    unit = 2 * ring_size
    length = max(length, smallest)
    unit = 64 * unit if length > 64 * unit else unit
    return -(-length // unit) * unit


def run(params, config, tokenizer, haystack, lengths, depths, samples, *, layout='zigzag', memory=None, seed=0,
        num_distractors=0, batch_tokens=65536, progress=None, generate=decode.generate):
    """Score a model over lengths x depths on the current mesh (jax.set_mesh), one device if there is none.

    Args:
      haystack: int [n], token ids of text that was not trained on.
      lengths: tokens of prompt and answer together; depths: fractions 0..1 of the text before the needle.
      samples: prompts per cell. Each is drawn from (seed, length, depth index, sample) alone, so a cell does
        not change with the rest of the grid.
      batch_tokens: cache slots of one batch; a prompt longer than this runs alone.
      progress: called as progress(done, total, length) after every batch.
      generate: models.decode.generate, or a reader that stands in for it.
    Returns:
      NeedleResult.
    """
    haystack = np.asarray(haystack)
    lengths, depths = tuple(map(int, lengths)), tuple(map(float, depths))
    _check(lengths, depths, samples, len(haystack))
    words = recall.RecallWords(tokenizer)
    cells = [(length, i, sample) for length in sorted(set(lengths)) for i in range(len(depths))
             for sample in range(samples)]

    def prompt_of(cell, shorter=0):
        length, i, _ = cell
        rng = np.random.default_rng([seed, length, *cell[1:]])
        return recall.needle_prompt(
            rng, words, haystack, length - shorter, depths[i], training=False, num_distractors=num_distractors
        )

    # One token more than the longest answer shows whether its digits end. A prompt with a shorter answer
    # makes room, so that no cache outgrows its length.
    longest = max(len(prompt_of(cell).answer_ids) for cell in cells)
    ring_size = sharding.axis_size('sequence')
    smallest = min(SMALLEST_BUCKET, max(lengths))
    buckets = {}
    for cell in cells:
        buckets.setdefault(cache_len(cell[0], ring_size, smallest), []).append(cell)
    records = []
    for seq_len, bucket in buckets.items():
        indices = layouts.permutation(layout, seq_len, ring_size)
        rows = min(max(1, batch_tokens // seq_len), len(bucket))
        for start in range(0, len(bucket), rows):
            group = bucket[start:start + rows]
            prompts = [prompt_of(cell) for cell in group]
            prompts = [
                prompt_of(cell, longest - len(p.answer_ids)) if len(p.answer_ids) < longest else p
                for cell, p in zip(group, prompts, strict=True)
            ]
            new = generate(
                params, config, [p.ids.tolist() for p in prompts], longest + 1, seq_len=seq_len,
                indices=indices, memory=memory, batch_size=rows,
            )
            records += [_record(tokenizer, *row) for row in zip(group, depths_of(group, depths), prompts, new,
                                                                strict=True)]
            if progress is not None:
                progress(len(records), len(cells), group[-1][0])
    return _result(lengths, depths, records, seed)


def depths_of(group, depths):
    """The depth of every (length, depth index, sample)."""
    return [depths[i] for _, i, _ in group]


def _check(lengths, depths, samples, available):
    if not lengths or not depths or samples < 1:
        raise ValueError(
            f'a needle grid needs lengths, depths and samples, got {len(lengths)} lengths, {len(depths)} '
            f'depths and {samples} samples; use at least one of each'
        )
    if max(lengths) > available:
        raise ValueError(
            f'length {max(lengths)} is longer than the held-out text of {available} tokens, which would repeat; '
            f'give more text or lengths up to {available}'
        )


def _record(tokenizer, cell, depth, prompt, new):
    got = tokenizer.decode([int(x) for x in new])
    key = tokenizer.decode(prompt.ids[-64:].tolist()).rsplit(recall.BEFORE_KEY, 1)[-1]
    return {
        'length': cell[0], 'depth': depth, 'sample': cell[2],
        'key': key.strip(), 'answer': prompt.answer, 'got': got,
        'correct': is_correct(got, prompt.answer),
    }


def _result(lengths, depths, records, seed):
    right = {}
    for record in records:
        right.setdefault((record['depth'], record['length']), []).append(record['correct'])
    scores = np.array([[np.mean(right[depth, length]) for length in lengths] for depth in depths])
    return NeedleResult(lengths, depths, scores, tuple(records), seed)
