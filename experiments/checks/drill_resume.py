"""Drills of continued runs: at every step, with another config, twice at once, and with wrong divisions."""

import copy
import json
import pathlib
import shutil
import signal
import sys
import time

from drill import TRAINING, Failed, drill, expect, finish, start

EXPERIMENTS = pathlib.Path(__file__).parents[1]
EXTEND, SMOKE = EXPERIMENTS / 'extend.py', EXPERIMENTS / 'configs' / 'smoke.py'
FAST = '--xla_cpu_opt_preset=fast_compile'  # programs of so few steps cost more to compile than to run
DEVICES = {'XLA_FLAGS': f'--xla_force_host_platform_device_count=8 {FAST}', 'JAX_PLATFORMS': 'cpu',
           'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
STEPS = 10  # of each of two stages
STAGE = {'batch_size': 4, 'accumulation': 1, 'num_steps': STEPS, 'learning_rate': 1e-3, 'warmup_steps': 2,
         'mesh': (1, 1, 4, 1), 'mixture': {'text': 0.7, 'copy': 0.3}, 'layout': 'zigzag',
         'memory': {'remat': 'none', 'query_chunk': 8, 'key_chunk': 8, 'loss_chunk': 8, 'ffn_chunks': 1}}
CONFIG = {'name': 'drill', 'seed': 0, 'param_dtype': 'float32', 'checkpoint_every': 1, 'keep_checkpoints': 99,
          # eps far above float32's rounding of a gradient: it must not decide the direction of a step
          'optimizer': {'weight_decay': 0.01, 'eps': 1e-4}, 'stages': [
              {**copy.deepcopy(STAGE), 'name': 'short', 'seq_len': 64, 'theta': 'keep'},
              {**copy.deepcopy(STAGE), 'name': 'long', 'seq_len': 128, 'theta': 'dynamic_ntk'}]}
TOLERANCE = 1e-4  # of the weights, relative to the largest: sums in another order, over five steps of AdamW

# What changes when the run continues after step 15, in the second stage; whether the weights stay bit-equal.
SAME, CLOSE = 'the same bits', f'within {TOLERANCE:g}'
CHANGES = [
    ({'name': 'other', 'checkpoint_every': 3, 'keep_checkpoints': 2}, SAME),
    ({'stages.0.mesh': (1, 1, 2, 1), 'stages.1.mesh': (1, 1, 2, 1)}, CLOSE),
    ({'stages.1.mesh': (2, 2, 1, 1)}, CLOSE), ({'stages.1.mesh': (1, 1, 1, 1)}, CLOSE),
    ({'stages.1.memory.remat': 'full'}, CLOSE), ({'stages.1.memory.query_chunk': 16}, CLOSE),
    ({'stages.1.memory.loss_chunk': 16}, CLOSE), ({'stages.1.memory.ffn_chunks': 2}, CLOSE),
    ({'stages.1.batch_size': 2, 'stages.1.accumulation': 2}, CLOSE),
    ({'stages.1.layout': 'contiguous'}, CLOSE),
    ({'stages.1.memory.strategy': 'all_gather_ring', 'stages.1.memory.node_size': 2}, CLOSE),
]
REFUSED = [
    {'seed': 1}, {'stages.1.batch_size': 8}, {'stages.0.learning_rate': 1e-4}, {'stages.1.seq_len': 256},
    {'stages.0.num_steps': 5}, {'optimizer.weight_decay': 0.1}, {'param_dtype': 'bfloat16'},
]

DIVISIONS = {
    'stages.0.mesh=1,2,1,1': 'use 2', 'stages.0.mesh=1,1,1,3': 'use a degree of 2 or 4',
    'stages.0.mesh=1,1,1': 'four positive degrees', 'stages.0.mesh=1,1,64,1': 'such as (1, 1, 8, 1)',
    'stages.0.memory.ffn_chunks=5': 'use ffn_chunks 4 or 8', 'stages.0.layout=spiral': 'is not one of',
}


@drill(22, 'continued after every step of two stages, over epochs')
def every_step(folder: pathlib.Path) -> str:
    ended = finish(start([__file__, 'every_step', folder], DEVICES), 900)
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    return ended.stdout[-1]


@drill(22, 'continued with another mesh, remat policy, chunks, learning rate, stages')
def other_configs(folder: pathlib.Path) -> str:
    ended = finish(start([__file__, 'other_configs', folder], DEVICES), 900)
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    return ended.stdout[-1]


@drill(22, 'extend.py with 8 devices, then with 2 and other evaluations')
def fewer_devices(folder: pathlib.Path) -> str:
    small = ['corpus_bytes=500000', 'needle.lengths=256', 'needle.depths=0.5', 'loss.windows=2',
             'checkpoint_every=1']
    command = [EXTEND, '--config', SMOKE, '--workdir', folder / 'run']
    command += [word for field in small for word in ('--set', field)]
    process = start(command)
    deadline = time.monotonic() + 900
    while process.poll() is None and not (folder / 'run/checkpoints/4').exists():
        expect(time.monotonic() < deadline, 'no checkpoint of step 4 after 900 s')
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    first = finish(process, 900)
    expect(first.status == 130, f'status {first.status}: {first.stderr[-1:]}')
    changed = ['--mesh', '1,1,2,1', '--set', 'stages.1.memory.remat=full', '--set', 'needle.lengths=128']
    second = finish(start([*command, *changed]), 900)
    expect(second.status == 0, f'status {second.status}: {second.stderr[-1:]}')
    lines = [line for line in second.stdout if line.startswith('config changed after step ')]
    expect(len(lines) == 1 and 'stages.1.mesh [1, 1, 8, 1] -> [1, 1, 2, 1]' in lines[0], f'no line: {lines}')
    again = [line for line in second.stdout if 'measured with other settings' in line]
    expect(len(again) == 1 and 'needle_base.json' in again[0], f'measured again: {again}')
    report = json.loads((folder / 'run/results.json').read_text())
    expect(report['num_devices'] == 2 and report['config_changes'], 'results.json lacks the changes')
    return f'finished on 2 devices after {lines[0].split()[4].rstrip(":")} steps on 8, base measured again'


@drill(23, 'two runs in one work directory')
def two_runs(folder: pathlib.Path) -> str:
    command = [TRAINING, folder / 'run', '--steps', 5000]
    first, deadline = start(command), time.monotonic() + 900
    while not (folder / 'run/checkpoints').exists():
        expect(first.poll() is None and time.monotonic() < deadline, 'the first run did not begin')
        time.sleep(0.01)
    second = finish(start(command), 900)
    expect(first.poll() is None, 'the first run ended before the second')
    first.send_signal(signal.SIGTERM)
    stopped = finish(first, 900)
    expect(second.status == 1 and len(second.stderr) == 1 and 'another process runs in' in second.stderr[0],
           f'the second ended with status {second.status}: {second.stderr[-1:]}')
    expect(stopped.status == 130, f'the first ended with status {stopped.status}: {stopped.stderr[-1:]}')
    return 'the second is refused in one line, the first goes on'


@drill(16, 'sizes that do not divide')
def wrong_divisions(folder: pathlib.Path) -> str:
    ended = finish(start([EXTEND, '--config', SMOKE, '--workdir', folder / 'run', '--set',
                          'stages.1.seq_len=1000'], DEVICES), 900)
    expect(ended.status == 1 and len(ended.stderr) == 1 and 'use 992 or 1008' in ended.stderr[0],
           f'status {ended.status}: {ended.stderr[-3:]}')
    expect(not (folder / 'run/config.json').exists(), 'a run was begun')
    ended = finish(start([__file__, 'wrong_divisions', folder], DEVICES), 900)
    expect(ended.status == 0, f'status {ended.status}: {ended.stderr[-1:]}')
    return ended.stdout[-1]


# ---------------------------------------------------------------------------------------------------
# In a process of its own with the environment DEVICES: python drill_resume.py NAME FOLDER
# ---------------------------------------------------------------------------------------------------


def with_fields(changes):
    """A copy of CONFIG with fields set, {'stages.1.mesh': value}."""
    config = copy.deepcopy(CONFIG)
    for name, value in changes.items():
        *parents, last = (int(key) if key.isdigit() else key for key in name.split('.'))
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


def train(folder, config, documents=6):
    """Train in a work directory as extend.py does; returns the weights as one float array [n]."""
    import jax
    import numpy as np
    from ml_collections import ConfigDict

    from lct.cli.config import as_plain, make_run
    from lct.data import tokenizer
    from lct.data.batches.memory_source import MemorySource
    from lct.models import llama
    from lct.ops.rope import RopeConfig
    from lct.train import loop
    from lct.train.workdir import lock_workdir

    loop.measured_peak = lambda dtype: 1e12
    model = llama.LlamaConfig(
        vocab_size=258, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        max_position_embeddings=64, tie_embeddings=True, rope=RopeConfig(theta=1000.0))
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 256, int(n)).astype(np.int32) for n in rng.integers(100, 400, documents)]
    settings = ConfigDict({**config, 'stages': tuple(map(ConfigDict, config['stages']))})
    lock = lock_workdir(folder, as_plain(settings), may_change=True)
    try:
        rows = MemorySource(texts, tokenizer.load('bytes'), seed=config['seed'])
        _, params, _ = loop.train(
            make_run(settings), model, lambda: llama.init(model, jax.random.key(0)), rows, folder)
        return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(params)]), rows.state
    finally:
        lock.close()


