"""The suites of evaluations. A new one is a module with a subclass of suite.Suite, and an entry of SUITES."""

from collections.abc import Iterable, Sequence

from lct.eval.suites.adversarial import AdversarialSuite
from lct.eval.suites.comprehension import ComprehensionSuite
from lct.eval.suites.icl import InContextSuite
from lct.eval.suites.loss import LossSuite
from lct.eval.suites.needle import NeedleSuite
from lct.eval.suites.own import OwnSuite
from lct.eval.suites.published import BABILongSuite, InfiniteBenchSuite, LongBenchV2Suite
from lct.eval.suites.repository import RepositorySuite
from lct.eval.suites.ruler import RulerSuite
from lct.eval.suites.suite import Plan, Suite

__all__ = ['SUITES', 'Plan', 'Suite', 'check_tasks', 'select']

SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    RulerSuite(), NeedleSuite(), AdversarialSuite(), ComprehensionSuite(), InContextSuite(),
    RepositorySuite(), LossSuite(), OwnSuite(),
    LongBenchV2Suite(), BABILongSuite(), InfiniteBenchSuite(),
)}


def select(names: Iterable[str], tasks: Sequence[str] | None = None) -> list[Suite]:
    """The suites of these names; tasks: names that --tasks gives.

    Raises:
      ValueError: for a name that is not a suite, a task that none of the suites has, or a suite without any
        of the tasks.
    """
    names = list(names)
    for name in names:
        if name not in SUITES:
            raise ValueError(f"unknown suite {name!r}; the suites are {', '.join(SUITES)}")
    chosen = [SUITES[name] for name in names]
    if tasks:
        check_tasks(chosen, tasks)
    return chosen


def check_tasks(suites: Sequence[Suite], tasks: Sequence[str]) -> None:
    """Refuse tasks that none of the suites has, and suites without any of the tasks."""
    with_tasks = [suite for suite in suites if suite.tasks]
    if not with_tasks:
        raise ValueError(f"the suite {suites[0].name} has no tasks such as {', '.join(tasks)}; "
                         'leave --tasks out')
    names = ', '.join(suite.name for suite in with_tasks)
    known = [task for suite in with_tasks for task in suite.tasks]
    for task in tasks:
        if task not in known:
            raise ValueError(f"unknown task {task!r}; the tasks of {names} are {', '.join(known)}")
    for suite in with_tasks:
        if not set(tasks) & set(suite.tasks):
            raise ValueError(f"suite {suite.name} has none of the tasks {', '.join(tasks)}; leave it out or "
                             f"name one of {', '.join(suite.tasks)}")
