"""Rows shorter than a window: what a stage of the sequence-length schedule reads.

A sample is always one window of train.seq_len + 1 tokens. A stage with rows of seq_len / d tokens cuts each window
into d rows, which start without state. So the stage changes how far the model sees, and nothing else: the order of the
data, the tokens of a step and the position in the data (in samples) are those of a run without stages, and no token
is repeated or skipped where a stage begins.
"""

from collections.abc import Sequence

import numpy as np


def split_windows(windows: Sequence[np.ndarray], row_tokens: int) -> list[np.ndarray]:
    """Windows [T + 1] as rows [row_tokens + 1] in order; neighbours share one token. 0: the windows as they are.

    Raises ValueError if `row_tokens` does not divide T.
    """
    length = len(windows[0]) - 1
    if row_tokens in (0, length):
        return list(windows)
    if row_tokens < 0 or length % row_tokens:
        raise ValueError(f"windows of {length} tokens do not divide into rows of {row_tokens}")
    return [window[start : start + row_tokens + 1] for window in windows for start in range(0, length, row_tokens)]
