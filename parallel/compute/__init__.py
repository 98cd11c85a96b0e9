"""Forward and backward over ranks: the replica, megatron-core's schedules, tensor regions, sums of gradients."""
