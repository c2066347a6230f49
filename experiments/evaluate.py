"""What a model reads of a long context: RULER, needles, misleading needles, learning in context, loss by position.

    python experiments/evaluate.py --model DIR --suite ruler,needle --lengths 4096,8192 --samples 20 --workdir runs/eval
    python experiments/evaluate.py --model smollm2 --suite ruler --lengths 1024,2048 --samples 8,4 --workdir runs/smol
    python experiments/evaluate.py --model DIR --suite icl,loss --lengths 65536 --mesh 1,1,8,1 --workdir runs/eval

Every finished answer is a line of WORKDIR/SUITE.jsonl, and the same command goes on where it was stopped. At the end
there are results.json, results.csv, report.html and, for RULER's own evaluate.py, predictions/LENGTH/TASK.jsonl.
"""

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time

import setup_run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--model', required=True, help="a Hugging Face Llama folder, or 'smollm2'")
    parser.add_argument('--suite', default='ruler,needle', help='of ruler, needle, adversarial, icl, loss')
    parser.add_argument('--lengths', default='1024,2048,4096,8192', help='tokens of prompt and answer together')
    parser.add_argument('--samples', default='20', help='of each task; one number, or one for each length')
    parser.add_argument('--tasks', help='names out of the suites; default all')
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--mesh', default='1,1,1,1', help='degrees of data,fsdp,sequence,tensor')
    parser.add_argument('--dtype', help="of the weights; default float32 on CPU, else the files'")
    parser.add_argument('--plain', action='store_true', help='no chat template, as for a base model')
    parser.add_argument('--haystack', default='embedded', help='folder, glob, .jsonl or text file')
    parser.add_argument('--trained', type=int, help='trained length; default the positions of the model')
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--batch-tokens', type=int, default=65536, help='cache slots of a batch')
    parser.add_argument('--piece', type=int, help='tokens of one forward, where prompts need more memory than there is')
    args = parser.parse_args()
    evaluate(args)


