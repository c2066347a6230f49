"""README.md of an exported model: what was done to it, and what the evaluations before and after say."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lct.eval.loss.by_position import LossBins
from lct.eval.recall_probe import DESCRIPTION, RecallResult
from lct.eval.report.text import compare_counts, describe_windows
from lct.text import markdown_table, short_length


@dataclasses.dataclass(frozen=True)
class Extension:
    """What was done.

    base_model: the checkpoint that was extended; native: its trained length in tokens.
    stages: dicts with length, theta, rule (where the theta comes from), steps, tokens.
    data: one paragraph on the training text and the held-out text. command: what reproduces the model.
    trained: 'full training', or which weights were trained.
    license: the identifier of the base model's license, which the weights inherit.
    """

    name: str
    base_model: str
    native: int
    stages: Sequence[Mapping]
    data: str
    command: str
    trained: str = 'full training'
    license: str | None = None


def model_card(extension: Extension, recall: Mapping[str, RecallResult] | None = None,
               losses: Mapping[str, LossBins] | None = None, figures: Iterable[tuple[str, str]] = ()) -> str:
    """The card in markdown.

    Args:
      recall: {name: result of the recall probe}, and losses: {name: loss by position}; the base model first.
      figures: (file name in the folder, caption) pairs.
    """
    stages, native = extension.stages, short_length(extension.native)
    longest = short_length(max(stage['length'] for stage in stages))
    tokens = sum(stage['tokens'] for stage in stages)
    sections = [
        _front_matter(extension), f'# {extension.name}',
        f'`{extension.base_model}`, trained to {native} tokens, extended to **{longest} tokens** by '
        f'{extension.trained} on {tokens:,} tokens with `lct`.',
        '## Stages',
        markdown_table(['length', 'rope theta', 'theta from', 'steps', 'tokens'], [
            [f'{stage["length"]:,}', f'{stage["theta"]:,.0f}', stage['rule'], f'{stage["steps"]:,}',
             f'{stage["tokens"]:,}'] for stage in stages]),
        '## Data', extension.data,
    ]
    if recall:
        sections += ['## Recall probe', _recall_section(recall)]
    if losses:
        sections += ['## Loss by position', _loss_section(losses)]
    sections += [f'![{caption}]({file})' for file, caption in figures]
    sections += ['## Reproduce', f'```\n{extension.command}\n```']
    return '\n\n'.join(sections) + '\n'


def _front_matter(extension):
    fields = {'base_model': extension.base_model, 'library_name': 'transformers',
              'pipeline_tag': 'text-generation', 'license': extension.license,
              'tags': '[llama, long-context]'}
    return '---\n' + '\n'.join(f'{key}: {value}' for key, value in fields.items() if value) + '\n---'


def _recall_section(recall):
    lengths = sorted({length for result in recall.values() for length in result.lengths})
    depths = compare_counts(len(result.depths) for result in recall.values())
    samples = compare_counts(result.samples for result in recall.values())
    rows = []
    for name, result in recall.items():
        means = dict(zip(result.lengths, result.scores.mean(0), strict=True))
        rows.append([name, *(f'{100 * means[x]:.0f}' if x in means else 'not run' for x in lengths)])
    return (f'Percent of six-digit numbers repeated exactly, greedy, mean over {depths} depths with '
            f'{samples} prompts each: {DESCRIPTION} (`lct.data.synthetic.recall`).\n\n'
            + markdown_table(['model', *(short_length(x) for x in lengths)], rows))


def _loss_section(losses):
    edges = max((curve.edges for curve in losses.values()), key=len)
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    rows = []
    for name, curve in losses.items():
        means = dict(zip(zip(curve.edges[:-1], curve.edges[1:], strict=True), curve.mean, strict=True))
        rows.append([name, *(f'{means[span]:.3f}' if span in means else 'not run' for span in spans)])
    header = ['model', *(f'{short_length(low)} to {short_length(high)}' for low, high in spans)]
    return f'Nats per token over {describe_windows(losses)}, by position.\n\n' + markdown_table(header, rows)
