"""The two errors flexpatch raises for what a user can put right."""


class FlexpatchError(ValueError):
    """Input that cannot be used; the message names the sample, the value found and what is allowed."""


class UnsupportedModelError(FlexpatchError):
    """A model, or a setting of it, for which shared prefixes would not be exact; the message gives the way out."""
