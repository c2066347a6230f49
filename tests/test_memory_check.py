"""The plan of a run against the memory of its devices, before it starts and when it runs out."""

import re

import jax
import pytest
import tiny
import tiny_training

from lct.cli import memory_check
from lct.cli.config import load_config, make_run, set_field
from lct.cli.paths import experiments_folder
from lct.models import llama
from lct.models.llama_sizes import LLAMA3_8B
from lct.models.lora import Adapter
from lct.plan import remedies
from lct.plan.buffers import buffers, with_adapter
from lct.plan.hardware import TABLE
from lct.plan.tables import GiB
from lct.train import loop, memory_errors, stages

H100 = TABLE['h100']


def gradient():
    """Gradient's 8B recipe with all stages on eight devices: 8K to 1M tokens a device."""
    config = load_config(experiments_folder() / 'configs' / 'published' / 'gradient_llama3_8b.py')
    for stage in config.stages:
        stage.mesh = (1, 1, 8, 1)
    return config


@pytest.fixture
def on_gpus(monkeypatch):
    """Call with bytes: the devices of this process are H100 with that memory."""
    monkeypatch.setattr(memory_check, 'device_hardware', lambda: H100)
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    return lambda memory: monkeypatch.setattr(memory_check, 'device_memory', lambda: memory)


def peak_of(run, index):
    return memory_check.needed_by(run, memory_check.step_of(run, index, LLAMA3_8B)).peak


def only(config, index):
    """The Run of one stage."""
    config.stages = config.stages[index:index + 1]
    return make_run(config)


@pytest.mark.parametrize(('share', 'expected'), [
    (1 / 1.3, 'refused'), (1 / 1.1, 'WARNING'), (1.1, 'WARNING'), (1.2, '')])
def test_a_stage_is_refused_only_beyond_the_error_of_the_plan(share, expected, on_gpus, capsys):
    run = only(gradient(), 1)
    on_gpus(share * peak_of(run, 0))
    if expected == 'refused':
        with pytest.raises(memory_check.TooLarge, match='stage 262K is predicted to need .* does not fit;'):
            memory_check.check(run, LLAMA3_8B)
        out = capsys.readouterr().out
        assert 'moments of AdamW' in out and 'capacity of the device' in out
    else:
        memory_check.check(run, LLAMA3_8B)
        out = capsys.readouterr().out
        assert out.startswith(expected) and bool(out) == bool(expected)


def test_unknown_memory_is_not_compared(on_gpus):
    on_gpus(None)
    memory_check.check(make_run(gradient()), LLAMA3_8B)


def test_the_remedies_named_can_be_followed(on_gpus):
    """Each one, given as its flags, makes the stage fit; the other stages that do not fit are named."""
    limit = 73 * GiB
    on_gpus(limit)
    with pytest.raises(memory_check.TooLarge) as error:
        memory_check.check(make_run(gradient()), LLAMA3_8B)
    text = str(error.value)
    assert text.startswith('stage 524K') and 'nor do 1048K, 4194K' in text and '\n' not in text
    named = text.partition('cheapest first: ')[2].split('; ')[0].split(', or ')
    assert len(named) == 3
    flags = [found for found in (re.findall(r'--set (\S+)', one) for one in named) if found]
    assert flags
    for overrides in flags:
        config = gradient()
        before = make_run(config).stages[2]
        for override in overrides:
            set_field(config, override)
        run = make_run(config)
        assert run.stages[2].tokens_per_step == before.tokens_per_step and peak_of(run, 2) <= limit


def test_remedies_fit_and_are_sorted_and_none_changes_more_than_it_must():
    step = memory_check.step_of(make_run(gradient()), 2, LLAMA3_8B)
    limit = 60 * GiB
    found = remedies.find(step, H100, lambda changed: buffers(changed).peak, limit)
    times = [remedy.times for remedy in found]
    assert found and times == sorted(times)
    fields = [frozenset(remedy.changes) for remedy in found]
    assert not any(a < b for a in fields for b in fields) and len(set(fields)) == len(fields)
    assert not remedies.find(step, H100, lambda changed: 2 * limit, limit)


def test_adapters_need_less_and_their_runs_are_planned_so():
    run = make_run(gradient())
    step = memory_check.step_of(run, 0, LLAMA3_8B)
    full = buffers(step)
    adapted = with_adapter(full, step, Adapter(frozen_dtype='bfloat16'))
    # frozen bfloat16 weights in place of float32 ones with two moments and gradients
    assert adapted.stays['weights'] == pytest.approx(full.stays['weights'] / 2, rel=0.02)
    assert adapted.stays['moments of AdamW'] < full.stays['moments of AdamW'] / 500
    assert adapted.peak < 0.6 * full.peak


def test_the_memory_of_a_cpu_is_shared_by_its_virtual_devices():
    host = memory_check.host_memory()
    assert GiB / 8 < host < 2**45
    assert memory_check.device_memory() == pytest.approx(host / jax.local_device_count(), rel=0.2)


@pytest.mark.parametrize(('raised', 'caught'), [
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore'), True),
    (MemoryError(), True), (jax.errors.JaxRuntimeError('INTERNAL: no'), False)])
def test_memory_that_runs_out_names_step_and_remedies(raised, caught, tmp_path, monkeypatch, capsys):
    def exhausted(*args):
        raise raised

    monkeypatch.setattr(loop, 'train_step', exhausted)
    stage = stages.Stage(name='long', seq_len=64, num_steps=4, batch_size=4, memory=tiny.MEMORY)
    run, config = loop.Run(stages=(stage,)), tiny_training.CONFIG
    with pytest.raises((memory_check.TooLarge, RuntimeError)) as error:
        with memory_check.explained(run, config):
            loop.train(run, config, lambda: llama.init(config, jax.random.key(0)), tiny_training.mixture(),
                       tmp_path)
    if not caught:
        assert error.value is raised
        return
    assert isinstance(error.value.__cause__, memory_errors.OutOfMemory)
    text = str(error.value)
    assert text.startswith('stage long: out of memory by step 1 (') and '\n' not in text
    assert '--set stages.0.' in text and 'x the time)' in text
    assert 'peak, in phase' in capsys.readouterr().out


def test_fields_that_a_config_lacks_but_may_have_can_be_set():
    config = gradient()
    set_field(config, 'check_memory=false')
    set_field(config, 'spike_factor=10')
    assert config.check_memory is False and make_run(config).spike_factor == 10
