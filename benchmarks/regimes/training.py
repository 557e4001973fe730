"""Training: all methods, learning rates and seeds of a setting side by side, as one batch.

Models of a batch do not depend on each other, so one backward of a loss's sum over them gives the
row of each. What a step does to one model is what ModalityDecoupledOptimizer around torch.optim
does; tests/benchmarks/regimes/test_regimes.py holds the two against each other.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.regimes.data import COMBINATIONS, Digits, Draw, Setting
from benchmarks.runs.methods import plain_sum
from gradsplit import Decoupling, LossBalance
from gradsplit.rules import draw_order, gmd, pcgrad

__all__ = ["METHODS", "Method", "Population", "Run", "extension", "methods_of", "study"]

WIDTH = 16
# Weight and bias of: the encoder of left, of right, the backbone, the head (10 digits and ink).
SHAPES = [
    (WIDTH, 32),
    (WIDTH,),
    (WIDTH, 32),
    (WIDTH,),
    (WIDTH, WIDTH),
    (WIDTH,),
    (11, WIDTH),
    (11,),
]
SIZES = [math.prod(shape) for shape in SHAPES]
PRIVATE = sum(SIZES[:4])  # the rest is reached by every loss
BALANCE_STEPS = LossBalance().steps
FIRST = 50  # steps that "at first" means
STARTS = {"SGD": range(-6, 1), "Adam": range(-5, -1)}  # learning rates, as powers of sqrt(10)


class Method(NamedTuple):
    """What is done about the losses of a step, and where.

    Attributes:
        rule: "sum", "gmd" or "pcgrad".
        everywhere: whether the Gramian is of all parameters and the weights apply to all.
        balanced: whether LossBalance weighs the losses, by the norms over the same parameters.
        first: whether it measures before the first step, at the initial weights, and not meanwhile.
        standardised: whether the ink is divided by its standard deviation in train.
    """

    rule: str
    everywhere: bool = False
    balanced: bool = False
    first: bool = False
    standardised: bool = False


METHODS = {
    "sum": Method("sum"),
    "gmd": Method("gmd"),
    "gmd-all": Method("gmd", everywhere=True),
    "pcgrad": Method("pcgrad"),
    "balance": Method("sum", balanced=True),
    "balance+gmd-all": Method("gmd", everywhere=True, balanced=True),
    "balance-first": Method("sum", balanced=True, first=True),
    "balance-first+gmd-all": Method("gmd", everywhere=True, balanced=True, first=True),
    "standardised target": Method("sum", standardised=True),
}


class Run(NamedTuple):
    """One model of a batch."""

    method: str
    lr: float
    seed: int


def methods_of(setting: Setting) -> list[str]:
    """All, without standardised target where there is no target."""
    return [name for name, how in METHODS.items() if setting.factor is None or not how.standardised]


# --- the model -----------------------------------------------------------------------------------


@cache
def initial(seed: int) -> Tensor:
    """(n,): the weights that torch gives the four layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Linear(shape[1], shape[0]) for shape in SHAPES[::2]]
    return torch.cat([p.detach().flatten() for layer in layers for p in layer.parameters()])


def predict(flat: Tensor, views: Tensor) -> Tensor:
    """(S, n) weights, (S, N, 2, 32) halves -> (S, 3, N, 11): what each combination says."""
    parts = [
        part.unflatten(1, shape)
        for part, shape in zip(flat.split(SIZES, 1), SHAPES, strict=True)
    ]  # fmt: skip

    def layer(inputs: Tensor, place: int) -> Tensor:
        return torch.baddbmm(parts[place + 1].unsqueeze(1), inputs, parts[place].mT)

    encoded = [layer(views[:, :, half], 2 * half).relu() for half in range(2)]
    left, right = layer(torch.cat(encoded, 1), 4).relu().chunk(2, 1)
    seen = {"left": left, "right": right, "left+right": (left + right) / 2}
    said = layer(torch.cat([seen[some] for some in COMBINATIONS], 1), 6)
    return said.view(len(flat), len(COMBINATIONS), -1, said.shape[2])


def losses_of(
    said: Tensor, labels: Tensor, target: Tensor, complete: Tensor, factor: float | None
) -> Tensor:
    """(S, m): means over the samples that have the combination, in the order of Setting.losses.

    Args:
        said: (S, 3, N, 11).
        labels: (S, N, 3).
        target: (S, N), the ink in its unit.
        complete: (S, N, 3).
        factor: as in Setting.
    """
    share = complete.mT.to(said) / complete.sum(1).unsqueeze(2)
    wrong = F.cross_entropy(said[..., :10].movedim(-1, 1), labels.mT, reduction="none")
    digit = (wrong * share).sum(2)
    if factor is not None:
        return digit * digit.new_tensor([factor if some == "right" else 1 for some in COMBINATIONS])
    ink = ((said[..., 10] - target.unsqueeze(1)).square() * share).sum(2)
    return torch.cat([digit, ink], 1)


