"""What a run stores, as files: checkpoints and exported weights, read with torch alone and written as JSON and raw
numbers. Nothing that is read is executed.

manifest.py     what is where in a checkpoint: the JSON that makes a folder one
folders.py      names of checkpoints, the atomic rename, `latest`, what is kept
tensors.py      tensors of a checkpoint from its raw files
safetensors.py  the format of exported weights
find.py         what a path means: a run, a checkpoint or an export
tokenizer.py    the tokenizer that belongs to the data of a run
errors.py       what a user can act on
"""
