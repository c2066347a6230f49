"""What a model reads of a long context: RULER, needles, misleading needles, learning in context, questions about a
repository, and losses: by position, with growing context, on key tokens, on identifiers, beside a base model.

    python experiments/evaluate.py --model DIR --suite ruler,needle --lengths 4096,8192 --samples 20 --workdir runs/eval
    python experiments/evaluate.py --model smollm2 --suite ruler --lengths 1024,2048 --samples 8,4 --workdir runs/smol
    python experiments/evaluate.py --model DIR --suite icl,loss --lengths 65536 --mesh 1,1,8,1 --base BASE --workdir runs/eval
    python experiments/evaluate.py --model DIR --suite ruler --data RULER/4096/data --lengths 4096 --workdir runs/theirs
    python experiments/evaluate.py --model DIR --suite repository,loss --haystack repo/ --lengths 32768 --workdir runs/repo

Every finished answer is a line of WORKDIR/SUITE.jsonl, and the same command goes on where it was stopped. At the end
there are results.json, results.csv (low to high is a 95% interval of each score), report.html, of all suites that ran
in WORKDIR, and, for RULER's own evaluate.py, predictions/LENGTH/TASK.jsonl.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import subprocess
import sys
import time

from lct.cli.main import run_script
from lct.cli.model import add_model_flags, find_model, load_model, mesh_context, parse_ints
from lct.files import atomic_file, write_atomically

TASKWISE = ('adversarial', 'icl', 'repository')  # suites whose scores are {task: ...}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--suite', default='ruler,needle', help='of ruler, needle, adversarial, icl, repository, loss')
    parser.add_argument('--lengths', default='1024,2048,4096,8192', help='tokens of prompt and answer together')
    parser.add_argument('--samples', default='20', help='of each task; one number, or one for each length')
    parser.add_argument('--tasks', help='names out of the suites; default all')
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--data', type=pathlib.Path, help="folder of RULER's own TASK/validation.jsonl, old or new, in "
                        'place of generated samples; its length is the one of --lengths')
    parser.add_argument('--haystack', default='embedded', help='folder, glob, .jsonl or text file')
    parser.add_argument('--base', help='the model before its extension, for its loss on short windows beside this one')
    parser.add_argument('--trained', type=int, help='trained length; default the positions of the model')
    parser.add_argument('--seed', type=int, default=42)
    args = parser.parse_args()
    evaluate(args)


def evaluate(args):
    from lct.eval import runner, suites
    from lct.eval.report import html

    lengths = parse_ints('--lengths', args.lengths)
    counts = parse_ints('--samples', args.samples)
    if len(counts) not in (1, len(lengths)):
        raise ValueError(f'--samples {args.samples} has {len(counts)} numbers for {len(lengths)} lengths; give one '
                         'number, or one for each length')
    counts = dict(zip(lengths, counts * (len(lengths) // len(counts)), strict=True))
    names, tasks = args.suite.split(','), tuple(args.tasks.split(',')) if args.tasks else None
    suites.check_tasks([name for name in names if name != 'loss'], tasks)
    if args.data and (names != ['ruler'] or len(lengths) != 1):
        raise ValueError(f"--data {args.data} holds samples of RULER of one length; use --suite ruler and one of --lengths, "
                         f'not {args.suite} and {args.lengths}')
    with mesh_context(args.mesh):
        model, about = load(args)
        plan, documents = plan_of(args, model, tuple(sorted(counts)), counts, tasks)
        about = {**about, 'samples_from': plan.material.provenance(), 'documents_sha256': documents_hash(documents)}
        about |= {'data': args.data and [str(args.data), files_hash(args.data.glob('*/*.jsonl'))]}
        if args.data:
            given, problems = suites.read_ruler(args.data, *lengths, *counts.values(), tasks)
            plan = dataclasses.replace(plan, given=given)
            warn(problems)
        if args.base:
            about |= {'base': args.base, 'base_sha256': base_hash(args, model)}
        about = check_workdir(args.workdir, about)
        results = {}
        for name in names:
            path = args.workdir / f'{name}.jsonl'
            progress = Progress(name)
            if name == 'loss':
                rows, problems, scores = losses(args, model, plan, documents, path, progress)
            else:
                suite = suites.SUITES[name]
                reader = dataclasses.replace(model, layout=suite.layout or model.layout)
                rows, problems = runner.run(reader, suite.items(plan), path, progress)
                scores = suite.scores(plan, rows)
            progress.end()
            warn(problems)
            if name == 'ruler':
                suites.write_predictions(args.workdir / 'predictions', rows)
            results[name] = {'count': len(rows), **({'tasks': scores} if name in TASKWISE else scores)}
    path, samples = args.workdir / 'results.json', {str(length): count for length, count in counts.items()}
    before = earlier(path)
    report = {'about': about, 'trained': args.trained or model.config.max_position_embeddings,
              'samples': before['samples'] | samples, 'results': before['results'] | results}
    write_atomically(path, json.dumps(strict(report), indent=1) + '\n')
    report = json.loads(path.read_text())
    write_csv(args.workdir / 'results.csv', html.cells(report))
    write_atomically(args.workdir / 'report.html', html.page(report))
    print(html.terminal(report))
    print(f'written: {args.workdir}/results.json, results.csv, report.html')


def warn(problems):
    for problem in problems:
        print('warning:', problem, file=sys.stderr)


def earlier(path):
    """{'samples', 'results'} of the calls before, without losses that do not say how many documents they come from."""
    before = json.loads(path.read_text()) if path.is_file() else {'samples': {}, 'results': {}}
    if 'documents' not in before['results'].get('loss', {'documents': 0}):
        del before['results']['loss']
        print(f'warning: the losses in {path} have errors over windows, not over documents, and are left out; run the '
              'suite loss again', file=sys.stderr)
    return before


def base_hash(args, model):
    """weights_hash of a base model; refuses one with which losses do not compare, before anything is measured."""
    from lct.data import tokenizer

    folder = pathlib.Path(find_model(args.base))
    if tokenizer.load(folder).fingerprint != model.tokenizer.fingerprint:
        raise ValueError(f'--base {args.base} has another tokenizer than {args.model}, so their losses do not '
                         'compare; give the model that was extended')
    return weights_hash(folder)


def losses(args, model, plan, documents, path, progress):
    """-> (rows, problems, scores) of the suite 'loss'; the identifiers where the haystack is a large enough
    repository, the short windows where there is a base model."""
    from lct.eval.loss import suite as loss_suite

    ids = [model.tokenizer.encode(document.text) for document in documents]
    bundles, problems = loss_suite.bundles(model, plan)
    rows, more = loss_suite.run(model, plan, ids, path, progress)
    scores = loss_suite.scores(rows)
    problems += more
    if bundles:
        found, more = loss_suite.run_identifiers(model, bundles, path, progress)
        scores['identifiers'] = loss_suite.identifier_scores(found)
        problems += more
    if args.base:
        base = load_model(argparse.Namespace(**{**vars(args), 'model': args.base}))[0]
        length = min(base.config.max_position_embeddings, max(plan.lengths))
        both = [loss_suite.run_short(one, plan, ids, path.with_name(f'{name}.jsonl'), length, progress)
                for name, one in (('short', model), ('short_base', base))]
        scores['short'] = loss_suite.regression(*(found for found, _ in both))
        problems += [problem for _, more in both for problem in more]
    return rows, problems, scores


def strict(value):
    """value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def load(args):
    """-> runner.Model and its provenance."""
    import jax

    model, folder = load_model(args)
    words, template, config = model.tokenizer, model.template, model.config
    about = {
        'model': args.model, 'weights_sha256': weights_hash(folder), 'tokenizer_sha256': words.fingerprint,
        'template_sha256': template and hashlib.sha256(template.source.encode()).hexdigest(),
        'template': 'none' if template is None else template.name.replace(str(folder), args.model),
        'dtype': str(model.params.embed.dtype), 'positions': config.max_position_embeddings,
        'rope': dataclasses.asdict(config.rope), 'mesh': parse_ints('--mesh', args.mesh),
        'layout': model.layout, 'seed': args.seed, 'decoding': 'greedy', 'piece': model.piece, 'batch_tokens': model.batch_tokens,
        'versions': {'python': sys.version.split()[0], 'jax': jax.__version__}, 'commit': commit(),
        'device': jax.devices()[0].device_kind,
    }
    return model, json.loads(json.dumps(about))


