"""Evaluate how well a model uses a long context.

The suites are RULER, needles, adversarial needles, learning in context, questions about a repository, and
losses: by position, with growing context, on key tokens, on identifiers, and beside a base model.

    python experiments/evaluate.py --model DIR --suite ruler,needle --lengths 4096,8192 --workdir RUN
    python experiments/evaluate.py --model smollm2 --suite ruler --lengths 1024,2048 --samples 8,4 \\
        --workdir RUN
    python experiments/evaluate.py --model DIR --suite icl,loss --lengths 65536 --mesh 1,1,8,1 \\
        --base BASE --workdir RUN
    python experiments/evaluate.py --model DIR --suite ruler --data RULER/4096/data --lengths 4096 \\
        --workdir RUN
    python experiments/evaluate.py --model DIR --suite repository,loss --haystack repo/ --lengths 32768 \\
        --workdir RUN

Every finished answer is a line of WORKDIR/SUITE.jsonl, and the same command continues where it stopped. It
ends with results.json, results.csv (low to high is a 95% interval of each score) and report.html of all
suites that ran in WORKDIR, and predictions/LENGTH/TASK.jsonl for RULER's own evaluate.py.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import shutil
import subprocess
import sys

from lct import json_files
from lct.cli.main import check_positive, run_script
from lct.cli.model import add_model_flags, find_model, load_model, mesh_context, parse_ints
from lct.cli.progress import Progress
from lct.files import write_atomically

MAX_SAMPLES = 100_000
MAX_RESULTS = 10**9  # bytes; the records of every needle are among them


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument('--suite', default='ruler,needle',
                        help='names separated by commas; lct/eval/suites has one module for each')
    parser.add_argument('--lengths', default='1024,2048,4096,8192',
                        help='tokens of prompt and answer together')
    parser.add_argument('--samples', default='20',
                        help='samples of each task; one number, or one for each length')
    parser.add_argument('--tasks', help='names from the suites; default: all')
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--data', type=pathlib.Path,
                        help="folder of RULER's own TASK/validation.jsonl, old or new, in place of generated "
                        'samples; their length is the one of --lengths')
    parser.add_argument('--haystack', default='embedded',
                        help='folder, glob, or file of text, .jsonl or .parquet')
    parser.add_argument('--base',
                        help='the model before its extension, whose loss on short windows is compared')
    parser.add_argument('--trained', type=int,
                        help='trained length; default: the positions of the model')
    parser.add_argument('--seed', type=int, default=42)
    evaluate(parser.parse_args())


def evaluate(args):
    from lct.eval import answers, suites

    check_positive(args, 'trained')
    names, tasks = args.suite.split(','), tuple(args.tasks.split(',')) if args.tasks else None
    counts = sample_counts(args)
    chosen = suites.select(names, tasks)
    if args.data and (names != ['ruler'] or len(counts) != 1):
        raise ValueError(f'--data {args.data} holds samples of RULER of one length; use --suite ruler and '
                         f'one of --lengths, not {args.suite} and {args.lengths}')
    with mesh_context(args.mesh):
        model, about = load(args)
        plan, inputs = make_plan(args, model, counts, tasks)
        about = check_workdir(args.workdir, about | inputs)
        plan = dataclasses.replace(plan, identity=identity_of(about))
        before = earlier_results(args.workdir / 'results.json', plan.identity)
        warn(lost_answers(args.workdir, before['results'], plan.identity))
        results = {suite.name: run_suite(suite, model, plan, args.workdir) for suite in chosen}
    results = before['results'] | json.loads(json.dumps(strict(results)))
    write_report(args.workdir, {
        'about': about, 'trained': args.trained or model.config.max_position_embeddings,
        'samples': before['samples'] | {str(length): count for length, count in counts.items()},
        'results': results,
        'checksums': {name: answers.checksum(one, plan.identity) for name, one in results.items()}})


def sample_counts(args):
    """{length: samples} of --lengths and --samples."""
    lengths, counts = parse_ints('--lengths', args.lengths), parse_ints('--samples', args.samples)
    if len(counts) not in (1, len(lengths)):
        raise ValueError(f'--samples {args.samples} has {len(counts)} numbers for {len(lengths)} lengths; '
                         'give one number, or one for each length')
    if max(counts) > MAX_SAMPLES:
        raise ValueError(f'--samples {args.samples} has a number above {MAX_SAMPLES:,}; an error of 1% takes '
                         'some thousands')
    return dict(zip(lengths, counts * (len(lengths) // len(counts)), strict=True))


def warn(problems):
    for problem in problems:
        print('warning:', problem, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------
# Model and plan, with their provenance
# ---------------------------------------------------------------------------------------------------


def load(args):
    """The runner.Model and its provenance."""
    import jax

    model, folder = load_model(args)
    tokenizer, template, config = model.tokenizer, model.template, model.config
    about = {
        'model': args.model, 'weights_sha256': weights_hash(folder),
        'tokenizer_sha256': tokenizer.fingerprint,
        'template_sha256': template and hashlib.sha256(template.source.encode()).hexdigest(),
        'template': 'none' if template is None else template.name.replace(str(folder), args.model),
        'dtype': str(model.params.embed.dtype), 'positions': config.max_position_embeddings,
        'rope': dataclasses.asdict(config.rope), 'mesh': parse_ints('--mesh', args.mesh),
        'layout': model.layout, 'seed': args.seed, 'decoding': 'greedy', 'piece': model.prefill_chunk,
        'batch_tokens': model.batch_tokens,
        'versions': {'python': sys.version.split()[0], 'jax': jax.__version__}, 'commit': commit(),
        'device': jax.devices()[0].device_kind,
    }
    return model, json.loads(json.dumps(about))


def make_plan(args, model, counts, tasks):
    """The suites.Plan and the provenance of its inputs."""
    from lct.data.corpus import documents
    from lct.eval.suites import ruler
    from lct.eval.suites.suite import Plan, make_material

    texts = documents.read(args.haystack)
    plan = Plan(make_material(model, texts, args.haystack, args.seed), tuple(sorted(counts)), counts, tasks)
    about = {'samples_from': plan.material.provenance(), 'documents_sha256': documents_hash(texts)}
    about['data'] = args.data and [str(args.data), files_hash(args.data.glob('*/*.jsonl'))]
    if args.data:
        ((length, count),) = counts.items()
        given, problems = ruler.read_data(args.data, length, count, tasks)
        plan = dataclasses.replace(plan, given=given)
        warn(problems)
    if args.base:
        about |= {'base': args.base, 'base_sha256': base_hash(args, model)}
        plan = dataclasses.replace(plan, load_base=functools.partial(load_base, args))
    return plan, about


def load_base(args):
    return load_model(argparse.Namespace(**{**vars(args), 'model': args.base}))[0]


def base_hash(args, model):
    """weights_hash of the base model. Refuses one with another tokenizer before anything is measured."""
    from lct.data import tokenizer as tokenizers

    folder = pathlib.Path(find_model(args.base))
    if tokenizers.load(folder).fingerprint != model.tokenizer.fingerprint:
        raise ValueError(f'--base {args.base} has another tokenizer than {args.model}, so their losses do '
                         'not compare; give the model that was extended')
    return weights_hash(folder)


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
        for text in (document.name, document.text):
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def commit():
    """The commit of this checkout, with -dirty where files differ from it; None outside of a checkout."""
    if not shutil.which('git'):
        return None
    command = ['git', 'describe', '--always', '--dirty', '--abbrev=12']
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60,
                                   cwd=pathlib.Path(__file__).parent)
    except subprocess.TimeoutExpired:  # many files on a slow disk
        return None
    return described.stdout.strip() or None


def check_workdir(workdir, about):
    """Refuse to mix the answers of two models in one folder.

    The base model may be added later, and the commit belongs to the latest answers. A folder without answers
    may be used for anything.

    Returns:
      about, with what earlier calls have stated.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / 'about.json'
    answered = any(file.stat().st_size for file in workdir.glob('*.jsonl'))
    if path.is_file() and (answered or (workdir / 'results.json').is_file()):
        try:
            old = json_files.read_json(path)
        except ValueError as error:
            raise ValueError(f'{error}, or use another --workdir: without it nothing says which model gave '
                             'the answers beside it') from None
        shared = (old.keys() & about.keys()) - {'commit'}
        if different := sorted(name for name in shared if old[name] != about[name]):
            raise ValueError(f"{workdir} holds answers made with other {', '.join(different)} "
                             f'({old[different[0]]!r}, not {about[different[0]]!r}); use another --workdir')
        about = old | about
    write_atomically(path, json.dumps(about, indent=1) + '\n')
    return about


