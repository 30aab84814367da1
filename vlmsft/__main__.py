"""`vlmsft COMMAND ...` is `python -m vlmsft.COMMAND ...`."""

import runpy
import sys

from vlmsft.errors import nearest

COMMANDS = {
    "prepare": "make a data set: fetch, check, split, write JSONL and shards",
    "train": "fine-tune a model",
    "sweep": "look after the sweeps that train -m launched: status, resume, retry, cancel, logs",
    "plan": "show what train would run, without starting it",
    "check_data": "read all data once and report what training would refuse or lose",
    "import_ckpt": "make a NeMo checkpoint of a Hugging Face model",
    "export_ckpt": "make a Hugging Face folder of a checkpoint, and compare the two",
    "generate": "a model's answer to a question, or to a file of them",
    "serve": "answer requests at an OpenAI-compatible endpoint",
    "evaluate": "ask models a benchmark's questions, score the answers, compare",
    "compare": "what differs between runs, beside what they reached",
}


def _usage() -> str:
    lines = "\n".join(f"  {name:12} {purpose}" for name, purpose in COMMANDS.items())
    return f"usage: vlmsft COMMAND [key=value ...]\n\n{lines}\n\nvlmsft COMMAND --help shows its keys."


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(_usage())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    command = sys.argv.pop(1)
    if command not in COMMANDS:
        print(f"vlmsft has no command {command!r}. {nearest(command, COMMANDS)}\n\n{_usage()}", file=sys.stderr)
        sys.exit(2)
    runpy.run_module(f"vlmsft.{command}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
