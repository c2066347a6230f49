"""The Jinja of chat templates: sandboxed, with the functions that transformers provides, and within Limits.

Jinja has hooks for calls, attributes, operators, filters and output. For what has none (loops, comparisons,
lists, slices, '~'), filters that count are put into the syntax tree.
"""

import contextlib
import contextvars
import datetime
import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, utils, visitor

from lct.data.template_limits import LimitExceeded, Limits

# Filters that templates cannot name.
STEP, MEASURE = ' step', ' measure'
LONGEST_DATE = 1000  # characters of a format

_limits: contextvars.ContextVar[Limits] = contextvars.ContextVar('limits')


@contextlib.contextmanager
def limited(*inputs: Any) -> Iterator[None]:
    """Within the block, templates work within Limits(*inputs)."""
    token = _limits.set(Limits(*inputs))
    try:
        yield
    finally:
        _limits.reset(token)


class Environment(sandbox.ImmutableSandboxedEnvironment):
    """Compiles and renders templates, both within `limited`."""

    intercepted_binops = frozenset(sandbox.SandboxedEnvironment.default_binop_table)

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols, _Generation],
                         finalize=_finalize, optimized=False)
        self.filters['tojson'] = _to_json
        self.filters = {name: _counted_filter(name, one) for name, one in self.filters.items()}
        self.filters |= {STEP: _step, MEASURE: lambda value: _limits.get().measure(value)}
        self.tests = {name: _counted_filter(name, one) for name, one in self.tests.items()}
        self.globals = {'range': sandbox.safe_range, 'dict': lambda *x, **y: dict(*x, **y),
                        'namespace': _Namespace, 'raise_exception': _raise}

    def _parse(self, source, name, filename):
        return _Counting().visit(super()._parse(source, name, filename)).set_environment(self)

    def concat(self, texts: Iterable[str]) -> str:
        """Join the output of a template, a macro or a block."""
        return ''.join(map(_spend, texts))

    def getattr(self, obj: Any, attribute: str) -> Any:
        _limits.get().step()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        _limits.get().step()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The names leave all others to keyword arguments of the template.
        limits, method = _limits.get(), getattr(__obj, '__wrapped__', __obj)  # the sandbox wraps str.format
        if isinstance(method, (types.BuiltinMethodType, types.MethodType)):
            args = tuple(map(limits.measured_list, args))
            limits.before(method.__name__, (method.__self__, *args), kwargs)
        return limits.measure(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        limits = _limits.get()
        limits.size([left, right])  # refuses what is too large for any operator
        limits.before(operator, (left, right), {})
        return limits.measure(super().call_binop(context, operator, left, right))


class _Counting(visitor.NodeTransformer):
    """Puts filters that count into a syntax tree."""

    def visit_For(self, node):
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(None), STEP), lineno=node.lineno))
        node.test = node.test and _filter(node.test, STEP)
        return node

    def visit_Compare(self, node):
        node = self.generic_visit(node)
        node.expr = _filter(node.expr, STEP)
        return node

    def visit_Concat(self, node):
        node = self.generic_visit(node)
        node.nodes = [_filter(one, MEASURE) for one in node.nodes]
        return node

    def visit_List(self, node):
        return _filter(self.generic_visit(node), MEASURE)

    visit_Dict = visit_List

    def visit_Tuple(self, node):
        node = self.generic_visit(node)
        return _filter(node, MEASURE) if node.ctx == 'load' else node

    def visit_Getitem(self, node):
        node = self.generic_visit(node)
        return _filter(node, MEASURE) if isinstance(node.arg, nodes.Slice) else node


def _filter(node, name):
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _step(value):
    _limits.get().step()
    return value


def _spend(text):
    _limits.get().spend(len(text))
    return text


@utils.pass_context  # with the context, Jinja computes no constant when it compiles
def _finalize(context, value):
    """Count a value that is written."""
    return _limits.get().measure(value)


def _counted_filter(name: str, function: Callable) -> Callable:
    """A filter or test that counts its work."""
    first = int(utils._PassArg.from_obj(function) is not None)

    @functools.wraps(function)
    def counted(*args, **kwargs):
        limits = _limits.get()
        args = list(map(limits.measured_list, args))
        limits.before(name, args[first:], kwargs)
        return limits.measure(function(*args, **kwargs))

    return counted


# ---------------------------------------------------------------------------------------------------
# What transformers' apply_chat_template provides
# ---------------------------------------------------------------------------------------------------


class _Generation(ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text; rendering ignores it."""

    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(['name:endgeneration'], drop_needle=True), lineno=line)


class _Namespace(utils.Namespace):
    """namespace() without names that begin with '_': Jinja itself looks these up on objects."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith('_'):
            raise jinja2.exceptions.SecurityError(f'namespace cannot hold {name!r}')
        super().__setitem__(name, value)

    def __repr__(self):  # Jinja's own may be endless, since a namespace can hold others and itself
        return '<Namespace>'


def make_strftime(now: datetime.datetime) -> Callable[[str], str]:
    """strftime_now(format) of the time `now`."""
    def strftime_now(format: str) -> str:
        if len(format) > LONGEST_DATE or re.search(r'%[^A-Za-z%]*\d{3}', format):
            raise LimitExceeded(f'formats a date with more than {LONGEST_DATE} characters or with a width '
                                'above 99')
        return now.strftime(format)

    return strftime_now


def _to_json(x: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """json.dumps, as transformers does it: Jinja's own tojson escapes HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
