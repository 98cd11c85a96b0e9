"""Memories of gradients that are neither linear nor linear and a network: one gain per tensor, a network alone, and
those of whole matrices under Muon. Against a reference that is written out here, in float64."""

import dataclasses

import pytest
import torch
from optims import with_dmgd

from hope.optim import coordinate_memory, newton_schulz
from hope.optim.build import build_optimizer
from hope.optim.config import MlpConfig, MuonConfig, OptimConfig, ScalarConfig
from hope.optim.dmgd import Dmgd
from hope.optim.kernels import kernels_of_run

SHAPES = [(6, 5), (3, 4, 4)]
GAIN = ScalarConfig(lr=0.5, decay=0.1)
BASE = OptimConfig(lr=0.02, beta1=0.8, eps=1e-4, weight_decay=0.1)
SCALAR = dataclasses.replace(BASE, dmgd=dataclasses.replace(BASE.dmgd, memory="scalar", scalar=GAIN))
ALONE = with_dmgd(BASE, memory="mlp_only", mlp_key="gradient", mlp_width=3, mlp_lr=0.4, output="rms_match")


def muon(**settings) -> OptimConfig:
    """Muon with settings of optim.muon."""
    return dataclasses.replace(BASE, name="muon", muon=MuonConfig(**settings))


SUMS = {"objective": "dot", "preconditioner": "none"}
NETWORK = MlpConfig(width=3, lr=0.4)
CASES = {
    "scalar": SCALAR,
    "scalar value": with_dmgd(SCALAR, normalise="value"),
    "scalar sums": with_dmgd(SCALAR, **SUMS, lr=1e-3),
    "scalar clip": with_dmgd(SCALAR, output="rms_clip", output_bound=1.0),
    "alone": ALONE,
    "alone as it is": with_dmgd(ALONE, output="identity"),
    "alone value": with_dmgd(ALONE, normalise="value"),
    "alone dot": with_dmgd(ALONE, **SUMS),
    "alone, one unit": with_dmgd(ALONE, mlp_width=1),
    "mlp, one unit": with_dmgd(BASE, memory="mlp", mlp_width=1, mlp_lr=0.4),
    "muon mlp": muon(memory="mlp", mlp=NETWORK),
    "muon mlp gradient": muon(memory="mlp", mlp=dataclasses.replace(NETWORK, key="gradient")),
    "muon scalar": muon(memory="scalar", scalar=GAIN),
}