# ---------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------


def run_suite(suite, model, plan, workdir):
    """Run a suite, write its answers and return its result."""
    progress = Progress(suite.name)
    outcome = suite.run(model, plan, workdir / f'{suite.name}.jsonl', progress)
    progress.end()
    warn(outcome.problems)
    suite.export(workdir, outcome.rows)
    return outcome.result


def identity_of(about):
    """A hash of what answers depend on: of the model, its template, and the inputs."""
    from lct.eval import answers

    names = ('weights_sha256', 'tokenizer_sha256', 'template_sha256', 'seed', 'samples_from',
             'documents_sha256', 'data')
    return answers.checksum([about.get(name) for name in names])


def earlier_results(path, identity=''):
    """{'samples', 'results'} of earlier calls, without those that were edited or that a suite cannot keep."""
    nothing = {'samples': {}, 'results': {}}
    try:
        before = nothing | (json_files.read_json(path, MAX_RESULTS) if path.is_file() else {})
        if not all(isinstance(before[name], dict) for name in nothing):
            raise ValueError(f'{path} lacks results')
    except ValueError as error:
        warn([f'{error}; its earlier results are left out, so run their suites again'])
        return nothing
    for name, result in list(before['results'].items()):
        if reason := why_not_kept(name, result, before.get('checksums'), identity):
            del before['results'][name]
            warn([f'the results of the suite {name} in {path} {reason}, and are left out; '
                  f'run the suite {name} again'])
    return before


