"""Tasks of the lm-evaluation-harness on our mesh, and our own tasks in the harness.

    pip install '.[lm-eval]'
    python experiments/run_lm_eval.py --model DIR --mesh 1,1,8,1 --tasks hellaswag,gsm8k --limit 100
    python experiments/run_lm_eval.py --model smollm2 --suite ruler,needle --lengths 2048,4096 --samples 5

Tasks of your own are YAML files in --include-path, as the harness reads them. --suite names our suites, of
which every task and length becomes a task of the harness, scored 0..1. The table is printed; --output keeps
all results of the harness.
"""

import argparse
import json
import pathlib

from lct.cli.flags import length
from lct.cli.main import needs, run_script
from lct.cli.model import add_model_flags, load_model, mesh_context, parse_lengths
from lct.files import write_atomically

SUITES = ('ruler', 'needle')  # RULER's score applies to their answers


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser, mesh='auto')
    parser.add_argument('--tasks', help='names of the harness, separated by commas')
    parser.add_argument('--include-path', help='folder of YAML tasks')
    parser.add_argument('--suite', help=f'our own: {",".join(SUITES)}')
    parser.add_argument('--lengths', default='4096', help='tokens of our own tasks')
    parser.add_argument('--samples', type=int, default=20,
                        help='samples of each of our own tasks and lengths')
    parser.add_argument('--haystack', default='embedded', help='text of our own tasks')
    parser.add_argument('--seed', type=int, default=42, help='seed of the samples')
    parser.add_argument('--num-fewshot', type=int, help='solved examples before each question')
    parser.add_argument('--limit', type=int, help="documents of each of the harness's tasks")
    parser.add_argument('--length', type=length,
                        help='tokens that the model may read; default: its positions')
    parser.add_argument('--bos', action='store_true',
                        help='begin texts with the BOS, as add_bos_token of the harness')
    parser.add_argument('--output', type=pathlib.Path, help='JSON')
    run(parser.parse_args())


def run(args):
    """Run the tasks, print the table of the harness and return its results."""
    with needs("'.[lm-eval]'"):
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table

    from lct.cli.corpus import read_documents
    from lct.eval import lm_eval_adapter, suites
    from lct.eval.suites.plan import make_material

    names = args.suite.split(',') if args.suite else []
    if unknown := [name for name in names if name not in SUITES]:
        raise ValueError(f"unknown suite {unknown[0]!r}; those of our own that the harness can score are "
                         f"{', '.join(SUITES)}")
    if not (names or args.tasks):
        raise ValueError('there is nothing to run; name --tasks of the harness or a --suite of our own')
    with mesh_context(args.mesh, args.model):
        model, _ = load_model(args)
        tasks = args.tasks.split(',') if args.tasks else []
        if names:
            lengths = tuple(sorted(parse_lengths('--lengths', args.lengths)))
            material = make_material(model, read_documents(args.haystack), args.haystack, args.seed)
            plan = suites.Plan(material, lengths, dict.fromkeys(lengths, args.samples))
            items = [item for name in names for item in suites.SUITES[name].items(plan)]
            tasks += lm_eval_adapter.tasks(items)
        results = simple_evaluate(
            model=lm_eval_adapter.ShardedLM(model, args.length, args.bos, args.seed), tasks=tasks,
            task_manager=TaskManager(include_path=args.include_path, include_defaults=bool(args.tasks)),
            num_fewshot=args.num_fewshot, limit=args.limit, apply_chat_template=model.template is not None)
    print(make_table(results))
    if args.output:
        write_atomically(args.output, json.dumps(results, indent=1, default=str) + '\n')
    return results


if __name__ == '__main__':
    run_script(main, urls=('--model', '--haystack'))
