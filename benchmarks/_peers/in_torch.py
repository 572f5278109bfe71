"""The probes and the work in torch: the models of ``in_jax`` and ``models.measured`` again."""

import copy
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks._peers.harness import THREADS, Problem

torch.set_num_threads(THREADS)

ROWS, VAL_ROWS, POSITIONS, FEATURES, VOCABULARY = 5, 3, 5, 8, 11


class TorchProblem(Problem):
    """``row_losses(outputs [N, ...], targets) -> [N]`` of ``model(*inputs)``."""

    def __init__(self, model, inputs, targets, row_losses, val_rows, device="cpu"):
        self.model = model.to(device)
        contiguous = [np.ascontiguousarray(array) for array in (*inputs, targets)]
        *self.inputs, self.targets = (torch.as_tensor(a, device=device) for a in contiguous)
        self.row_losses = row_losses
        self.val_rows = val_rows
        self.train_rows = len(targets) - val_rows

    def rows(self, start, stop):
        return [array[start:stop] for array in self.inputs], self.targets[start:stop]

    @property
    def train(self):
        return self.rows(0, self.train_rows)

    @property
    def val(self):
        return self.rows(self.train_rows, self.train_rows + self.val_rows)

    def losses(self, model, rows):
        inputs, targets = rows
        return self.row_losses(model(*inputs), targets)

    @functools.cached_property
    def in_float64(self):
        return copy.deepcopy(self.model).double()

    def row_gradient(self, row):
        inputs, targets = self.rows(row, row + 1)
        wide = [array.double() if array.is_floating_point() else array for array in inputs]
        targets = targets.double() if targets.is_floating_point() else targets
        loss = self.losses(self.in_float64, (wide, targets)).sum()
        grads = torch.autograd.grad(loss, list(self.in_float64.parameters()))
        return [grad.detach().cpu().numpy() for grad in grads]

    def plain(self, model=None):
        model = model or copy.deepcopy(self.model)

        def step():
            model.zero_grad()
            self.losses(model, self.train).mean().backward()
            return [p.grad for p in model.parameters()]

        return step

    def floor(self):
        model = copy.deepcopy(self.model)

        def step():
            model.zero_grad()
            self.losses(model, self.train).mean().backward()
            grads = [p.grad for p in model.parameters()]
            model.zero_grad()
            self.losses(model, self.val).mean().backward()
            return grads, [p.grad for p in model.parameters()]

        return step


def arrays(tensors):
    return [tensor.detach().double().cpu().numpy() for tensor in tensors]


def row_means(losses):
    return losses.flatten(1).mean(1)


def squared(outputs, targets):
    return row_means((outputs - targets.reshape(-1, *[1] * (outputs.dim() - 1))) ** 2)


def cross_entropy(logits, targets):
    if logits.dim() == 2:
        return F.cross_entropy(logits, targets, reduction="none")
    return row_means(F.cross_entropy(logits.transpose(1, 2), targets, reduction="none"))


