"""Paths with a scheme, such as s3://bucket/folder: which ones there are, and where they can be used."""

import os
import re

SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]+):/')  # one slash: what pathlib leaves of two


def scheme_of(path: str | os.PathLike) -> str:
    """'s3' of 's3://bucket/folder'; '' of a local path."""
    match = SCHEME.match(os.fspath(path))
    return match[1].lower() if match else ''


def refuse_remote(path: str | os.PathLike, name: str = '') -> None:
    """Refuse a path with a scheme, of which the operating system would make a local folder 's3:'.

    name: of the flag or field that holds it.

    Raises:
      ValueError: with the remedy.
    """
    if scheme := scheme_of(path):
        remedy = 'write it without file://' if scheme == 'file' else (
            'give a local path, such as a folder where the bucket is mounted')
        name = name.strip() + ' ' * (not name.endswith('='))
        raise ValueError(f'{name}{os.fspath(path)} has the scheme {scheme}://, which is not supported; '
                         f'{remedy}'.strip())
