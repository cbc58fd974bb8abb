"""Errors and warnings that a user can act on."""


class FlexpatchError(ValueError):
    """Input that cannot be used. The message names the sample, the value found and the values allowed."""


class UnsupportedModelError(FlexpatchError):
    """Model or setting with which shared prefixes would not be exact. The message gives the way out."""


class FlexpatchWarning(UserWarning):
    """Batch that runs as it was given, without sharing. Results are exact; the message gives the reason."""


def first_line(error: BaseException, most: int = 500) -> str:
    """Shorten an error's message to one line. Messages of other libraries may be empty, or have many lines.

    Args:
        error: Any error.
        most: Largest number of characters.

    Returns:
        The first line of the message.
    """
    line = (str(error).strip() or "no message").splitlines()[0]
    return line if len(line) <= most else f"{line[:most]} ..."
