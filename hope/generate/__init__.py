"""Text from a trained model: `python -m hope.generate RUN|CHECKPOINT|EXPORT --prompt TEXT --tokens N`.

sampling.py   which token comes next: temperature, top-k, top-p, and draws that are a function of seed and place
loop.py       prefill in chunks, then single steps with the carried state
text.py       text as it grows: whole characters only, stop strings
learning.py   a prompt that is learned from while it is read (--adapt)
session.py    what a sequence remembers, as a file
prompts.py    prompts from the command line, a file or standard input
options.py    the command line
__main__.py   the program
"""
