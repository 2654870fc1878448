"""LoRA extraction by rasa_theory, PEFT and mergekit from the same pair of checkpoints: error, seconds, memory.

    python experiments/extractors.py                    # figures/extractors.csv, about a minute
    python experiments/extractors.py --rank 32 --out FILE.csv

The pair is a BERT of 6 layers, hidden size 384, with random weights, and the same with the bundled fine-tuning updates
of all-MiniLM-L6-v2 added. Each extractor runs in a process of its own, its start and the reading of the files included;
memory is the most that the process held (Linux). Errors are of the adapters as written, per layer, re-evaluated here.
- rasa_theory: `python -m rasa_theory.extract --k 0`.
- peft: `convert_to_lora` of an adapter that holds the whole update (full rank), since it converts adapters only.
- mergekit: `mergekit-extract-lora`, if it is on the PATH (it has no place in this package's extras).
Needs peft and transformers (extra `test`).
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import rasa_theory as rt
from rasa_theory.formats import lora_key

NAMES = {
    "query": "attention.self.query", "key": "attention.self.key",
    "value": "attention.self.value", "attention_output": "attention.output.dense",
}  # fmt: skip
COLUMNS = ("extractor", "rank", "error", "worst_layer_over_ours", "seconds", "peak_mib", "note")


def write_pair(folder: Path) -> dict[str, torch.Tensor]:
    """`base` and `tuned` in `folder`; the updates by the key of the weight."""
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
    """PEFT's own conversion of the adapter `whole`, which holds the update at full rank."""
    import peft
    from transformers import BertModel

    model = peft.PeftModel.from_pretrained(BertModel.from_pretrained(folder / "base"), whole)
    _, tensors = peft.convert_to_lora(model, rank)
    out.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / "adapter_model.safetensors")


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most memory in MiB, of a command."""
    began, peak = time.perf_counter(), 0.0
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        while child.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it may end meanwhile
                lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
                peak = max(peak, float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024)
            time.sleep(0.05)
        seconds = time.perf_counter() - began
        if child.returncode != 0:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed: {said.read().strip().splitlines()[-1:]}")
    return seconds, peak


def errors_of(adapter: Path, updates: dict[str, torch.Tensor]) -> dict[str, float]:
    """||M_i - B_i A_i||_F^2 by the key of the weight, from the tensors as written."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = {}
    for key, M in updates.items():
        name = key.removesuffix(".weight")
        B, A = (tensors[lora_key(name, side)].double() for side in "BA")
        found[key] = float(((M - B @ A) ** 2).sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("figures/extractors.csv"))
    parser.add_argument("--peft", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peft:
        convert_with_peft(options.peft[0], options.peft[1], options.rank, options.peft[2])
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder, rank = Path(scratch), str(options.rank)
        updates = write_pair(folder)
        pair = ["--base", f"{folder}/base", "--tuned", f"{folder}/tuned"]
        ours = [sys.executable, "-m", "rasa_theory.extract", *pair, "--quiet", "--k", "0"]
        ours += ["--modules", "*attention*"]
        measured([*ours, "--rank", "384", "--out", f"{folder}/whole"])
        jobs = {
            "rasa_theory": [*ours, "--rank", rank, "--out", f"{folder}/rasa_theory"],
            "peft": [
                sys.executable, __file__, "--rank", rank, "--peft", str(folder), f"{folder}/whole", f"{folder}/peft",
            ],
        }  # fmt: skip
        if tool := shutil.which("mergekit-extract-lora"):
            jobs["mergekit"] = [
                tool, "--model", f"{folder}/tuned", "--base-model", f"{folder}/base", "--out-path",
                f"{folder}/mergekit", "--max-rank", rank, "--include-regex", ".*attention.*",
            ]  # fmt: skip
        best: dict[str, float] = {}
        for name, command in jobs.items():
            try:
                seconds, peak = measured(command)
                found = errors_of(folder / name, updates)
            except (RuntimeError, KeyError, OSError) as error:
                rows.append({"extractor": name, "rank": rank, "note": str(error)})
                print(f"{name}: {error}")
                continue
            best = best or found
            worst = max(found[key] / best[key] for key in found)
            error = sum(found.values()) / sum(float((M**2).sum()) for M in updates.values())
            rows.append(
                {
                    "extractor": name, "rank": rank, "error": error, "worst_layer_over_ours": worst,
                    "seconds": seconds, "peak_mib": peak,
                }
            )  # fmt: skip
            print(
                f"{name:12} error / ||M||^2 {error:.7f}, worst layer {worst:.6f} ours, {seconds:.1f} s, {peak:.0f} MiB"
            )
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
