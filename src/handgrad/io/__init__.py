"""What handgrad keeps on disk: checkpoints."""

from handgrad.io.checkpoint import Writer, load, load_meta, load_state, newest, prune, save

__all__ = ["Writer", "load", "load_meta", "load_state", "newest", "prune", "save"]