class Tokens(nn.Module):
    """Ids [N, T] -> [N, T, F], through a table and what stands on it."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(VOCABULARY, FEATURES)
        if kind == "positions":
            self.positions = nn.Embedding(POSITIONS, FEATURES)
        if kind == "bare":
            self.table = nn.Parameter(torch.randn(POSITIONS, FEATURES))
        self.dense = nn.Linear(FEATURES, FEATURES)
        if kind == "tied":
            self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)
            self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "positions":
            x = x + self.positions(torch.arange(POSITIONS, device=ids.device)[None])
        if self.kind == "bare":
            x = x + self.table
        x = torch.tanh(self.dense(x))
        if self.kind == "twice":
            x = torch.tanh(self.dense(x))
        if self.kind == "tied":
            x = self.head(x)
        if self.kind == "product":
            x = x @ self.embed.weight.T
        return x


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(FEATURES, FEATURES, batch_first=True)

    def forward(self, x):
        return self.cell(x)[0]


def probe(make, shape):
    def build():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():  # no scale of one, no bias of zero
                parameter += 0.2 * torch.randn(parameter.shape)
        generator = np.random.default_rng(0)
        if shape == "ids":
            inputs = generator.integers(0, VOCABULARY, (ROWS + VAL_ROWS, POSITIONS))
        else:
            inputs = generator.normal(size=(ROWS + VAL_ROWS, *shape)).astype(np.float32)
        targets = generator.normal(size=ROWS + VAL_ROWS).astype(np.float32)
        return TorchProblem(model, [inputs], targets, squared, VAL_ROWS)

    return build


def probes():
    sequence, image = (POSITIONS, FEATURES), (3, 6, 6)

    def dense(*between):
        return nn.Sequential(
            nn.Linear(FEATURES, FEATURES), *between, nn.Tanh(), nn.Linear(FEATURES, 3)
        )

    def convolution(*between):
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), *between, nn.Tanh())

    return {
        "dense layers, one position": probe(dense, (FEATURES,)),
        "dense layers": probe(dense, sequence),
        "LayerNorm": probe(lambda: dense(nn.LayerNorm(FEATURES)), sequence),
        "embedding": probe(lambda: Tokens("embedding"), "ids"),
        "embedding tied to the head": probe(lambda: Tokens("tied"), "ids"),
        "head by x @ table.T": probe(lambda: Tokens("product"), "ids"),
        "layer called twice": probe(lambda: Tokens("twice"), "ids"),
        "position look-up for all rows": probe(lambda: Tokens("positions"), "ids"),
        "position table as a parameter": probe(lambda: Tokens("bare"), "ids"),
        "convolution": probe(convolution, image),
        "GroupNorm": probe(lambda: convolution(nn.GroupNorm(2, 4)), image),
        "LSTM": probe(Recurrent, sequence),
    }


class Block(nn.Module):
    def __init__(self, features, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(features, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x):
        n, t, f = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, t, 3, self.heads, -1).unbind(2)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + self.out(y.transpose(1, 2).reshape(n, t, f))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, layers, features, heads, positions, vocabulary, tied):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, features)
        self.positions = nn.Embedding(positions, features)
        self.blocks = nn.ModuleList(Block(features, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(features, eps=1e-6)
        self.head = nn.Linear(features, vocabulary, bias=False)
        for table in (self.embed, self.positions):
            nn.init.normal_(table.weight, std=features**-0.5)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens, positions):
        x = self.embed(tokens) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def gpt(
    rows,
    val_rows,
    *,
    tied,
    layers=2,
    features=256,
    heads=4,
    positions=128,
    vocabulary=2048,
    device="cpu",
):
    torch.manual_seed(0)
    model = GPT(layers, features, heads, positions, vocabulary, tied)
    tokens = np.random.default_rng(0).integers(0, vocabulary, (rows + val_rows, positions + 1))
    places = np.tile(np.arange(positions), (len(tokens), 1))
    inputs = [tokens[:, :-1], places]
    return TorchProblem(model, inputs, tokens[:, 1:], cross_entropy, val_rows, device)


def classifier(make, rows, val_rows, *shape):
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(rows + val_rows, *shape)).astype(np.float32)
    targets = generator.integers(0, 10, rows + val_rows)
    return TorchProblem(make(), [inputs], targets, cross_entropy, val_rows)


def mlp(rows, val_rows):
    def make():
        layers = []
        for width in (784, 512):
            layers += [nn.Linear(width, 512), nn.LayerNorm(512, eps=1e-6), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(512, 10))

    return classifier(make, rows, val_rows, 784)


class Padded(nn.Module):
    """The padding of "SAME" with a stride of 2 on an even size: one row and column at the end."""

    def forward(self, x):
        return F.pad(x, (0, 1, 0, 1))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def cnn(rows, val_rows):
    def make():
        layers = []
        for width, features in ((3, 32), (32, 64), (64, 128)):
            layers += [Padded(), nn.Conv2d(width, features, 3, stride=2), nn.ReLU()]
        return nn.Sequential(*layers, Mean(), nn.Linear(128, 10))

    return classifier(make, rows, val_rows, 3, 32, 32)


def works():
    return {
        "GPT-2 shape, tied head": lambda: gpt(4, 4, tied=True),
        "GPT-2 shape, head of its own": lambda: gpt(4, 4, tied=False),
        "MLP with LayerNorms": lambda: mlp(64, 64),
        "CNN without norms": lambda: cnn(64, 16),
    }
