"""From a folder and a corpus to a finished extension, plans of known machines, answers to mistakes.

    python experiments/checks/check_road.py --output experiments/results/road.json
    python experiments/checks/check_road.py --parts mistakes

plans: configs that plan.py writes for 8B at 256K on 64 L40S, 1B at 64K on one RTX 4090 and 70B at 1M on 512
H100 pass `extend.py --check`, by name and as folders whose weights are holes in sparse files. road: a random
tiny Llama and a corpus in four forms, each extended by plan.py and extend.py without an edit; the first is
also measured. mistakes: each is answered in one sentence that names the field or file, the value and the
remedy; seconds are CPU time.
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

from lct.text import table

EXPERIMENTS = pathlib.Path(__file__).parents[1]
PARTS = 'plans', 'road', 'mistakes'
PLANS = (('llama3-8b', '256K', 'l40s', 64), ('llama3.2-1b', '64K', 'rtx4090', 1),
         ('llama3-70b', '1M', 'h100', 512))
LIMIT_S = 3.0  # of a mistake for which no model must be read


def run(script, *flags):
    """(exit status, stdout, stderr, CPU seconds) of a script."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, EXPERIMENTS / script, *map(str, flags)], capture_output=True,
                          text=True, cwd=EXPERIMENTS.parent)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, done.stderr, seconds


# ---------------------------------------------------------------------------------------------------
# Models and corpora
# ---------------------------------------------------------------------------------------------------


def tiny_model(folder):
    """A Hugging Face folder in the shape of Llama 3.2, with random weights and the tokenizer of base/."""
    import jax

    from lct.models import llama
    from lct.models.config import LlamaConfig
    from lct.ops.rope import RopeConfig
    from lct.weights import llama_hf

    rope = RopeConfig(theta=500000.0, type='llama3', factor=32.0, original_max_position=256, max_position=512)
    config = LlamaConfig(vocab_size=1392, embed_dim=64, mlp_dim=128, num_layers=2, num_heads=4,
                         num_kv_heads=2, head_dim=16, tie_embeddings=True, max_position_embeddings=512,
                         rope=rope)
    llama_hf.save(folder, config, llama.init(config, jax.random.key(0)), tokenizer_from=EXPERIMENTS / 'base',
                  overwrite=True)
    return folder


