"""Recipes of context extension at equal tokens: every arm from the same base, beside its control.

    python experiments/studies/recipe_study.py --workdir runs/study
    python experiments/studies/recipe_study.py --workdir runs/study --arms yarn --seeds 1

An arm is a run of extend.py: a config of configs/study with settings, whose command stands in the results.
All arms train on equally many tokens; for one seed they draw their rows from one stream and answer the same
prompts, so differences from the control are paired by seed. A recipe is measured by what extend.py measures:
loss by position over held-out documents, the recall probe, and needles and RULER tasks in wordings that no
training row has. Stop it at any time: the same command continues, and a run that is finished is not repeated.
Writes recipe_study.json and recipe_study.png into the work directory.
"""

import argparse
import json
import math
import pathlib
import shlex
import shutil
import time
from typing import NamedTuple

import child_script
import recipe_report
import study_corpora

from lct import environment, json_files
from lct.cli.config import load_config, make_run, set_field
from lct.cli.main import run_script
from lct.cli.model import find_model, parse_ints
from lct.cli.paths import experiments_folder
from lct.files import write_atomically
from lct.ops.theta import ntk_theta
from lct.text import clock
from lct.weights import llama_hf

CONFIGS = experiments_folder() / 'configs' / 'study'
FACTORS = experiments_folder() / 'results' / 'rope_factors.json'
CONTROL = 'unchanged_theta'
CORPORA = pathlib.Path('runs/study/corpora')
BASE_FILES = ('needle_base.json', 'loss_base.json', 'needle_suite_base.json', 'ruler_suite_base.json')
MAX_RESULTS = 10**8  # bytes


class Arm(NamedTuple):
    """control: the arm that it is compared with. config: of configs/study. settings: of its --set flags."""

    control: str
    settings: tuple[str, ...] = ()
    config: str = 'one_stage'


