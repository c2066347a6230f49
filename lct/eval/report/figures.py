"""What an extension did, for the eye: needle heat maps, loss by position, tables and the model card."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from lct import files
from lct.text import markdown_table, short_length, table

RAMP = LinearSegmentedColormap.from_list('score', ['#F0496E', '#EBB839', '#0CD79F'])
LINE_COLORS = ('#8A8F98', '#1F5FBF', '#0B9E74', '#C2573A')

# ---------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------


def _new_figure(width, height):
    """A figure of its own: pyplot would need a backend, which belongs to the notebook that imports this."""
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    """Write a PNG atomically."""
    with files.atomic_path(path) as partial:
        figure.savefig(partial, dpi=130, format='png')


def needle_figure(base, extended, native, path, names=('before', 'after')):
    """Two heat maps of one colour scale side by side. native: the trained length before extension."""
    columns = max(len(base.lengths), len(extended.lengths))
    width = min(max(5.0, 0.62 * columns + 1.5), 9.5)
    height = 1.9 + 0.42 * max(len(base.depths), len(extended.depths))
    figure = _new_figure(2 * width, height)
    axes = figure.subplots(1, 2)
    for axis, result, name in zip(axes, (base, extended), names, strict=True):
        image = _heat_map(axis, result, native, name)
    axes[0].set_ylabel('needle depth (0% = top of the text)')
    figure.colorbar(image, ax=axes, label='Score', fraction=0.03, pad=0.015)
    _save(figure, path)


def _heat_map(axis, result, native, name):
    scores = np.asarray(result.scores, float)
    # A fixed scale: with an automatic one a map that is uniformly wrong looks as lively as any other.
    image = axis.pcolormesh(scores, cmap=RAMP, vmin=0, vmax=1, edgecolors='white', linewidth=1)
    axis.invert_yaxis()
    axis.set_xticks(np.arange(len(result.lengths)) + 0.5, [short_length(x) for x in result.lengths], rotation=45)
    axis.set_yticks(np.arange(len(result.depths)) + 0.5, [f'{100 * d:.0f}%' for d in result.depths])
    axis.tick_params(length=0)
    axis.set_xlabel('context length (tokens)')
    size = 9 if len(result.lengths) <= 12 else 7
    for (row, column), score in np.ndenumerate(scores):
        axis.text(column + 0.5, row + 0.5, f'{score:.2f}'.replace('0.', '.') if score < 1 else '1',
                  ha='center', va='center', fontsize=size, color='#10241F')
    within = sum(length <= native for length in result.lengths)
    # A boundary between columns: lengths on its left were trained on before the extension.
    axis.axvline(within, color='#10241F', linewidth=2, linestyle='--', clip_on=False)
    axis.annotate(f'trained to {short_length(native)}', (within, 0), xytext=(3 if within == 0 else -3, 3),
                  textcoords='offset points', ha='left' if within == 0 else 'right', va='bottom', fontsize=8)
    axis.set_title(f'{name}: mean {scores.mean():.2f}, n = {result.samples} per cell', pad=18)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return image


def loss_figure(curves, native, path):
    """Loss by position of every model in curves (name -> by_position.LossBins), with bands of one standard
    error over documents."""
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        color = LINE_COLORS[i % len(LINE_COLORS)]
        at = _middles(curve.edges)
        axis.plot(at, curve.mean, color=color, marker='o', markersize=4, linewidth=2, label=name)
        error = np.nan_to_num(curve.stderr)
        axis.fill_between(at, curve.mean - error, curve.mean + error, color=color, alpha=0.18, linewidth=0)
    axis.set_xscale('log', base=2)
    edges = sorted({edge for curve in curves.values() for edge in curve.edges if edge > 0})
    axis.set_xticks(edges, [short_length(edge) for edge in edges], rotation=45 if len(edges) > 10 else 0)
    axis.minorticks_off()
    axis.axvline(native, color='#10241F', linewidth=1.2, linestyle='--')
    axis.annotate(f'trained to {short_length(native)}', (native, 1), xycoords=('data', 'axes fraction'),
                  xytext=(-4, -4), textcoords='offset points', ha='right', va='top', fontsize=8, rotation=90)
    axis.set_xlabel('position in the text (tokens)')
    axis.set_ylabel('loss (nats per token)')
    axis.set_title(f'loss by position, {_windows(curves)}')
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, path)


def shots_figure(curves, path, references=None, title='learning in context'):
    """Accuracy over the number of shots on a log axis, with 95% bands where they are known.

    curves: {name: icl.curve(...)}; references: {learner: {shots: accuracy}}, dashed.
    """
    figure = _new_figure(7.5, 4.5)
    axis = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        color = LINE_COLORS[(i + 1) % len(LINE_COLORS)]
        shots, cells = list(curve), list(curve.values())
        axis.plot(shots, [cell['accuracy'] for cell in cells], color=color, marker='o', markersize=4, linewidth=2,
                  label=name)
        low, high = zip(*(cell['interval'] or 2 * [cell['accuracy']] for cell in cells), strict=True)
        axis.fill_between(shots, low, high, color=color, alpha=0.18, linewidth=0)
    for i, (learner, curve) in enumerate((references or {}).items()):
        axis.plot(list(curve), list(curve.values()), color=LINE_COLORS[0], linewidth=1.4,
                  linestyle=('--', ':', '-.')[i % 3], label=learner)
    axis.set_xscale('log', base=2)
    counts = sorted({shots for curve in (*curves.values(), *(references or {}).values()) for shots in curve})
    axis.set_xticks(counts, [short_length(count) for count in counts], rotation=45 if len(counts) > 10 else 0)
    axis.minorticks_off()
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel('shots')
    axis.set_ylabel('accuracy')
    axis.set_title(title)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(frameon=False)
    _save(figure, path)


def _middles(edges):
    """The geometric middle of every bin; of the first, which starts at 0, the arithmetic one."""
    low, high = np.array(edges[:-1], float), np.array(edges[1:], float)
    return np.where(low > 0, np.sqrt(low * high), high / 2)


# ---------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------


def needle_table(result):
    """A heat map for the terminal: percent right, depth downwards and length rightwards."""
    header = ['depth', *(short_length(length) for length in result.lengths)]
    rows = [[f'{100 * depth:.0f}%', *(f'{100 * score:.0f}' for score in scores)]
            for depth, scores in zip(result.depths, result.scores, strict=True)]
    rows.append(['mean', *(f'{100 * score:.0f}' for score in result.scores.mean(0))])
    total = f'{100 * result.scores.mean():.1f}% of {len(result.records)} needles found'
    return f'{table(header, rows, left=(), footer=1)}\n{total}'


def model_card(*, name, base_model, native, stages, data, command, needle=None, losses=None, license=None,
               figures=(), trained='full training'):
    """README.md of an exported folder.

    Args:
      base_model: the checkpoint that was extended; native: its trained length.
      stages: dicts with length, theta, rule (where the theta comes from), steps, tokens.
      data: one paragraph on what was trained on and what was held out.
      command: what reproduces the model. trained: 'full training', or which part of the weights.
      needle: name -> NeedleResult; losses: name -> by_position.LossBins. Before first, after second.
      license: the identifier of the base model's license, which the weights inherit.
      figures: (file name in the folder, caption) pairs.
    """
    longest = short_length(max(stage['length'] for stage in stages))
    front = {'base_model': base_model, 'library_name': 'transformers', 'pipeline_tag': 'text-generation',
             'license': license, 'tags': '[llama, long-context]'}
    matter = '\n'.join(f'{key}: {value}' for key, value in front.items() if value)
    tokens = sum(stage['tokens'] for stage in stages)
    parts = [
        f'---\n{matter}\n---', f'# {name}',
        f'`{base_model}`, trained to {short_length(native)} tokens, extended to **{longest} tokens** by {trained} '
        f'on {tokens:,} tokens with `lct`.',
        '## Stages',
        markdown_table(['length', 'rope theta', 'theta from', 'steps', 'tokens'], [
            [f'{stage["length"]:,}', f'{stage["theta"]:,.0f}', stage['rule'], f'{stage["steps"]:,}',
             f'{stage["tokens"]:,}'] for stage in stages]),
        '## Data', data,
    ]
    if needle:
        parts += ['## Needle in a haystack', _needle_markdown(needle)]
    if losses:
        parts += ['## Loss by position', _loss_markdown(losses)]
    parts += [f'![{caption}]({file})' for file, caption in figures]
    parts += ['## Reproduce', f'```\n{command}\n```']
    return '\n\n'.join(parts) + '\n'


def _needle_markdown(needle):
    lengths = sorted({length for result in needle.values() for length in result.lengths})
    depths = _numbers(len(result.depths) for result in needle.values())
    samples = _numbers(result.samples for result in needle.values())
    rows = []
    for name, result in needle.items():
        mean = dict(zip(result.lengths, result.scores.mean(0), strict=True))
        rows.append([name, *(f'{100 * mean[x]:.0f}' if x in mean else 'not run' for x in lengths)])
    return (f'Percent of six-digit numbers repeated exactly, greedy, mean over {depths} depths with '
            f'{samples} prompts each. Keys and numbers are those that `lct.data.recall` keeps from training.\n\n'
            + markdown_table(['model', *(short_length(x) for x in lengths)], rows))


def _loss_markdown(losses):
    edges = max((curve.edges for curve in losses.values()), key=len)
    spans = list(zip(edges[:-1], edges[1:], strict=True))
    rows = []
    for name, curve in losses.items():
        known = dict(zip(zip(curve.edges[:-1], curve.edges[1:], strict=True), curve.mean, strict=True))
        rows.append([name, *(f'{known[span]:.3f}' if span in known else 'not run' for span in spans)])
    header = ['model', *(f'{short_length(low)} to {short_length(high)}' for low, high in spans)]
    return f'Nats per token over {_windows(losses)}, by position.\n\n' + markdown_table(header, rows)


def _windows(curves):
    windows, documents = (_numbers(getattr(curve, name) for curve in curves.values())
                          for name in ('num_windows', 'documents'))
    return f'{windows} windows (documents: {documents})'


def _numbers(counts):
    """'11', or '5/11' where models differ."""
    return '/'.join(map(str, sorted(set(counts))))
