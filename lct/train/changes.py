"""What of a config may change when a run continues, and what would make it another run.

A field is written as a path into the config, 'stages.*.mesh', in which * stands for any one name or number,
and ** at the end for any names below.
Every field is in one of the two lists; one that is in neither may not change.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# At any time: where and in which order the same sums are computed, what is written, and evaluations, which
# are measured again. The corpus and the model may move: their contents are compared as inputs.
ANY_TIME = (
    'name', 'license', 'save_dtype', 'model_folder', 'corpus', 'exclude', 'text_field', 'corpus_bytes',
    'fit_ring', 'evaluate', 'evaluation_corpus',
    'base.max_position_embeddings', 'base.rope_theta', 'base.model',  # written down for plan.py and readers
    'hardware', 'devices',
    'checkpoint_every', 'keep_checkpoints', 'max_skips_in_row', 'max_failed_saves', 'line_every_s',
    'spike_factor', 'spike_window', 'check_memory', 'watchdog.*',
    'needle.lengths', 'needle.depths', 'needle.samples', 'loss.seq_len', 'loss.windows', 'loss.rotations',
    'stages.*.mesh', 'stages.*.layout', 'stages.*.published.**',
    'stages.*.gate', 'stages.*.gate.every', 'stages.*.gate.needle', 'stages.*.gate.short_loss_rise',
    'stages.*.gate.otherwise',
    'stages.*.memory.remat', 'stages.*.memory.query_chunk', 'stages.*.memory.key_chunk',
    'stages.*.memory.ffn_chunks', 'stages.*.memory.loss_chunk', 'stages.*.memory.query_passes',
    'stages.*.memory.strategy',
    'stages.*.memory.node_size', 'stages.*.memory.kernel', 'stages.*.memory.cache_dtype',
    'stages.*.memory.offload_state',
)
# Until the stage ends: the schedule of its steps that are left.
UNTIL_END = (
    'stages.*.learning_rate', 'stages.*.warmup_steps', 'stages.*.final_fraction', 'stages.*.num_steps',
)
# Until the stage begins; batch_size and accumulation at any time if their product stays the same.
UNTIL_BEGINNING = (
    'stages.*', 'stages.*.name', 'stages.*.seq_len', 'stages.*.batch_size', 'stages.*.accumulation',
    'stages.*.theta', 'stages.*.alpha', 'stages.*.scaling', 'stages.*.scaling.*', 'stages.*.mixture',
    'stages.*.mixture.*', 'stages.*.carry_optimizer', 'stages.*.memory.dtype',
)
MAY_CHANGE = (*ANY_TIME, *UNTIL_END, *UNTIL_BEGINNING)
MAY_NOT = (
    'seed', 'held_out', 'sequences', 'eos_target', 'chat_template', 'upsample', 'upsample.at_least',
    'upsample.keep', 'window', 'param_dtype',
    'optimizer.b1', 'optimizer.b2', 'optimizer.eps', 'optimizer.weight_decay', 'optimizer.clip_norm',
    'adapter', 'adapter.rank', 'adapter.alpha', 'adapter.also_train', 'adapter.frozen_dtype', 'adapter.seed',
    'model.vocab_size', 'model.embed_dim', 'model.mlp_dim', 'model.num_layers', 'model.num_heads',
    'model.num_kv_heads', 'model.head_dim', 'model.norm_eps', 'model.tie_embeddings',
    'model.max_position_embeddings', 'model.rope_theta', 'model.rope', 'model.window', 'model.family',
    'model.qkv_bias', 'model.out_bias', 'model.mlp_bias', 'model.qk_norm', 'model.rope_layers',
    'start_folder',
    'search.thetas', 'search.seeds',
    'inputs.model.*', 'inputs.architecture.**', 'inputs.tokenizer', 'inputs.training', 'inputs.tokens',
    'inputs.held_out',
)
ABSENT = '(absent)'


class Change(NamedTuple):
    """A field whose value differs. path: its names, such as ('stages', '0', 'mesh'). old, new: plain values,
    or ABSENT."""

    path: tuple[str, ...]
    old: Any
    new: Any

    @property
    def field(self) -> str:
        return '.'.join(self.path)

    def __str__(self) -> str:
        return f'{self.field} {_show(self.old)} -> {_show(self.new)}'


def listed(path: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether a field is in a list of patterns."""
    return any(_matches(pattern.split('.'), path) for pattern in patterns)


