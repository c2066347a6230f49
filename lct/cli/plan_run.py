"""A run of extend.py planned: stages, meshes, memory policies, steps, and evaluations sized to the corpus."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lct.cli.corpus_survey import HeldOut, Survey, hold_out
from lct.cli.plan_models import BaseModel
from lct.cli.planned_config import config_fields, stage_fields
from lct.models import llama, prompt_layout
from lct.models.lora import Adapter
from lct.ops import rope
from lct.plan import search
from lct.plan.hardware import Hardware
from lct.plan.tables import GiB
from lct.text import short_length

DEFAULT_TOKENS = 50 * 2**23  # of Gradient's stage at 1M: 419,430,400
EPOCHS = 4  # of a corpus that is smaller than that; more repetition hardly helps (arXiv 2305.16264)
FACTOR = 4  # between the lengths of automatic stages, as from 64K to 262K and 1M in Gradient's recipe
EVEN = 512  # a length of an automatic stage is a multiple, so that it divides over devices
LEAST_STEPS = 10
CPU_S = 180  # of training on CPUs, where a run is a trial
ROW_TOKENS = 2**22  # of a step, as in the published recipes
SAVE_EVERY_S = 900
LONGEST_WINDOW, SHORTEST_WINDOW = 2**17, 64  # tokens of the windows of the loss by position
SHORTEST_PROMPT = 512  # tokens of the recall probe


@dataclasses.dataclass(frozen=True)
class Request:
    """What a user asks plan.py for.

    lengths: tokens of the stages, () for automatic ones. tokens: to train on in all stages, None to choose.
    rows: of a step, None to choose. theta: of the last stage, None for the critical base.
    train: 'all' weights, an 'adapter', or 'auto': all weights where they fit.
    frozen_dtype: of an adapter's frozen weights; None for the dtype of the computation, or 8 bits where only
      those fit.
    """

    model: BaseModel
    context: int
    kind: Hardware
    devices: int
    lengths: tuple[int, ...] = ()
    corpus: Survey | None = None
    tokens: float | None = None
    rows: int | None = None
    param_dtype: str = 'float32'
    theta: float | None = None
    train: str = 'auto'
    frozen_dtype: str | None = None


class Planned(NamedTuple):
    """A planned stage. result: of the search; its first plan is taken. theta: a rule or a number."""

    seq_len: int
    rows: int
    num_steps: int
    theta: str | float
    result: search.SearchResult
    adapter: Adapter | None

    @property
    def plan(self) -> search.Plan:
        return self.result.plans[0]

    @property
    def days(self) -> float:
        return self.num_steps * self.plan.seconds / 86400


def stage_lengths(native: int, context: int) -> tuple[int, ...]:
    """The lengths of automatic stages: down from the context by FACTOR to above twice the native length."""
    lengths = [context]
    while lengths[0] % (FACTOR * EVEN) == 0 and lengths[0] // FACTOR > 2 * native:
        lengths.insert(0, lengths[0] // FACTOR)
    return tuple(lengths)


def check_lengths(request: Request) -> None:
    """Refuse stages that are not in ascending order up to the context.

    Raises:
      ValueError: with the remedy.
    """
    lengths = request.lengths
    if lengths and (list(lengths) != sorted(set(lengths)) or lengths[-1] != request.context):
        raise ValueError(f'--stages {",".join(map(short_length, lengths))} must be in ascending order and '
                         f'end at --context {short_length(request.context)}')
    if lengths and lengths[-1] > request.model.config.max_position_embeddings > lengths[0]:
        raise ValueError(f'--stages begins at {lengths[0]:,} tokens, which the model reads already (native '
                         f'context {request.model.config.max_position_embeddings:,}); leave that stage out')


def theta_for(config: llama.LlamaConfig, context: int, theta: float | None) -> str | float:
    """The theta to train with at a context: the given one, if it reaches that far, or the critical base.

    Raises:
      ValueError: for one that does not reach that far, with one that does; for one at a context that needs
        none.
    """
    trained = config.max_position_embeddings
    if context <= trained:
        if theta is not None:
            raise ValueError(f'--theta {theta:,.0f} is for a context beyond the {trained:,} tokens that the '
                             f'model reads already, and --context is {context:,}; leave it out')
        return 'keep'
    if theta is None:
        return 'critical_base'
    reach = rope.extrapolation_bound(theta, config.rope_theta, trained, config.head_dim)
    if reach < context:
        needed = rope.critical_base(config.rope_theta, trained, context)
        raise ValueError(f'context {context} is beyond the {reach:,.0f} tokens that theta {theta:,.0f} '
                         f'reaches by the RoPE scaling law; use --theta {math.ceil(needed)}, or leave it out')
    return theta


def plan_stages(request: Request) -> list[Planned]:
    """All stages of a request.

    Raises:
      ValueError: if a stage does not fit the devices, or theta does not reach the context.
    """
    config, native = request.model.config, request.model.config.max_position_embeddings
    lengths = request.lengths or stage_lengths(native, request.context)
    total = request.tokens or DEFAULT_TOKENS
    if request.corpus and not request.tokens:
        total = min(total, EPOCHS * request.corpus.num_tokens)
    last = theta_for(config, request.context, request.theta)
    out = []
    for i, length in enumerate(lengths):
        tokens = total * 2**i / (2**len(lengths) - 1)  # half as many as in the next stage
        rows = request.rows or _rows(tokens, length)
        theta = last if i == len(lengths) - 1 else theta_for(config, length, None)
        num_steps = max(round(tokens / (rows * length)), 1 if request.tokens else LEAST_STEPS)
        out.append(Planned(length, rows, num_steps, theta, *_search(request, length, rows)))
    return out if request.tokens or request.kind.platform != 'cpu' else _shortened(out)


def _shortened(planned):
    """The stages with fewer steps where they would take more than CPU_S."""
    share = CPU_S / max(sum(one.num_steps * one.plan.seconds for one in planned), CPU_S)
    return [one._replace(num_steps=max(round(share * one.num_steps), LEAST_STEPS)) for one in planned]


def _rows(tokens, length):
    """Rows of a step: up to ROW_TOKENS, but three times LEAST_STEPS where the tokens are few."""
    most = max(ROW_TOKENS // length, 1)
    few = max(int(tokens / (3 * LEAST_STEPS * length)), 1)
    return min(most, 1 << (few.bit_length() - 1))


def _search(request, length, rows):
    """(SearchResult, Adapter or None) of a stage: the first way to train that fits."""
    job = search.Job(request.model.config, length, rows, request.param_dtype)
    jobs = [] if request.train == 'adapter' else [job]
    if request.train != 'all':
        dtypes = [request.frozen_dtype] if request.frozen_dtype else [
            search.compute_dtype(request.kind), 'int8']
        jobs += [dataclasses.replace(job, adapter=Adapter(frozen_dtype=dtype)) for dtype in dtypes]
    for each in jobs:
        result = search.search(each, request.kind, request.devices)
        if result.plans:
            return result, each.adapter
    return search.best(jobs[0], request.kind, request.devices), None


def one_way_to_train(request: Request, planned: Sequence[Planned]) -> list[Planned]:
    """All stages with adapters if one needs them, and on weights in 8 bits if one needs those: a run has one
    set of trained and of frozen parameters."""
    adapters = {one.adapter for one in planned}
    if len(adapters) == 1:
        return list(planned)
    quantized = any(adapter and adapter.quantized for adapter in adapters)
    return plan_stages(dataclasses.replace(
        request, train='adapter', frozen_dtype='int8' if quantized else request.frozen_dtype))


def evaluations(corpus: Survey | None, planned: Sequence[Planned]) -> tuple[dict[str, Any], list[str]]:
    """({held_out, needle, loss} sized to a corpus, sentences on what it does not allow).

    Raises:
      ValueError: for a corpus that is shorter than one row of the last stage, or cannot be split.
    """
    context = planned[-1].seq_len
    prompts = [n for n in (context >> i for i in range(20)) if n >= SHORTEST_PROMPT] or [context]
    loss = {'seq_len': min(context, LONGEST_WINDOW), 'windows': 16, 'rotations': 4}
    needle = {'lengths': tuple(sorted(prompts)), 'depths': (0.0, 0.25, 0.5, 0.75, 1.0), 'samples': 2}
    if corpus is None:
        return {'held_out': 0.01, 'needle': needle, 'loss': loss}, []
    if corpus.num_tokens < context and not corpus.estimated:
        raise ValueError(f'the corpus has {corpus.num_tokens:,} tokens, fewer than one row of {context:,}; '
                         'add text, or use --context '
                         f'{short_length(2**max(corpus.num_tokens.bit_length() - 2, 0))}')
    held = hold_out(corpus, max(2 * context, 4 * loss['seq_len']), context)
    notes = []
    needle['lengths'] = tuple(n for n in needle['lengths'] if n <= held.tokens)
    if max(needle['lengths'], default=0) < context:
        notes.append(f'the held-out documents have {held.tokens:,} tokens, so the recall probe ends at '
                     f'{max(needle["lengths"], default=0):,} tokens and not at {context:,}; add text to '
                     'measure further')
    loss['seq_len'] = _window(held, planned)
    if not loss['seq_len']:
        loss['windows'] = 0
        notes.append(f'the longest held-out document has {held.longest:,} tokens, too few for a window on '
                     'this mesh, so the loss by position is not measured')
    elif loss['seq_len'] < min(context, LONGEST_WINDOW):
        notes.append(f'the longest held-out document has {held.longest:,} tokens, so the loss by position is '
                     f'measured to {loss["seq_len"]:,} tokens')
    return {'held_out': held.fraction, 'needle': needle, 'loss': loss}, notes


def _window(held: HeldOut, planned):
    """Tokens of a window: a multiple of what the meshes need, at most those of the longest document."""
    steps = [one.plan.step for one in planned]
    unit = math.lcm(*(prompt_layout.length_unit(step.mesh[2], step.memory.ffn_chunks) for step in steps))
    longest = min(held.longest - 1, planned[-1].seq_len, LONGEST_WINDOW)
    power = 1 << max(longest.bit_length() - 1, 0)
    window = power if power % unit == 0 else longest // unit * unit
    return window if window >= SHORTEST_WINDOW else 0


def mixture_for(corpus: Survey | None, length: int) -> tuple[dict[str, float], str]:
    """(kinds of rows of a stage, a note or ''): stretches of one document where most text is shorter than
    the stage, as a packed row of short documents teaches nothing beyond their lengths."""
    if corpus is None or corpus.estimated or corpus.documents is None:
        return {'text': 1.0}, ''
    long = corpus.lengths[corpus.lengths >= length]
    share = corpus.lengths[corpus.lengths >= length // 2].sum() / max(corpus.num_tokens, 1)
    if share >= 0.5:
        return {'text': 1.0}, ''
    if len(long) > 3:  # some of them are held out
        return {'text': 0.7, 'long': 0.3}, ''
    return {'text': 1.0}, (
        f'{1 - share:.0%} of the text is in documents shorter than {length // 2:,} tokens, and a row of '
        f'{length:,} packs several, each of which attends to itself alone; longer documents, or --set '
        'stages.*.mixture.forms=0.3 (generated tasks of reading back), teach the model to use its context')


def learning_rate_of(config: llama.LlamaConfig) -> float:
    """Of the published recipes for models of a billion parameters and more, larger for small ones."""
    size = llama.num_params(config)
    return 2e-5 if size > 5e8 else 1e-4 if size > 5e7 else 5e-4


def config_of(request: Request, planned: Sequence[Planned], sized: dict[str, Any], name: str,
              more: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(all fields of the config, notes). sized: of evaluations(). more: fields that replace others."""
    stages, notes = [], []
    rate = learning_rate_of(request.model.config) * (10 if planned[0].adapter else 1)
    for one in planned:
        mixture, note = mixture_for(request.corpus, one.seq_len)
        notes += [note] if note else []
        stages.append(stage_fields({
            'name': short_length(one.seq_len), 'num_steps': one.num_steps, 'learning_rate': rate,
            'warmup_steps': min(one.num_steps // 10, 20), 'final_fraction': 0.1, 'theta': one.theta,
            'mixture': mixture}, one.plan.step))
    fields = config_fields(name, request.model, stages, sized)
    slowest = max(one.plan.seconds for one in planned)
    fields['checkpoint_every'] = max(min(round(SAVE_EVERY_S / slowest), planned[-1].num_steps), 1)
    fields |= {'hardware': request.kind.name, 'devices': request.devices, **more}
    if planned[0].adapter:
        fields['adapter'] = {
            name: getattr(planned[0].adapter, name) for name in ('rank', 'alpha', 'frozen_dtype')}
    return fields, notes


def peak(planned: Sequence[Planned]) -> float:
    """GiB of a device at the peak of all stages."""
    return max(one.plan.buffers.peak for one in planned) / GiB
