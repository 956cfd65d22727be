"""A teacher that kills the process which builds it, but not the one that runs the tests."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from raydfkd.networks import ConvNet


def build(**options: Any) -> ConvNet:
    """See the module."""
    if "pytest" not in sys.modules:
        os.kill(os.getpid(), signal.SIGKILL)
    return ConvNet(10, 1, widths=(4, 8))
