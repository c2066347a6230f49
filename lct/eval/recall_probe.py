"""Recall probe: one fact hidden in held-out text, at every length and depth, and queried at the end.

The training rows of lct.data.synthetic.recall have the same sentence pattern; only keys and numbers are held
out.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import numpy as np

from lct import sharding
from lct.data import layout as layouts
from lct.data.synthetic import recall
from lct.data.tokenizer import Tokenizer
from lct.eval import batching
from lct.models import decode, llama, prompt_layout

DESCRIPTION = 'sentence pattern of the training rows; keys and numbers held out'
SMALLEST_BUCKET = 1024  # shorter prompts share one cache of this length, so one compiled program


@dataclasses.dataclass(frozen=True)
class RecallGrid:
    """Which prompts to ask.

    lengths: tokens of prompt and answer together. depths: fractions 0..1 of the text before the fact.
    samples: prompts per cell. Each is drawn from (seed, length, depth index, sample) alone, so a cell does
      not change with the rest of the grid.
    num_distractors: facts with other keys and values in the text.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int = 0
    num_distractors: int = 0

    def __post_init__(self):
        object.__setattr__(self, 'lengths', tuple(map(int, self.lengths)))
        object.__setattr__(self, 'depths', tuple(map(float, self.depths)))
        if not self.lengths or not self.depths or self.samples < 1:
            raise ValueError(
                f'a recall grid needs lengths, depths and samples, got {len(self.lengths)} lengths, '
                f'{len(self.depths)} depths and {self.samples} samples; use at least one of each'
            )
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise ValueError(f'depths {self.depths} must lie in 0..1; 0 is the top of the text, 1 the end')

    def check_haystack(self, haystack_len: int) -> None:
        """Raise ValueError if a text of haystack_len tokens is too short for the grid."""
        if max(self.lengths) > haystack_len:
            raise ValueError(
                f'length {max(self.lengths)} is longer than the held-out text of {haystack_len} tokens, '
                f'which would repeat; give more text or lengths up to {haystack_len}'
            )

    def cells(self) -> list[tuple[int, int, int]]:
        """(length, index of the depth, sample) of every prompt, shorter lengths first."""
        return [(length, i, sample) for length in sorted(set(self.lengths)) for i in range(len(self.depths))
                for sample in range(self.samples)]


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How prompts are answered.

    layout: of the sequence over the ring. batch_tokens: cache slots of one batch; longer prompts run one on
    each replica. generate: models.decode.generate, or a stand-in.
    """

    layout: str = 'zigzag'
    memory: llama.Memory = llama.Memory()
    batch_tokens: int = 65536
    generate: Callable = decode.generate


@dataclasses.dataclass(frozen=True)
class RecallResult:
    """scores[i, j] is the mean over samples at depths[i] (0 the beginning of the text) and lengths[j].

    records: one dict per sample with length, depth, sample, key, answer, got, correct.
    """

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    scores: np.ndarray  # [depths, lengths]
    records: tuple[dict, ...]
    seed: int = 0

    @property
    def samples(self) -> int:
        """Samples per cell."""
        return len(self.records) // max(self.scores.size, 1)

    def to_json(self) -> str:
        """The result as JSON text; from_json reads it back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return json.dumps({**fields, 'scores': self.scores.tolist()}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> 'RecallResult':
        fields = json.loads(text)
        for name in ('lengths', 'depths', 'records'):
            fields[name] = tuple(fields[name])
        return cls(**{**fields, 'scores': np.asarray(fields['scores'])})


def cells_right(result: RecallResult, lo: float = 0, hi: float = float('inf')) -> tuple[int, int]:
    """(cells whose every sample is right, all cells) over the lengths with lo <= length <= hi."""
    columns = [lo <= length <= hi for length in result.lengths]
    cells = result.scores[:, columns]
    return int((cells == 1).sum()), cells.size


def summary(result: RecallResult, native: int) -> dict:
    """The numbers that measure an extension, for JSON; native: the trained length before it.

    inside and beyond: cells_right up to native and past 2 * native. reads_inside: whether at least 95% of the
    cells inside are right. blind_beyond: whether at most 20% of the cells beyond are right. Both are None
    where there are no such lengths. reads_everywhere: whether every length has a mean of at least 90%.
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


def is_correct(text: str, answer: str) -> bool:
    """Whether text begins with exactly the digits of answer: '4829' is wrong and so is '4829131'."""
    text = text.lstrip(' ')
    return text.startswith(answer) and not text[len(answer):len(answer) + 1].isdigit()


def cache_len(length: int, ring_size: int, smallest: int, ffn_chunks: int = 1) -> int:
    """Cache slots for prompts of length tokens; those up to `smallest` share one cache length."""
    return prompt_layout.cache_len(max(length, smallest), ring_size, ffn_chunks)


def run(
    params: llama.Params, config: llama.LlamaConfig, tokenizer: Tokenizer, haystack: Sequence[int],
    grid: RecallGrid, decoding: Decoding | None = None,
    progress: Callable[[int, int, int], None] | None = None,
) -> RecallResult:
    """Score a model over the grid on the current mesh (jax.set_mesh), on one device if there is none.

    Args:
      haystack: int [n], token ids of held-out text.
      progress: called as progress(done, total, length) after every batch.
    Raises:
      ValueError: if the haystack is shorter than the longest prompt.
    """
    decoding = decoding or Decoding()
    haystack = np.asarray(haystack)
    grid.check_haystack(len(haystack))
    vocabulary, cells = recall.RecallVocabulary(tokenizer), grid.cells()
    # One token more than the longest answer shows whether its digits end. A prompt with a shorter answer
    # makes room, so that no cache outgrows its length.
    longest = max(len(_prompt(grid, cell, vocabulary, haystack).answer_ids) for cell in cells)
    ring_size = sharding.axis_size('sequence')
    smallest = min(SMALLEST_BUCKET, max(grid.lengths))
    lengths = [length for length, _, _ in cells]
    seq_lens = [cache_len(length, ring_size, smallest, decoding.memory.ffn_chunks) for length in lengths]
    records = []
    for batch in batching.batches(lengths, seq_lens, config.rope, decoding.batch_tokens):
        group = [cells[i] for i in batch.indices]
        prompts = [_prompt(grid, cell, vocabulary, haystack, longest) for cell in group]
        new = decoding.generate(
            params, config, [prompt.ids.tolist() for prompt in prompts], longest + 1,
            indices=layouts.permutation(decoding.layout, batch.seq_len, ring_size), memory=decoding.memory,
            batch_size=batch.rows,
        )
        records += [_record(tokenizer, grid, *row) for row in zip(group, prompts, new, strict=True)]
        if progress is not None:
            progress(len(records), len(cells), group[-1][0])
    return _result(grid, records)


def _prompt(grid, cell, vocabulary, haystack, longest=0):
    """The recall.RecallPrompt of a cell; it leaves room for an answer of `longest` tokens."""
    length, i, _ = cell

    def draw(prompt_len):
        rng = np.random.default_rng([grid.seed, *cell])
        return recall.recall_prompt(rng, vocabulary, haystack, prompt_len, grid.depths[i], training=False,
                                    num_distractors=grid.num_distractors)

    prompt = draw(length)
    missing = longest - len(prompt.answer_ids)
    return draw(length - missing) if missing > 0 else prompt


def _record(tokenizer, grid, cell, prompt, new):
    length, i, sample = cell
    got = tokenizer.decode([int(x) for x in new])
    key = tokenizer.decode(prompt.ids[-64:].tolist()).rsplit(recall.BEFORE_KEY, 1)[-1]
    return {
        'length': length, 'depth': grid.depths[i], 'sample': sample,
        'key': key.strip(), 'answer': prompt.answer, 'got': got,
        'correct': is_correct(got, prompt.answer),
    }


def _result(grid, records):
    correct = {}
    for record in records:
        correct.setdefault((record['depth'], record['length']), []).append(record['correct'])
    scores = np.array([[np.mean(correct[depth, length]) for length in grid.lengths] for depth in grid.depths])
    return RecallResult(grid.lengths, grid.depths, scores, tuple(records), grid.seed)
