"""The model, or any contiguous slice of it: embedding, blocks, norm, head.

Shapes: T time, B batch, D width, V vocabulary. Parameter names are those of the whole model in every slice
(`blocks.5.mixer.query.weight`), so checkpoints and gradient rules speak one language.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hope.block import RECOMPUTE, Block, BlockState
from hope.config import ModelConfig
from hope.dense import Dense, form_for, set_form, whole
from hope.documents import Documents
from hope.flops import Flops
from hope.layers import RMSNorm
from hope.loss import Unscored, block_of
from hope.parameters import initialise, new_parameter, normal

States = dict[int, BlockState]
"""By block number."""


@dataclass(frozen=True)
class Slice:
    """Blocks [first, last) of the model; with the embedding if first is 0, with the head if last is the end."""

    first: int
    last: int


class Embedding(Dense):
    """Rows of the vocabulary [V, D]. N(0, 0.09 / D): as the head it adds 0.045 nats to a first loss of ln V.

    A tensor-parallel rank holds the rows from `first_row` on; it looks up zeros for the others, and `leave` sums.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        init = normal(0.3 * config.width**-0.5)
        self.weight = new_parameter(config.vocab_size, config.width, init=init, cut=0, update="elementwise")
        self.vocab_size, self.first_row = config.vocab_size, 0
        self.enter, self.leave = nn.Identity(), nn.Identity()

    def forward(self, tokens_TB: Tensor) -> Tensor:
        """Token ids [T, B] -> [T, B, D]."""
        rows = self.weight.shape[0]
        if rows == self.vocab_size:
            return F.embedding(tokens_TB, self.weight)
        local = tokens_TB - self.first_row
        elsewhere = (local < 0) | (local >= rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        whole: Tensor = self.leave(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))
        return whole

    def logits(self, x_TBD: Tensor) -> Tensor:
        """[T, B, D] -> scores of this rank's rows [T, B, V]."""
        return F.linear(self.enter(x_TBD), self.weight)

    def scores(self, x_TBD: Tensor, chunk: int | None) -> Tensor | Unscored:
        """`logits`, or where they are too many what they are made of. chunk: as `hope.loss.block_of` takes it."""
        x_TBD, rows = self.enter(x_TBD), self.weight.shape[0]
        block = block_of(x_TBD.shape[0] * x_TBD.shape[1], rows, chunk)
        if not block:
            return F.linear(x_TBD, self.weight)
        return Unscored(x_TBD, self.weight, self.first_row, block, self.form)