@torch.no_grad()
def scores_of(
    said: Tensor, labels: Tensor, target: Tensor, complete: Tensor, factor: float | None
) -> dict[str, Tensor]:
    """(S,) each: arguments as for :func:`losses_of`.

    ``score`` is the mean, over combinations and tasks, of accuracy and of R^2 clipped to [0, 1],
    times 100. A model whose numbers are not finite scores 0.
    """
    share = complete.mT.to(said) / complete.sum(1).unsqueeze(2)
    hit = (said[..., :10].argmax(3) == labels.mT) & said[..., :10].isfinite().all(3)
    accuracy = (hit * share).sum(2)
    found = {f"accuracy_{some}": accuracy[:, i] for i, some in enumerate(COMBINATIONS)}
    found["accuracy"] = accuracy.mean(1)
    if factor is None:
        center = (target.unsqueeze(1) * share).sum(2, keepdim=True)
        spread = ((target.unsqueeze(1) - center).square() * share).sum(2)
        error = ((said[..., 10] - target.unsqueeze(1)).square() * share).sum(2)
        r2 = (1 - error / spread).nan_to_num(nan=0.0).clamp(0.0, 1.0)
        found |= {f"r2_{some}": r2[:, i] for i, some in enumerate(COMBINATIONS)}
        found["r2"] = r2.mean(1)
    tasks = [found[key] for key in ("accuracy", "r2") if key in found]
    return {"score": 100 * torch.stack(tasks).mean(0), **found}


# --- a batch of models ---------------------------------------------------------------------------


