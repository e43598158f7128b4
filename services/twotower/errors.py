"""Every error a user can meet. `status.py` maps them to gRPC and HTTP.

TwoTowerError
├── InvalidArgument        the request is wrong; names the field
├── CheckpointError        the checkpoint is missing, damaged or does not fit its config
├── ConfigError            a service was started with settings that cannot work
│   └── PortInUse          the address to listen on is taken
├── ServiceFailed          a process of the stack did not start, or keeps dying
├── Unavailable            cannot be served now; try again
│   ├── BrokerUnavailable  Redis does not answer
│   └── Draining           the service takes nothing new; another one does
├── Overloaded             the queue is full; try again later
├── DeadlineExceeded       the caller's deadline passed before the end
├── Incompatible           two processes (or a frame and a config) do not fit each other
├── SessionNotFound        the session has ended, or never was
├── LeaseLost              another worker holds the session
├── RequestFailed          the towers fail on this request, wherever it runs
├── EngineStuck            a forward does not return: the process must end
├── LossNotFinite          training diverged; the last good state is kept
└── NonFiniteLogits        the model produced NaN or infinity for this request
"""

from __future__ import annotations


class TwoTowerError(Exception):
    """Base of all errors that are shown to users as one line, without a traceback."""


class InvalidArgument(TwoTowerError):
    """The caller's fault: the request can never succeed as it is."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class CheckpointError(TwoTowerError):
    """The checkpoint directory cannot be used; the message names the file or tensor."""


class ConfigError(TwoTowerError):
    """A service's settings are wrong; the message names the option."""


class PortInUse(ConfigError):
    """The address to listen on is taken or not ours to use."""


class ServiceFailed(TwoTowerError):
    """A process of the stack did not start, or died too often; the message is its own last error."""


class Unavailable(TwoTowerError):
    """The service's state, not the request: the same call may succeed later."""


class BrokerUnavailable(Unavailable):
    """Redis does not answer."""


class Draining(Unavailable):
    """This replica takes nothing new; another one does."""


class Overloaded(TwoTowerError):
    """Too much is in flight; nothing was started for this request."""

    retry_after_s = 1


class DeadlineExceeded(TwoTowerError):
    """The caller gave a deadline, and it passed; what was generated until then was delivered."""


class Incompatible(TwoTowerError):
    """Two ends do not fit each other; the message names the field."""


class SessionNotFound(TwoTowerError):
    """No such session here (it ended, or its context restarted)."""


class LeaseLost(TwoTowerError):
    """The session was queued again since, or another worker is attached."""


class RequestFailed(TwoTowerError):
    """Forwards failed on this request alone, wherever it ran; it is not tried again."""


class EngineStuck(TwoTowerError):
    """A forward has not returned for too long; nothing but the end of the process helps."""


class LossNotFinite(TwoTowerError):
    """The loss of a training run became NaN or infinite; the last saved state is kept."""


class NonFiniteLogits(TwoTowerError):
    """NaN or infinity where a confidence was needed; the request fails, its neighbours do not."""
