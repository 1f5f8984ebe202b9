"""Errors that the user of the program can mend, as opposed to faults of the program."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from zipfile import BadZipFile


class UserError(ValueError):
    """Something that was given is wrong; the message says what was got, what was expected and what to do.

    The command line prints the message alone and ends with exit code 2. Every other exception is a fault of
    the program and keeps its traceback.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'NAME'?" with the known name that is spelt most alike, or nothing."""
    near = get_close_matches(name, list(known), n=1)
    near = near or [other for other in known if other.casefold() == name.casefold()]
    return f"; did you mean {near[0]!r}?" if near else ""


class DataWarning(UserWarning):
    """Something in the data that was given is odd, and was mended or is tolerated; the message says how."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the errors of reading and validating `what` into a :class:`UserError` that names it.

    Put it around code that looks at nothing but what the user gave: in there such errors are about the input.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, OSError, BadZipFile, zlib.error) as error:
        # str(KeyError("x")) is "'x'": its argument is the message.
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"{what}: {message}") from error


def one_line(error: Exception) -> str:
    """The message of an error, for the inside of another."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
