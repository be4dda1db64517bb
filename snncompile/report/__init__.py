"""What a compile decided and what a run measured."""

from __future__ import annotations

from .parity import Comparison, Parity, verify
from .profile import profile_module
from .report import Report, SegmentRow

__all__ = ["Comparison", "Parity", "Report", "SegmentRow", "profile_module", "verify"]