def weights_hash(folder):
    return files_hash(folder.glob('*.safetensors'))


def files_hash(paths):
    """sha256 over files in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open('rb') as file:
            digest.update(hashlib.file_digest(file, 'sha256').digest())
    return digest.hexdigest()


def documents_hash(documents):
    """sha256 over the names and texts of all documents."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def commit():
    """That of the checkout this runs in, with -dirty where files differ from it; None outside of one."""
    described = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=12'], capture_output=True, text=True,
                               cwd=pathlib.Path(__file__).parent, check=False) if shutil.which('git') else None
    return described.stdout.strip() or None if described else None


def plan_of(args, model, lengths, counts, tasks):
    """-> suites.Plan and the documents of the haystacks."""
    from lct.data.corpus import documents
    from lct.eval import suites
    from lct.eval.tasks.material import ChatOverhead, Material

    texts = documents.read(args.haystack)
    material = Material(model.tokenizer, texts, text_source=args.haystack, seed=args.seed,
                              overhead=ChatOverhead(model.overhead(), model.overhead_before()))
    return suites.Plan(material, lengths, counts, tasks), texts


def check_workdir(workdir, about):
    """Refuse to mix the answers of two models in one folder -> about, with what calls before have said.

    The base model may come later, and the commit is that of the latest answers. A folder without answers binds nobody.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'about.json'
    answered = any(answers.stat().st_size for answers in workdir.glob('*.jsonl')) or (workdir / 'results.json').is_file()
    if path.is_file() and answered:
        old = json.loads(path.read_text())
        if different := sorted(name for name in old.keys() & about if name != 'commit' and old[name] != about[name]):
            raise ValueError(f"{workdir} holds answers made with other {', '.join(different)} "
                             f'({old[different[0]]!r}, not {about[different[0]]!r}); use another --workdir')
        about = old | about
    write_atomically(path, json.dumps(about, indent=1) + '\n')
    return about


def write_csv(path, cells):
    with atomic_file(path) as file:
        table = csv.writer(file)
        table.writerow(('suite', 'task', 'at', 'score', 'low', 'high', 'count'))
        table.writerows(cells)


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
    run_script(main, resumes=True)
