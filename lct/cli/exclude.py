"""The flag --exclude of the scripts that read a corpus."""

import argparse


def add_exclude_flag(parser: argparse.ArgumentParser) -> None:
    """args.exclude: patterns for data.corpus.listing.find."""
    parser.add_argument('--exclude', action='append', default=[], metavar='PATTERN',
                        help="leave out files and folders of such a name, as '*.csv' or tests; may be given "
                             'several times')
