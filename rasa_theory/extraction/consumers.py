"""What the programs that load an adapter need, in sentences: for the report and the README.md of the adapter."""

from __future__ import annotations

from typing import Any

from rasa_theory.formats import not_loadable, task_heads

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank: vllm/config/lora.py, as in vLLM 0.26
_VLLM_VOCABULARY = 258_048  # the largest of an lm_head: vllm/lora/layers/logits_processor.py, the same version
_SHOWN = 3


def consumer_notes(report: dict[str, Any]) -> list[str]:
    """Sentences on who loads the files of this report, and with which flag or limit."""
    settings = report["plan"]["settings"]
    notes: list[str] = []
    if settings["format"] in ("lora", "lora-exact-rasa"):
        notes = _of_lora(report, settings)
    elif settings["format"] == "kohya":
        notes = ["ComfyUI and diffusers load the one file lora.safetensors; the alpha of each module is its rank."]
    elif settings["format"] == "rasa":
        notes = _of_rasa(report, settings)
    if settings["k"] != 0 and settings["format"] not in ("lora-exact-rasa", "rasa"):
        notes.append(
            f"k concerns the report alone: format {settings['format']} holds no pool, and --k 0 writes the same file."
        )
    return notes


def _of_lora(report: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    ranks = [rank for row in report["stacks"] for rank in row["ranks"].values()]
    if not ranks:
        return []
    largest = max(ranks)
    flag = next((rank for rank in _VLLM_RANKS if rank >= largest), None)
    notes = []
    if report["rank"] is None and len(set(ranks)) > 1:
        notes.append(
            "Modules differ in rank, by rank_pattern and alpha_pattern. PEFT reads them; vLLM, llama.cpp and TGI do "
            "not, and would scale updates wrongly. --ranks one writes a file for them."
        )
    elif flag is None:
        notes.append(
            f"Rank {largest}: PEFT loads it; vLLM takes no rank above {_VLLM_RANKS[-1]}, so merge it into the model to "
            "serve it."
        )
    else:
        vllm = "" if report["saved_modules"] else f" A vLLM that knows the model serves it with --max-lora-rank {flag}."
        notes.append(f"Rank {largest}, alpha {largest} for all modules.{vllm}")
    padded = sum(rank < largest for rank in ranks)
    if report["rank"] is not None and padded:
        notes.append(
            f"{padded} of {len(ranks)} modules have a lower rank and are padded with zeros; --ranks own leaves them."
        )
    heads = [
        row for row in report["stacks"] if row["kind"].rpartition(".")[2] in ("lm_head", "embed_out") and row["ranks"]
    ]
    if heads:
        limit = f" of at most {_VLLM_VOCABULARY:,} entries"
        fits = "" if heads[0]["shape"][0] <= _VLLM_VOCABULARY else f", and this one has {heads[0]['shape'][0]:,}"
        notes.append(
            f"It adapts {heads[0]['kind']}: vLLM needs a model whose output layer is its own (not tied) and a "
            f"vocabulary{limit}{fits}. --exclude '*{heads[0]['kind']}*' leaves it out."
        )
    if any(row["parameter"] and row["ranks"] for row in report["stacks"]):
        notes.append(
            "Fused experts are adapted through target_parameters, which PEFT reads from 0.17 on; llama.cpp does not."
        )
    if report["saved_modules"]:
        notes.append(
            f"{len(report['saved_modules'])} modules are saved whole (modules_to_save): PEFT loads them; vLLM, TGI and "
            "llama.cpp refuse such an adapter."
        )
    task, head_names = task_heads(settings["base"]["architecture"])
    if task is not None and not set(head_names) & set(report["saved_modules"]):
        notes.append(
            f"AutoPeftModelFor{task} cannot load it: that class wants the head ({' or '.join(head_names)}) whole, as "
            "--save-modules writes it if it changed. AutoPeftModel and PeftModel load it."
        )
    return notes


def _of_rasa(report: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    modules = [name for row in report["stacks"] for name in row["ranks"]]
    notes = []
    if lost := not_loadable(modules):
        shown = ", ".join(lost[:_SHOWN]) + (", .." if len(lost) > _SHOWN else "")
        notes.append(
            f"The authors' fork finds a layer by `layers.N.` in its name, and cannot load {len(lost)} of "
            f"{len(modules)} modules ({shown}). `rasa_theory.peft` and format lora-exact-rasa can."
        )
    if settings["k"] == settings["rank"] and settings["layout"] == "private":
        notes.append("The authors' second fork wants private ranks, k below r, and cannot load this file.")
    return notes
