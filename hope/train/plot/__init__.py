"""Loss curves of runs as pictures: `python -m hope.train.plot RUN ...`.

curves.py     what metrics.jsonl says, smoothed
picture.py    lines, dots and words with a place, as SVG
chart.py      curves on two axes as a picture
__main__.py   the program; it also paints PNG, with pillow
"""
