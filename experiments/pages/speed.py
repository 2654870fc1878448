"""Blocks about seconds, passes over M and memory."""

from __future__ import annotations

from experiments.pages.words import has, one, record, rows, span, spelled, table


def passes() -> str:
    """Passes and seconds until the core's sweeps are below 300 joint sweeps from the same start."""
    own = [row for row in rows("benchmark.csv") if row["part"] == "passes"]
    lines = []
    for stack in dict.fromkeys(row["stack"] for row in own):
        core, joint = ([r for r in own if r["stack"] == stack and r["method"] == name] for name in ("core", "joint"))
        ratios = [slow["seconds"] / fast["seconds"] for fast, slow in zip(core, joint, strict=True)]
        sizes = f"{core[0]['layers']} x {core[0]['b']} x {core[0]['a']}"
        cells = [str(joint[0]["passes"]), span((row["passes"] for row in core), "d"), span(ratios, ".1f")]
        lines.append([spelled(stack), sizes, *cells])
    columns = ["r = 8, k = 1 to 8", "size", "passes, joint sweeps", "passes, default sweeps", "joint / default seconds"]
    return table(columns, lines)


def sweep_cost() -> str:
    """Seconds of one sweep of plain CP, k = r = 4, over those of our joint sweep, and of its two products."""
    own = [row for row in rows("benchmark.csv") if has(row, {"part": "sweep", "k": 4, "rank": 4})]
    lines = []
    for method in dict.fromkeys(row["method"] for row in own):
        cells = []
        for dtype in ("float32", "float64"):
            seconds = {row["method"]: row["seconds"] for row in own if row["dtype"] == dtype}
            cells.append(f"{seconds[method] / seconds['joint']:.2f}" if method in seconds else "")
        lines.append([{"joint": "joint sweep"}.get(method, method), *cells])
    return table(["16 x 768 x 768, k = r, R = 64", "float32", "float64"], lines)


def lora_speed() -> str:
    """`solve_lora` with method fast beside torch's singular values."""
    own = [row for row in rows("benchmark.csv") if row["part"] == "lora"]
    lines = []
    for stack in dict.fromkeys(row["stack"] for row in own):
        fast, full = (next(r for r in own if r["stack"] == stack and r["method"] == m)
                      for m in ("solve_lora fast", "torch svdvals"))  # fmt: skip
        lines.append([stack, f"{fast['seconds']:.2f} s", f"{full['seconds']:.2f} s", f"{fast['error']:.0e}"])
    return table(
        ["8 x 2048 x 2048, r = 8", "solve_lora, fast", "torch svdvals", "width of the interval / norm²"], lines
    )


def at_size() -> str:
    """Seconds of an answer with its floor by the size of the layers."""
    lines = []
    for row in rows("at_size.csv"):
        seconds = [f"{row[key]:.0f} s" for key in ("seconds", "solve_seconds", "floor_seconds")]
        size = f"{row['layers']} x {row['n']} x {row['n']}"
        lines.append([size, {"leading": "products", "exact": "SVDs"}[row["way"]], *seconds])
    return table(["float32, two cores", "way", "answer", "solver", "floor"], lines)


def leading_and_exact() -> str:
    """What an answer from leading directions costs beside a certified LoRA, and what it loses against SVDs."""
    all_rows = rows("at_size.csv")
    exact = {(row["layers"], row["n"]): row for row in all_rows if row["way"] == "exact"}
    lines = []
    for row in (row for row in all_rows if row["way"] == "leading"):
        other = exact.get((row["layers"], row["n"]))
        losses = ["", ""]
        if other is not None:
            losses = [f"{row['error'] - other['error']:+.1e}", f"{other['floor'] - row['floor']:+.1e}"]
        lines.append([
            f"{row['layers']} x {row['n']} x {row['n']}", "not run" if other is None else f"{other['seconds']:.0f} s",
            f"{row['seconds']:.0f} s", f"{row['lora_seconds']:.2f} s", f"{row['over_lora']:.0f}", *losses,
        ])  # fmt: skip
    columns = [
        "layers", "from SVDs", "leading", "certified LoRA", "leading / LoRA", "error, leading less exact",
        "floor, exact less leading",
    ]  # fmt: skip
    return table(columns, lines)


def gpu() -> str:
    """Stacks at the size of an 8B model's layers, from a start that is already there."""
    lines = []
    for run in record("figures/gpu_scale.json")["records"]:
        if run["tf32"]:
            continue
        joint, products = (1000 * run[key]["min"] for key in ("joint_sweep_seconds", "two_products_seconds"))
        peak = max(size for stage, size in run["peak_device_bytes"].items() if stage != "default")
        lines.append([
            f"{run['layers']} x {run['b']} x {run['a']}", str(run["rank"]), str(run["k"]),
            f"{run['lora_fast_seconds']:.1f} s", f"{run['solve_seconds']:.2f} s", str(run["solve_sweeps"]),
            f"{run['e_rasa_over_e_lora'][1]:.4f}", f"{joint:.0f} / {products:.1f} ms", f"{peak / 2**30:.1f} GiB",
        ])  # fmt: skip
    columns = [
        "layers", "r", "k", "e_lora", "to the stop", "sweeps", "best found", "joint sweep / products", "memory",
    ]  # fmt: skip
    return table(columns, lines)


