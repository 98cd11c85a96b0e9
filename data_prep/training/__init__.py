"""What a training run reads: windows by sample number, blends, and batches per data-parallel rank."""
