"""From raw text to clean, deduplicated, split token shards, with a report: the command `gptcore prepare`."""
