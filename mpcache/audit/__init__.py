"""`mpcache audit`: what each eviction setting costs, priced by `mpcache.cost.pricing` and laid out."""

from __future__ import annotations

from mpcache.audit.audit_command import audit

__all__ = ["audit"]
