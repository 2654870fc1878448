"""Seconds per GB and memory of an extraction from a pair of checkpoints that is larger than its memory limit.

    python -m experiments.extract_scale --scratch DIR            # 2 x 8.6 GB in DIR, removed at the end; some minutes
    python -m experiments.extract_scale --scratch DIR --layers 2
    python -m experiments.extract_scale --scratch DIR --rank 8 --k 0 1               # with a pool
    python -m experiments.extract_scale --scratch DIR --rank 8 --k 1 --layers 32 --kinds self_attn.q_proj
    python -m experiments.extract_scale --scratch DIR --rank 8 --k 1 --effort quick --sweeps 6    # faster, larger error

Both checkpoints hold `--layers` layers of an 8B model in bfloat16 shards: the attention and two of the three MLP
matrices (`SHAPES`), or only `--kinds`. The base is zeros in sparse files. Every matrix of the tuned model has 32 terms
with sigma_j = j^-0.7 and noise of a tenth of its norm; layers of equal shape differ in the order of their rows alone.
The command is `rasa_theory.extract --rank R --k K --compute float32 --memory MEMORY`. Its forecast (`--dry-run`)
is printed first, and with a pool floors and errors over e_lora at the end. Appends a row for each k to `--out`. With
`--inspect`, the seconds of plain reading and of `rasa_theory.inspect --memory MEMORY` on the same pair come first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.support.rows import append_rows
from experiments.support.timing import measured
from rasa_theory.solvers import EFFORTS, SolverOptions

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
}  # fmt: skip
COLUMNS = (
    "layers", "kinds", "rank", "k", "effort", "sweeps", "memory", "error", "floor", "gigabytes", "seconds",
    "seconds_per_gigabyte", "peak_mib", "threads", "torch", "machine",
)  # fmt: skip


def update(shape: tuple[int, int]) -> torch.Tensor:
    """Draw 32 singular terms and noise."""
    generator = torch.Generator().manual_seed(sum(shape))
    b, a = shape
    U, V = (torch.linalg.qr(torch.randn(n, 32, generator=generator))[0] for n in (b, a))
    s = torch.arange(1, 33) ** -0.7
    noise = torch.randn(b, a, generator=generator) * (0.1 * float(s.norm()) / (b * a) ** 0.5)
    M: torch.Tensor = (U * s) @ V.T + noise
    return M.bfloat16()


def write_shard(path: Path, tensors: dict[str, torch.Tensor | None], shapes: dict[str, tuple[int, int]]) -> None:
    """Write a safetensors file of these tensors in bfloat16; None stands for zeros, which take no room on the disk."""
    header, offset = {}, 0
    for key, (b, a) in shapes.items():
        header[key] = {"dtype": "BF16", "shape": [b, a], "data_offsets": [offset, offset + 2 * b * a]}
        offset += 2 * b * a
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key, (b, a) in shapes.items():
            if (tensor := tensors[key]) is None:
                file.seek(2 * b * a, os.SEEK_CUR)
            else:
                file.write(tensor.view(torch.int16).numpy().data)
        file.truncate(8 + len(text) + offset)


def write_pair(folder: Path, layers: int, kinds: list[str]) -> int:
    """Write `base` and `tuned` into the folder, one shard per layer; returns the bytes of both."""
    updates = {shape: update(shape) for shape in {SHAPES[kind] for kind in kinds}}
    for name in ("base", "tuned"):
        (folder / name).mkdir(parents=True)
        places: dict[str, str] = {}
        for i in range(layers):
            shapes = {f"model.layers.{i}.{kind}.weight": SHAPES[kind] for kind in kinds}
            tensors = {
                key: updates[shape].roll(97 * i, 0) if name == "tuned" else None for key, shape in shapes.items()
            }
            write_shard(folder / name / f"model-{i:05d}.safetensors", tensors, shapes)
            places |= dict.fromkeys(shapes, f"model-{i:05d}.safetensors")
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="the pair lies in a new folder there for a while")
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--kinds", nargs="+", choices=list(SHAPES), default=list(SHAPES), metavar="KIND")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--k", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--effort", choices=tuple(EFFORTS), default="default", help="of the search")
    parser.add_argument("--sweeps", type=int, default=SolverOptions().max_sweeps, help="most sweeps of the solver")
    parser.add_argument("--memory", default="8GiB", help="limit of the command (default: 8GiB)")
    parser.add_argument("--inspect", action="store_true", help="time plain reading and rasa_theory.inspect as well")
    parser.add_argument("--out", type=Path, default=Path("figures/extract_scale.csv"))
    options = parser.parse_args()
    options.scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="extract-scale-", dir=options.scratch) as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    """Write the pair into the folder, and time the commands on it."""
    size = write_pair(folder, options.layers, options.kinds) / 1e9
    pair = ["--base", f"{folder}/base", "--tuned", f"{folder}/tuned", "--memory", options.memory]
    command = [sys.executable, "-m", "rasa_theory.extract", *pair, "--rank", str(options.rank), "--compute", "float32"]
    if options.inspect:
        files = [str(file) for file in sorted(folder.rglob("*.safetensors"))]
        inspection = [sys.executable, "-m", "rasa_theory.inspect", *pair, "--out", f"{folder}/inspection"]
        for name, words in (("reading", ["cat", *files]), ("inspect", inspection)):
            seconds, peak = measured(words)
            print(f"{name}: {seconds:.1f} s, {seconds / size:.2f} s per GB, {peak:.0f} MiB", flush=True)
    for k in options.k:
        out = folder / f"adapter-{k}"
        full = [*command, "--k", str(k), "--out", str(out)]
        full += ["--effort", options.effort, "--sweeps", str(options.sweeps)] if k > 0 else []
        forecast = subprocess.run([*full, "--dry-run"], check=True, capture_output=True, text=True).stdout
        print(*forecast.splitlines()[-3:], sep="\n", flush=True)
        seconds, peak = measured(full)
        stacks = json.loads((out / "report.json").read_text())["stacks"]
        row = {
            "layers": options.layers, "kinds": " ".join(options.kinds), "rank": options.rank, "k": k,
            "memory": options.memory,
            "effort": options.effort if k > 0 else None, "sweeps": options.sweeps if k > 0 else None,
            "error": over_lora(stacks, "e_rasa") if k > 0 else None,
            "floor": over_lora(stacks, "lower_bound") if k > 0 else None, "gigabytes": size,
            "seconds": seconds, "seconds_per_gigabyte": seconds / size, "peak_mib": peak,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "machine": platform.machine(),
        }  # fmt: skip
        append_rows(options.out, [row], COLUMNS)
        print(row, flush=True)
        for stack in stacks if k > 0 else ():
            kind, name = stack["kind"], stack["lower_bound_name"]
            error, floor = (over_lora([stack], key) for key in ("e_rasa", "lower_bound"))
            print(f"{kind}: {floor:.5f} ({name}) .. {error:.5f} of e_lora", flush=True)


def over_lora(stacks: list[dict[str, Any]], key: str) -> float:
    """A squared error of stacks of a report, summed, over their e_lora."""
    return math.fsum(stack[key] for stack in stacks) / math.fsum(stack["e_lora"] for stack in stacks)


if __name__ == "__main__":
    main()
