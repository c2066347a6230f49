"""All figures of this project with the file that holds each, as the page experiments/results/README.md.

    python experiments/checks/results_page.py          # prints it
    python experiments/checks/results_page.py --write  # writes it

tests/test_results_page.py compares the two, and the numbers of both README files with the page.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import extension_figures as extension
import result_figures as figures
import speed_figures
from result_figures import RESULTS, percent, read

INTRODUCTION = """# Results

Every figure of this project and the file in this folder that holds it; written by `checks/results_page.py`.
*Measured* figures come from two virtual CPU cores (Intel Xeon or AMD EPYC), *compiled* ones from a compiler
for the named accelerator, without one, and *predicted* ones from the planner. Nothing has run on a GPU or TPU
yet. The commands are in [experiments/README.md](../README.md), in the row that names the file. A figure is of
the version that wrote its file (`git log -1 FILE`); versions after it have not repeated every measurement.
"""


class Figure(NamedTuple):
    """A line of the page. figure: (content of the file) -> text."""

    kind: str
    claim: str
    file: str
    figure: Callable[[Any], str]


EXTENSION = (
    Figure('measured', 'main job, 512 to 8,192 tokens: recall probe, held-out keys and numbers',
           'laptop.json', extension.recall),
    Figure('measured', 'the same: needle of `evaluate.py`, 512 to 8,192, wording never trained on',
           'laptop.json', extension.suite_needle),
    Figure('measured', 'the same: five RULER tasks, wording never trained on, two prompts each',
           'laptop.json', extension.suite_ruler),
    Figure('measured', 'the same: loss by position, held-out documents', 'laptop.json', extension.long_loss),
    Figure('measured', 'the same: size and time', 'laptop.json', extension.main_job),
    Figure('measured', '512 to 131,072 tokens, 256 times the native length: recall probe by length, five '
           'prompts each', 'laptop_128k.json', extension.recall_by_length),
    Figure('measured', 'the same: needle and RULER to 8,192, wordings never trained on; time',
           'laptop_128k.json', extension.tasks_after),
    Figure('measured', 'adapters and norms alone: recall probe', 'laptop_lora.json', extension.adapters),
    Figure('measured', 'stages that end at a gate: recall probe', 'laptop_gated.json', lambda d:
           f'{extension.recall(d)}, in {d["summary"]["steps"]} steps in place of 160'),
    Figure('measured', 'one stage at equal tokens: recall probe', 'laptop_one_shot.json', extension.recall),
    Figure('measured', 'adapters, gate, one stage: loss at 4K-8K, on the same windows',
           '', extension.earlier_losses),
    Figure('measured', 'base model inside its 512 tokens: needle, wording never trained on',
           'base.json', lambda d:
           f'{sum(map(sum, d["needle"]["scores"])) * 2:.0f} of {sum(map(sum, d["needle"]["samples"]))}'),
    Figure('measured', 'the same: RULER, 20 samples a task', 'base.json', extension.base_ruler),
    Figure('measured', 'recipes from 512 to 8,192 at equal tokens, percent of recall probe, needle and RULER',
           'recipe_study.json', extension.recipe_study),
    Figure('measured', 'divisors of RoPE found without training: loss of answers at 8,192, first and last '
           'generation', 'rope_factors.json', lambda d:
           f'{d["generations"][0][0]:.2f} and {d["generations"][-1][0]:.2f} nats'),
    Figure('measured', 'theta for 4,096 tokens, three seeds each: loss at 2K-4K and recall beyond 512',
           'theta_search.json', extension.theta_table),
    Figure('measured', 'SmolLM2-135M at twice its length, scaling alone: loss at 8K-16K',
           'theta_positions.json', extension.scaled_loss),
    Figure('measured', 'SmolLM2-135M trained to 16,384 tokens, beside the model as it was and scaled without '
           'training: RULER, percent with 95% intervals', 'real_model.json', lambda d:
           extension.real_model_scores(d, 'ruler')),
    Figure('measured', 'the same: the trained model less a control on the same prompts of RULER',
           'real_model.json', lambda d: extension.real_model_differences(d, 'ruler')),
    Figure('measured', 'the same: needle', 'real_model.json', lambda d:
           extension.real_model_scores(d, 'needle')),
    Figure('measured', 'the same: loss, two texts', 'real_model.json', extension.real_model_loss),
    Figure('measured', 'SmolLM2-135M: RULER, 20 samples a task',
           'smollm2/results.json', extension.smollm2_ruler),
    Figure('measured', 'SmolLM2-135M: RULER and comprehension in one report, 6 samples a task to 1 at 8K',
           'smollm2_tasks/results.json', extension.both_suites),
    Figure('measured', 'SmolLM2-135M: needles found, 1K to 8K', 'smollm2/results.json', lambda d:
           percent(d['results']['needle']['mean'])),
)

SPEED = (
    Figure('measured', 'ring attention against BAIR, 8 virtual devices, CPU time, forward + backward',
           'speed_attention.jsonl', figures.against_bair('cpu', 8)),
    Figure('measured', 'the same on 2 virtual devices, wall time',
           'speed_attention.jsonl', figures.against_bair('wall', 2)),
    Figure('compiled', 'transfers of ring attention, forward and backward', '', figures.transfers),
    Figure('compiled', '8B at 1M on 512 L40S: gathers and reductions of weights and gradients',
           'compile_l40s_512.json', figures.gathers),
    Figure('compiled', 'what the matmuls of a training step multiply, 8B on one and 8 H100 and on 512 L40S, '
           'without attention', '', speed_figures.matmul_types),
    Figure('predicted', 'memory of a device in a training step, over the compiled one', 'plan_memory.json',
           figures.plan_memory),
    Figure('compiled', '8B at 5M tokens on 8 H100, in passes over the queries and without',
           'plan_memory.json', figures.passes),
    Figure('predicted', 'keys and values of 1M tokens of Llama-3 8B', '', figures.cache_sizes),
    Figure('compiled', 'its temporaries relative to BAIR (for CPUs)',
           'memory_attention.jsonl', figures.bair_memory),
    Figure('measured', 'an attention tile beside zigzag, forward + backward',
           'layouts.json', figures.layouts),
    Figure('predicted', 'zigzag: work of the busiest device over the mean, rings of 2 to 64',
           'balance.json', lambda d:
           f'{max(row["max_over_mean"]["zigzag"] for row in d if "ring_size" in row):.3f}x'),
    Figure('measured', 'the loss in chunks', 'bench_blockwise.json', figures.bench_row('loss', 'lct:512')),
    Figure('measured', 'the FFN in chunks', 'bench_blockwise.json', figures.bench_row('ffn', 'lct:512')),
    Figure('measured', 'SmolLM2 beside transformers, one device: prompt and a token, times theirs',
           'bench_generate.json', speed_figures.beside_transformers),
    Figure('measured', 'the same on a ring of two', 'bench_generate_ring.json',
           speed_figures.beside_transformers),
    Figure('measured', 'a training step on a ring of two beside torch and transformers',
           'bench_step.json', speed_figures.training_step),
    Figure('measured', 'the FFN, forward and backward, as a share of the matmul peak',
           'bench_ffn.json', lambda d: f'{d["fraction"]:.0%}'),
    Figure('measured', 'a token of 32K on 8 virtual devices against 4K on one, per device',
           'decode.json', figures.growing_ring),
    Figure('measured', '1,000 decoded tokens against the forward pass, largest difference of a logit',
           'decode.json', lambda d:
           f'{max(one["1000 decoded"] for one in d["exact"].values()):.1e}'),
    Figure('measured', 'a token with a cache in int8 against float32, shape of SmolLM2',
           'decode.json', figures.int8_speed),
    Figure('measured', 'SmolLM2 served: first token and rate beside transformers',
           'bench_serve.json', figures.serve_medians),
    Figure('measured', 'a process that reads a text, and one that finds it on disk',
           'sessions.json', figures.sessions),
    Figure('measured', 'evaluations beside version f9ca58e, time and CPU time',
           'evaluate_speed.json', figures.speed_of_evaluations),
    Figure('measured', '`evaluate.py --session`: what a second call reuses; without one, first, second call',
           'evaluate_prefixes.json', figures.prefixes),
    Figure('measured', 'fingerprints of a checkpoint, of the time of a save and restore',
           'checkpoint.json', lambda d:
           f'{percent(d["share"][0])}, CPU time {percent(d["share"][1])}'),
    Figure('measured', 'loading weights: peak memory over the parameters', 'load.json', figures.loading),
    Figure('measured', 'tokenizing 100 MB beside the tokenizers library alone',
           'tokenize.json', figures.tokenizing),
    Figure('measured', 'padding of packed rows, 8K to 4M tokens', 'data.json', lambda d:
           f'at most {percent(max(row["waste"] for row in d["waste"] if row["mode"] == "packed"), 2)}'),
)

CORRECTNESS = (
    Figure('measured', 'what small runs do when they are broken', 'drills.json', figures.drills),
    Figure('measured', 'random evaluations, interrupted and continued, against a plain rerun',
           'evaluations.json', figures.evaluations),
    Figure('measured', 'answers of SmolLM2 in RULER and comprehension beside transformers, token for token',
           'greedy.json', figures.greedy),
    Figure('measured', 'every task of every suite, 1K to 1M, with oracle, mute and half readers',
           'tasks.json', figures.tasks),
    Figure('measured', 'clients of the server that go away or send nonsense', 'server.json', figures.server),
    Figure('measured', 'the next question after Ctrl-C in `ask.py`', 'interrupts.json', lambda d:
           f'right after {d["interrupts"]} of {d["interrupts"]} interrupts (' +
           ', '.join(f'{number} while {phase}' for phase, number in d['while'].items()) + ')'),
    Figure('measured', 'loss with a cache in int8, largest difference of a position bin to 8K, SmolLM2',
           'caches_smollm2.json', figures.cache_loss),
    Figure('measured', 'needles (2K, 4K) and RULER (1K) with a cache in int8 beside the full one, SmolLM2',
           'caches_smollm2_tasks.json', figures.cache_tasks),
    Figure('measured', 'loss with frozen weights in 8 bits and in bfloat16, over that in float32',
           'frozen.json', figures.frozen),
    Figure('measured', 'loss with a cache in int8, largest difference to 8K, the model of the main job',
           'caches_laptop.json', figures.cache_loss),
    Figure('measured', '1, 2 and 4 processes, killed and continued: largest difference of a loss',
           'processes.json', lambda d:
           f'{max(row["loss_difference"] for row in d["rows"]):.1e}'),
    Figure('measured', 'weights, token ids and texts through all pairs of formats', 'formats.json', lambda d:
           f'all kept in {len(d["rows"])} of {len(d["rows"])} round trips'),
    Figure('measured', 'from a folder of text to an extension; plans accepted; mistakes explained',
           'road.json', figures.road),
)


def paper_lines() -> Iterator[str]:
    for path in sorted((RESULTS / 'papers').glob('*.json')):
        paper = json.loads(path.read_text())
        for claim in paper['claims']:
            cells = claim['kind'], f'{paper["paper"]}: {claim["text"]}', claim['published'], claim['found']
            cells = *(str(cell).replace('|', '/') for cell in cells), claim['agrees'], f'`papers/{path.name}`'
            yield f'| {" | ".join(cells)} |'


def page() -> str:
    """The page in markdown."""
    lines = [INTRODUCTION]
    for title, rows in (('Extension and reading', EXTENSION), ('Speed and memory', SPEED),
                           ('Correctness and endurance', CORRECTNESS)):
        lines += [f'## {title}\n', '| kind | claim | figure | file |', '|:--|:--|:--|:--|']
        for one in rows:
            content = read(one.file) if one.file else None
            file = f'`{one.file}`' if one.file else ''
            lines.append(f'| {one.kind} | {one.claim} | {one.figure(content)} | {file} |')
        lines.append('')
    lines += ['## Papers\n', 'What papers claim beside what is found here; each file has the reasons.\n']
    lines += ['| kind | claim | published | found | agrees | file |', '|:--|:--|:--|:--|:--|:--|']
    lines += paper_lines()
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', action='store_true', help='write experiments/results/README.md')
    if parser.parse_args().write:
        (RESULTS / 'README.md').write_text(page())
    else:
        sys.stdout.write(page())


if __name__ == '__main__':
    main()
