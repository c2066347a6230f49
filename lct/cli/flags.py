"""What the flags of all scripts have in common."""

import argparse

from lct.text import parse_length


def add_exclude_flag(parser: argparse.ArgumentParser) -> None:
    """args.exclude: patterns for data.corpus.listing.find."""
    parser.add_argument('--exclude', action='append', default=[], metavar='PATTERN',
                        help="leave out files and folders of such a name, as '*.csv' or tests; may be given "
                             'several times')


def length(text: str) -> int:
    """The type of flags that are numbers of tokens: 65536, 64K or 1M."""
    try:
        return parse_length(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
