"""The optimizer over ranks: ZeRO-1 partitions, owners of whole matrices, clocks, statistics."""
