"""Builds token shards and evaluation files from text and published data sets."""
