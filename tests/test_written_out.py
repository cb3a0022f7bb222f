"""Whole runs of InfLoRA and its variants against the method written out: adapters never merged, SVDs, plain loops.

Both are given the same images, weights, classifiers, orders and drawn features, as docs/fidelity.md says.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from inflora.adapters.memories import memory_of
from inflora.config import RunConfig, override, parse_config
from inflora.continual import run
from inflora.data import prepare_store
from inflora.data.source import Arrays, Dataset, Options, Source
from inflora.gaussians import Gaussians

SIZES, WIDTH, BATCH, SAMPLES = [3, 1, 2], 32, 10, 32
EPOCHS = 4  # of the longest task
CLASSES, PER_CLASS = sum(SIZES), 8
STARTS = [sum(SIZES[:t]) for t in range(len(SIZES) + 1)]

SGD = {"name": "sgd", "lr": 0.05, "head_lr": 0.02, "weight_decay": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "adam, a first task of its own": {"optim": {"first_task": {"lr": 2e-3, "epochs": 4}}},
    "one epoch, cut short": {"optim": {"epochs": 1}, "adapter": {"total_tasks": 9}},
    "retain": {"adapter": {"energy": 0.9997, "rank": 2}},
    "sgd": {"optim": SGD | {"first_task": {"weight_decay": 0.0}}},
    "the first blocks, gpm": {"adapter": {"blocks": 2, "memory": "gpm", "energy": 0.99}},
    "aligned": {
        "adapter": {"memory": "gpm"},
        "classifier": {"name": "aligned", "epochs": 3, "samples": SAMPLES},
        "optim": SGD | {"schedule": "step", "milestones": [2]},
    },
    "aligned, normalised": {
        "classifier": {"name": "aligned", "epochs": 3, "samples": SAMPLES, "temperature": 0.1},
    },
}


class Written:
    """The method of algorithm.md, one step after the other; ``given`` is what both sides are given."""

    def __init__(self, config: RunConfig, given: dict[str, dict[str, Tensor]], images: Tensor, labels: Tensor) -> None:
        self.settings, self.aligned, self.optim = config.adapter, config.classifier, config.optim
        self.given = given
        self.images, self.labels = images, labels
        self.vit = VisionTransformer(**OPTIONS, img_size=32, patch_size=8, num_classes=0).eval().requires_grad_(False)
        self.vit.load_state_dict(given["weights"])
        layers = [block.attn.qkv for block in self.vit.blocks[: self.settings.blocks]]
        self.adapters: list[list[list[Tensor]]] = [[] for _ in layers]  # per block and task: A, B of keys, B of values
        self.inputs: list[list[Tensor]] = [[] for _ in layers]
        for index, layer in enumerate(layers):
            layer.register_forward_hook(lambda _, args, out, index=index: self.adapt(index, args[0], out))
        self.heads: list[nn.Linear] = []
        self.taken: list[Tensor] = []  # per block: orthonormal columns, never turned into the complement
        self.moments: list[tuple[Tensor, Tensor]] = []
        self.rates: list[tuple[float, float]] = []  # of the task's epochs: the adapters', the classifier's

    def adapt(self, index: int, x: Tensor, out: Tensor) -> Tensor:
        self.inputs[index].append(x.detach().flatten(0, 1))
        q, k, v = out.chunk(3, dim=-1)
        for lora_A, of_k, of_v in self.adapters[index]:
            k, v = k + linear(x, of_k @ lora_A), v + linear(x, of_v @ lora_A)
        return torch.cat([q, k, v], dim=-1)

    def covariances(self, rows: Tensor) -> list[Tensor]:
        self.inputs = [[] for _ in self.inputs]
        for batch in rows.split(BATCH):
            self.vit(self.images[batch])
        seen = [torch.cat(parts).double() for parts in self.inputs]
        return [h.T @ h / len(h) for h in seen]

    def learn(self, t: int) -> list[list[float]]:
        orders = {name.split("/")[1]: rows for name, rows in self.given["orders"].items() if name.startswith(f"{t}/")}
        for index, cov in enumerate(self.covariances(orders["covariance-before"])):
            left = cov - self.taken[index] @ self.taken[index].T @ cov if t else cov
            lora_A = torch.linalg.svd(left).U[:, : self.settings.rank].T.float() / math.sqrt(3)
            self.adapters[index].append([lora_A, *(torch.zeros(WIDTH, len(lora_A)).requires_grad_() for _ in "kv")])
        head = nn.Linear(WIDTH, SIZES[t])
        head.load_state_dict({name: self.given["heads"][f"{t}.{name}"] for name in ("weight", "bias")})
        self.heads.append(head)
        losses = self.train(t, orders)
        self.remember(t, self.covariances(orders["covariance-after"]))
        if self.aligned.name == "aligned":
            self.align(t)
        return losses

    def train(self, t: int, orders: dict[str, Tensor]) -> list[list[float]]:
        optim = self.optim.of_task(t)
        of_adapters = [factor for block in self.adapters for factor in block[-1][1:]]
        groups = [{"params": of_adapters, "lr": optim.lr}, {"params": list(self.heads[-1].parameters())}]
        kind = {"adam": torch.optim.Adam, "sgd": lambda *a, **k: torch.optim.SGD(*a, **k, momentum=0.9)}[optim.name]
        optimizer = kind(groups, lr=optim.head_lr or optim.lr, weight_decay=optim.weight_decay)
        full, losses, self.rates = [group["lr"] for group in optimizer.param_groups], [], []
        for e in range(optim.epochs):
            if optim.schedule == "step":
                factor = 0.1 if e >= optim.milestones[0] else 1.0
            elif optim.name == "sgd":
                factor = (1 + math.cos(math.pi * e / optim.epochs)) / 2
            else:
                factor = math.cos(99 * math.pi * max(e - 1, 0) / (200 * max(optim.epochs - 1, 1)))
            for group, lr in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = lr * factor
            self.rates.append(tuple(lr * factor for lr in full))
            losses.append([])
            for rows in orders[f"train-{e}"].split(BATCH):
                loss = cross_entropy(self.heads[-1](self.vit(self.images[rows])), self.labels[rows] - STARTS[t])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[-1].append(loss.item())
        for block in self.adapters:
            block[-1] = [factor.detach() for factor in block[-1]]
        return losses

    def remember(self, t: int, covariances: list[Tensor]) -> None:
        eps = self.settings.energy + (1 - self.settings.energy) * t / (self.settings.total_tasks or len(SIZES))
        for index, cov in enumerate(covariances):
            total = torch.linalg.svdvals(cov).square().sum()
            if t == 0:
                U, S, _ = torch.linalg.svd(cov)
                number = max(1, int((S.square().cumsum(0) / total < eps).sum()))
                self.taken.append(U[:, :number])
                continue
            U, S, _ = torch.linalg.svd(cov - self.taken[index] @ self.taken[index].T @ cov)
            held, number = 1 - S.square().sum() / total, 0
            while held < eps:
                held, number = held + S[number] ** 2 / total, number + 1
            self.taken[index] = torch.cat([self.taken[index], U[:, :number]], dim=1)

    def align(self, t: int) -> None:
        for label in range(STARTS[t], STARTS[t + 1]):
            features = self.vit(self.images[self.labels == label]).double()
            self.moments.append((features.mean(0), torch.cov(features.T)))
        if t == 0:
            return
        settings = self.aligned
        everything = [parameter for head in self.heads for parameter in head.parameters()]
        optimizer = torch.optim.SGD(everything, lr=0.01, momentum=0.9, weight_decay=5e-4)
        for e in range(settings.epochs):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * e / settings.epochs)) / 2
            drawn = (self.given["draws"][f"{t}/{name}-{e}"].split(SAMPLES) for name in ("features", "classes"))
            for features, classes in zip(*drawn, strict=True):
                logits = [head(features) for head in self.heads]
                if settings.temperature:
                    norms = torch.stack([part.norm(dim=1) for part in logits], dim=1).mean(1, keepdim=True)
                    logits = [part / norms / settings.temperature for part in logits]
                optimizer.zero_grad()
                cross_entropy(torch.cat(logits, dim=1), classes).backward()
                optimizer.step()

    def logits(self, images: Tensor) -> Tensor:
        features = self.vit(images)
        return torch.cat([head(features) for head in self.heads], dim=1).detach()

    def hits(self, images: Tensor, labels: Tensor, t: int) -> float:
        """The share of a task's images whose class is found among those of the task."""
        own = (labels >= STARTS[t]) & (labels < STARTS[t + 1])
        right = self.logits(images[own])[:, STARTS[t] : STARTS[t + 1]].argmax(1) == labels[own] - STARTS[t]
        return float(right.double().mean())


