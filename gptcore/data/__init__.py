"""Token datasets, their files (shards), and the collator that makes batches."""
