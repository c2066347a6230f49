"""Evaluate how well a model uses a long context.

The suites are RULER, needles, adversarial needles, comprehension, learning in context, questions about a
repository, and losses: by position, with growing context, on key tokens, on identifiers, and beside a base
model.

    python experiments/evaluate.py --model DIR --suite ruler,needle --lengths 4096,8192 --workdir RUN
    python experiments/evaluate.py --model smollm2 --suite ruler --lengths 1024,2048 --samples 8,4 \\
        --workdir RUN
    python experiments/evaluate.py --model DIR --suite icl,loss --lengths 65536 --mesh 1,1,8,1 \\
        --base BASE --evaluator STRONG --workdir RUN
    python experiments/evaluate.py --model DIR --suite ruler --data RULER/4096/data --lengths 4096 \\
        --workdir RUN
    python experiments/evaluate.py --model DIR --suite repository,loss --haystack repo/ --lengths 32768 \\
        --workdir RUN
    python experiments/evaluate.py --model DIR --suite own --data tasks/ --lengths 65536 --session mine \\
        --workdir RUN
    python experiments/evaluate.py --compare RUN RUN2 RUN3 --workdir REPORT

Every finished answer is a line of WORKDIR/SUITE.jsonl, and the same command continues where it stopped, also
on another mesh or with other --batch-tokens and --piece. After each suite, results.json, results.csv (low to
high is a 95% interval of each score) and report.html tell of all answers in WORKDIR, those of calls with
other suites, tasks, lengths or samples among them; predictions/LENGTH/TASK.jsonl is for RULER's own
evaluate.py. The losses are those of the last call. With --session, texts that several prompts begin with are
kept on disk, and a later call reads only what follows them.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import sys

from lct import bucket_cache
from lct.cli import sessions
from lct.cli.flags import length
from lct.cli.main import check_positive, run_script
from lct.cli.model import (
    add_model_flags,
    find_model,
    load_model,
    mesh_context,
    mesh_degrees,
    parse_ints,
    parse_lengths,
)
from lct.cli.progress import Progress
from lct.cli.urls import work_folder
from lct.files import write_atomically

MAX_SAMPLES = 100_000
MAX_PROBLEMS = 4  # that one message names
OTHERS = {'base': 'the model that was extended', 'evaluator': 'a model with the same tokenizer'}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    if sessions.manage(sys.argv[1:]):
        return
    add_model_flags(parser, required=False, mesh='auto')
    parser.add_argument('--suite', default='ruler,needle',
                        help='names separated by commas; lct/eval/suites has one module for each')
    parser.add_argument('--lengths', default='1024,2048,4096,8192',
                        help='tokens of prompt and answer together')
    parser.add_argument('--samples', default='20',
                        help='samples of each task; one number, or one for each length')
    parser.add_argument('--tasks', help='names from the suites; default: all')
    parser.add_argument('--workdir', type=pathlib.Path, help='for answers and reports')
    parser.add_argument('--compare', type=pathlib.Path, nargs='+', metavar='DIR',
                        help='finished work directories, the first of which the others are compared with; '
                        'nothing is measured')
    parser.add_argument('--data', type=pathlib.Path,
                        help="folder of RULER's own TASK/validation.jsonl, old or new, in place of generated "
                        'samples; with --suite own of your TASK/*.jsonl, both of the one length of '
                        '--lengths; or of the files of --suite longbench_v2, babilong or infinitebench')
    parser.add_argument('--haystack', default='embedded',
                        help='folder, glob, or file of text, .jsonl or .parquet')
    for name in ('squad', 'hotpotqa', 'nq'):
        parser.add_argument(f'--{name}', type=pathlib.Path, help=f'file of questions for passages_{name}; '
                            '--squad also for qa_1 and --hotpotqa for qa_2')
    parser.add_argument('--base',
                        help='the model before its extension, whose loss on short windows is compared')
    parser.add_argument('--evaluator',
                        help='the model that chooses the key tokens of LongPPL; default: the model itself, '
                        'whose LongPPL has a bound and compares with no other')
    parser.add_argument('--trained', type=length,
                        help='trained length; default: the positions of the model')
    parser.add_argument('--seed', type=int, default=42, help='seed of the samples')
    sessions.add_flags(parser)
    args = parser.parse_args()
    with work_folder(args.workdir) if args.workdir else contextlib.nullcontext() as args.workdir:
        evaluate(args)


def evaluate(args):
    from lct.cli import run_record
    from lct.eval import provenance, results_file, suites

    if args.compare:
        compare(args.compare, args.workdir)
        return
    if not (args.model and args.workdir):
        raise ValueError('--model and --workdir are needed: what to evaluate, and a folder for the answers')
    check_positive(args, 'trained')
    names, tasks = args.suite.split(','), tuple(args.tasks.split(',')) if args.tasks else None
    counts = sample_counts(args)
    chosen = suites.select(names, None if names == ['own'] else tasks)  # its tasks are folders of --data
    check_data(args, chosen)
    with mesh_context(args.mesh, args.model):
        model, about = load(args)
        plan, inputs = make_plan(args, model, about['weights_sha256'], counts, tasks)
        check_suites(chosen, model, plan)
        for suite in chosen:
            inputs |= suite.inputs(plan)
        about, number = provenance.enter(args.workdir, about | inputs)
        plan = dataclasses.replace(plan, identity=provenance.identity_of(about), run=number)
        before, problems = results_file.earlier(args.workdir / 'results.json', plan.identity)
        warn([*problems, *results_file.lost_answers(args.workdir, before['results'], plan.identity)])
        report = {'about': about, 'trained': args.trained or model.config.max_position_embeddings,
                  'samples': before['samples'] | {str(length): count for length, count in counts.items()},
                  'results': before['results']}
        with run_record.call(args.workdir, json.loads(json.dumps(vars(args), default=str)), about):
            for suite in chosen:
                report['results'][suite.name] = run_suite(suite, model, plan, args.workdir)
                report = results_file.write(args.workdir, report, plan.identity)
    show(args.workdir, report)


def compare(folders, workdir):
    """Print a table for every evaluation beside the first one, and write comparison.html and .json."""
    from lct.eval import comparison
    from lct.eval.report import html
    from lct.text import table

    if len(folders) < 2:
        raise ValueError(f'--compare {folders[0]} names one folder; name two or more')
    first, *others = map(comparison.read, map(bucket_cache.local, folders))
    found = {one.name: comparison.differences(first, one) for one in others}
    for name, differences in found.items():
        print(f'\n{name} beside {first.name}')
        print(table(comparison.HEADER, comparison.table_rows(differences)))
        print('\n'.join(comparison.sentences(differences)))
    if workdir:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / 'comparison.html', html.comparison_page(first.name, found))
        rows = {name: [dataclasses.asdict(one) for one in differences] for name, differences in found.items()}
        write_atomically(workdir / 'comparison.json',
                         json.dumps({'first': first.name, 'others': rows}, indent=1) + '\n')
        print(f'written: {workdir}/comparison.html, comparison.json')


def check_data(args, chosen):
    """Refuse --data for suites without files, and suites of files without it."""
    if args.data and (len(chosen) > 1 or not chosen[0].takes_data):
        from lct.eval.suites import SUITES

        known = ', '.join(name for name, suite in SUITES.items() if suite.takes_data)
        raise ValueError(f'--data {args.data} holds samples of one suite; use --suite with one of {known}, '
                         f'not {args.suite}')
    for suite in chosen:
        if suite.needs_data and not args.data:
            raise ValueError(f'--suite {suite.name} takes its tasks from files; name their folder with '
                             '--data')


def check_suites(chosen, model, plan):
    """Refuse everything that would stop a suite, before the first of them runs."""
    longest, positions = max(plan.lengths), model.config.max_position_embeddings
    if longest > positions:
        raise ValueError(f'length {longest} is more than the {positions} positions of the model; use shorter '
                         'lengths, or raise max_position_embeddings in its config.json')
    problems = [problem for suite in chosen for problem in suite.check(model, plan)]
    if problems:
        more = f'; {len(problems) - MAX_PROBLEMS} more like these' if problems[MAX_PROBLEMS:] else ''
        raise ValueError('; '.join(problems[:MAX_PROBLEMS]) + more)


def sample_counts(args):
    """{length: samples} of --lengths and --samples."""
    lengths, counts = parse_lengths('--lengths', args.lengths), parse_ints('--samples', args.samples)
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

    from lct import environment
    from lct.eval import provenance

    session = sessions.folder_of_flags(args)
    model, folder = load_model(args)
    if session:
        from lct.cli.prefixes import DiskPrefixes

        model = dataclasses.replace(model, prefixes=DiskPrefixes(
            session, sessions.model_facts(model, folder), args.model, args.session_gb * 1e9))
    tokenizer, template, config = model.tokenizer, model.template, model.config
    about = {
        'model': args.model, 'weights_sha256': provenance.weights_hash(folder),
        'tokenizer_sha256': tokenizer.fingerprint,
        'template_sha256': template and provenance.text_hash(template.source),
        'template': 'none' if template is None else template.name.replace(str(folder), args.model),
        'dtype': dtype_of(model), 'positions': config.max_position_embeddings,
        'rope': dataclasses.asdict(config.rope), 'mesh': mesh_degrees(),
        'layout': model.layout, 'seed': args.seed, 'decoding': 'greedy', 'piece': model.prefill_chunk,
        'batch_tokens': model.batch_tokens, 'session': args.session, 'device': jax.devices()[0].device_kind,
        'versions': environment.versions(), 'commit': environment.commit(pathlib.Path(__file__).parent),
    }
    return model, json.loads(json.dumps(about))


def dtype_of(model):
    """The dtype of a model and, where it is another one, of its cache."""
    cache = model.memory.cache_dtype
    return str(model.params.embed.dtype) + (f', cache {cache}' if cache else '')


def make_plan(args, model, weights_sha256, counts, tasks):
    """The suites.Plan and the provenance of its inputs."""
    from lct.cli.corpus import read_documents
    from lct.eval import provenance, suites
    from lct.eval.suites.plan import Evaluator, Plan, make_material
    from lct.eval.tasks import qa_documents

    texts = read_documents(args.haystack)
    paths = {name: getattr(args, name) for name in qa_documents.FILES if getattr(args, name, None)}
    material = make_material(model, texts, args.haystack, args.seed, qa_documents.read_sources(paths))
    plan = Plan(material, tuple(sorted(counts)), counts, tasks)
    about = {'samples_from': material.provenance(), 'documents_sha256': provenance.documents_hash(texts)}
    if paths:
        about['questions_sha256'] = provenance.files_hash(paths.values())
    about['data'] = None
    if args.data:
        data = pathlib.Path(bucket_cache.local(args.data))
        plan, files, problems = suites.SUITES[args.suite].with_data(plan, data, model)
        about['data'] = [str(args.data), provenance.files_hash(files)]
        warn(problems)
    if args.base:
        about |= {'base': args.base, 'base_sha256': hash_of_other(args, 'base', model)}
        plan = dataclasses.replace(plan, load_base=functools.partial(load_other, args, args.base))
    if args.evaluator:
        about |= {'evaluator': args.evaluator, 'evaluator_sha256': hash_of_other(args, 'evaluator', model)}
        is_model = about['evaluator_sha256'] == weights_sha256
        plan = dataclasses.replace(plan, evaluator=Evaluator(
            args.evaluator, functools.partial(load_other, args, args.evaluator), is_model))
    return plan, about


def load_other(args, name):
    return load_model(argparse.Namespace(**{**vars(args), 'model': name}))[0]


def hash_of_other(args, flag, model):
    """weights_hash of the model that a flag names. Refuses one with another tokenizer, and an evaluator with
    too few positions, before anything is measured."""
    from lct.data import tokenizer as tokenizers
    from lct.eval import provenance
    from lct.weights import llama_hf

    name = getattr(args, flag)
    folder = pathlib.Path(find_model(name))
    if tokenizers.load(folder).fingerprint != model.tokenizer.fingerprint:
        raise ValueError(f'--{flag} {name} has another tokenizer than {args.model}, so their losses do '
                         f'not compare; give {OTHERS[flag]}')
    positions, longest = llama_hf.read_config(folder).max_position_embeddings, max(sample_counts(args))
    if flag == 'evaluator' and positions < longest:
        raise ValueError(f'--evaluator {name} has {positions} positions, fewer than the longest length '
                         f'{longest}; give a model with more, or shorter lengths')
    return provenance.weights_hash(folder)


# ---------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------


def run_suite(suite, model, plan, workdir):
    """Run a suite, write its answers and return its result."""
    progress = Progress(suite.name)
    outcome = suite.run(model, plan, workdir / f'{suite.name}.jsonl', progress)
    progress.end()
    if model.prefixes is not None:
        model.prefixes.report()
    warn(outcome.problems)
    suite.export(workdir, outcome.rows)
    return outcome.result


def show(workdir, report):
    """Print the tables."""
    from lct.eval.report import tables

    print(tables.terminal(report))
    print(f'written: {workdir}/results.json, results.csv, report.html')


if __name__ == '__main__':
    run_script(main, resumes=True,
               urls=('--model', '--workdir', '--compare', '--data', '--haystack', '--base', '--evaluator'))
