"""How processes find each other: launcher variables, process groups, megatron-core on a CPU."""
