"""What prompts begin with, kept from one evaluation to the next."""

import abc
import itertools
from collections.abc import Sequence

from lct.models.prompt_layout import common_prefix
from lct.models.session import Rows, Session

MIN_TOKENS = 256  # that are worth a file


class Prefixes(abc.ABC):
    """Prefixes of prompts in some store. read, reused: tokens of the prompts so far, computed and loaded."""

    read = reused = 0

    @abc.abstractmethod
    def load(self, session: Session, prompts: Rows) -> list[int]:
        """Make an empty session hold what the store has of the prompts, one for each row from the first.

        Returns:
          how many tokens of each; all 0 where reading them anew takes no longer.
        """

    @abc.abstractmethod
    def save(self, session: Session, row: int) -> None:
        """Store the text of a row, unless a stored one begins with nearly all of it."""

    def keep(self, session: Session, lengths: Sequence[int]) -> None:
        """Store the first lengths tokens of the rows, where they are worth it. The session then holds those,
        and still has the rest for the next update."""
        session.rewind([*lengths, *session.lengths[len(lengths):]])
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):  # others may begin the longest
            if lengths[row] >= MIN_TOKENS:
                self.save(session, row)


def shared_prefixes(texts: Rows) -> list[int]:
    """For each text, how many tokens it shares from its beginning with the other that shares most."""
    order = sorted(range(len(texts)), key=lambda i: list(texts[i]))
    out = [0] * len(texts)
    for i, j in itertools.pairwise(order):
        shared = common_prefix(texts[i], texts[j])
        out[i], out[j] = max(out[i], shared), max(out[j], shared)
    return out


def longest_rest(prompts: Rows, counts: Sequence[int]) -> int:
    """Tokens of the longest rest of a prompt behind its first counts [rows] tokens. Rows are read side by
    side, so this is how long it takes to read them."""
    return max(len(prompt) - count for prompt, count in zip(prompts, counts, strict=True))