class Reference:
    """One tensor and its memory, a step at a time, all in one expression each. Gradients of the inner loss are
    autograd's, coordinate by coordinate."""

    def __init__(self, config: OptimConfig, weight: torch.Tensor) -> None:
        self.config, self.weight, self.t, self.gain = config, weight.clone(), 0, 1.0
        self.matrix = config.name == "muon"
        inner = config.muon if self.matrix else config.dmgd
        self.kind, self.learner = inner.memory, inner.scalar if inner.memory == "scalar" else inner.mlp
        self.adam = not self.matrix and inner.preconditioner == "adam"
        self.at_value = self.adam and inner.normalise == "value"
        self.l2 = self.matrix or inner.objective == "l2"
        self.s, self.v, self.r = torch.zeros_like(weight), torch.zeros_like(weight), 0.0
        if self.kind == "scalar":
            self.theta = torch.zeros(1, dtype=weight.dtype)
        else:
            by_gradient = 2 if self.kind == "mlp_only" else 4
            features = by_gradient if self.learner.key == "gradient" else 3 if self.adam and not self.at_value else 2
            self.theta = coordinate_memory.initial(features, self.learner.width, torch.device("cpu")).to(weight.dtype)
        self.start = self.theta.clone()

    def y(self, theta: torch.Tensor, features: list[torch.Tensor]) -> torch.Tensor:
        if self.kind == "scalar":
            return theta[0] * features[0]
        width, stacked = self.learner.width, torch.stack([f.reshape(-1).clamp(-8, 8) for f in features])
        hidden = torch.tanh(theta[:-width].view(width, -1) @ stacked)
        return torch.tanh(theta[-width:] @ hidden).view(features[0].shape)

    def features(self, w, s, root, r, unit) -> list[torch.Tensor]:
        over = lambda x, a: x / a if isinstance(a, torch.Tensor) or a else torch.zeros_like(x)
        log = lambda x: torch.asinh(100 * x) / 5
        if self.kind == "scalar":
            return [over(s, unit)]
        if self.learner.key == "gradient":
            seen = [over(w, unit)] + ([] if self.kind == "mlp_only" else [over(s, unit)])
            return [f for x in seen for f in (x, log(x))]
        if self.adam and not self.at_value:
            return [over(s, root), log(over(s, root)), over(s, r)]
        return [over(s, r), log(over(s, r))]

    def learn(self, features, value, known) -> None:
        """One normalised step on 1/2 (known + y - value)^2, or on -y value."""
        flat = lambda theta: self.y(theta, features).reshape(-1)
        jacobian = torch.autograd.functional.jacobian(flat, self.theta)
        y = flat(self.theta).reshape(value.shape)
        slope = (known + y - value if self.l2 else -value).reshape(-1)
        step = (jacobian * slope[:, None]).mean(0) / (jacobian.square().sum(1).mean() + 1e-6)
        target, deep = (value if self.kind == "mlp_only" else known), known + y
        if deep.any() and target.any():
            self.gain = min(10.0, (target.square().sum() / deep.square().sum()).sqrt().item())
        self.theta = self.theta - self.learner.lr * step - self.learner.decay * (self.theta - self.start)

    def step(self, g: torch.Tensor) -> None:
        config, self.t = self.config, self.t + 1
        b1, b2, t = config.beta1, config.beta2, self.t
        corrected = lambda b, n: 1 - b**n if n and not self.matrix else 1.0
        before = (self.v / corrected(b2, t - 1)).sqrt() + config.eps
        self.v = b2 * self.v + (1 - b2) * g * g
        root = (self.v / corrected(b2, t)).sqrt() + config.eps
        w = g / root if self.at_value else g
        divided = self.adam and not self.at_value
        unit = root if divided else self.r
        over = lambda x: x / unit if isinstance(unit, torch.Tensor) or unit else torch.zeros_like(x)
        alone, average = self.kind == "mlp_only", self.l2 and not self.matrix
        held = 0 * self.s if alone else self.s / (corrected(b1, t - 1) if average else 1.0)
        self.learn(self.features(w, held, before, self.r, unit), over(w), over(held))
        self.r = (w.square().mean() if t == 1 else b1 * self.r**2 + (1 - b1) * w.square().mean()).sqrt().item()
        unit = root if divided else self.r
        self.s = b1 * self.s + (1 - b1 if self.l2 else 1.0) * w
        found = 0 * self.s if alone else self.s / (corrected(b1, t) if average else 1.0)
        by_gradient = self.kind != "scalar" and self.learner.key == "gradient"
        found = found + self.y(self.theta, self.features(w, held if by_gradient else found, root, self.r, unit)) * unit
        self.weight = self.weight * (1 - config.lr * config.weight_decay)
        if self.matrix:
            rms = 0.2 * max(g.shape[-2:]) ** 0.5
            self.weight -= config.lr * rms * newton_schulz.orthogonalise((1 - b1) * g + b1 * found, 5)
            return
        found = found * self.gain if config.dmgd.output == "rms_match" else found
        if config.dmgd.output == "rms_clip":
            found = found.clamp(-config.dmgd.output_bound * self.r, config.dmgd.output_bound * self.r)
        self.weight -= config.lr * (found / root if divided else found)


def problem() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    return [draw(shape) for shape in SHAPES], [draw(shape) for shape in SHAPES], generator


