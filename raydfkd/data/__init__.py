"""The transfer set: shards, commits, snapshots and the batches read from them."""
