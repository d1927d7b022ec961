"""From raw data to token shards, one file per kind of data."""
