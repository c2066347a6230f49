"""The planner's command: plans in order, a config that trains, the published table, bad flags."""

import dataclasses
import pathlib
import re
import time

import plan as planner
import pytest

from lct.cli import memory_check, plan_run
from lct.cli.config import load_config, make_run
from lct.models.llama_sizes import LLAMA3_8B, LLAMA3_70B, SIZES
from lct.plan import cost, hardware, search, timing
from lct.train import stages

EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
M = 2**20
L40S = hardware.find('l40s')
GRADIENT = {'gradient_llama3_8b': LLAMA3_8B, 'gradient_llama3_70b': LLAMA3_70B}


@pytest.fixture(scope='module')
def found():
    start = time.perf_counter()
    result = search.search(search.Job(LLAMA3_8B, M, 8), L40S, 512)
    return result, time.perf_counter() - start


def test_a_search_for_512_devices_takes_seconds(found):
    assert found[1] < 5


def test_plans_are_valid_and_sorted(found):
    plans = found[0].plans
    assert [p.seconds for p in plans] == sorted(p.seconds for p in plans)
    for plan in plans:
        plan.step.check()
        assert plan.step.devices == 512 and plan.step.tokens == 8 * M
        assert plan.buffers.peak == search.needed_by(plan.step, L40S).peak <= search.USABLE * L40S.memory
    assert {p.step.memory.attention.strategy for p in plans} >= {'ring', 'double_ring', 'all_to_all_ring'}


def test_rejections_give_reasons(found):
    result = found[0]
    reasons = result.reasons()
    assert sum(count for count, _, _ in reasons) == len(result.rejections)
    text = ' '.join(reason for _, reason, _ in reasons)
    assert 'largest buffer' in text and 'rings side by side' in text and 'all_to_all gives each' in text
    for rejection in result.rejections:
        assert rejection.excess is None or rejection.excess > 0


def test_the_best_plan_beats_the_recipes_own_mesh(found):
    step = recipe_steps('gradient_llama3_8b')[3][0]
    assert step.tokens == 8 * M and found[0].plans[0].seconds <= sum(timing.seconds(step, L40S).values())


# ---------------------------------------------------------------------------------------------------
# Gradient's tables
# ---------------------------------------------------------------------------------------------------


def recipe_steps(name):
    """[(Step, number of steps, published minutes)] of a recipe."""
    config = load_config(next((EXPERIMENTS / 'configs').rglob(f'{name}.py')))
    return [
        (cost.Step(GRADIENT[name], stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation,
                   dataclasses.replace(stage.memory, dtype='bfloat16')),
         stage.num_steps, raw.published.minutes)
        for stage, raw in zip(make_run(config).stages, config.stages)]


def minutes(name):
    """[(predicted, published)] of every stage."""
    return [(sum(timing.seconds(step, L40S).values()) * steps / 60, published)
            for step, steps, published in recipe_steps(name)]


@pytest.mark.parametrize('name', GRADIENT)
def test_published_minutes_within_a_factor_of_two(name):
    for predicted, published in minutes(name):
        assert 0.5 <= predicted / published <= 2


@pytest.mark.parametrize('name', GRADIENT)
def test_stages_in_the_published_order_except_for_one_pair(name):
    """A ring of 32 GPUs took Gradient longer than anything of one network constant explains: the 8B model's
    262K and 4194K change places, and the 70B model's 524K and 1048K."""
    rows = minutes(name)
    pairs = [(a, b) for i, a in enumerate(rows) for b in rows[i + 1:]]
    assert sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs) <= 1


@pytest.mark.parametrize('name', GRADIENT)
def test_the_table_of_a_recipe(name, capsys):
    planner.run(['--config', str(next((EXPERIMENTS / 'configs').rglob(f'{name}.py'))), '--price-per-hour',
                 '2'])
    text = capsys.readouterr().out
    for predicted, published in minutes(name):
        assert re.search(rf' {predicted:.0f} +{published} +{predicted / published:.2f} ', text)
    assert 'matmul 0.5' in text and 'device-hours' in text and 'published order' in text


# ---------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------


ONE = ['--model', 'llama3-8b', '--context', '1M', '--hardware', 'l40s', '--devices', '512']


