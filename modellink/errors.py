"""The one exception a user is meant to read."""


class ModelLinkError(Exception):
    """Bad usage or bad input: one sentence that says what is wrong, where, and how to fix it.

    Command-line programs print it as ``modellink: error: ...`` without a traceback and exit with `exit_code`
    (2 for bad usage or input; 1 for a failure while running).
    """

    exit_code = 2


class RunFailure(ModelLinkError):
    """Something failed while a run was under way (a dead peer, NaN loss): exit code 1."""

    exit_code = 1
