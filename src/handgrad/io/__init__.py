"""What handgrad keeps on disk: checkpoints."""

from handgrad.io.checkpoint import load, load_meta, load_state, newest, prune, save

__all__ = ["load", "load_meta", "load_state", "newest", "prune", "save"]