def arms(corpora: pathlib.Path = CORPORA) -> dict[str, Arm]:
    """{name: Arm}: choices of RoPE beside the unchanged theta, schedules beside one stage, then rows of text
    over the token stores in corpora beside documents that attend only to themselves."""
    folder = find_model('base')
    base = llama_hf.read_config(folder)
    scale = load_config(CONFIGS / 'one_stage.py').stages[0].seq_len / base.max_position_embeddings
    ntk = round(ntk_theta(base.rope_theta, scale, head_dim=base.head_dim))
    keep, scaled = 'stages.0.theta=keep', 'stages.0.scaling.type='
    found = {
        CONTROL: Arm(CONTROL, (keep,)),
        'position_interpolation': Arm(CONTROL, (keep, scaled + 'linear')),
        'ntk_aware': Arm(CONTROL, (f'stages.0.theta={ntk}',)),
        'dynamic_ntk': Arm(CONTROL, ('stages.0.theta=dynamic_ntk',)),
        'critical_base': Arm(CONTROL, ('stages.0.theta=critical_base',)),
        'yarn': Arm(CONTROL, (keep, scaled + 'yarn')),
    }
    if FACTORS.exists():
        factors = ','.join(map(str, json.loads(FACTORS.read_text())['factors']))
        ones = ','.join(['1.0'] * (base.head_dim // 2))
        found['searched_factors'] = Arm(CONTROL, (
            keep, scaled + 'longrope', f'stages.0.scaling.long_factor={factors}',
            f'stages.0.scaling.short_factor={ones}'))

    def over(store):
        return (f'corpus={corpora / store}', f'evaluation_corpus={corpora / study_corpora.HELD_OUT}')

    return found | {
        'two_stages': Arm('critical_base', config='two_stages'),
        'ladder': Arm('critical_base', config='ladder'),
        'mostly_short': Arm('yarn', config='mostly_short'),
        'document_mask': Arm('document_mask', over(study_corpora.TRAINING), 'over_store'),
        'joined': Arm('document_mask', (*over(study_corpora.TRAINING), 'sequences=joined'), 'over_store'),
        'hard_negatives': Arm('document_mask', over(study_corpora.HARD_NEGATIVES), 'over_store'),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/study'))
    parser.add_argument('--arms', help='names with commas between them; default: all')
    parser.add_argument('--seeds', default='1,2,3', help='numbers with commas between them')
    args = parser.parse_args()
    corpora = args.workdir / CORPORA.name
    known, seeds = arms(corpora), parse_ints('--seeds', args.seeds)
    chosen = args.arms.split(',') if args.arms else list(known)
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f'--arms {unknown[0]} is not one of {", ".join(known)}')
    tokens = check_tokens(known)
    if any(known[name].config == 'over_store' for name in chosen):
        config = load_config(CONFIGS / 'one_stage.py')
        study_corpora.make(corpora, config.corpus, config.corpus_bytes, config.held_out)
    jobs = [(name, seed) for seed in seeds for name in chosen]
    began, computed = time.monotonic(), 0
    for i, (name, seed) in enumerate(jobs):
        left = (time.monotonic() - began) / computed * (len(jobs) - i) if computed else math.nan
        print(f'study: run {i + 1} of {len(jobs)}: {name}, seed {seed}'
              + (f', about {clock(left)} left' if computed else ''), flush=True)
        computed += run_arm(args.workdir, name, known[name], seed)
    report(args.workdir, known, tokens)


def check_tokens(known) -> int:
    """The training tokens of every arm.

    Raises:
      ValueError: if they differ.
    """
    tokens = {}
    for name, arm in known.items():
        config = load_config(CONFIGS / f'{arm.config}.py')
        for setting in arm.settings:
            set_field(config, setting)
        tokens[name] = sum(stage.num_steps * stage.tokens_per_step for stage in make_run(config).stages)
    if len(set(tokens.values())) > 1:
        counts = ', '.join(f'{name} {count:,}' for name, count in tokens.items())
        raise ValueError(f'the arms train on different numbers of tokens ({counts}); change steps or rows '
                         'until they are equal')
    return tokens[CONTROL]


def command_of(name, arm, seed, workdir):
    """The extend.py of an arm with a seed, as a list."""
    settings = [*arm.settings, f'seed={seed}', f'name={name}']
    return ['experiments/extend.py', '--config', f'experiments/configs/study/{arm.config}.py', '--workdir',
            str(workdir), *(part for setting in settings for part in ('--set', setting))]


def run_arm(workdir, name, arm, seed):
    """Run extend.py unless it has finished before. Returns whether it ran."""
    folder = workdir / f'{name}_seed{seed}'
    if (folder / 'results.json').exists():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for file in BASE_FILES:  # the base answers the prompts of a seed once
        source = workdir / f'{CONTROL}_seed{seed}' / file
        if source.exists() and not (folder / file).exists():
            shutil.copy(source, folder / file)
    _, flag, config, *others = command_of(name, arm, seed, folder)
    child_script.call('extend.py', flag, experiments_folder().parent / config, *others)
    return True


def report(workdir, known, tokens):
    """Write recipe_study.json and the figure, and print the table, of all finished runs in workdir."""
    results = {}
    for path in sorted(workdir.glob('*_seed*/results.json')):
        name, _, seed = path.parent.name.rpartition('_seed')
        if name in known:
            results[name, int(seed)] = json_files.read_json(path, max_bytes=MAX_RESULTS)
    summary = {
        **recipe_report.summarise(results, {name: arm.control for name, arm in known.items()}),
        'tokens_of_a_run': tokens, 'versions': environment.versions(), 'command': environment.command(),
        'commands': {name: 'python ' + shlex.join(command_of(name, arm, 1, f'runs/study/{name}_seed1'))
                     for name, arm in arms().items()},
    }
    write_atomically(workdir / 'recipe_study.json', json.dumps(summary, indent=1) + '\n')
    recipe_report.figure(summary, workdir / 'recipe_study.png')
    print(recipe_report.summary_table(summary))
    print(f'wrote {workdir / "recipe_study.json"} and recipe_study.png')


if __name__ == '__main__':
    run_script(main)