class Population:
    """The models of ``runs``, a row each; the runs of a method must lie side by side."""

    def __init__(
        self, setting: Setting, runs: Sequence[Run], dtype: torch.dtype = torch.float32
    ) -> None:
        self.setting = setting
        self.m = len(setting.losses)
        names = [run.method for run in runs]
        self.blocks = {
            name: slice(names.index(name), names.index(name) + names.count(name))
            for name in dict.fromkeys(names)
        }
        self.seeds = [run.seed for run in runs]
        self.draws = [_draw(run.seed, setting.steps, setting.missing) for run in runs]
        self.lr = torch.tensor([[run.lr] for run in runs], dtype=dtype)
        self.flat = torch.stack([initial(run.seed) for run in runs]).to(dtype)
        self.moments = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.center = torch.tensor([[draw.center] for draw in self.draws], dtype=dtype)
        self.unit = torch.full_like(self.center, setting.unit)
        self.factors = torch.ones(len(runs), self.m, dtype=dtype)  # of LossBalance
        self.balances: dict[int, LossBalance] = {}
        for name, block in self.blocks.items():
            if METHODS[name].standardised:
                spreads = [[draw.spread] for draw in self.draws[block]]
                self.unit[block] = torch.tensor(spreads, dtype=dtype)
            if METHODS[name].balanced:
                self.balances |= {i: LossBalance() for i in range(block.start, block.stop)}
        self.batches = torch.stack([draw.batches for draw in self.draws], 1)  # (steps, S, BATCH)
        self.complete = torch.stack([draw.complete for draw in self.draws])  # (S, N, 3)
        self.number = 0
        self.seen: list[Tensor] = []  # by step that took rows: (3, S of sum), see diagnosed
        early = {name: block for name, block in self.blocks.items() if METHODS[name].first}
        for self.number in range(min(BALANCE_STEPS, setting.steps) if early else 0):
            rows, losses = self._rows()
            for name, block in early.items():
                self._balance(block, losses[block], self._gramian(name, rows[block]))
        self.number = 0

    def step(self, take_rows: bool) -> None:
        """One step of all; the rules need rows, constant weights do not."""
        if take_rows:
            gradient = self._merged(*self._rows())
        else:
            flat = self.flat.requires_grad_()
            losses = losses_of(*self._at(self.batches[self.number], flat)) * self.factors
            (gradient,) = torch.autograd.grad(losses.mean(1).sum(), flat)
        self.number += 1
        self.flat = self._updated(self.flat.detach(), gradient)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """(S, m, n) and the losses (S, m), of this step's batches."""
        flat = self.flat.requires_grad_()
        losses = losses_of(*self._at(self.batches[self.number], flat))
        each = torch.eye(self.m, dtype=flat.dtype)
        rows = torch.autograd.grad(losses.sum(0), flat, each, is_grads_batched=True)[0]
        return rows.transpose(0, 1), losses.detach()

    def scores(self, split: str) -> dict[str, Tensor]:
        """(S,) each, on "validation" or "test"; see :func:`scores_of`."""
        index = torch.stack([getattr(draw, split) for draw in self.draws])
        with torch.no_grad():
            return scores_of(*self._at(index, self.flat))

    def _at(
        self, index: Tensor, flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float | None]:
        """What :func:`losses_of` takes, for the images ``index`` (S, N)."""
        digits = Digits.load()
        said = predict(flat, digits.views[index].to(flat))
        labels = digits.digit[index].unsqueeze(2).repeat(1, 1, len(COMBINATIONS))
        if self.setting.factor is not None:
            labels[..., COMBINATIONS.index("right")] += 1
            labels %= 10
        target = (digits.ink[index].to(flat) - self.center) / self.unit
        chosen = self.complete.gather(1, index.unsqueeze(2).expand(labels.shape))
        return said, labels, target, chosen, self.setting.factor

    def _merged(self, rows: Tensor, losses: Tensor) -> Tensor:
        """(S, n): the mean of the rows (S, m, n) of each model, weighed in the method's scope."""
        merged = torch.empty_like(rows[:, 0])
        for name, block in self.blocks.items():
            scope = slice(0 if METHODS[name].everywhere else PRIVATE, None)
            some = rows[block] * self.factors[block].unsqueeze(2)
            gramian = self._gramian(name, some)
            weights = self._weights(METHODS[name].rule, gramian, block)
            merged[block] = some.mean(1)
            inside = weights.to(some).unsqueeze(1) @ some[..., scope]
            merged[block, scope] = inside.squeeze(1) / self.m
            if METHODS[name].balanced:
                self._balance(block, losses[block] * self.factors[block], gramian)
            if name == "sum":
                self.seen.append(diagnosed(gramian))
        return merged

    def _gramian(self, name: str, rows: Tensor) -> Tensor:
        """(S, m, m), of the rows (S, m, n) in the method's scope."""
        inside = rows if METHODS[name].everywhere else rows[..., PRIVATE:]
        return (inside @ inside.mT).double()

    def _weights(self, rule: str, gramian: Tensor, block: slice) -> Tensor:
        if rule == "pcgrad":
            orders = [_orders(self.m, seed, self.setting.steps) for seed in self.seeds[block]]
            return pcgrad(gramian, torch.stack([order[self.number] for order in orders]))
        return gmd(gramian) if rule == "gmd" else plain_sum(gramian)

    def _balance(self, block: slice, losses: Tensor, gramian: Tensor) -> None:
        """Measure, as long as there is something to measure; the next step has the weights."""
        if self.number >= BALANCE_STEPS:
            return
        names, ones = self.setting.losses, torch.ones(self.m, dtype=torch.float64)
        for row, place in enumerate(range(block.start, block.stop)):
            seen = Decoupling(names, (), losses[row], gramian[row], ones)
            self.balances[place].update(seen)
            if found := self.balances[place].weights:
                own = [found[name] for name in names]
                self.factors[place] = torch.tensor(own, dtype=self.factors.dtype)

    def _updated(self, flat: Tensor, gradient: Tensor) -> Tensor:
        """torch.optim's SGD and Adam with their defaults, but for a learning rate per model."""
        if self.setting.optimizer == "SGD":
            return flat - self.lr * gradient
        first, second = self.moments
        first.lerp_(gradient, 0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        scale = (second / (1 - 0.999**self.number)).sqrt() + 1e-8
        return flat - self.lr / (1 - 0.9**self.number) * first / scale


@cache
def _draw(seed: int, steps: int, missing: bool) -> Draw:
    return Draw(seed, steps, missing)


@cache
def _orders(m: int, seed: int, steps: int) -> Tensor:
    """(steps, m, m): what ModalityDecoupledOptimizer(seed=seed) draws."""
    return torch.stack([draw_order(m, seed, step) for step in range(steps)])


def diagnosed(gramian: Tensor) -> Tensor:
    """(S, m, m) -> (3, S): rates of opposed losses and conflicting pairs, the log of dominance.

    As Decoupling's opposed(), conflict_rate() and the largest entry of dominance() beside the
    diagonal, for a batch. NaN where a training has diverged.
    """
    m = gramian.shape[-1]
    diagonal = gramian.diagonal(dim1=1, dim2=2)
    opposed = (gramian.sum(1) < 0).double().mean(1)
    above = torch.ones(m, m, dtype=torch.bool).triu(1)
    conflicts = (gramian[:, above] < 0).double().mean(1)
    others = gramian.abs() * (1 - torch.eye(m, dtype=gramian.dtype))
    dominance = (others / diagonal.unsqueeze(1).clamp(min=1e-300)).amax((1, 2))
    found = torch.stack([opposed, conflicts, dominance.clamp(min=1e-300).log()])
    return torch.where(gramian.isfinite().all(2).all(1), found, torch.nan)


# --- a setting -----------------------------------------------------------------------------------


def train(setting: Setting, runs: Sequence[Run], test: bool) -> list[dict[str, Any]]:
    """Train all; what is kept of each is its best checkpoint on validation.

    Without ``test`` there is only the best validation score, as ``selected``.
    """
    found: dict[Run, dict[str, Any]] = {}
    # Two batches, as only rules need rows at every step; those of the sum are recorded for test.
    for rules in (False, True):
        some = [run for run in runs if (METHODS[run.method].rule != "sum") == rules]
        if some:
            results = _trained(Population(setting, some), rules, test)
            found |= zip(some, results, strict=True)
    return [found[run] for run in runs]


def _trained(population: Population, rules: bool, test: bool) -> list[dict[str, Any]]:
    setting = population.setting
    best = torch.full((len(population.flat),), -1.0)
    kept = population.flat.clone()
    steps = torch.zeros(len(kept), dtype=torch.long)
    for number in range(1, setting.steps + 1):
        population.step(rules or test or number <= BALANCE_STEPS)
        if number % min(50, setting.steps // 4) == 0:
            score = population.scores("validation")["score"]
            better = score > best
            best = torch.where(better, score, best)
            kept[better], steps[better] = population.flat[better], number
    results: list[dict[str, Any]] = [{"selected": value} for value in best.tolist()]
    if test:
        population.flat = kept
        columns = {key: value.tolist() for key, value in population.scores("test").items()}
        columns |= {"step": steps.tolist()}
        for place, result in enumerate(results):
            result.update({key: values[place] for key, values in columns.items()})
        if "sum" in population.blocks:
            block = population.blocks["sum"]
            summary = _summary(torch.stack(population.seen))
            for place in range(block.start, block.stop):
                results[place].update({k: v[place - block.start] for k, v in summary.items()})
    return results


def _summary(seen: Tensor) -> dict[str, list[float]]:
    """(steps, 3, S) -> what each model of the sum saw at first and in all; dominance geometric."""
    found = {}
    for when, part in (("first", seen[:FIRST]), ("all", seen)):
        opposed, conflicts, dominance = part.nanmean(0)
        found[f"opposed_{when}"] = opposed.tolist()
        found[f"conflicts_{when}"] = conflicts.tolist()
        found[f"dominance_{when}"] = dominance.exp().tolist()
    return found


def extension(scores: Mapping[int, float]) -> int | None:
    """The next power to try: beyond the end where the best is; None once it lies inside."""
    low, high = min(scores), max(scores)
    others = {power: score for power, score in scores.items() if power not in (low, high)}
    inside = max(others.values(), default=-1.0)
    if scores[low] > max(inside, scores[high]):
        return low - 1
    return high + 1 if scores[high] > max(inside, scores[low]) else None


def tune(setting: Setting, seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """By method: power of sqrt(10) -> validation score, mean over seeds."""
    wanted: dict[str, Sequence[int]] = dict.fromkeys(methods_of(setting), STARTS[setting.optimizer])
    scores: dict[str, dict[int, float]] = {name: {} for name in wanted}
    while wanted:
        runs = [
            Run(name, learning_rate(power), seed)
            for name, powers in wanted.items()
            for power in powers
            for seed in seeds
        ]
        found = iter(train(setting, runs, test=False))
        for name, powers in wanted.items():
            for power in powers:
                scores[name][power] = math.fsum(next(found)["selected"] for _ in seeds) / len(seeds)
        more = {name: extension(scores[name]) for name in wanted}
        wanted = {name: [power] for name, power in more.items() if power is not None}
    return scores


def learning_rate(power: int) -> float:
    return float(f"{10 ** (power / 2):.2g}")


def study(
    setting: Setting, tuning: Sequence[int], seeds: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tune on the seeds ``tuning``, test on ``seeds``.

    Returns:
        A flat row per method and seed, and per method the learning rates that were tried.
    """
    where = {"part": setting.part, "setting": setting.name, "optimizer": setting.optimizer}
    scores = tune(setting, tuning)
    chosen = {name: max(tried, key=lambda p: tried[p]) for name, tried in scores.items()}
    runs = [Run(name, learning_rate(chosen[name]), seed) for name in scores for seed in seeds]
    tested = train(setting, runs, test=True)
    rows = [{**where, **run._asdict(), **one} for run, one in zip(runs, tested, strict=True)]
    tuned = [
        {**where, "method": name, "validation": {learning_rate(p): s for p, s in sorted(t.items())}}
        for name, t in scores.items()
    ]
    return rows, tuned
