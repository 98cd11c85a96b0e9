"""Looking at token sets: verify, statistics, documents and samples shown as text."""
