"""The error for what a user can put right."""


class UserError(ValueError):
    """One sentence that names the file, field or value at fault and what to do about it.

    The binaries print it without a traceback and exit with status 2.
    """


def reason_of(error: BaseException) -> str:
    """What a library's error says, in one line: its first that is no mere heading, or its name."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    heading = lines[0] if lines and lines[0].endswith(":") else ""
    return " ".join([heading, *lines[bool(heading) :][:1]]).strip() or type(error).__name__
