"""The two errors flexpatch raises for what a user can put right, its warning, and how errors are shown."""


class FlexpatchError(ValueError):
    """Input that cannot be used; the message names the sample, the value found and what is allowed."""


class UnsupportedModelError(FlexpatchError):
    """A model, or a setting of it, for which shared prefixes would not be exact; the message gives the way out."""


class FlexpatchWarning(UserWarning):
    """A batch runs as it was given, without sharing; the message says why. Results are those of the unpatched model."""


def first_line(error: BaseException, most: int = 500) -> str:
    """What an error says, for one line of a terminal: other libraries' messages may be empty, or have many lines."""
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if len(line) <= most else f"{line[:most]} ..."
