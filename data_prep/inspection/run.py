"""Show a training sample of a run as text: training's own reader decides which tokens it is. Imports torch."""

from data_prep.config import DataConfig
from data_prep.errors import DataError
from data_prep.inspection.tokens import checked_tokenizer, show_ids
from data_prep.training.blend import open_blend
from data_prep.training.index_store import open_store


def show_sample(data: DataConfig, seq_len: int, number: int, model: str = "") -> str:
    """Sample `number` (from 0, over all epochs) of a run: its source, epoch and window, and its text.

    Raises:
        DataError: a source that training would refuse, a negative number, another tokenizer than the set's, a stream.
    """
    if number < 0:
        raise DataError(f"inspect: sample {number} is negative; 0 or more works")
    if data.documents == "stream":
        what = "which window it is depends on train.global_batch with data.documents=stream"
        raise DataError(f"inspect: sample {number}: {what}; a token set with --window works")
    blend = open_blend(data, seq_len)
    which, own = blend.shares.locate(number)
    source, (_, entry) = blend.sources[which], data.entries()[which]
    tokenizer = checked_tokenizer(open_store(entry.train, entry.eos_id, entry.vocab_size), model)
    epoch, position = divmod(own, len(source))
    title = (
        f"sample {number}: {entry.train}, epoch {epoch}, {position} of {len(source)} (window {source.window_of(own)},"
        f" seed {data.seed}, documents {data.documents}, {blend.real_targets(number)} targets)"
    )
    return f"{title}\n{show_ids(blend.sample(number), data.documents, tokenizer)}"
