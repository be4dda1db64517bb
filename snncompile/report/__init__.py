"""What a compile decided and what a run measured."""

from __future__ import annotations

from .front import FrontPoint, front_of
from .parity import Comparison, Parity, verify
from .profile import profile_module
from .report import Report, SegmentRow

__all__ = ["Comparison", "FrontPoint", "Parity", "Report", "SegmentRow", "front_of", "profile_module", "verify"]