def sparse_model(folder, name):
    """A folder in a published shape whose weights are holes: it has names and shapes, and takes no disk."""
    from lct.cli.plan_models import MODELS
    from lct.models import llama
    from lct.weights import llama_hf

    config = MODELS[name]
    folder.mkdir(parents=True)
    for path in (EXPERIMENTS / 'base').glob('*token*.json'):
        shutil.copy(path, folder)
    (folder / 'config.json').write_text(json.dumps(llama_hf.config_to_json(config)))
    header, end = {}, 0
    for tensor, shape in llama_hf.checkpoint_shapes(config).items():
        size = 2
        for n in shape:
            size *= n
        header[tensor] = {'dtype': 'BF16', 'shape': list(shape), 'data_offsets': [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / 'model.safetensors', 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.truncate(8 + len(text) + end)
    assert llama.num_params(config) * 2 == end
    return folder


def texts():
    """60 texts of this Python's standard library, {name: text}."""
    paths = sorted(pathlib.Path(json.__file__).parents[1].glob('*.py'))[:60]
    return {path.name: path.read_text(errors='replace')[:12000] for path in paths}


def text_files(folder):
    folder.mkdir()
    for name, text in texts().items():
        (folder / f'{name}.txt').write_text(text)


def saved_dataset(folder):
    """What datasets.save_to_disk writes, by that package or by pyarrow alone."""
    rows = {'text': list(texts().values())}
    try:
        import datasets
        datasets.Dataset.from_dict(rows).save_to_disk(folder)
    except ImportError:
        import pyarrow as arrow
        folder.mkdir()
        values = arrow.table(rows)
        with arrow.ipc.new_stream(str(folder / 'data-00000-of-00001.arrow'), values.schema) as writer:
            writer.write_table(values)
        for name in ('state.json', 'dataset_info.json'):
            (folder / name).write_text('{}')


def mailbox(path):
    mails = [f'From a@example.org Mon Jan  1 00:00:00 2024\nFrom: a@example.org\nSubject: {name}\n\n'
             + text.replace('\nFrom ', '\n>From ') + '\n\n' for name, text in texts().items()]
    path.write_text(''.join(mails))


def checkout(folder):
    text_files(folder)
    (folder / '.gitignore').write_text('secret.txt\n')
    (folder / 'secret.txt').write_text('not to be read')
    for command in (['init', '-q'], ['add', '.']):
        subprocess.run(['git', '-C', folder, *command], check=True)


CORPORA = {'text files': text_files, 'save_to_disk': saved_dataset, 'mailbox': mailbox, 'checkout': checkout}


# ---------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------


def check_plans(workdir):
    """A row for every machine, by name and as a folder."""
    rows = []
    for name, context, hardware, devices in PLANS:
        flags = ['--context', context, '--hardware', hardware, '--devices', devices, '--output',
                 workdir / 'plan.py']
        for model in (name, sparse_model(workdir / name, name)):
            status, _, error, _ = run('plan.py', '--model', model, *flags)
            if not status:
                more = [] if model == name else ['--set', 'corpus=embedded', '--set', 'needle.lengths=1024',
                                                 '--set', 'loss.windows=0', '--set', 'held_out=0.1']
                status, out, error, _ = run('extend.py', '--config', workdir / 'plan.py', '--check', *more)
            lines = out.splitlines() if not status else []
            rows.append({'case': f'{name} at {context} on {devices} {hardware}, '
                                 f'{"by name" if model == name else "a folder"}',
                         'right': 'the config can be trained' in lines,
                         'answer': next((line for line in lines if line.startswith(context)), error)})
    return rows


def check_road(workdir):
    """A row for every form of the corpus."""
    rows, model = [], tiny_model(workdir / 'tiny')
    for name, write in CORPORA.items():
        corpus, config = workdir / f'corpus {name}', workdir / f'{name}.py'
        write(corpus)
        began = time.monotonic()
        status, out, error, _ = run('plan.py', '--model', model, '--context', '1K', '--hardware', 'cpu',
                                    '--tokens', 40000, '--corpus', corpus, '--output', config,
                                    *([] if name == 'text files' else ['--evaluate', 'off']))
        if not status:
            status, out, error, _ = run('extend.py', '--config', config, '--workdir',
                                        workdir / f'run {name}')
        done = (workdir / f'run {name}' / 'model' / 'config.json').exists()
        rows.append({'case': name, 'right': not status and done, 'seconds': round(time.monotonic() - began),
                     'answer': out.splitlines()[-1] if not status else error})
    return rows


def config_with(workdir, *lines):
    """A config file: smoke.py with some lines."""
    path = workdir / f'config{len(list(workdir.glob("config*.py")))}.py'
    path.write_text('\n    '.join((
        f'from lct.cli.config import load_config\ndef get_config():\n    config = load_config('
        f'{str(EXPERIMENTS / "configs" / "smoke.py")!r})', *lines, 'return config')))
    return path


def mistakes(workdir):
    """[(case, script, flags, parts of the answer)]."""
    def corpus(name, content, **more):
        (workdir / name).write_bytes(content)
        return 'extend.py', [*smoke, '--set', f'corpus={workdir / name}']

    smoke = ['--config', EXPERIMENTS / 'configs' / 'smoke.py', '--workdir', workdir / 'run']
    for name in ('empty', 'pdf', 'mds', 'no_model'):
        (workdir / name).mkdir()
    (workdir / 'pdf' / 'a.pdf').write_text('%PDF')
    for name in ('index.json', 'shard.00000.mds'):
        (workdir / 'mds' / name).write_text('{}')
    record, line1 = b'{"text": "%s"}\n' % (b'a line of text ' * 300), 'line 1'
    setting = lambda text: ('extend.py', [*smoke, '--set', text])
    file = lambda *lines: ('extend.py', [*smoke[2:], '--config', config_with(workdir, *lines)])
    plan = lambda **flags: ('plan.py', [part for key, value in {
        'model': 'llama3-8b', 'context': '64K', 'hardware': 'h100', 'devices': 8, 'output': workdir / 'p.py',
        **flags}.items() for part in (f'--{key}', value)])
    return [
        ('corpus that does not exist', *setting(f'corpus={workdir}/nowhere'), ['nowhere', 'give a folder']),
        ('empty folder', *setting(f'corpus={workdir}/empty'), ['empty', 'holds no text', '.jsonl']),
        ('only PDF', *setting(f'corpus={workdir}/pdf'), ['not read: 1 .pdf', 'name other files']),
        ('MosaicML shards', *setting(f'corpus={workdir}/mds'), ['.mds', 'write it as .jsonl']),
        ('another field', *corpus('field.jsonl', b'{"content": "x"}\n'), ["'text'", "'content'", line1]),
        ('damaged JSON', *corpus('cut.jsonl', record + b'{"text": "x'),
         ['line 2 is not valid JSON', 'remove it']),
        ('damaged UTF-8', *corpus('bad.txt', 'é'.encode() + b'\xff'),
         ['bad.txt line 1 is not UTF-8', 'byte 2']),
        ('truncated gzip', *corpus('cut.jsonl.gz', b'\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03abc'),
         ['cut.jsonl.gz is truncated or damaged', 'copy it again']),
        ('too little text', *corpus('short.jsonl', b'{"text": "a"}\n{"text": "b"}\n'),
         ['fewer than one sequence of seq_len 512', 'add documents']),
        ('one document', *corpus('one.txt', b'words ' * 9000), ['1 document cannot be split', 'held_out=0']),
        ('typo in a config', *file('config.modle_folder = "base"'),
         ['modle_folder', 'nearest are model_folder']),
        ('wrong type in a config', *file('config.held_out = None'), ['held_out None is not a number']),
        ('missing field in a config', *file('del config.stages[0].num_steps'), ['lacks the field num_steps']),
        ('config that does not parse', *file('x = ('), ['line 4', 'correct the file']),
        ('length that does not divide', *setting('stages.0.seq_len=500'), ['500', 'multiple of', 'use 496']),
        ('unknown rule of theta', *setting('stages.0.theta=dynamic'), ["theta 'dynamic'", "'dynamic_ntk'"]),
        ('typo in --set', *setting('stages.0.thata=1'), ['stages.0.thata', 'nearest are stages.0.theta']),
        ('wrong type in --set', *setting('stages.0.num_steps=many'), ["'many' is not a whole number", '3']),
        ('unknown time of evaluations', *setting('evaluate=often'), ["'often'", 'each_stage']),
        ('mesh of three', 'extend.py', [*smoke, '--mesh', '1,1,8'], ['--mesh 1,1,8', 'four degrees']),
        ('folder without a model', *setting(f'model_folder={workdir}/no_model'), ['no_model', 'config.json']),
        ('unknown hardware', *plan(hardware='h10'), ["'h10'", 'nearest are h100']),
        ('unknown model', *plan(model='llama-3-8b'), ["'llama-3-8b'", 'nearest are llama3-8b']),
        ('length that is none', *plan(context='64Q'), ["'64Q'", 'write 1048576, 1M or 64K']),
        ('too few devices', *plan(model='llama3-70b', hardware='l4', devices=1),
         ['needs', 'usable', 'remedies']),
    ]


def check_mistakes(workdir):
    """A row for every mistake."""
    rows = []
    for mistake, script, flags, parts in mistakes(workdir):
        status, _, error, seconds = run(script, *flags)
        answer = error.strip().splitlines()[-1] if error.strip() else ''
        missing = [part for part in parts if part not in error]
        is_fast = seconds < LIMIT_S or any(
            flag in str(flags) for flag in ('corpus=', 'model_folder=', 'theta'))
        rows.append({'case': mistake, 'right': status in (1, 2) and not missing and 'Traceback' not in error
                     and answer.startswith('error: ') and is_fast, 'seconds': round(seconds, 1),
                     'answer': answer.replace(str(workdir), 'DIR').replace(str(EXPERIMENTS.parent), '.')})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--parts', default=','.join(PARTS), help=f'of {",".join(PARTS)}')
    parser.add_argument('--output', type=pathlib.Path, help='write the rows as JSON')
    args = parser.parse_args()
    checks, results = {'plans': check_plans, 'road': check_road, 'mistakes': check_mistakes}, {}
    for part in args.parts.split(','):
        with tempfile.TemporaryDirectory() as folder:
            results[part] = checks[part](pathlib.Path(folder))
        print(f'{part}: {sum(row["right"] for row in results[part])} of {len(results[part])} right')
        print(table(('case', 'right', 'seconds', 'answer'), [
            (row['case'], 'yes' if row['right'] else 'NO', row.get('seconds', ''), row['answer'][:160])
            for row in results[part]], left=(0, 1, 3)), flush=True)
    if args.output:
        before = json.loads(args.output.read_text()) if args.output.is_file() else {}
        args.output.write_text(json.dumps({**before, **results}, indent=1) + '\n')
    sys.exit(not all(row['right'] for rows in results.values() for row in rows))


if __name__ == '__main__':
    main()
