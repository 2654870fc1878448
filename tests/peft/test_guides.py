"""The code of docs/guides/train.md runs as it stands, on a tiny checkpoint in place of the one from the hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rasa_theory as rt
from rasa_theory.peft import factors
from tests.helpers.tiny_models import TINY, VOCABULARY, tiny

GUIDE = Path(__file__).parents[2] / "docs/guides/train.md"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


def checkpoint(folder: Path) -> None:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))])}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>").save_pretrained(str(folder))
    tiny("llama").save_pretrained(str(folder))


@pytest.mark.filterwarnings("ignore")
def test_the_page_trains_saves_loads_and_converts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    code = blocks()[0]
    lines = [line for line in code.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) <= 30
    code = code.replace("HuggingFaceTB/SmolLM2-135M", str(tmp_path / "base")).replace("max_steps=20", "max_steps=2")
    exec(compile(code, str(GUIDE), "exec"), {})
    merged = AutoModelForCausalLM.from_pretrained("rasa-adapter/merged", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(tiny("llama"), "rasa-adapter")
    as_lora = PeftModel.from_pretrained(tiny("llama"), "rasa-adapter/lora")
    answer = TINY["llama"].answer
    torch.testing.assert_close(answer(as_lora), answer(adapted), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(answer(merged), answer(adapted), rtol=0, atol=0.05)


@pytest.mark.slow
def test_the_page_starts_from_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, generator = tiny("llama"), torch.Generator().manual_seed(0)
    updates = {name: 0.1 * torch.randn(p.shape, generator=generator) for name, p in base.state_dict().items()
               if name.endswith(("q_proj.weight", "up_proj.weight"))}  # fmt: skip
    save_file(updates, tmp_path / "updates.safetensors")
    monkeypatch.chdir(tmp_path)
    base.save_pretrained("base")
    names = {"AutoModelForCausalLM": AutoModelForCausalLM, "BASE": "base"}  # from the example before
    exec(compile(blocks()[1], str(GUIDE), "exec"), names)
    result = {pool: one.layers for pool, one in factors(names["model"]).items()}
    assert result == {"self_attn.q_proj": 3, "mlp.up_proj": 3}
    error = rt.reconstruction_error(names["stacks"][0], factors(names["model"])["mlp.up_proj"])
    assert error < rt.solve_lora(names["stacks"][0], 8).error