OPTIONS = {"embed_dim": WIDTH, "depth": 3, "num_heads": 4}
DATA = {"dataset": "written", "tasks": SIZES, "train_on": "train+validation", "augment": "none"}


def images_of(seed: int) -> tuple[Tensor, Tensor]:
    """Noisy copies (N x 3 x 32 x 32, uint8) of a picture for each class, and their classes."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(CLASSES, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels = torch.arange(CLASSES).repeat(PER_CLASS)
    noise = torch.randn(len(labels), 3, 32, 32, generator=generator.manual_seed(seed))
    return (255 * (pictures[labels] + 0.2 * noise).clamp(0, 1)).byte(), labels


def given_to_both(labels: Tensor) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = VisionTransformer(**OPTIONS, img_size=32, patch_size=8, num_classes=0)
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in vit.state_dict().items()}
    heads, orders, draws = {}, {}, {}
    for t, size in enumerate(SIZES):
        heads |= {f"{t}.weight": 0.2 * torch.randn(size, WIDTH, generator=generator), f"{t}.bias": torch.ones(size)}
        rows = ((labels >= STARTS[t]) & (labels < STARTS[t + 1])).nonzero()[:, 0]
        for name in ("covariance-before", "covariance-after", *(f"train-{e}" for e in range(EPOCHS))):
            orders[f"{t}/{name}"] = rows[torch.randperm(len(rows), generator=generator)]
        for e in range(3 if t else 0):
            draws[f"{t}/features-{e}"] = torch.randn(SAMPLES * STARTS[t + 1], WIDTH, generator=generator)
            draws[f"{t}/classes-{e}"] = torch.randint(STARTS[t + 1], (SAMPLES * STARTS[t + 1],), generator=generator)
    return {"weights": weights, "heads": heads, "orders": orders, "draws": draws}


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """A folder with the images and all that is given, and the same as tensors."""
    folder = tmp_path_factory.mktemp("written")
    (train, labels), (test, _) = images_of(2), images_of(3)
    splits = {
        s: Arrays(x.permute(0, 2, 3, 1).contiguous().numpy(), labels.numpy())
        for s, x in (("train", train), ("test", test))
    }
    source = Source("made up", tuple(map(str, range(CLASSES))), splits)
    prepare_store("written", Dataset(lambda *_: source, needs=None), folder, Options(), root=str(folder))
    given = given_to_both(labels)
    for name in ("weights", "heads", "draws"):
        save_file(given[name], folder / f"{name}.safetensors")
    return folder, given, train.float() / 255, labels, test.float() / 255


def config_of(folder: Path, given: dict[str, dict[str, Tensor]], variant: dict[str, Any]) -> RunConfig:
    adapter = {"name": "inflora", "rank": 4, "energy": 0.9} | variant.get("adapter", {})
    classifier = variant.get("classifier", {"name": "linear"})
    files = ("heads", "draws") if classifier["name"] == "aligned" else ("heads",)
    config = parse_config(
        {
            "data": DATA | {"root": folder},
            "backbone": {"weights": folder / "weights.safetensors", "options": {"in_chans": 3} | OPTIONS},
            "adapter": adapter,
            "classifier": classifier,
            "optim": {"epochs": 3, "lr": 5e-3, "batch_size": BATCH} | variant.get("optim", {}),
            "replay": {name: folder / f"{name}.safetensors" for name in files},
            "device": "cpu",
            "precision": "fp32",
        }
    )
    # A run takes no orders of epochs that it does not have.
    epochs = [config.optim.of_task(t).epochs for t in range(len(SIZES))]
    beyond = {f"{t}/train-{e}" for t in range(len(SIZES)) for e in range(epochs[t], EPOCHS)}
    orders = {name: rows for name, rows in given["orders"].items() if name not in beyond}
    save_file(orders, folder / "orders.safetensors")
    return override(config, {"replay.orders": folder / "orders.safetensors"})


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_gives_the_numbers_of_the_method_written_out(name, trace):
    folder, given, train, labels, test = trace
    config = config_of(folder, given, VARIANTS[name])
    written, kinds = Written(config, given, train, labels), set()
    for t, result in enumerate(run(config, evaluate_on="test")):
        losses = written.learn(t)
        torch.testing.assert_close(torch.tensor(result.step_losses), torch.tensor(losses), atol=1e-4, rtol=0)
        rates = torch.tensor([(epoch.lr, epoch.head_lr) for epoch in result.epochs])
        torch.testing.assert_close(rates, torch.tensor(written.rates), atol=1e-9, rtol=1e-6)
        memory = memory_of(result.state.adapter)
        assert len(memory) == len(written.adapters)
        for index, block in enumerate(written.adapters):
            layer, (theirs_A, *theirs_B) = f"backbone.blocks.{index}.attn.qkv", block[-1]
            lora_A, lora_B = (result.factors[f"{layer}.{factor}"] for factor in ("lora_A", "lora_B"))
            assert difference(lora_A.T @ lora_A, theirs_A.T @ theirs_A) < 5e-4
            assert difference(lora_B @ lora_A, torch.cat(theirs_B) @ theirs_A) < 1e-3
            kind, basis = memory[layer]
            basis = basis.double()
            projector = basis @ basis.T if kind == "remove" else torch.eye(WIDTH) - basis @ basis.T
            number = written.taken[index].shape[1]
            assert basis.shape[1] == (number if kind == "remove" else WIDTH - number)
            assert difference(projector, written.taken[index] @ written.taken[index].T) < 1e-4
            kinds.add(kind)
        seen = test[labels < STARTS[t + 1]]
        with torch.no_grad():
            assert difference(result.model(seen), written.logits(seen)) < 5e-4
        assert result.task_aware == pytest.approx([written.hits(test, labels, s) for s in range(t + 1)])
        for c, (mean, cov) in enumerate(written.moments[STARTS[t] :]):
            remembered = Gaussians(*(result.state.classifier[f"{part}/{t}"] for part in ("means", "factors")))
            assert difference(remembered.mean_CD[c], mean) < 1e-4
            assert difference(remembered.covariances()[c], cov) < 1e-3
    assert ("retain" in kinds) == (name == "retain")