def extraction() -> str:
    """Extraction from a pair of checkpoints in bfloat16."""
    lines = []
    for row in rows("extract_scale.csv"):
        kinds = row["kinds"].split()
        effort = f"{row['effort']}, {row['sweeps']}" if row["k"] > 0 else ""
        interval = "" if not row["floor"] else f"{row['floor']:.4f} to {row['error']:.4f}"
        lines.append([
            f"{row['layers']}, " + (kinds[0].partition(".")[2] if len(kinds) == 1 else f"{len(kinds)} kinds"),
            str(row["rank"]), str(row["k"]), effort, f"{row['gigabytes']:.1f} GB", rounded_time(row["seconds"]),
            f"{row['seconds_per_gigabyte']:.0f} s", interval, f"{row['peak_mib'] / 1024:.1f} GiB",
        ])  # fmt: skip
    columns = [
        "layers", "r", "k", "effort, sweeps at most", "read", "time", "for each GB",
        "floor to error, over e_lora", "memory",
    ]  # fmt: skip
    return table(columns, lines)


MODELS = {
    "1B: 16 layers of width 2048": (16, 2048, 512, 8192),
    "8B: 32 layers of width 4096": (32, 4096, 1024, 14336),
    "70B: 80 layers of width 8192": (80, 8192, 1024, 28672),
}
"""Layers, width, rows of keys and values, and rows of the MLP of the Llama 3 models."""


def whole_models() -> str:
    """Forecast of an extraction from two whole models in bfloat16, r = 8.

    Without a pool the time is proportional to the bytes. With one the time per byte grows with the number of layers: a
    line through the two measured extractions. The quick effort has one measurement, and is taken to grow likewise. The
    least memory is what `check_memory` asks for.
    """
    measured = rows("extract_scale.csv")
    plain = one(measured, layers=27, rank=16, k=0)["seconds_per_gigabyte"]
    few, many = (one(measured, layers=L, k=1, effort="default") for L in (2, 32))
    quick = one(measured, layers=27, k=1, effort="quick")
    low, high = few["seconds_per_gigabyte"], many["seconds_per_gigabyte"]

    def pooled(layers: int) -> float:
        """Seconds for each GB."""
        return float(low + (high - low) * (layers - few["layers"]) / (many["layers"] - few["layers"]))

    quick_share = quick["seconds_per_gigabyte"] / pooled(quick["layers"])
    lines = []
    for model, (L, width, narrow, wide) in MODELS.items():
        gigabytes = 4e-9 * L * width * (2 * width + 2 * narrow + 3 * wide)
        memory = 64 * width * wide / 2**30
        times = [rounded_time(gigabytes * rate) for rate in (plain, pooled(L), quick_share * pooled(L))]
        lines.append([model, f"{gigabytes:.3g} GB", *times, f"{memory:.3g} GiB"])
    return table(["model", "read", "k = 0", "k = 1", "k = 1, quick", "least `--memory`"], lines)


def rounded_time(seconds: float) -> str:
    """Seconds as days, hours, minutes or seconds, with about two digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(seconds / 60, 1):.0f} min"


def extractors() -> str:
    """Three tools on the same pair, a BERT of six layers."""
    own = rows("extractors.csv")
    lines = [
        [row["extractor"], f"{row['error']:.6f}", f"{row['seconds']:.1f} s", f"{row['peak_mib']:.0f} MiB"]
        for row in own
    ]
    return table(["rank 16", "error / norm²", "seconds", "memory"], lines)


def busy_machine() -> str:
    lines = [
        [row["job"], f"{row['idle_seconds']:.3g} s", f"{row['busy_seconds']:.3g} s", f"{row['ratio']:.1f}"]
        for row in rows("busy_machine.csv")
    ]
    return table(["two cores", "idle", "beside two busy processes", "ratio"], lines)


def scaling() -> str:
    """Seconds of a sweep over processes, measured or by the model."""
    lines = []
    for row in rows("scaling.csv"):
        measured = f"{1000 * row['seconds']:.0f} ms" if row["seconds"] else ""
        size = f"{row['layers']} x {row['b']} x {row['a']}"
        cells = [measured, f"{1000 * row['predicted']:.0f} ms", f"{row['gib_held']:.2f} GiB"]
        lines.append([row["where"], str(row["processes"]), size, *cells])
    return table(["where", "processes", "layers", "measured", "model", "memory of each"], lines)


def largest_error_of_the_model() -> str:
    """The largest ratio of a measured sweep to the model, either way up."""
    ratios = [row["seconds"] / row["predicted"] for row in rows("scaling.csv") if row["seconds"]]
    return f"{max(max(ratio, 1 / ratio) for ratio in ratios):.1f}"


BLOCKS = (
    passes, sweep_cost, lora_speed, at_size, leading_and_exact, gpu, extraction, whole_models, extractors, busy_machine,
    scaling, largest_error_of_the_model,
)  # fmt: skip
