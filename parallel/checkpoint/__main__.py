"""Look into checkpoints: `python -m parallel.checkpoint inspect|verify|reshard-plan|export|import PATH`.

PATH is a checkpoint folder, the `checkpoints` folder of a run, or the run folder; of the last two the newest checkpoint
is meant. Of `import` it is a folder of Hugging Face's. No command executes anything that a file brings: manifests are
JSON, tensors raw numbers. Exit code 0, or 2 with what is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hope.arguments import count
from hope.pipe import in_words, piped
from hope.pretrained import load
from hope.stored import folders, manifest
from parallel.checkpoint.describe import contents, reshard_plan
from parallel.checkpoint.errors import CheckpointError
from parallel.layout.topology import ParallelConfig


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        if args.command == "import":
            print(imported(args.path, Path(args.out)))
            return 0
        path = which(args.path)
        content = manifest.read(path)
        if args.command == "verify":
            print(verify(path))
        elif args.command == "inspect":
            print(f"{path}\n{contents(content, tensors=args.tensors)}")
        elif args.command == "reshard-plan":
            degrees = {"tensor": args.tensor, "pipeline": args.pipeline, "virtual_pipeline": args.virtual_pipeline}
            print(f"{path}\n{reshard_plan(content, ParallelConfig(**degrees), args.data)}")
        else:
            from parallel.checkpoint.export import export

            print(export(path, Path(args.out), args.dtype, args.format))
    except BrokenPipeError:  # an OSError, but about the reader of the output
        raise
    except (CheckpointError, OSError) as error:
        print(f"checkpoint error: {in_words(error)}", file=sys.stderr)
        return 2
    return 0


def imported(path: Path, out: Path) -> str:
    """Write a Llama of Hugging Face's as exported weights to `out`; returns what was written.

    Raises:
        CheckpointError: it cannot be read, is none, or needs what our model has not; or `out` is the same folder.
    """
    from hope.stored.tokenizer import HF_TOKENIZER, TOKENIZER
    from parallel.checkpoint.elsewhere.llama import read_llama
    from parallel.checkpoint.export import write_export

    if out.resolve() == path.resolve():
        raise CheckpointError(f"--out {out} is the folder that is imported; give another one")
    found = read_llama(path)
    about = {"model": found.section, "dtype": found.dtype, "step": 0, "seq_len": found.seq_len, "data": {}}
    tokenizer = next((path / name for name in (TOKENIZER, HF_TOKENIZER) if (path / name).is_file()), None)
    done = write_export(out, found.weights, about, tokenizer, found.eos_id)
    load(out)  # names and shapes
    return done


def which(path: Path) -> Path:
    """The checkpoint that a path on the command line means.

    Raises:
        CheckpointError: there is none.
    """
    if path.name.startswith("step_") or (path / manifest.NAME).exists():
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder")
        return path
    for folder in (path, path / "checkpoints"):
        found = folders.finished(folder)
        if found:
            return found[0]
    raise CheckpointError(f"{path} is no checkpoint and holds none; give a run folder, or one like .../step_00001200")


def verify(path: Path) -> str:
    """Check sizes and hashes of all files against the manifest.

    Raises:
        DamagedCheckpoint: a file is not what was written.
    """
    content = manifest.read(path)
    manifest.check_sizes(path, content)
    manifest.check_hashes(path, content, content.files)
    return f"{path}: {len(content.files)} files, {content.bytes:,} bytes, all as written"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m parallel.checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="step, layout, states and sizes")
    inspect.add_argument("--tensors", action="store_true", help="also every tensor with its shape and chunks")
    verify_parser = commands.add_parser("verify", help="compare every file with its recorded size and sha256")
    plan = commands.add_parser("reshard-plan", help="what each rank of another layout would read")
    for name in ("tensor", "pipeline", "virtual-pipeline", "data"):
        plan.add_argument(f"--{name}", type=count, default=1, metavar="N")
    exported = commands.add_parser("export", help="weights as one safetensors file, with config.json and the tokenizer")
    exported.add_argument("--out", required=True, help="folder for model.safetensors, config.json and the tokenizer")
    exported.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    layouts = "hf: a model of Hugging Face's transformers, which needs this package installed"
    exported.add_argument("--format", choices=("hope", "hf"), default="hope", help=layouts)
    taken = commands.add_parser("import", help="a Llama of Hugging Face's as exported weights, for model.init")
    taken.add_argument("--out", required=True, help="folder for model.safetensors, config.json and the tokenizer")
    for command in (inspect, verify_parser, plan, exported, taken):
        command.add_argument("path", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(piped(main))
