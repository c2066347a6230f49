"""README.md of an exported model: what was done to it, and what the evaluations before and after say."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from lct.eval.before_after import NEEDLE_DESCRIPTION
from lct.eval.loss.by_position import LossBins
from lct.eval.quick_ruler import DESCRIPTION as RULER_DESCRIPTION
from lct.eval.recall_probe import DESCRIPTION as RECALL
from lct.eval.recall_probe import RecallResult
from lct.eval.report.text import compare_counts, describe_windows
from lct.text import markdown_table, short_length


@dataclasses.dataclass(frozen=True)
class Extension:
    """What was done to the base model.

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


def model_card(
    extension: Extension, recall: Mapping[str, RecallResult] | None = None,
    losses: Mapping[str, LossBins] | None = None, figures: Iterable[tuple[str, str]] = (),
    needle: Mapping[str, RecallResult] | None = None, ruler: Mapping[str, RecallResult] | None = None,
) -> str:
    """The card in markdown.

    Args:
      recall: {name: result of the recall probe}; losses: {name: loss by position}; needle, ruler:
        {name: scores of those suites}, with tasks in place of depths for 'ruler'. The base model first.
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
        intro = 'Percent of six-digit numbers repeated exactly, greedy, mean over {cells}: ' + RECALL
        sections += ['## Recall probe', _grid_section(recall, intro + ' (`lct.data.synthetic.recall`).')]
    if needle:
        intro = 'Percent of seven-digit numbers found, greedy, mean over {cells}: ' + NEEDLE_DESCRIPTION
        sections += ['## Needle', _grid_section(
            needle, intro + '. A low score here beside a high one above means that the model recalls in the '
                            'wording it was trained on.')]
    if ruler:
        sections += ['## RULER', _task_section(ruler)]
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


def _grid_section(results, intro):
    """A table of means over depths; intro: with {cells} for the numbers of depths and prompts."""
    lengths = sorted({length for result in results.values() for length in result.lengths})
    depths = compare_counts(len(result.depths) for result in results.values())
    samples = compare_counts(result.samples for result in results.values())
    rows = []
    for name, result in results.items():
        means = dict(zip(result.lengths, result.scores.mean(0), strict=True))
        rows.append([name, *(f'{100 * means[x]:.0f}' if x in means else 'not run' for x in lengths)])
    intro = intro.format(cells=f'{depths} depths (prompts per cell: {samples})')
    return intro + '\n\n' + markdown_table(['model', *(short_length(x) for x in lengths)], rows)


def _task_section(results):
    lengths = sorted({length for result in results.values() for length in result.lengths})
    rows = []
    for name, result in results.items():
        scores = {(task, x): result.scores[i, j] for i, task in enumerate(result.depths)
                  for j, x in enumerate(result.lengths)}
        rows += [[name, task, *(f'{100 * scores[task, x]:.0f}' for x in lengths)] for task in result.depths]
    samples = compare_counts(result.samples for result in results.values())
    return (f'Scores of tasks of RULER (prompts per cell: {samples}): {RULER_DESCRIPTION}.\n\n'
            + markdown_table(['model', 'task', *(short_length(x) for x in lengths)], rows))


def _loss_section(losses):
    edges = max((curve.edges for curve in losses.values()), key=len)
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    rows = []
    for name, curve in losses.items():
        means = dict(zip(zip(curve.edges[:-1], curve.edges[1:], strict=True), curve.mean, strict=True))
        rows.append([name, *(f'{means[span]:.3f}' if span in means else 'not run' for span in spans)])
    header = ['model', *(f'{short_length(low)} to {short_length(high)}' for low, high in spans)]
    return f'Nats per token over {describe_windows(losses)}, by position.\n\n' + markdown_table(header, rows)
