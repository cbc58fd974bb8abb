"""The two errors flexpatch raises for what a user can put right, and its warning."""


class FlexpatchError(ValueError):
    """Input that cannot be used; the message names the sample, the value found and what is allowed."""


class UnsupportedModelError(FlexpatchError):
    """A model, or a setting of it, for which shared prefixes would not be exact; the message gives the way out."""


class FlexpatchWarning(UserWarning):
    """A batch runs as it was given, without sharing; the message says why. Results are those of the unpatched model."""
