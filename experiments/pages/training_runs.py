"""Blocks about training adapters that need the single runs, and not only their means."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from scipy import stats

from experiments import adapter_claims as claims
from experiments.pages.training import methods_of, titled
from experiments.pages.words import FIGURES, percents, rows, signed, table
from experiments.support.rows import Row
from experiments.train_adapters.protocol import best_rate

Seeds = dict[int, Row]
"""The runs of one method, by seed."""


@cache
def runs_of(name: str) -> dict[str, Seeds]:
    return claims.read(FIGURES / name)


def gpu_runs() -> dict[str, Seeds]:
    """The runs on the GPU at the rate that validation chose, from few to many parameters."""
    runs = runs_of("train_adapters.jsonl")
    return {row["method"]: runs[row["method"]] for row in methods_of(rows("train_adapters.csv"))}


def test_mrr(row: Row) -> float:
    return float(row["test_mrr"])


def early_loss(row: Row) -> float:
    losses = row["losses"][: claims.SMOOTH]
    return float(sum(losses) / len(losses))


@dataclass(frozen=True)
class Pair:
    """Two methods: test MRR of `high` minus that of `low`, paired by seed, with its 95 % interval and p."""

    high: str
    low: str
    difference: tuple[float, float]
    p: float

    @property
    def differs(self) -> bool:
        """Whether the interval excludes 0."""
        return self.difference[0] > self.difference[1]


@cache
def pairs() -> list[Pair]:
    """All pairs of methods on the GPU."""
    runs, found = gpu_runs(), []
    for one, other in itertools.combinations(runs, 2):
        high, low = (one, other) if claims.paired(runs[one], runs[other], test_mrr)[0] >= 0 else (other, one)
        seeds = sorted(runs[high].keys() & runs[low].keys())
        scores = [[test_mrr(runs[name][seed]) for seed in seeds] for name in (high, low)]
        p = float(stats.ttest_rel(*scores).pvalue)
        found.append(Pair(high, low, claims.paired(runs[high], runs[low], test_mrr), p))
    return found


def table_of_pairs() -> str:
    """The pairs whose interval excludes 0."""
    lines = [
        [f"{titled(pair.high)} minus {titled(pair.low)}", signed(pair.difference), f"{pair.p:.3f}"]
        for pair in sorted(pairs(), key=lambda pair: pair.p)
        if pair.differs
    ]
    return table(["", "test MRR", "p"], lines)


def pairs_that_differ() -> str:
    return f"{sum(pair.differs for pair in pairs())} of {len(pairs())}"


def chance_pairs() -> str:
    """How many pairs would differ at 95 % if no method did."""
    return f"{0.05 * len(pairs()):.1f}"


def smallest_p() -> str:
    """The smallest p of all pairs times their number, which is Bonferroni's correction."""
    return f"{min(1.0, len(pairs()) * min(pair.p for pair in pairs())):.2f}"


def prose_change() -> str:
    """MRR on prose before training, and how much each method changes it."""
    lines = []
    for method, of in gpu_runs().items():
        changes = [claims.prose_mrr(row["looks"][-1]) - claims.prose_mrr(row["looks"][0]) for row in of.values()]
        lines.append([titled(method), signed(claims.interval(changes), 3)])
    return table(["", "MRR on prose, after minus before"], lines)


def prose_before() -> str:
    return f"{claims.prose_mrr(next(iter(gpu_runs()['lora(2)'].values()))['looks'][0]):.3f}"


def validation_change() -> str:
    """How much all training raises the MRR on validation pairs, over methods: from, to."""
    runs = [row for of in gpu_runs().values() for row in of.values()]
    before = runs[0]["looks"][0]["validation_mrr"]
    means = [claims.interval([claims.validation(row) for row in of.values()])[0] for of in gpu_runs().values()]
    return f"{before:.3f} to between {min(means):.3f} and {max(means):.3f}"


def more_parameters() -> str:
    """LoRA(28) minus LoRA(2): test MRR, paired by seed."""
    runs = gpu_runs()
    return signed(claims.paired(runs["lora(28)"], runs["lora(2)"], test_mrr))


def fewer_shared() -> str:
    """RaSA(8, 1) minus RaSA(8, 4): test MRR."""
    runs = gpu_runs()
    return signed(claims.paired(runs["rasa(8,1)"], runs["rasa(8,4)"], test_mrr))