def cut(whole, folder, step):
    """Copy a work directory as it was after a step."""
    shutil.copytree(whole, folder)
    for path in (folder / 'checkpoints').iterdir():
        if path.name.isdigit() and int(path.name) > step:
            shutil.rmtree(path)


def run_every_step(folder):
    mesh = {f'stages.{i}.mesh': (1, 1, 2, 1) for i in range(2)}
    whole, state = train(folder / 'whole', with_fields(mesh))
    for step in range(1, 2 * STEPS):
        cut(folder / 'whole', folder / str(step), step)
        weights, _ = train(folder / str(step), with_fields({**mesh, 'checkpoint_every': 7}))
        if weights.tobytes() != whole.tobytes():
            raise Failed(f'continued after step {step}: other weights')
        rows = (folder / str(step) / 'metrics/metrics.jsonl').read_text().splitlines()
        if [json.loads(row)['step'] for row in rows] != list(range(1, 2 * STEPS + 1)):
            raise Failed(f'continued after step {step}: the metrics repeat or skip a step')
        shutil.rmtree(folder / str(step))
    return (f'equal weights from each of {2 * STEPS - 1} steps, stage boundary after {STEPS}, '
            f'{state["epoch"]} epochs')


def run_other_configs(folder):
    whole, _ = train(folder / 'whole', CONFIG)
    largest = abs(whole).max()
    worst = 0.0
    for i, (changes, wanted) in enumerate(CHANGES):
        cut(folder / 'whole', folder / str(i), 15)
        weights, _ = train(folder / str(i), with_fields(changes))
        difference = abs(weights - whole).max() / largest
        worst = max(worst, difference)
        print(f'{changes}: largest difference {difference:.1e}', flush=True)
        if difference > (0 if wanted is SAME else TOLERANCE):
            raise Failed(f'{changes}: weights differ by {difference:.1e}, not {wanted}')
    cut(folder / 'whole', folder / 'refused', 15)
    for changes in REFUSED:
        try:
            train(folder / 'refused', with_fields(changes))
        except ValueError as error:
            if all(name in str(error) for name in changes) and 'another config' in str(error):
                continue
            raise Failed(f'{changes}: {error}') from error
        raise Failed(f'{changes} was not refused')
    ahead = {'stages.1.learning_rate': 1e-4, 'stages.1.num_steps': 4, 'stages.1.seq_len': 256}
    for step, changes in ((15, {'stages.1.learning_rate': 1e-4}), (10, ahead)):
        cut(folder / 'whole', folder / f'ahead{step}', step)
        weights, _ = train(folder / f'ahead{step}', with_fields(changes))
        if not 1e-6 < abs(weights - whole).max() < 1:
            raise Failed(f'{changes} had no effect')
    return (f'{len(CHANGES)} changes continue, weights within {worst:.0e}; {len(REFUSED)} are refused by '
            'name; rate and length of what is left change')


def run_wrong_divisions(_folder):
    """What extend.py checks first, with the base model of the smallest config."""
    from lct import sharding
    from lct.cli.config import load_config, make_run, set_field
    from lct.cli.model import find_model
    from lct.train import stages
    from lct.weights import llama_hf

    for setting, remedy in DIVISIONS.items():
        config = load_config(SMOKE)
        set_field(config, setting)
        try:
            settings = make_run(config)
            for stage in settings.stages:
                sharding.make_mesh(stage.mesh)
            stages.configs(settings.stages, llama_hf.read_config(find_model(config.model_folder)))
        except ValueError as error:
            if remedy not in str(error) or len(str(error).splitlines()) != 1:
                raise Failed(f'{setting}: {error}') from error
        else:
            raise Failed(f'{setting} was not refused')
    return f'{len(DIVISIONS) + 1} refused before anything is computed, with the nearest values that divide'


if __name__ == '__main__':
    run = {'every_step': run_every_step, 'other_configs': run_other_configs,
           'wrong_divisions': run_wrong_divisions}[sys.argv[1]]
    print(run(pathlib.Path(sys.argv[2])))
