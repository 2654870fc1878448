"""Blocks about training adapters."""

from __future__ import annotations

from collections.abc import Iterable

from experiments.pages.words import Line, model_table, one, percent, percents, plus_minus, rows, table
from experiments.support.rows import Row

GPU, CPU = "train_adapters.csv", "train_adapters_cpu.csv"


def methods_of(own: list[Row]) -> list[Row]:
    """The runs at the rate that validation chose, random starts alone, from few to many parameters."""
    chosen = [row for row in own if " at " not in row["method"] and " from " not in row["method"]]
    return sorted(chosen, key=lambda row: row["parameters"])


def titled(method: str) -> str:
    """`rasa(8,1)` as prose writes it."""
    names = {"lora": "LoRA", "rasa": "RaSA", ",": ", ", "full": "full fine-tuning"}
    for name, title in names.items():
        method = method.replace(name, title)
    return method


def within(row: Row, key: str, digits: int) -> str:
    return f"{row[key]:.{digits}f} ± {row[f'{key}_interval']:.{digits}f}"


def training() -> str:
    """Every method at its own rate: means and 95 % intervals over seeds, differences paired."""

    def lines(own: list[Row]) -> Iterable[Line]:
        for row in methods_of(own):
            compared = row["test_mrr_minus_lora"] is not None
            yield [
                titled(row["method"]), f"{row['parameters']:,}", f"{row['rate']:g}", str(row["seeds"]),
                within(row, "test_mrr", 4), plus_minus(row, "test_mrr_minus_lora") if compared else "",
                f"{row['mean_loss']:.3f}", within(row, "drift", 3),
                plus_minus(row, "drift_minus_lora", 3) if compared else "",
            ]  # fmt: skip

    columns = [
        "", "parameters", "rate", "seeds", "test MRR", "minus LoRA(r)", "mean loss", "drift", "minus LoRA(r)",
    ]  # fmt: skip
    return model_table(columns, rows(GPU), lines)


def equal_rates() -> str:
    """RaSA minus LoRA of as many parameters at the same learning rate."""
    pairs = [(GPU, "", row) for row in rows(GPU)] + [(CPU, ", CPUs", row) for row in rows(CPU)]
    lines = []
    for _, machine, row in sorted(pairs, key=lambda pair: (pair[2]["parameters"], pair[0] == CPU, pair[2]["rate"])):
        if row["test_mrr_minus_lora_at_equal_rate"] is None or " from " in row["method"]:
            continue
        name = titled(row["method"].partition(" at ")[0])
        keys = (f"{key}_minus_lora_at_equal_rate" for key in ("test_mrr", "mean_loss", "drift"))
        lines.append([f"{name}, both at {row['rate']:g}{machine}", *(plus_minus(row, key) for key in keys)])
    return table(["minus LoRA(r)", "test MRR", "mean loss", "drift"], lines)


def training_summary() -> str:
    """RaSA less LoRA of as many parameters, at rates of their own and at one rate."""
    lines = []
    for name, method, suffix in (
        (GPU, "rasa(2,1)", ""),
        (GPU, "rasa(2,1) at 0.001", "_at_equal_rate"),
        (CPU, "rasa(8,1)", "_at_equal_rate"),
        (CPU, "rasa(8,1) at 0.002", "_at_equal_rate"),
        (CPU, "rasa(8,1)", ""),
        (CPU, "rasa(2,1)", ""),
        (GPU, "rasa(8,1)", ""),
    ):
        row = one(rows(name), method=method)
        keys = ("test_mrr", "drift", "drift_at_equal_mrr", "prose_mrr")
        cells = [plus_minus(row, f"{key}_minus_lora{suffix}") for key in keys]
        label = f"r = {lora_rank(method)}, {compared_rates(name, row, suffix)}{', CPUs' if name == CPU else ''}"
        lines.append([label, *("not reached" if "nan" in cell else cell for cell in cells)])
    columns = ["RaSA(r, 1) minus LoRA(r)", "test MRR", "drift", "drift at equal validation MRR", "MRR on prose"]
    return table(columns, lines)


def lora_rank(method: str) -> str:
    """r of `rasa(r,k)`."""
    return method.removeprefix("rasa(").partition(",")[0]


def compared_rates(name: str, row: Row, suffix: str) -> str:
    """How a row names the learning rates of RaSA and LoRA. With a suffix it compares them at the same rate."""
    lora = one(rows(name), method=f"lora({lora_rank(row['method'])})")
    both = f"both at {row['rate']:g}"
    if suffix:
        return both
    rates = both if lora["rate"] == row["rate"] else f"RaSA at {row['rate']:g}, LoRA at {lora['rate']:g}"
    return f"{rates}, as chosen"


