"""The failures that end in one line for a person instead of a traceback."""


class UserError(ValueError):
    """Something the user can put right: a field, a file, a folder. Exit status 2."""


class DivergedError(RuntimeError):
    """The loss is no longer a finite number. Exit status 1.

    Attributes:
        step: number of optimizer steps that had been taken when it happened.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class InterruptedRunError(Exception):
    """A signal ended the run after its state was saved. Exit status 128 + signal.

    Attributes:
        signal_number: the signal that asked for it.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number
