"""Serving system for two-tower diffusion language models.

The public Python API is what `__all__` names here and in `twotower.client`: the nouns of a generation, the errors that a
user can meet, and the client. Everything else may change with any version.
"""

from twotower.errors import (
    BrokerUnavailable,
    CheckpointError,
    ConfigError,
    DeadlineExceeded,
    Draining,
    Incompatible,
    InvalidArgument,
    NonFiniteLogits,
    Overloaded,
    RequestFailed,
    ServiceFailed,
    TwoTowerError,
    Unavailable,
)
from twotower.events import Accepted, Block, Event, Finished
from twotower.request import FinishReason, Mode, Priority, TokenLogprob

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "Block",
    "BrokerUnavailable",
    "CheckpointError",
    "ConfigError",
    "DeadlineExceeded",
    "Draining",
    "Event",
    "FinishReason",
    "Finished",
    "Incompatible",
    "InvalidArgument",
    "Mode",
    "NonFiniteLogits",
    "Overloaded",
    "Priority",
    "RequestFailed",
    "ServiceFailed",
    "TokenLogprob",
    "TwoTowerError",
    "Unavailable",
    "__version__",
]
