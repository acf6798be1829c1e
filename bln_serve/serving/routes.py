"""The URLs that ask a model, and the wire protocol that each of them speaks."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from bln_serve.serving import open_inference, predict, tf_serving
from bln_serve.serving.prediction import Message, PredictRequest
from bln_serve.signature import ModelSignature


@dataclass(frozen=True, slots=True)
class Protocol:
    """A wire protocol.

    Attributes:
        read: turns a message into a request, for a model with this signature.
        slow_bytes: how many bytes of a message are text to be parsed, and so take long.
    """

    read: Callable[[Message, ModelSignature], PredictRequest]
    slow_bytes: Callable[[Message], int]


@dataclass(frozen=True, slots=True)
class Target:
    """What a URL asks.

    Attributes:
        protocol: in which it does.
        name: of the model; None for the default one.
        version: as written; None for the one that is served.
    """

    protocol: Protocol
    name: str | None = None
    version: str | None = None


PREDICT = Protocol(predict.read, predict.slow_bytes)
TF_SERVING = Protocol(tf_serving.read, tf_serving.slow_bytes)
OPEN_INFERENCE = Protocol(open_inference.read, open_inference.slow_bytes)

_NAME, _VERSION = "(?P<name>[^/]+?)", "(?:/versions/(?P<version>[^/]+?))?"
_PATTERNS = (
    (re.compile("/predict"), PREDICT),
    (re.compile(f"/models/{_NAME}{_VERSION}/predict"), PREDICT),
    (re.compile(f"/v1/models/{_NAME}{_VERSION}:predict"), TF_SERVING),
    (re.compile(f"/v2/models/{_NAME}{_VERSION}/infer"), OPEN_INFERENCE),
)


def target_of(path: str) -> Target | None:
    """Return what a POST to this path asks, or None if it asks no model."""
    return _known_target(path) if len(path) <= _MAX_KNOWN_LENGTH else _target(path)


def _target(path: str) -> Target | None:
    for pattern, protocol in _PATTERNS:
        if match := pattern.fullmatch(path):
            return Target(protocol, **match.groupdict())
    return None


# Whoever asks for many long paths would otherwise have them all kept.
_MAX_KNOWN_LENGTH = 256
_known_target = lru_cache(maxsize=1024)(_target)