def test_a_plan_is_printed_and_its_config_trains_what_was_planned(tmp_path, capsys):
    path = tmp_path / 'planned.py'
    planner.run([*ONE, '--stages', '1M', '--rows', '8', '--price-per-hour', '1.5', '--output', str(path)])
    text = capsys.readouterr().out
    for word in ('PREDICTED', 'moments of AdamW', 'attention', 'tokens/s', 'utilisation', 'days',
                 'per device and hour'):
        assert word in text
    best = search.best(search.Job(LLAMA3_8B, M, 8), L40S, 512).plans[0]
    run = make_run(load_config(path))
    (stage,) = run.stages
    assert (run.param_dtype, stage.memory.dtype) == (best.step.dtype,
                                                     best.step.memory.dtype) == ('float32', 'bfloat16')
    assert (stage.mesh, stage.seq_len, stage.batch_size, stage.accumulation, stage.memory) == (
        best.step.mesh, M, best.step.batch_size, best.step.accumulation, best.step.memory)
    assert stage.num_steps * stage.tokens_per_step == pytest.approx(plan_run.DEFAULT_TOKENS, rel=0.02)
    assert stages.configs(run.stages, LLAMA3_8B)[0].rope_theta == 3_580_165_449  # the critical base at 1M
    recipe = load_config(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py')
    assert set(load_config(path)) == {*recipe, 'param_dtype', 'hardware', 'devices', 'evaluate'}


def test_a_recipe_planned_for_other_devices(tmp_path, capsys):
    path = tmp_path / 'planned.py'
    recipe = EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py'
    planner.run(['--config', str(recipe), '--hardware', 'h200', '--devices', '64', '--output', str(path)])
    theirs, ours = (make_run(load_config(p)).stages for p in (recipe, path))
    assert [s.tokens_per_step for s in ours] == [s.tokens_per_step for s in theirs]
    assert all(s.mesh[0] * s.mesh[1] * s.mesh[2] * s.mesh[3] == 64 for s in ours)
    assert [c.rope_theta for c in stages.configs(ours, LLAMA3_8B)] == [
        c.rope_theta for c in stages.configs(theirs, LLAMA3_8B)]
    assert '64 x h200' in capsys.readouterr().out


def test_a_recipe_with_adapters_needs_their_memory(tmp_path, capsys):
    path, peaks = tmp_path / 'recipe.py', []
    for adapter in ('', "config.adapter = {'rank': 8, 'alpha': 16.0}"):
        path.write_text(f"""
from lct.cli.config import load_config
def get_config():
    config = load_config({str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py')!r})
    config.stages = config.stages[:1]
    {adapter}
    return config
""")
        planner.run(['--config', str(path)])
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith('65K'))
        peaks.append(float(row.split('%')[1].split()[0].rstrip('!')))
    assert peaks[1] < peaks[0] - 10


def test_typos_of_a_recipe_are_reported_at_once(tmp_path):
    path = tmp_path / 'recipe.py'
    path.write_text(f"""
from lct.cli.config import load_config
def get_config():
    config = load_config({str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py')!r})
    config.stages[0].thata = 'keep'
    del config.stages[1].num_steps
    return config
""")
    with pytest.raises(ValueError, match='(?s)2 problems.*nearest are stages.0.theta.*lacks the field'):
        planner.run(['--config', str(path)])


def test_the_readmes_example_fits_the_memory_that_its_setting_gives(tmp_path, monkeypatch, capsys):
    """Four of Gradient's stages on eight H100, of whose memory jax takes 92%."""
    text, path = (EXPERIMENTS.parent / 'README.md').read_text(), tmp_path / '8b.py'
    (command,) = re.findall(r'experiments/plan.py (--config .*?--output) \S+', text.replace('\\\n', ' '))
    recipe = str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py')
    planner.run([recipe if part.endswith('.py') else part for part in command.split()] + [str(path)])
    config = load_config(path)
    assert [stage.seq_len for stage in config.stages] == [2**16, 2**18, 2**19, 2**20]
    assert max(config.needle.lengths) == 2**20
    h100 = hardware.find('h100')
    monkeypatch.setattr(memory_check, 'device_hardware', lambda: h100)
    monkeypatch.setattr(memory_check, 'device_memory', lambda: search.USABLE * h100.memory)
    monkeypatch.setattr(memory_check.jax, 'default_backend', lambda: 'gpu')
    peaks = [memory_check.needed_by(run, memory_check.step_of(run, i, LLAMA3_8B)).peak
             for run in [make_run(config)] for i in range(4)]
    assert max(peaks) < search.USABLE * h100.memory
    memory_check.check(make_run(config), LLAMA3_8B)
    assert "Eight H100 hold all stages of that recipe, to 4M tokens (predicted)" in text
    assert search.feasible(search.Job(LLAMA3_8B, 2**22), h100, 8)


