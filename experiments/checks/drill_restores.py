"""Damage the newest of two checkpoints in many ways and restore: what the drills of checkpoints call.

    python experiments/checks/drill_restores.py FOLDER flips|files|meshes|targets [--trials 200]

A trial is right if the newest checkpoint is restored bit for bit, or if it is set aside and the older one is
restored bit for bit. The last line of output is a JSON object.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import re
import shutil

NOBODY = 65534
MESHES = ((1, 1, 1, 1), (1, 4, 1, 1), (1, 1, 4, 1), (1, 8, 1, 1), (2, 1, 2, 2), (1, 2, 2, 2))


class Trials:
    """Two checkpoints of random states of a tiny model, and the restores of damaged copies."""

    def __init__(self, folder, mesh):
        import jax
        import numpy as np

        from lct import sharding
        from lct.models import llama
        from lct.ops import rope
        from lct.train import checkpoint, optimizer, state

        self.model = llama.LlamaConfig(
            vocab_size=258, embed_dim=32, mlp_dim=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
            max_position_embeddings=64, tie_embeddings=True, rope=rope.RopeConfig(theta=1000.0))
        self.mesh, self.tx = mesh, optimizer.make(optimizer.OptimizerConfig())
        self.saved, self.copy, self.results, self.problems = folder / 'saved', folder / 'copy', {}, []
        rng, self.states = np.random.default_rng(0), {}
        checkpoints = checkpoint.Checkpoints(self.saved)
        with jax.set_mesh(sharding.make_mesh(mesh)):
            for step in (2, 4):
                blank = state.create(llama.init(self.model, jax.random.key(step)), self.tx)
                full = jax.tree.map(lambda x: jax.device_put(
                    (rng.normal(size=x.shape) * 9).astype(x.dtype), x.sharding), blank)
                self.states[step] = jax.device_get(full)
                checkpoints.save(step, full, {'cursor': {'row': step}, 'seconds': 1.0})
        checkpoints.close()

    def files(self):
        """{class: its files, relative to the folder of checkpoints}, of the newest checkpoint."""
        classes = {}
        for path in sorted((self.saved / '4').rglob('*')):
            if path.is_file():
                name = path.relative_to(self.saved)
                classes.setdefault(re.sub('[0-9a-f]{16,}', '*', str(name)), []).append(name)
        return classes

    def target(self, mesh=None, dtype='float32', **changed):
        import dataclasses

        import jax

        from lct import sharding
        from lct.train import state

        with jax.set_mesh(sharding.make_mesh(mesh or self.mesh)):
            return state.abstract(dataclasses.replace(self.model, **changed), self.tx, jax.numpy.dtype(dtype))

    def restore(self, target):
        from lct.train import checkpoint

        checkpoints = checkpoint.Checkpoints(self.copy)
        try:
            return checkpoints.restore_newest_valid(lambda step: target)
        finally:
            checkpoints.close()

    def trial(self, damage=None, name='', target=None):
        """Damage the file or folder `name` of a copy, restore it and count the result."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.saved, self.copy)
        if damage:
            damage(self.copy / name)
        try:
            with as_nobody(self.copy, damage is hide):
                result = self.judge(self.restore(target or self.target()))
        except ValueError as error:
            refused = 'does not fit' in str(error) and '\n' not in str(error) and (self.copy / '4').exists()
            result = 'refused' if refused else f'error: {error}'
        except Exception as error:
            result = f'{type(error).__name__}: {error}'
        if result not in ('exact', 'fell back', 'refused'):
            self.problems.append(f'{damage.__name__ if damage else ""} {name}: {result[:300]}')
        self.results[result] = self.results.get(result, 0) + 1

    def judge(self, restored):
        import jax
        import numpy as np

        same = jax.tree.all(jax.tree.map(
            lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == y.tobytes(), restored.state,
            self.states[restored.step]))
        if not same or restored.record['cursor'] != {'row': restored.step}:
            return f'SILENT: other bits than step {restored.step} had'
        if restored.step == 4:
            return 'exact' if not restored.warnings else f'warned of nothing: {restored.warnings}'
        one_line = len(restored.warnings) == 1 and '\n' not in restored.warnings[0]
        aside = (self.copy / '4.damaged').exists() and not (self.copy / '4').exists()
        return 'fell back' if one_line and aside else f'not set aside in one line: {restored.warnings}'


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    if path.is_file():
        os.truncate(path, 0)
        return
    shutil.rmtree(path)
    path.mkdir()


def remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def hide(path):
    path.chmod(0)


@contextlib.contextmanager
def as_nobody(folder, wanted):
    """Whether root, who may read everything, is to be someone else who owns the folder."""
    wanted = wanted and os.geteuid() == 0
    if wanted:
        folder.parent.chmod(0o777)
        for path in [folder, *folder.rglob('*')]:
            os.chown(path, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if wanted:
            os.seteuid(0)


def flips(trials, count):
    """One bit in a random file of every class in turn."""
    rng, classes = random.Random(0), trials.files()

    def flip(path):
        content = bytearray(path.read_bytes())
        bit = rng.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)

    for index in range(count):
        trials.trial(flip, rng.choice(list(classes.values())[index % len(classes)]))


def files(trials, count):
    """Every file cut short, emptied, removed; every folder emptied, removed; permissions."""
    names = [name for group in trials.files().values() for name in group]
    folders = sorted({str(parent) for name in names for parent in name.parents} - {'.', '4'})
    for damage in (cut, empty, remove):
        for name in names:
            trials.trial(damage, name)
    for name in folders:
        trials.trial(remove, name)
    for name in (*folders, '4'):
        trials.trial(empty, name)
    for name in ('4', '4/state', '4/state/d', '4/record/metadata'):
        trials.trial(hide, name)


def meshes(trials, count):
    for mesh in MESHES:
        trials.trial(name=mesh, target=trials.target(mesh))


def targets(trials, count):
    """Another dtype, shape, vocabulary, number of arrays: refused in one sentence, nothing renamed."""
    for changed in ({'dtype': 'bfloat16'}, {'vocab_size': 260}, {'mlp_dim': 32}, {'tie_embeddings': False}):
        trials.trial(name=changed, target=trials.target(**changed))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=pathlib.Path)
    parser.add_argument('kind', choices=('flips', 'files', 'meshes', 'targets'))
    parser.add_argument('--trials', type=int, default=200)
    args = parser.parse_args()
    import jax

    jax.config.update('jax_num_cpu_devices', 8)
    trials = Trials(args.folder, (1, 2, 2, 2) if args.kind == 'meshes' else (1, 2, 1, 1))
    {'flips': flips, 'files': files, 'meshes': meshes, 'targets': targets}[args.kind](trials, args.trials)
    print(json.dumps({
        'results': trials.results, 'problems': trials.problems, 'classes': len(trials.files())}))


if __name__ == '__main__':
    main()
