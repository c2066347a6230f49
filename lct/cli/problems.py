"""Everything that is wrong with a command, in one error."""

import contextlib
from collections.abc import Iterable, Iterator


class Problems:
    """Sentences about what is wrong, collected while the checks go on."""

    def __init__(self):
        self.sentences = []

    @contextlib.contextmanager
    def collect(self) -> Iterator[None]:
        """Around a check: its ValueError or OSError is kept, and the checks go on."""
        try:
            yield
        except SeveralProblems as error:
            self.extend(error.sentences)
        except ValueError as error:
            self.extend([str(error)])
        except OSError as error:
            self.extend([str(error) if error.filename is None else
                         f'{error.filename} cannot be read ({error.strerror}); name another file or folder'])

    def extend(self, sentences: Iterable[str]) -> None:
        """Add sentences, each once."""
        self.sentences = list(dict.fromkeys([*self.sentences, *sentences]))

    def check(self) -> None:
        """Raise what was collected, if anything.

        Raises:
          ValueError: with the one sentence, or SeveralProblems.
        """
        if len(self.sentences) == 1:
            raise ValueError(self.sentences[0])
        if self.sentences:
            raise SeveralProblems(self.sentences)


class SeveralProblems(ValueError):
    """The sentences of several problems, each a line."""

    def __init__(self, sentences: list[str]):
        self.sentences = sentences
        super().__init__('\n'.join([f'{len(sentences)} problems',
                                    *(f'{i}. {one}' for i, one in enumerate(sentences, 1))]))
