"""Streaming video diffusion with absorbed attention history and 8-bit linear layers."""

from __future__ import annotations

__version__ = "0.1.0"
