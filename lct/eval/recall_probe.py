"""A needle in a haystack: one fact hidden in held-out text, at every length and depth, asked for at the end.

The facts are those of data.recall with the keys and values that no training row holds.
"""

import dataclasses
import json

import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data.synthetic import recall
from lct.eval import batching
from lct.models import decode, llama, prompt_layout

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


def summary(result, native):
    """The numbers that an extension is judged by, for JSON; native: the trained length before it.

    inside and beyond: [cells whose every sample is right, cells] up to native and past 2 * native.
    reads_inside: at least 95% of the former. blind_beyond: at most 20% of the latter. None where there are
    no such lengths. reads_everywhere: every length has a mean of at least 90%.
    """
    inside, beyond = cells_right(result, hi=native), cells_right(result, lo=2 * native + 1)
    means = result.scores.mean(0)
    worst = int(means.argmin())
    return {
        'inside': list(inside), 'beyond': list(beyond), 'mean': float(result.scores.mean()),
        'worst_length': result.lengths[worst], 'worst_mean': float(means[worst]),
        'reads_inside': inside[0] >= 0.95 * inside[1] if inside[1] else None,
        'blind_beyond': beyond[0] <= 0.2 * beyond[1] if beyond[1] else None,
        'reads_everywhere': bool(means[worst] >= 0.9),
    }


def is_correct(text, answer):
    """Whether text begins with exactly the digits of answer: '4829' is wrong and so is '4829131'."""
    text = text.lstrip(' ')
    return text.startswith(answer) and not text[len(answer):len(answer) + 1].isdigit()


def cache_len(length, ring_size, smallest, ffn_chunks=1):
    """Cache slots for prompts of length, of which those up to smallest share one cache."""
    return prompt_layout.cache_len(max(length, smallest), ring_size, ffn_chunks)


def check(lengths, depths, samples, haystack_len):
    """Refuse a grid that cannot be run over a text of haystack_len tokens."""
    if not len(lengths) or not len(depths) or samples < 1:
        raise ValueError(
            f'a needle grid needs lengths, depths and samples, got {len(lengths)} lengths, {len(depths)} '
            f'depths and {samples} samples; use at least one of each'
        )
    if min(depths) < 0 or max(depths) > 1:
        raise ValueError(f'depths {tuple(depths)} must lie in 0..1; 0 is the top of the text, 1 the end')
    if max(lengths) > haystack_len:
        raise ValueError(
            f'length {max(lengths)} is longer than the held-out text of {haystack_len} tokens, which would '
            f'repeat; give more text or lengths up to {haystack_len}'
        )


def run(params, config, tokenizer, haystack, lengths, depths, samples, *, layout='zigzag', memory=None, seed=0,
        num_distractors=0, batch_tokens=65536, progress=None, generate=decode.generate):
    """Score a model over lengths x depths on the current mesh (jax.set_mesh), one device if there is none.

    Args:
      haystack: int [n], token ids of text that was not trained on.
      lengths: tokens of prompt and answer together; depths: fractions 0..1 of the text before the needle.
      samples: prompts per cell. Each is drawn from (seed, length, depth index, sample) alone, so a cell does
        not change with the rest of the grid.
      batch_tokens: cache slots of one batch; prompts longer than this run one on each replica.
      progress: called as progress(done, total, length) after every batch.
      generate: models.decode.generate, or a reader that stands in for it.
    Returns:
      NeedleResult.
    """
    haystack = np.asarray(haystack)
    lengths, depths = tuple(map(int, lengths)), tuple(map(float, depths))
    check(lengths, depths, samples, len(haystack))
    memory = memory or llama.Memory()
    words = recall.RecallVocabulary(tokenizer)
    cells = [(length, i, sample) for length in sorted(set(lengths)) for i in range(len(depths))
             for sample in range(samples)]

    def prompt_of(cell, shorter=0):
        length, i, _ = cell
        rng = np.random.default_rng([seed, length, *cell[1:]])
        return recall.recall_prompt(
            rng, words, haystack, length - shorter, depths[i], training=False, num_distractors=num_distractors
        )

    # One token more than the longest answer shows whether its digits end. A prompt with a shorter answer
    # makes room, so that no cache outgrows its length.
    longest = max(len(prompt_of(cell).answer_ids) for cell in cells)
    ring_size = sharding.axis_size('sequence')
    smallest = min(SMALLEST_BUCKET, max(lengths))
    seq_lens = [cache_len(length, ring_size, smallest, memory.ffn_chunks) for length, _, _ in cells]
    records = []
    for batch in batching.batches([length for length, _, _ in cells], seq_lens, config.rope, batch_tokens):
        group = [cells[i] for i in batch.indices]
        prompts = [prompt_of(cell) for cell in group]
        prompts = [
            prompt_of(cell, longest - len(p.answer_ids)) if len(p.answer_ids) < longest else p
            for cell, p in zip(group, prompts, strict=True)
        ]
        new = generate(
            params, config, [p.ids.tolist() for p in prompts], longest + 1, memory=memory,
            indices=layouts.permutation(layout, batch.seq_len, ring_size), batch_size=batch.rows,
        )
        records += [_record(tokenizer, *row) for row in zip(group, depths_of(group, depths), prompts, new,
                                                            strict=True)]
        if progress is not None:
            progress(len(records), len(cells), group[-1][0])
    return _result(lengths, depths, records, seed)


def depths_of(group, depths):
    """The depth of every (length, depth index, sample)."""
    return [depths[i] for _, i, _ in group]


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