def test_a_faster_network_makes_a_faster_plan():
    slow, fast = (planner.hardware_of(planner.flags([*ONE, *more])) for more in ([], ['--network', '50']))
    job = search.Job(LLAMA3_8B, M, 8)
    times = [search.best(job, kind, 512).plans[0].seconds for kind in (slow, fast)]
    assert fast.network == 50e9 and times[1] < times[0]


def changed(**flags):
    pairs = dict(zip(ONE[::2], ONE[1::2])) | {f'--{key}': value for key, value in flags.items()}
    return [arg for pair in pairs.items() for arg in pair]


@pytest.mark.parametrize(('argv', 'expected'), [
    (changed(hardware='l40z'), r"hardware 'l40z' is not in the table; nearest are l40, l40s"),
    (changed(model='llama3-9b'), r"model 'llama3-9b' is not in the table; nearest are llama3-8b"),
    (changed(context='1X'), r"'1X' is not a number of tokens"),
    (changed(devices='0'), r'--devices 0 must be at least 1'),
    (changed(rows='0'), r'--rows 0 must be a whole number above 0'),
    (changed(tokens='-5'), r'--tokens -5.0 must be a whole number above 0'),
    (changed(context='8K', theta='1e6'), r'--theta 1,000,000 is for a context beyond the 8,192 tokens'),
    (['--config', str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py'), '--devices', '-2'],
     r'--devices -2 must be a whole number above 0'),
    (changed(devices='100'), r'embed_dim 4096 is not a multiple .* remedies'),
    (changed(theta='5e8'), r'context 1048576 is beyond the 359,277 tokens that theta 500,000,000 reaches .* '
                           r'--theta 3580165450'),
    (ONE[:6], r'--devices is needed'),
    (changed(compile='h100:64'), r'--compile h100:64 is 64 x h100, the plan is for 512 x l40s; name the same '
                                 r'machine'),
    (['--config', str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py'), '--context', '8M'],
     r'context 8M is beyond the 4194304 tokens .* theta 45,218,125,209'),
    (['--config', str(EXPERIMENTS / 'configs' / 'laptop.py'), '--hardware', 'h100'],
     r'names no base model; add --model'),
    (['--config', str(EXPERIMENTS / 'configs' / 'published' / 'gradient_llama3_8b.py'), '--rows', '3'],
     r'--rows is set by the recipe'),
])
def test_mistakes(argv, expected):
    with pytest.raises(ValueError, match=expected):
        planner.run(argv)


def test_nothing_feasible_names_the_buffer_and_three_remedies():
    with pytest.raises(ValueError) as error:
        planner.run(['--model', 'llama3-70b', '--context', '1M', '--hardware', 'l40s', '--devices', '8',
                     '--stages', '1M', '--train', 'all'])
    text = str(error.value)
    assert re.search(r"largest buffer is '[^']+' with [\d.]+ GiB, [\d.]+ GiB too much", text)
    remedies = text.partition('remedies, cheapest first: ')[2].split(', or ')
    assert len(remedies) == 3 and remedies[0].startswith('a context of ')
    for count, name in (remedy.split(' x ') for remedy in remedies[1:]):
        assert search.search(search.Job(SIZES['llama3-70b'], M, 4), hardware.find(name), int(count)).plans


@pytest.mark.parametrize(('name', 'context'), [('h200', M), ('h100', M // 2)])
def test_one_device_trains_all_of_8b_with_the_state_on_the_host(name, context):
    kind = hardware.find(name)
    plan = search.best(search.Job(LLAMA3_8B, context), kind, 1).plans[0]
    on_host = plan.step.memory.offload_state
    assert on_host in ('moments', 'all') and plan.times['state to and from the host'] < 30
    weights = 4 * 8_030_261_248
    assert plan.buffers.host['moments of AdamW'] == 2 * weights
    assert plan.buffers.host.get('weights') == (weights if on_host == 'all' else None)
    assert sum(plan.buffers.host.values()) < 1.5 * 2**40
    # where the host has less memory, what is kept there is less or nothing fits
    with pytest.raises(ValueError, match='no plan is feasible'):
        search.best(search.Job(LLAMA3_8B, context), dataclasses.replace(kind, host_memory=2**38), 1)


def test_the_nearest_remedy_is_a_shorter_context():
    job = search.Job(LLAMA3_8B, 2**24)
    with pytest.raises(ValueError, match='cheapest first: a context of ([0-9]+) tokens') as error:
        search.best(job, L40S, 16)
    shorter = int(re.search(r'a context of (\d+) tokens', str(error.value))[1])
    fits = [search.feasible(search.Job(LLAMA3_8B, length), L40S, 16) for length in (shorter, 2 * shorter)]
    assert fits == [True, False]