class Model(nn.Module):
    """forward(inputs, state, starts, keep_state, last_only) -> (outputs, state).

    inputs: token ids [T, B] if the slice has the embedding, else activations [T, B, D].
    state: block index -> state carried from the previous call, or None to start every sequence anew.
    starts: [T, B] bool, true at document starts: memories, convolutions and attention are reset there.
    keep_state: whether the state is wanted; without it each block's is let go at once.
    last_only: logits of the last token only, [1, B, V]: those of a long prompt would take more memory than all else.
    outputs: logits [T, B, V] if the slice has the head, else activations [T, B, D].
    """

    def __init__(self, config: ModelConfig, part: Slice | None = None) -> None:
        super().__init__()
        part = part or Slice(0, config.layers)
        if not 0 <= part.first < part.last <= config.layers:
            raise ValueError(f"slice [{part.first}, {part.last}) of a model with {config.layers} blocks")
        self.config, self.part = config, part
        self.has_embedding, self.has_head = part.first == 0, part.last == config.layers
        if self.has_embedding or (self.has_head and config.tie_embeddings):
            self.embedding = Embedding(config)
        mixers = config.mixer_of_layer
        self.blocks = nn.ModuleDict({str(i): Block(config, mixers[i]) for i in range(part.first, part.last)})
        if self.has_head:
            self.norm = RMSNorm(config.width, eps=config.norm_eps)
            if not config.tie_embeddings:
                self.head = Embedding(config)

    def initialise(self, seed: int) -> "Model":
        """Fill all parameters as a pure function of (seed, name); see `hope.layers.initialise`."""
        initialise(self, seed)
        return self

    def set_recompute(self, what: str) -> None:
        """Trade compute for memory in the backward pass; `what` is one of `hope.block.RECOMPUTE`, see `Block`."""
        if what not in RECOMPUTE:
            raise ValueError(f"recompute {what!r} is none of {', '.join(RECOMPUTE)}")
        for block in self.blocks.values():
            assert isinstance(block, Block)
            block.recompute = what

    def set_compile(self, what: str, device: str) -> None:
        """Fuse the dense parts of sublayers, or whole blocks; `what` is one of `hope.dense.COMPILE`, `device` a type.

        Raises:
            CannotCompile: this machine has no compiler for that.
        """
        form = form_for(what, device)
        set_form(self, form)
        for block in self.blocks.values():
            assert isinstance(block, Block)
            block.whole = whole(block.stateless) if what == "block" and block.compiles_whole else None

    def forward(
        self,
        inputs: Tensor,
        state: States | None = None,
        starts: Tensor | None = None,
        *,
        keep_state: bool = True,
        last_only: bool = False,
    ) -> tuple[Tensor, States]:
        """See the class. Raises ValueError for a state of other blocks, and for what cannot be tokens [T, B]."""
        x, after = self.trunk(inputs, state, starts, keep_state=keep_state)
        if not self.has_head:
            return x, after
        return self.vocabulary.logits(x[-1:] if last_only else x), after

    def trunk(
        self, inputs: Tensor, state: States | None = None, starts: Tensor | None = None, *, keep_state: bool = True
    ) -> tuple[Tensor, States]:
        """`forward` without the scores: [T, B, D], normed if the slice has the head. For `vocabulary.scores`."""
        if self.has_embedding:
            _check_tokens(inputs, starts)
        if state is not None and [str(number) for number in state] != list(self.blocks):
            raise ValueError(f"a state of blocks {list(state)} for blocks {', '.join(self.blocks)}")
        x = self.embedding(inputs) if self.has_embedding else inputs
        documents = None if starts is None else Documents(starts)
        after: States = {}
        for name, block in self.blocks.items():
            x, states = block(x, None if state is None else state[int(name)], documents, keep_state)
            if keep_state:
                after[int(name)] = states
        return self.norm(x) if self.has_head else x, after

    @property
    def watched(self) -> bool:
        """Whether mixers collect what they report; one within a mixer is told by that one, in a forward pass."""
        return any(part.watched for block in self.blocks.values() for part in block.mixing().values())  # type: ignore[operator]

    @property
    def vocabulary(self) -> Embedding:
        """What scores the vocabulary, of a slice with the head."""
        return self.embedding if self.config.tie_embeddings else self.head

    def flops(self, length: int) -> Flops:
        """Per token, forward, at this sequence length. The embedding is a look-up and counts nothing."""
        total = Flops()
        for block in self.blocks.values():
            assert isinstance(block, Block)
            total = total + block.flops(length)
        if self.has_head:
            total = total + Flops(dense=2.0 * self.config.vocab_size * self.config.width)
        return total


def _check_tokens(tokens_TB: Tensor, starts_TB: Tensor | None) -> None:
    """Time comes first. Ids that lie [B, T] cannot be told from these: they give other numbers, and no error."""
    if tokens_TB.dim() != 2 or tokens_TB.is_floating_point() or tokens_TB.dtype == torch.bool:
        shown = f"{str(tokens_TB.dtype).removeprefix('torch.')} {list(tokens_TB.shape)}"
        raise ValueError(f"tokens are {shown}; a model takes whole numbers [time, batch]")
    if starts_TB is not None and (starts_TB.shape != tokens_TB.shape or starts_TB.dtype != torch.bool):
        shown = f"{str(starts_TB.dtype).removeprefix('torch.')} {list(starts_TB.shape)}"
        raise ValueError(f"starts are {shown} for tokens {list(tokens_TB.shape)}; bool [time, batch] is wanted")


def next_token_loss(logits_TBV: Tensor, targets_TB: Tensor, weights_TB: Tensor | None = None) -> Tensor:
    """Mean cross-entropy in nats, taken in fp32 (or fp64).

    With `weights_TB` [T, B] the mean over all T B places of weight times cross-entropy: weights that average 1 over a
    global batch give its mean over the places that count, however it is divided over micro-batches and ranks.
    """
    dtype = torch.promote_types(logits_TBV.dtype, torch.float32)
    scores, targets = logits_TBV.flatten(0, 1).to(dtype), targets_TB.flatten()
    if weights_TB is None:
        return F.cross_entropy(scores, targets)
    return (F.cross_entropy(scores, targets, reduction="none") * weights_TB.flatten()).mean()
