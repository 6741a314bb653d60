"""The errors that a user can mend. Each message names the argument, what was expected, what came, and the way out."""


class MambakitError(Exception):
    """Something the user can put right; the command line prints its message on one line and exits with status 1."""


class DataError(MambakitError):
    """Input data that cannot be used: missing, too short, not finite, out of order."""


class ArtefactError(MambakitError):
    """A saved file or folder that is missing, incomplete, or whose checksum does not match."""


class TrainingDiverged(MambakitError):
    """The loss stopped being finite; the message says in which epoch and step."""


class OutOfMemory(MambakitError):
    """Training needs more memory than there is; the message says what to lower."""
