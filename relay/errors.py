"""What can go wrong, said in one line that names the cause and the way out."""


class RelayError(Exception):
    """Base of every error a user may meet. The message is one line, whatever it quotes."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class BadRequest(RelayError):
    """What was asked cannot be done as asked."""


class FamilyError(RelayError):
    """A family's description, members or weights do not allow it."""


class HandoffRefused(RelayError):
    """A handoff that is not trusted: damaged, foreign or inconsistent."""


class NonFiniteLatent(RelayError):
    """A member produced NaN or infinity; the message names the member and the step."""


class Busy(RelayError):
    """Nothing more is taken in now; `retry_after_s` seconds from now there should be room."""

    def __init__(self, message: str, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(RelayError):
    """Nobody wants it any more; the message says how far it got."""


class DeadlinePassed(RelayError):
    """The time that was given is over; the message says how far it got."""


class StepFailed(RelayError):
    """A member could not make a step: out of memory at one image, or an error of its own."""
