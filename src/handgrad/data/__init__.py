"""Token shards, batches of them, and the way from text to shards."""

from handgrad.data.loader import Tokens, tokens
from handgrad.data.prepare.text import prepare_text, read_meta, read_text, shakespeare
from handgrad.data.shards import Shard, ShardWriter, id_dtype, open_shard, write_random, write_shard

__all__ = [
    "Shard",
    "ShardWriter",
    "Tokens",
    "id_dtype",
    "open_shard",
    "prepare_text",
    "read_meta",
    "read_text",
    "shakespeare",
    "tokens",
    "write_random",
    "write_shard",
]