def starts_from_data() -> str:
    """Starts from data minus random starts, each at its own rate, and at the same rate where there are both."""
    runs = runs_of("train_adapters_cpu.jsonl")
    lines = []
    for method, start in itertools.product(("lora(2)", "rasa(2,1)"), ("updates", "gradient")):
        of = runs[f"{method} from {start}"]
        rate = run_rate(of)
        for random in (runs[method], runs.get(f"{method} at {rate:g}")):
            if random is not None:
                other = run_rate(random)
                lines.append([
                    f"{titled(method)} from {start}",
                    f"both {rate:g}" if other == rate else f"{rate:g}, random {other:g}",
                    signed(claims.paired(of, random, test_mrr)),
                    signed(claims.paired(of, random, early_loss), 3),
                    signed(claims.paired(of, random, claims.final_loss), 3),
                ])  # fmt: skip
    columns = ["minus random start", "rates", "test MRR", "loss, first 20 steps", "loss, last 20 steps"]
    return table(columns, lines)


def run_rate(of: Seeds) -> float:
    """The learning rate of the runs of one name."""
    return claims.rate(next(iter(of.values())))


def tuned_rates() -> str:
    """The rates that were tried on the GPU, by method; the best of them is marked."""
    tried = claims.trials_by_method(rows("train_adapters.jsonl"))
    lines = []
    for method in gpu_runs():
        best, rates = best_rate(tried[method]), sorted(map(claims.rate, tried[method]))
        lines.append([titled(method), ", ".join(f"**{rate:g}**" if rate == best else f"{rate:g}" for rate in rates)])
    return table(["", "rates tried, one seed each; best in bold"], lines)


def finer_rates() -> str:
    """Validation MRR at r = 8 on CPUs: a line for each rate, the mean of all tuning seeds; the best one is marked."""
    tried = claims.trials_by_method([row for row in rows("train_adapters_cpu.jsonl") if row["run"]["rank"] == 8])
    best = {name: best_rate(trials) for name, trials in tried.items()}
    lines = []
    for rate in sorted({claims.rate(row) for trials in tried.values() for row in trials}):
        cells = []
        for name, trials in tried.items():
            scores = [claims.validation(row) for row in trials if claims.rate(row) == rate]
            mark = "**" if rate == best[name] else ""
            each = ", ".join(f"{score:.4f}" for score in scores)
            cells.append(f"{mark}{statistics.fmean(scores):.4f}{mark} ({each})" if scores else "")
        lines.append([f"{rate:g}", *cells])
    return table(["rate", *map(titled, tried)], lines)


def on_cpus(method: str, other: str, value: Callable[[Row], float], digits: int = 4) -> str:
    """The first of two methods or rates minus the second, paired by seed, on CPUs."""
    runs = runs_of("train_adapters_cpu.jsonl")
    return signed(claims.paired(runs[method], runs[other], value), digits)


def higher_rate_of_lora(value: Callable[[Row], float], digits: int = 4) -> str:
    """LoRA(8) at the rate that validation chose, minus the same at 0.001."""
    return on_cpus("lora(8)", "lora(8) at 0.001", value, digits)


def rasa_rate_validation() -> str:
    """RaSA(8, 1) at 0.002 minus the same at the rate that validation chose."""
    return on_cpus("rasa(8,1) at 0.002", "rasa(8,1)", claims.validation)


def validation_at_002() -> str:
    """RaSA(8, 1) minus LoRA(8), both at 0.002."""
    return on_cpus("rasa(8,1) at 0.002", "lora(8)", claims.validation)


def lora_rate_validation() -> str:
    return higher_rate_of_lora(claims.validation)


def lora_rate_mrr() -> str:
    return higher_rate_of_lora(test_mrr)


def lora_rate_drift() -> str:
    return higher_rate_of_lora(lambda row: claims.drift(row["looks"][-1]), 3)


def full_gain_8_1() -> str:
    """What RaSA(8, 1) gains in reconstruction on the updates of the full runs, over seeds."""
    return percents(gain for gain, _ in claims.predicted(gpu_runs())["rasa(8,1)"])


def full_gains_all() -> str:
    """The same of all budgets."""
    return percents(gain for points in claims.predicted(gpu_runs()).values() for gain, _ in points)


BLOCKS = (
    table_of_pairs, pairs_that_differ, chance_pairs, smallest_p, prose_change, prose_before, validation_change,
    more_parameters, fewer_shared, starts_from_data, tuned_rates, finer_rates, full_gain_8_1, full_gains_all,
    lora_rate_validation, lora_rate_mrr, lora_rate_drift, rasa_rate_validation, validation_at_002,
)  # fmt: skip
