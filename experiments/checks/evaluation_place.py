"""What random evaluations share: a tiny model, its plain twin, haystacks, and what fits into which length."""

import dataclasses
import json
import pathlib
import runpy
import shutil

from drill import CHECKS
from plain_evaluation import PlainModel

from lct.cli.model import find_model
from lct.data.corpus import documents
from lct.eval import runner, suites
from lct.eval.report import html
from lct.eval.suites import SUITES
from lct.eval.tasks.material import Material

POSITIONS = 1024


@dataclasses.dataclass(frozen=True)
class Call:
    """Flags of evaluate.py: what is measured, and how."""

    suites: tuple[str, ...]
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int
    meshes: tuple[str, ...]


class Place:
    """The model, its plain twin, haystacks, and what fits into which length. seconds: of the last call."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.seconds, self._materials, self._fits = folder, 1.0, {}, {}
        source = find_model('base')
        shutil.copytree(source, folder / 'model')
        config = json.loads((source / 'config.json').read_text())
        (folder / 'model' / 'config.json').write_text(
            json.dumps(config | {'max_position_embeddings': POSITIONS}))
        self.plain = PlainModel(folder / 'model')
        self.model = runner.Model(self.plain.params, self.plain.config, self.plain.tokenizer)
        for name in ('text', 'code', 'own/letters', 'own/digits'):
            (folder / name).mkdir(parents=True)
        for i, document in enumerate(documents.read('embedded', 200_000)[:3]):
            (folder / 'text' / f'{i}.txt').write_text(document.text[:8000])
        for path in pathlib.Path(json.__file__).parent.glob('*.py'):
            shutil.copy(path, folder / 'code')
        for name, metric in (('letters', 'exact'), ('digits', 'f1')):
            rows = [{'input': f'The number of {one} is {i * 7919}. The number of {one} is', 'metric': metric,
                     'outputs': [str(i * 7919)], 'max_new_tokens': 8} for i, one in enumerate('abcdef')]
            (folder / 'own' / name / 'a.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
        html.page = lambda report: ''  # drawing takes longer than answering
        self.main = runpy.run_path(str(CHECKS.parent / 'evaluate.py'))['main']

    def flags(self, kind: str) -> list[str]:
        if kind == 'own':
            return ['--haystack', str(self.folder / 'text'), '--data', str(self.folder / 'own')]
        return ['--haystack', str(self.folder / kind)]

    def plan(self, kind: str, seed: int, call: Call) -> suites.Plan:
        if (kind, seed) not in self._materials:
            haystack = self.folder / ('code' if kind == 'code' else 'text')
            self._materials[kind, seed] = Material(
                self.plain.tokenizer, documents.read(haystack), text_source=str(haystack), seed=seed)
        plan = suites.Plan(self._materials[kind, seed], tuple(sorted(call.lengths)),
                           dict.fromkeys(call.lengths, call.samples), call.tasks or None)
        if kind == 'own':
            plan, *_ = SUITES['own'].with_data(plan, self.folder / 'own', self.model)
        return plan

    def fits(self, kind: str, seed: int, call: Call) -> bool:
        """Whether every suite of a call takes all samples of its tasks."""
        call = dataclasses.replace(call, meshes=())
        key = kind, seed, call
        if key not in self._fits:
            plan = self.plan(kind, seed, call)
            self._fits[key] = not any(list(SUITES[name].check(self.model, plan)) for name in call.suites)
        return self._fits[key]