def evaluate(args):
    import jax

    from lct.eval import html_report, runner, suites

    lengths = numbers('--lengths', args.lengths)
    counts = numbers('--samples', args.samples)
    if len(counts) not in (1, len(lengths)):
        raise ValueError(f'--samples {args.samples} has {len(counts)} numbers for {len(lengths)} lengths; give one '
                         'number, or one for each length')
    counts = dict(zip(lengths, counts * (len(lengths) // len(counts)), strict=True))
    names, tasks = args.suite.split(','), tuple(args.tasks.split(',')) if args.tasks else None
    suites.check_tasks([name for name in names if name != 'loss'], tasks)
    degrees = numbers('--mesh', args.mesh)
    if len(degrees) != 4:
        raise ValueError(f'--mesh {args.mesh} must be four degrees data,fsdp,sequence,tensor, such as 1,1,8,1')
    if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
        with contextlib.suppress(RuntimeError):  # too late where a notebook has computed already
            jax.config.update('jax_num_cpu_devices', math.prod(degrees))
    with mesh_of(degrees):
        model, about = load(args, degrees)
        plan, documents = plan_of(args, model, tuple(sorted(counts)), counts, tasks)
        about = {**about, 'samples_from': plan.material.provenance()}
        check_workdir(args.workdir, about)
        results = {}
        for name in names:
            path = args.workdir / f'{name}.jsonl'
            progress = Progress(name)
            if name == 'loss':
                ids = [model.tokenizer.encode(document.text) for document in documents]
                rows, problems = suites.run_loss(model, plan, ids, path, progress)
                scores = suites.loss_scores(plan, rows)
            else:
                suite = suites.SUITES[name]
                rows, problems = runner.run(model, suite.items(plan), path, progress)
                scores = suite.scores(plan, rows)
            progress.end()
            for problem in problems:
                print('warning:', problem, file=sys.stderr)
            if name == 'ruler':
                suites.write_predictions(args.workdir / 'predictions', rows)
            results[name] = {'count': len(rows), **({'tasks': scores} if name in ('adversarial', 'icl') else scores)}
    report = {'about': about, 'trained': args.trained or model.config.max_position_embeddings,
              'samples': {str(length): count for length, count in counts.items()}, 'results': results}
    write(args.workdir / 'results.json', json.dumps(strict(report), indent=1) + '\n')
    report = json.loads((args.workdir / 'results.json').read_text())
    write_csv(args.workdir / 'results.csv', html_report.cells(report))
    write(args.workdir / 'report.html', html_report.page(report))
    print(html_report.terminal(report))
    print(f'written: {args.workdir}/results.json, results.csv, report.html')


def strict(value):
    """value with None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def numbers(flag, text):
    """(int, ...) of '1024,2048'."""
    parts = text.split(',')
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f'{flag} {text} must be whole numbers above 0, such as 1024,2048')
    return tuple(int(part) for part in parts)


def mesh_of(degrees):
    """The mesh as a context; none for one device."""
    import jax

    from lct import sharding
    return contextlib.nullcontext() if set(degrees) == {1} else jax.set_mesh(sharding.make_mesh(degrees))


def load(args, degrees):
    """-> runner.Model and its provenance."""
    import jax

    from lct.data import chat, tokenizer
    from lct.eval import runner
    from lct.weights import json_files, llama_hf

    folder = pathlib.Path(setup_run.model_folder(args.model))
    words = tokenizer.load(folder)
    tokenizer.check_vocab(words, llama_hf.read_config(folder).vocab_size)
    template = None
    if not args.plain:
        try:
            template = chat.read(folder)
        except ValueError as error:  # a base model has none
            print(f'note: prompts are plain text: {error}', file=sys.stderr)
    eos = set()
    for name in ('config.json', 'generation_config.json'):
        if (folder / name).is_file():
            found = json_files.read_json(folder / name).get('eos_token_id')
            eos |= set(found if isinstance(found, list) else [found]) - {None}
    on_cpu = jax.default_backend() == 'cpu'
    dtype = args.dtype or ('float32' if on_cpu else None)
    config, params = llama_hf.load(folder, dtype)
    model = runner.Model(params, config, words, template, tuple(sorted(eos)), piece=args.piece,
                         batch_tokens=args.batch_tokens)
    about = {
        'model': args.model, 'weights_sha256': weights_hash(folder), 'tokenizer_sha256': words.fingerprint,
        'template_sha256': template and hashlib.sha256(template.source.encode()).hexdigest(),
        'template': 'none' if template is None else template.name.replace(str(folder), args.model),
        'dtype': str(params.embed.dtype), 'positions': config.max_position_embeddings,
        'rope': dataclasses.asdict(config.rope), 'mesh': list(degrees), 'layout': model.layout, 'seed': args.seed,
        'decoding': 'greedy', 'piece': args.piece, 'batch_tokens': args.batch_tokens,
        'versions': {'python': sys.version.split()[0], 'jax': jax.__version__},
        'device': jax.devices()[0].device_kind,
    }
    return model, json.loads(json.dumps(about))


def weights_hash(folder):
    """sha256 over all weight files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob('*.safetensors')):
        with path.open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()


def plan_of(args, model, lengths, counts, tasks):
    """-> suites.Plan and the documents of the haystacks."""
    from lct.data import documents
    from lct.eval import ruler, suites

    texts = documents.read(args.haystack)
    material = ruler.Material(model.tokenizer, texts, text_source=args.haystack, seed=args.seed,
                              overhead=model.overhead())
    return suites.Plan(material, lengths, counts, tasks), texts


def check_workdir(workdir, about):
    """Refuse to mix the answers of two models in one folder."""
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'about.json'
    if path.is_file():
        old = json.loads(path.read_text())
        if different := sorted(name for name in {*old, *about} if old.get(name) != about.get(name)):
            raise ValueError(f"{workdir} holds answers made with other {', '.join(different)} "
                             f'({old.get(different[0])!r}, not {about.get(different[0])!r}); use another --workdir')
    write(path, json.dumps(about, indent=1) + '\n')


def write(path, text):
    """A text file that appears whole or not at all."""
    part = path.with_name(path.name + '.part')
    part.write_text(text, encoding='utf-8')
    part.replace(path)


def write_csv(path, cells):
    part = path.with_name(path.name + '.part')
    with part.open('w', newline='') as file:
        table = csv.writer(file)
        table.writerow(('suite', 'task', 'at', 'score', 'low', 'high', 'count'))
        table.writerows(cells)
    part.replace(path)


class Progress:
    """A line in the terminal, or one every half minute in a file."""

    def __init__(self, name):
        self.name, self.live, self.last = name, sys.stderr.isatty(), 0.0

    def __call__(self, done, total, seconds):
        if self.live or time.monotonic() - self.last > 30 or done == total:
            self.last = time.monotonic()
            left = f'{seconds / 60:.0f} min' if seconds > 90 else f'{seconds:.0f} s'
            print(f'{self.name}: {done} of {total} samples, {left} left    ', end='\r' if self.live else '\n',
                  file=sys.stderr, flush=True)

    def end(self):
        if self.live:
            print(file=sys.stderr)


if __name__ == '__main__':
    setup_run.main(main)
