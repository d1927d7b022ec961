"""Token shards: reading batches from them, and writing them from text."""

from handgrad.data.choices import Choices, read_choices, tokens_digest, tokens_record, write_choices
from handgrad.data.labels import Labels
from handgrad.data.loader import Tokens, find_shards, tokens
from handgrad.data.masked import Masked
from handgrad.data.meta import common_meta, labelled, read_meta
from handgrad.data.mixture import Data, Mixture
from handgrad.data.objectives import Causal, Chat, Objective
from handgrad.data.prepare.build import check
from handgrad.data.prepare.chat import EncodedRow, prepare_chat, read_chats
from handgrad.data.prepare.labels import Columns, prepare_labels
from handgrad.data.prepare.questions import prepare_questions
from handgrad.data.prepare.recipes import prepare, prepare_text
from handgrad.data.prepare.text import read_text, shakespeare, split_text
from handgrad.data.shards import Shard, ShardWriter, id_dtype, open_shard, write_random, write_shard
from handgrad.data.spans import Spans

__all__ = [
    "Causal",
    "Chat",
    "Choices",
    "Columns",
    "Data",
    "EncodedRow",
    "Labels",
    "Masked",
    "Mixture",
    "Objective",
    "Shard",
    "ShardWriter",
    "Spans",
    "Tokens",
    "check",
    "common_meta",
    "find_shards",
    "id_dtype",
    "labelled",
    "open_shard",
    "prepare",
    "prepare_chat",
    "prepare_labels",
    "prepare_questions",
    "prepare_text",
    "read_chats",
    "read_choices",
    "read_meta",
    "read_text",
    "shakespeare",
    "split_text",
    "tokens",
    "tokens_digest",
    "tokens_record",
    "write_choices",
    "write_random",
    "write_shard",
]
