"""LoRA extraction by rasa_theory, PEFT and mergekit from the same pair of checkpoints: error, seconds, memory.

    python -m experiments.extractors                    # figures/extractors.csv, about a minute
    python -m experiments.extractors --rank 32 --out FILE.csv

The pair is a BERT of 6 layers and hidden size 384 with random weights, and the same BERT plus the bundled fine-tuning
updates of all-MiniLM-L6-v2. Each extractor runs in its own process, and its start and the reading of the files count.
Memory is the most that the process held (Linux). The errors of each layer are evaluated from the adapters as written.

- rasa_theory: `python -m rasa_theory.extract --k 0`.
- peft: `convert_to_lora` of an adapter that holds the whole update (full rank), since it converts adapters only.
- mergekit: `mergekit-extract-lora`, if it is on the PATH (the extras of this package leave it out).

Needs peft and transformers (extra `test`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from experiments.support.rows import Row, write_rows
from experiments.support.timing import measured
from rasa_theory.formats import lora_key

NAMES = {
    "query": "attention.self.query", "key": "attention.self.key",
    "value": "attention.self.value", "attention_output": "attention.output.dense",
}  # fmt: skip
COLUMNS = ("extractor", "rank", "error", "worst_layer_over_ours", "seconds", "peak_mib", "note")


def write_pair(folder: Path) -> dict[str, torch.Tensor]:
    """Write `base` and `tuned` into `folder`; returns the updates by the key of the weight."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=1000, hidden_size=384, intermediate_size=1536, num_hidden_layers=6))
    model.save_pretrained(folder / "base")
    weights, updates = model.state_dict(), {}
    for stack in rt.load("minilm-code")[0]:
        for i, M in enumerate(stack.values.float()):
            key = f"encoder.layer.{i}.{NAMES[stack.name]}.weight"
            weights[key] += M
            updates[key] = M
    model.load_state_dict(weights)
    model.save_pretrained(folder / "tuned")
    before = load_file(folder / "base" / "model.safetensors")
    after = load_file(folder / "tuned" / "model.safetensors")
    return {key: after[key].double() - before[key].double() for key in updates}


def convert_with_peft(folder: Path, whole: Path, rank: int, out: Path) -> None:
    """Convert the adapter `whole`, which holds the update at full rank, with PEFT's own function."""
    import peft
    from transformers import BertModel

    model = peft.PeftModel.from_pretrained(BertModel.from_pretrained(folder / "base"), whole)
    _, tensors = peft.convert_to_lora(model, rank)
    out.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "adapter_model.safetensors")


def errors_of(adapter: Path, updates: dict[str, torch.Tensor]) -> dict[str, float]:
    """||M_i - B_i A_i||_F^2 by the key of the weight, from the tensors as written."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    errors = {}
    for key, M in updates.items():
        name = key.removesuffix(".weight")
        B, A = (tensors[lora_key(name, side)].double() for side in "BA")
        errors[key] = float(((M - B @ A) ** 2).sum())
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("figures/extractors.csv"))
    parser.add_argument("--peft", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft:
        convert_with_peft(options.peft[0], options.peft[1], options.rank, options.peft[2])
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, rank = Path(scratch), str(options.rank)
        updates = write_pair(folder)
        pair = ["--base", f"{folder}/base", "--tuned", f"{folder}/tuned"]
        ours = [sys.executable, "-m", "rasa_theory.extract", *pair, "--quiet", "--k", "0", "--modules", "*attention*"]
        theirs = [sys.executable, "-m", "experiments.extractors", "--rank", rank, "--peft"]
        measured([*ours, "--rank", "384", "--out", f"{folder}/whole"])
        jobs = {
            "rasa_theory": [*ours, "--rank", rank, "--out", f"{folder}/rasa_theory"],
            "peft": [*theirs, str(folder), f"{folder}/whole", f"{folder}/peft"],
        }
        if tool := shutil.which("mergekit-extract-lora"):
            jobs["mergekit"] = [
                tool, "--model", f"{folder}/tuned", "--base-model", f"{folder}/base", "--out-path",
                f"{folder}/mergekit", "--max-rank", rank, "--include-regex", ".*attention.*",
            ]  # fmt: skip
        best: dict[str, float] = {}
        for name, command in jobs.items():
            try:
                seconds, peak = measured(command)
                errors = errors_of(folder / name, updates)
            except (RuntimeError, KeyError, OSError) as failure:
                rows.append({"extractor": name, "rank": rank, "note": str(failure)})
                print(f"{name}: {failure}")
                continue
            best = best or errors
            worst = max(errors[key] / best[key] for key in errors)
            error = sum(errors.values()) / sum(float((M**2).sum()) for M in updates.values())
            rows.append(
                {
                    "extractor": name, "rank": rank, "error": error, "worst_layer_over_ours": worst,
                    "seconds": seconds, "peak_mib": peak,
                }
            )  # fmt: skip
            print(
                f"{name:12} error / ||M||^2 {error:.7f}, worst layer {worst:.6f} ours, {seconds:.1f} s, {peak:.0f} MiB"
            )
    write_rows(options.out, COLUMNS, rows)


if __name__ == "__main__":
    main()
