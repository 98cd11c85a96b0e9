"""Weights for other programs, and of other programs: Hugging Face's layout.

modeling_hope.py    what an export brings along so that `transformers` runs our model
huggingface.py      the files of such an export
llama.py            a Llama's weights under our names
"""
