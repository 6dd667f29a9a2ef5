"""The error whose message is meant for the person at the command line."""


class UserError(ValueError):
    """Something the user can fix; the command line prints the message without a traceback."""
