"""The error for what a user can put right."""


class UserError(ValueError):
    """One sentence that names the file, field or value at fault and what to do about it.

    The binaries print it without a traceback and exit with status 2.
    """