def data_starts() -> str:
    """Starts from data beside random ones, r = 2."""
    lines = []
    for method in ("lora(2)", "lora(2) from updates", "lora(2) from gradient",
                   "rasa(2,1)", "rasa(2,1) from updates", "rasa(2,1) from gradient"):  # fmt: skip
        row = one(rows(CPU), method=method)
        cells = [within(row, "test_mrr", 4), f"{row['mean_loss']:.3f}", within(row, "drift", 3)]
        lines.append([titled(method), f"{row['rate']:g}", *cells])
    return table(["CPUs", "rate", "test MRR", "mean loss", "drift"], lines)


def trained_ranks() -> str:
    """Entropy ranks of the trained updates beside the ranks that they may have."""
    adapters = [row for row in methods_of(rows(GPU)) if row["method"] != "full"]
    lines = [
        [titled(row["method"]), str(most_rank(row["method"])), f"{row['median_entropy_rank']:.2f}"] for row in adapters
    ]
    return table(["", "rank of an update", "median entropy rank"], lines)


def most_rank(method: str) -> int:
    """The rank that an update of `lora(r)` or `rasa(r,k)` may have, in a model of six layers."""
    r, _, k = method[5:-1].partition(",")
    return int(r) + 5 * int(k or 0)


def ranks_used() -> str:
    """Entropy rank and largest rank of RaSA's trained updates."""
    own = [row for row in methods_of(rows(GPU)) if row["method"].startswith("rasa")]
    *first, last = (f"{row['median_entropy_rank']:.1f} of {most_rank(row['method'])}" for row in own)
    return f"{', '.join(first)} and {last}"


def difference(method: str, key: str, digits: int = 4) -> str:
    return plus_minus(one(rows(GPU), method=method), f"{key}_minus_lora", digits)


def mrr_r2() -> str:
    return difference("rasa(2,1)", "test_mrr")


def mrr_r8() -> str:
    return difference("rasa(8,1)", "test_mrr")


def drift_r2() -> str:
    """Both at 0.003, the best rate of each."""
    return difference("rasa(2,1)", "drift", 3)


def drift_r8() -> str:
    return difference("rasa(8,1)", "drift", 3)


def on_cpu_r8(key: str, digits: int, method: str = "rasa(8,1)") -> str:
    """RaSA(8, 1) minus LoRA(8) on CPUs."""
    return plus_minus(one(rows(CPU), method=method), key, digits)


def drift_r8_at_002() -> str:
    return on_cpu_r8("drift_minus_lora_at_equal_rate", 3, "rasa(8,1) at 0.002")


def mrr_r8_at_002() -> str:
    return on_cpu_r8("test_mrr_minus_lora_at_equal_rate", 4, "rasa(8,1) at 0.002")


def drift_r8_equal_rate() -> str:
    return on_cpu_r8("drift_minus_lora_at_equal_rate", 3)


def drift_r8_finer() -> str:
    """Each at its best rate of the finer grid."""
    return on_cpu_r8("drift_minus_lora", 3)


def mrr_r8_equal_rate() -> str:
    return on_cpu_r8("test_mrr_minus_lora_at_equal_rate", 4)


def mrr_r8_finer() -> str:
    return on_cpu_r8("test_mrr_minus_lora", 4)


LLAMA_LAYERS = 32
LLAMA_PARAMETERS = 8_030_261_248
"""All parameters of Llama-3.1-8B."""
LLAMA_SHAPES = (
    (4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
"""The seven linear kinds of Llama-3.1-8B, (out, in)."""


def extra_parameters() -> str:
    """The parameters that RaSA's mixing adds to those of LoRA, on all linear layers of Llama-3.1-8B."""
    lines = [
        [
            f"r = {r}, k = {k}",
            f"{lora:,}",
            f"{mixing:,}",
            percent(mixing / lora, 3),
            percent(mixing / LLAMA_PARAMETERS, 4),
        ]
        for r, k, lora, mixing in llama_parameters()
    ]
    return table(["Llama-3.1-8B", "LoRA", "mixing", "of LoRA's", "of the model's"], lines)


def llama_parameters() -> Iterable[tuple[int, int, int, int]]:
    """Yield r, k, the parameters of LoRA, and those of RaSA's mixing."""
    for r, k in ((8, 1), (32, 1), (32, 8)):
        lora = LLAMA_LAYERS * r * sum(b + a for b, a in LLAMA_SHAPES)
        yield r, k, lora, LLAMA_LAYERS * len(LLAMA_SHAPES) * (r - k + LLAMA_LAYERS * k)


def extra_range() -> str:
    return percents((mixing / lora for _, _, lora, mixing in llama_parameters()), 3)


def extra_range_of_model() -> str:
    return percents((mixing / LLAMA_PARAMETERS for _, _, _, mixing in llama_parameters()), 4)


BLOCKS = (
    training, training_summary, equal_rates, data_starts, trained_ranks, mrr_r2, mrr_r8, drift_r2, drift_r8,
    drift_r8_equal_rate, drift_r8_finer, mrr_r8_equal_rate, mrr_r8_finer, drift_r8_at_002, mrr_r8_at_002,
    extra_parameters, extra_range, extra_range_of_model, ranks_used,
)  # fmt: skip
