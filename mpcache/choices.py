"""The public choices that have names: enums that are text, as YAML, JSON and the command line write them."""

from __future__ import annotations

from enum import StrEnum

POLICY_AUTO = "auto"  # in place of a policy: `mpcache.cost.planner` picks one


class ProtocolName(StrEnum):
    """What computes on shares. FAST and FAST_BITS differ in how a top-k compares; AUTO picks one of them.

    The engines themselves: `mpcache.engines.registry`. The choice of AUTO: `mpcache.cost.choose`.
    """

    STOCK = "stock"
    FAST = "fast"
    FAST_BITS = "fast-bits"
    AUTO = "auto"


class Reveal(StrEnum):
    """What the client learns of each step: all logits, or the likeliest token alone."""

    LOGITS = "logits"
    TOKEN = "token"


class ChatForm(StrEnum):
    """What stands around document and questions: the model's chat template, if it has one, or nothing."""

    TEMPLATE = "template"
    RAW = "raw"


class DocumentAs(StrEnum):
    """Where a chat template finds the document: as its system message, or before the first question."""

    SYSTEM = "system"
    USER = "user"
