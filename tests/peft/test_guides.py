"""The code of docs/guides/train.md runs as it stands, on a tiny checkpoint in place of the one from the hub."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.helpers.tiny_models import TINY, VOCABULARY, tiny

GUIDE = Path(__file__).parents[2] / "docs/guides/train.md"


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
    code = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[0]
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
