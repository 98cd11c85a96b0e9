"""A prompt that is learned from while it is read; see `hope.adapt`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hope.adapt.learner import Learner, detached
from hope.generate.loop import Memory
from hope.model import Model, next_token_loss


def read_and_learn(model: Model, learner: Learner, memory: Memory, prompt: Sequence[int]) -> Memory:
    """What the sequence remembers after `prompt`, of which the last token waits to be read.

    Every token of the prompt that stands behind another one is learned from; what the model wrote itself is not. The
    prompt is read in calls that end where a window of the learner does, or the prompt.

    Args:
        memory: of the sequence that goes on; an empty one: it begins with the prompt.
    """
    device = next(model.parameters()).device
    tokens = torch.tensor([*memory.unread, *prompt], device=device).unsqueeze(1)
    state, begin, last = memory.state, 0, len(tokens) - 1
    while begin < last:
        end = min(begin + learner.room, last)
        with torch.enable_grad():
            logits, after = model(tokens[begin:end], state)
            nats = next_token_loss(logits, tokens[begin + 1 : end + 1]) * (end - begin)
            learner.learn(nats, end - begin)
        state, begin = detached(after), end
    return Memory(state, tokens[last:, 0].tolist(), memory.place + len(prompt))
