"""`python -m data_prep tokenize`."""

import argparse
import time
from pathlib import Path

from data_prep.errors import DataError
from data_prep.files import sha256_file
from data_prep.hooks import hook_identity
from data_prep.manifest import TokenSetManifest, is_verified, load_manifest, manifest_path
from data_prep.paths import output_prefix, user_path
from data_prep.tokenizing.inputs import INPUT_HELP, input_files
from data_prep.tokenizing.records import Rules
from data_prep.tokenizing.tokenize import Settings, tokenize_files
from data_prep.tokenizing.tokenizer import Tokenizer, available_threads, refuse_lossy
from data_prep.tokenizing.units import FORMATS
from data_prep.tokenizing.work import WorkFolder, recipe_of
from hope.arguments import count, finite


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    tokens = commands.add_parser("tokenize", help="text to PREFIX.bin, .idx and .manifest.json")
    tokens.add_argument("--input", required=True, nargs="+", type=user_path, help=INPUT_HELP)
    tokens.add_argument(
        "--tokenizer", "--model", required=True, type=user_path, help="sentencepiece model, or a tokenizer.json"
    )
    tokens.add_argument("--lossy", action="store_true", help="take a tokenizer that gives some texts back changed")
    tokens.add_argument("--out", required=True, type=output_prefix, help="prefix, for example data/mine/train")
    tokens.add_argument("--workers", type=count, default=available_threads(), help="processes (default: all cores)")
    tokens.add_argument(
        "--format", choices=FORMATS, default="auto", help="auto goes by the name; lines: one text document per line"
    )
    tokens.add_argument("--text-key", default="text", help="field with the text (default text), or a.b inside a")
    tokens.add_argument(
        "--on-bad",
        choices=["stop", "skip", "replace"],
        default="stop",
        help="bad records: stop at the first (default), skip them, or mend what can be mended",
    )
    tokens.add_argument("--max-bad", default="", help="fail above this many bad records, 20 or 0.5%% (default: none)")
    tokens.add_argument("--max-document-mb", type=finite, default=16.0, help="longest document (default 16 MiB)")
    tokens.add_argument("--hook", default="", help="module:function(doc) -> doc or None, see data_prep/hooks.py")
    tokens.add_argument("--dedup", choices=["off", "exact"], default="off", help="keep the first of equal texts")
    tokens.add_argument("--licence", default="", help="of text whose corpus does not state one")
    tokens.add_argument("--unit-mb", type=finite, default=4.0, help="input per unit of work (default 4 MB)")
    tokens.set_defaults(run=_tokenize)


def _tokenize(args: argparse.Namespace) -> None:
    if args.unit_mb <= 0:
        raise DataError(f"--unit-mb {args.unit_mb}: need more than 0")
    tokenizer = Tokenizer.load(args.tokenizer)
    if not args.lossy:
        refuse_lossy(tokenizer)
    inputs = input_files(args.input)
    rules = Rules(
        text_key=args.text_key,
        on_bad=args.on_bad,
        max_bytes=round(args.max_document_mb * (1 << 20)),
        hook=args.hook,
        dedup=args.dedup,
        format=args.format,
    )
    if (kept := _made_before(inputs, tokenizer, args.out, rules)) is not None:
        print(f"{summary(args.out, kept)} (kept)")
        return
    settings = Settings(rules, args.workers, round(args.unit_mb * 1e6), args.max_bad, args.licence, progress=True)
    started = time.monotonic()
    manifest = tokenize_files(inputs, tokenizer, args.out, settings)
    seconds = time.monotonic() - started
    print(
        f"{summary(args.out, manifest)}; {seconds:.1f} s with {args.workers} workers,"
        f" {manifest.text_bytes / 1e6 / seconds:.2f} MB/s, {manifest.tokens / seconds:,.0f} tokens/s"
    )
    if manifest.bad:
        counts = ", ".join(f"{kind} {count}" for kind, count in manifest.bad.items())
        print(f"bad        {counts}; listed in {args.out}.bad.jsonl")


def _made_before(inputs: list[str], tokenizer: Tokenizer, prefix: str, rules: Rules) -> TokenSetManifest | None:
    """The manifest of a set that was made from exactly this and is intact; else None."""
    if not Path(manifest_path(prefix)).exists() or not all(Path(name).is_file() for name in inputs):
        return None
    digests = [{"sha256": sha256_file(name)} for name in inputs]
    recipe = recipe_of(digests, rules, hook_identity(rules.hook), tokenizer.sha256)
    try:
        manifest = load_manifest(prefix)
    except DataError:
        return None
    if manifest.recipe != recipe or not is_verified(prefix, manifest.sha256_source, tokenizer.sha256):
        return None
    if Path(f"{prefix}.work").exists():  # killed after the manifest was written, before this was cleared away
        with WorkFolder(f"{prefix}.work") as work:
            work.remove_temporary()
            work.remove()
    return manifest


def summary(prefix: str | Path, manifest: TokenSetManifest) -> str:
    """One line about a token set."""
    dropped = ", ".join(f"{count} left out ({why})" for why, count in manifest.dropped.items() if count)
    return (
        f"tokens     {prefix}: {manifest.documents} documents, {manifest.tokens} tokens,"
        f" {manifest.text_bytes / 1e6:.2f} MB of text, {manifest.bytes_per_token:.2f} bytes/token"
        f"{'; ' + dropped if dropped else ''}"
    )
