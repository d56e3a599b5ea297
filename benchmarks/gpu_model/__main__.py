"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from . import guard

RESULT = Path(__file__).parent.parent / "results" / "gpu-simulated.json"


_ONE = ("padded", "stochastic", "derivative", "deep")  # subjects of one object
_MANY = ("layers", "eager_attention")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description="see benchmarks/gpu_model")
    parser.add_argument("--device", choices=["H100", "A100"], default="H100")
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="simulates what the table lacks")
    table.add_argument("--out", type=Path, help="default: benchmarks/results/gpu-simulated.json")
    table.add_argument("--only", default="", help="models with this in their names")
    shown = commands.add_parser("show", help="the table, as Markdown")
    shown.add_argument("--out", type=Path, help="default: as above")
    shown.add_argument("--brief", action="store_true", help="one line for each model, precision and batch")
    check = commands.add_parser("check", help="what the tests want to know, one JSON object a line")
    check.add_argument("subject", choices=["bert", "vit", "llama", *_ONE, *_MANY])
    graphs = commands.add_parser("partitions", help="how CUDA graphs would divide the code, one JSON object a line")
    graphs.add_argument("subject", choices=["bert", "vit", "llama"])
    interpreter = commands.add_parser("interpret", help="generated code on the CPU beside the library, as JSON")
    interpreter.add_argument("subject", help='"codecs", or a preset for a step of a tiny model')
    options = parser.parse_args(arguments)
    if options.command == "show":
        from .show import overview, show

        print("\n".join((overview if options.brief else show)(options.out or RESULT)))
        return
    if options.command == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it while it is imported
    try:
        guard.load()
    except guard.ToolError as error:
        sys.exit(str(error))
    # all that follows imports torch
    from .devices import DEVICES
    from .pretend import pretend

    device = DEVICES[options.device]
    with pretend(device):
        if options.command == "table":
            from .table import measure

            measure(device, out=options.out or RESULT, only=options.only)
        elif options.command == "partitions":
            from .partitions import partitions

            for fact in partitions(options.subject):
                print(json.dumps(fact), flush=True)
        elif options.command == "interpret":
            from . import interpreted

            facts = interpreted.codecs() if options.subject == "codecs" else interpreted.step(options.subject)
            for fact in facts:
                print(json.dumps(fact), flush=True)
        else:
            from . import check

            named = getattr(check, options.subject) if options.subject in (*_ONE, *_MANY) else None
            facts = named() if named else check.check(options.subject)
            for fact in [facts] if options.subject in _ONE else facts:
                print(json.dumps(fact), flush=True)


if __name__ == "__main__":
    main()
