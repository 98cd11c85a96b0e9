"""Text to Megatron's .bin/.idx: in parallel, resumable, with every bad record accounted for. Which file to read:

commands             cli.py, split_cli.py, tokenizer_cli.py
the run              tokenize.py -> work.py (unfinished parts) -> shard.py (one unit) -> merge.py; progress.py
what is read         inputs.py (files of --input) -> sniff.py (what a file is) -> units.py (how it is cut)
documents            raw_records.py (lines, texts, rows) -> records.py; bad.py and outlook.py say what is wrong
tokenizer            tokenizer.py
train and held-out   split.py
"""