def why_not_kept(name, result, checksums, identity):
    """Why the result of an earlier call is left out; None if it is kept. checksums: None in older files."""
    from lct.eval import answers
    from lct.eval.suites import SUITES

    if checksums is not None:
        stated = checksums.get(name) if isinstance(checksums, dict) else None
        if stated != answers.checksum(result, identity):
            return 'were edited, or belong to another evaluation: their checksum differs'
    if name not in SUITES or not isinstance(result, dict):
        return 'are not of a suite'
    return SUITES[name].outdated(result)


def lost_answers(workdir, results, identity):
    """A sentence for each file that holds fewer answers than the results count."""
    from lct.eval import answers

    for name, result in results.items():
        path, count = workdir / f'{name}.jsonl', int(result.get('count', 0))
        kept = len(answers.read(path, identity)[0])
        if kept < count:
            yield (f'{path} holds {kept} of the {count} answers that results.json counts; the others are '
                   f'measured again when the suite {name} runs')


def write_report(workdir, report):
    """results.json, results.csv, report.html, and the tables on the terminal."""
    from lct.eval.report import html, tables

    path = workdir / 'results.json'
    write_atomically(path, json.dumps(strict(report), indent=1) + '\n')
    report = json.loads(path.read_text())
    tables.write_csv(workdir / 'results.csv', report)
    write_atomically(workdir / 'report.html', html.page(report))
    print(tables.terminal(report))
    print(f'written: {workdir}/results.json, results.csv, report.html')


def strict(value):
    """value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == '__main__':
    run_script(main, resumes=True)
