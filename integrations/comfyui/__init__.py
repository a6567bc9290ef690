"""Nodes for ComfyUI: load an erasure, apply it to a model and its text encoders, verify it, remove objects.

ComfyUI finds the nodes by the two names below. See README.md beside this file.
"""

from __future__ import annotations

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
