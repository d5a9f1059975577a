"""What goes wrong in words: the text is shown to the person, without a traceback."""


class SalunError(Exception):
    """Something failed; one sentence that names it, and the next command to type. Exit code 1."""

    exit_code = 1


class UsageError(SalunError):
    """The command's own arguments are wrong or cannot go together. Exit code 2."""

    exit_code = 2
