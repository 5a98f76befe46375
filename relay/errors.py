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
