"""Text to Megatron's .bin/.idx: in parallel, resumable, with every bad record accounted for."""
