"""Ends of a command that are no faults of the program."""


class UserError(ValueError):
    """Something the user can fix; the command line prints the message without a traceback."""


class DataError(UserError):
    """A source of data that is missing or does not have the expected columns."""


class ModelError(UserError):
    """A model that is missing, cannot be built, or does not fit the other one."""


class ToldByMain(UserError):
    """What another process of the job has told already."""


class NonFiniteError(UserError):
    """What the teacher answers, or too many updates in a row, are not finite."""


class Terminated(KeyboardInterrupt):
    """The system asked for the end (SIGTERM), and what was done is saved."""