def gradient(weight: torch.Tensor, target: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return 4 * (weight - target) ** 3 + 3 * noise


@pytest.mark.parametrize("name", list(CASES))
def test_fifteen_steps_are_the_references(name):
    """Weights of two tensors, and at the end all that their memories hold."""
    config = CASES[name]
    weights, targets, generator = problem()
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    group = {"params": params, "weight_decay": config.weight_decay, "matrices": config.name == "muon"}
    optimizer = build_optimizer([group], config)
    references = [Reference(config, w) for w in weights]
    for _ in range(15):
        for p, reference, target in zip(params, references, targets, strict=True):
            g = gradient(reference.weight, target, generator)
            reference.step(g)
            p.grad = g.clone()
        optimizer.step()
        for p, reference in zip(params, references, strict=True):
            torch.testing.assert_close(p.detach(), reference.weight, rtol=1e-10, atol=1e-10)
    for p, reference in zip(params, references, strict=True):
        state = optimizer.state[p]
        learned = state["gain" if reference.kind == "scalar" else "mlp"]
        torch.testing.assert_close(learned[0], reference.theta, rtol=1e-9, atol=1e-9)
        assert (reference.theta - reference.start).abs().max() > 1e-3  # it has learned something
        torch.testing.assert_close(state["mean_square"].item(), reference.r**2)
        assert ("memory" in state) == (reference.kind != "mlp_only")


def test_a_gain_that_learns_at_once_is_the_quotient_of_two_sums():
    """rho = sum (w - s) s / sum s^2 in units of sqrt(v), up to the smallest norm of 1e-6."""
    config = dataclasses.replace(SCALAR, dmgd=dataclasses.replace(SCALAR.dmgd, scalar=ScalarConfig(lr=1.0, decay=0.0)))
    weights, targets, generator = problem()
    p = torch.nn.Parameter(weights[0].clone())
    optimizer = Dmgd([{"params": [p]}], config)
    for step in range(1, 6):
        p.grad = gradient(p.detach(), targets[0], generator)
        s, v = (optimizer.state[p][k].clone() if step > 1 else 0 * p.detach() for k in ("memory", "square"))
        root = ((0.95 * v + 0.05 * p.grad**2) / (1 - 0.95**step)).sqrt() + config.eps
        s, w = s / (1 - 0.8 ** (step - 1) if step > 1 else 1) / root, p.grad / root
        optimizer.step()
        expected = ((w - s) * s).sum() / (s * s).sum() if step > 1 else torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(optimizer.state[p]["gain"][0, 0], expected, rtol=1e-4, atol=1e-12)


def descend(config: OptimConfig, steps: int = 12) -> list[torch.Tensor]:
    weights, targets, generator = problem()
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = build_optimizer([{"params": params, "matrices": config.name == "muon"}], config)
    for _ in range(steps):
        for p, target in zip(params, targets, strict=True):
            p.grad = gradient(p.detach(), target, generator)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    ("frozen", "linear"),
    [
        (dataclasses.replace(SCALAR, dmgd=dataclasses.replace(SCALAR.dmgd, scalar=ScalarConfig(lr=0.0))), BASE),
        (muon(memory="scalar", scalar=ScalarConfig(lr=0.0)), muon()),
        (muon(memory="mlp", mlp=MlpConfig(lr=0.0)), muon()),
    ],
    ids=["scalar", "muon scalar", "muon mlp"],
)
def test_what_does_not_learn_is_the_linear_memory(frozen, linear):
    for a, b in zip(descend(frozen), descend(linear), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_a_network_alone_descends_where_the_printed_value_diverges():
    """As linear memories do (test_deep_momentum.py): with Eq. 50's value 1 the same descent ends above 1e3 times."""
    start = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = torch.nn.Parameter(start.clone())
    optimizer = Dmgd([{"params": [p]}], dataclasses.replace(ALONE, lr=0.05, weight_decay=0.0))
    for _ in range(200):
        p.grad = p.detach().clone()
        optimizer.step()
    assert p.detach().square().sum() < 1e-2 * start.square().sum()


def test_rms_match_gives_what_a_network_alone_says_the_rms_of_what_it_answers():
    lengths = {}
    for output in ("identity", "rms_match"):
        p = torch.nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
        optimizer = Dmgd([{"params": [p]}], with_dmgd(ALONE, output=output, mlp_lr=0.1))
        generator = torch.Generator().manual_seed(3)
        for _ in range(40):
            before = p.detach().clone()
            p.grad = torch.randn(30, 20, generator=generator, dtype=torch.float64)
            optimizer.step()
        lengths[output] = ((p.detach() - before) / ALONE.lr).square().mean().sqrt().item()
    assert lengths["identity"] < 0.5
    assert lengths["rms_match"] == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_a_sum_may_keep_everything(memory):
    """beta1 1 with the objective dot, Eq. 34: s is the sum of all gradients, and r the rms over all of them."""
    config = with_dmgd(memory=memory, **SUMS, beta1=1.0)
    assert not list(config.problems())
    p = torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.float64))
    optimizer = Dmgd([{"params": [p]}], config)
    seen = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for g in seen:
        p.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["memory"], seen.sum(0))
    if memory == "mlp":
        torch.testing.assert_close(optimizer.state[p]["mean_square"].item(), seen.square().mean().item())


def test_an_average_may_not():
    for config in (with_dmgd(beta1=1.0), dataclasses.replace(muon(), beta1=1.0)):
        [problem] = config.problems()
        assert (problem.path, problem.what) == ("optim.beta1", "1.0 is not in [0, 1)")
        assert "optim.dmgd.objective=dot" in problem.fix


@pytest.mark.parametrize(
    ("config", "path"),
    [
        (with_dmgd(memory="mlp_only"), "optim.dmgd.mlp.key"),
        (with_dmgd(ALONE, erase=0.1, bias_correction=False), "optim.dmgd.erase"),
        (with_dmgd(SCALAR, output="rms_match"), "optim.dmgd.output"),
        (dataclasses.replace(SCALAR, dmgd=dataclasses.replace(SCALAR.dmgd, objective="dot",
                                                              scalar=ScalarConfig(decay=0.0))),
         "optim.dmgd.scalar.decay"),
        (muon(memory="mlp", mlp=MlpConfig(width=0)), "optim.muon.mlp.width"),
        (muon(memory="scalar", scalar=ScalarConfig(lr=2.0)), "optim.muon.scalar.lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_contradicts_a_memory_is_refused(config, path):
    assert [problem.path for problem in config.problems()] == [path]


def test_what_takes_the_plain_way_says_why():
    assert kernels_of_run(SCALAR, "cuda").reason == "memory scalar"
    assert kernels_of_run(ALONE, "cuda").reason == "memory mlp_only"
