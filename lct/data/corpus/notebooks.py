"""The text of a Jupyter notebook: its cells without outputs, in the percent format of editors."""

import json
from typing import Any


def notebook_text(content: bytes) -> str:
    """The cells of an .ipynb: code as it is, other cells under '# %% [their type]'.

    Raises:
      ValueError: with a predicate, for content that is not a notebook.
    """
    try:
        cells = json.loads(content)['cells']
        return '\n'.join(f'# %%{_kind(cell)}\n{_source(cell)}\n' for cell in cells)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f'is not a Jupyter notebook ({type(error).__name__}: {error})') from None


def _kind(cell: dict[str, Any]) -> str:
    return '' if cell['cell_type'] == 'code' else f' [{cell["cell_type"]}]'


def _source(cell: dict[str, Any]) -> str:
    source = cell['source']
    return (source if isinstance(source, str) else ''.join(source)).rstrip('\n')