def differences(old: Mapping, new: Mapping) -> list[Change]:
    """The fields in which two configs, as plain dicts and lists, differ. A stage that only one of them has is
    one change."""
    stages = old.get('stages', []), new.get('stages', [])
    common = min(map(len, stages))
    values = [dict(flatten({**config, 'stages': own[:common]})) for config, own in zip((old, new), stages)]
    found = [Change(path, *(each.get(path, ABSENT) for each in values)) for path in sorted({*values[0],
                                                                                            *values[1]})]
    found += [Change(('stages', str(i)), *(own[i].get('name') if i < len(own) else ABSENT for own in stages))
              for i in range(common, max(map(len, stages)))]
    return [change for change in found if change.old != change.new]


def refusal(change: Change, old: Mapping, new: Mapping, step: int) -> str | None:
    """Why a run of the config old that has taken `step` steps cannot continue with a change of the config
    new; None if it can."""
    if listed(change.path, ANY_TIME):
        return None
    if change.path[0] == 'inputs' and change.old is ABSENT:  # recorded before it was compared
        return None
    if not listed(change.path, MAY_CHANGE):
        return str(change)
    if _harmless(change, old, new, step):
        return None
    return f'{change} ({"its steps are taken" if listed(change.path, UNTIL_END) else "the stage has begun"})'


def training_fields(config: Mapping) -> dict[str, Any]:
    """The fields of a config, by name, on which the weights at the end of its run depend."""
    return {'.'.join(path): value for path, value in flatten(config) if not listed(path, ANY_TIME)}


def steps_before(change: Change, old: Mapping, step: int) -> int:
    """The number of steps before a change has an effect, in a run that has taken `step` steps: its stage may
    begin later."""
    return max(step, _span(old, int(change.path[1]))[0]) if change.path[0] == 'stages' else step


def _harmless(change, old, new, step):
    """Whether a change of a stage comes before the steps that it changes."""
    index, field = int(change.path[1]), change.path[-1]
    start, end = _span(old, index)
    if step <= start:
        return True
    if len(change.path) == 2:
        return False
    before, after = old['stages'][index], new['stages'][index]
    if field in ('batch_size', 'accumulation'):
        return _rows(before) == _rows(after)
    if field == 'num_steps':
        return start + after['num_steps'] >= step and step <= end
    return listed(change.path, UNTIL_END) and step < max(end, _span(new, index)[1]) and step <= end


def _span(config, index):
    """The steps at which stage `index` begins and ends; a stage that the config lacks follows the last."""
    ends = [0, *itertools.accumulate(stage['num_steps'] for stage in config.get('stages', []))]
    return (ends[index], ends[index + 1]) if index + 1 < len(ends) else (ends[-1], ends[-1])


def _rows(stage):
    return stage.get('batch_size', 1) * stage.get('accumulation', 1)


def _matches(pattern, path):
    if pattern[-1] == '**':
        pattern, path = pattern[:-1], path[:len(pattern) - 1]
    return len(pattern) == len(path) and all(one in ('*', name) for one, name in zip(pattern, path))


def flatten(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """(path, value) of every leaf; a list of plain values is one, and so is an empty dict."""
    if isinstance(tree, list) and tree and isinstance(tree[0], dict):
        tree = {str(i): value for i, value in enumerate(tree)}
    if isinstance(tree, dict) and (tree or not path):
        for key, value in tree.items():
            yield from flatten(value, (*path, str(key)))
    else:
        yield path, tree


def _show(value):
    return value if value is ABSENT else json.dumps(value)
