"""Checks of the fields of config.json and of Meta's params.json."""

from typing import Any

from lct.json_files import short_repr

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1  # larger sizes are mistakes, found before any work is done with them


def refuse_unknown(values: dict[str, Any], known: set[str], path: str) -> None:
    """Refuse fields outside of known, unless they are null."""
    for field, value in values.items():
        if field not in known and value is not None:
            raise ValueError(
                f'{path}: field {short_repr(field)} is not known and might change the result; '
                'remove it if it does not')


def read_required(values: dict[str, Any], names: dict[str, str], path: str) -> dict[str, Any]:
    """{LlamaConfig field: value} of names {field of the file: LlamaConfig field}; none may be missing."""
    for field in names:
        if values.get(field) is None:
            raise ValueError(f'{path}: {field} is missing; add it')
    return {name: values[field] for field, name in names.items()}


def check_sizes(sizes: dict[str, Any], path: str) -> None:
    """Refuse {field: value} unless all are positive integers of a sane size."""
    for field, value in sizes.items():
        limit = MAX_LAYERS if field in ('n_layers', 'num_hidden_layers') else MAX_SIZE
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not is_integer or not 0 < value <= limit:
            raise ValueError(
                f'{path}: {field} is {short_repr(value)}; it must be a positive integer up to {limit}')


def is_number(x: Any) -> bool:
    """Whether float() takes a JSON value: integers may be too large for it."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e300
