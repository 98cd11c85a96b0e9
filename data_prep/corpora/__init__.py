"""Where text comes from: documents as JSON lines, deduplicated, split by hash into training and held-out."""
