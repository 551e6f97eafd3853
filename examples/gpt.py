"""A byte-level GPT in plain torch: the model that the demo trains, small enough for one thread of one core.

Bytes are the vocabulary, so there is no tokenizer and any text will do. Pre-norm blocks, rotary positions, causal
attention through `scaled_dot_product_attention`, squared ReLU, no biases, no dropout.
Shapes in comments: B batch, T time, C d_model, H heads, D head width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # every byte is a token


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The size of the model. The default has 0.85 million parameters."""

    layers: int = 4
    d_model: int = 128
    heads: int = 4
    context: int = 128

    def __post_init__(self) -> None:
        if min(self.layers, self.d_model, self.heads, self.context) < 1:
            raise ValueError(f"layers, d_model, heads and context must be positive: {self}")
        if self.d_model % (2 * self.heads):
            raise ValueError(f"d_model {self.d_model} must be an even multiple of heads {self.heads}")


class Attention(nn.Module):
    """Every position looks at itself and at what came before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = linear(config.d_model, 3 * config.d_model)
        self.out = linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))  # (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = linear(config.d_model, 4 * config.d_model)
        self.down = linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model, bias=False)
        self.attention = Attention(config)
        self.norm_mlp = nn.LayerNorm(config.d_model, bias=False)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), cos, sin)
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out. Equal (config, seed) give equal weights, and the global
    random state is neither read nor moved."""

    def __init__(self, config: GPTConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.utils.skip_init(nn.Embedding, VOCABULARY, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model, bias=False)
        self.head = linear(config.d_model, VOCABULARY)
        cos, sin = rotary_tables(config.context, config.d_model // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal weights; what ends a residual branch, and the head, starts at zero: so the first loss is log 256."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue  # LayerNorm gains stay at one
            if name.endswith(("out.weight", "down.weight", "head.weight")):
                parameter.zero_()
            else:
                std = 0.5 if name == "embedding.weight" else parameter.shape[1] ** -0.5
                parameter.normal_(std=std, generator=generator)

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens)  # (B, T) -> (B, T, C)
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.head(self.norm(x))  # (B, T, 256)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats per byte; both (B, T), targets are the tokens one position later."""
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def generate(
        self, prompt: bytes, length: int, temperature: float = 0.8, generator: torch.Generator | None = None
    ) -> bytes:
        """The prompt's continuation by `length` bytes, without the prompt. Temperature 0 takes the likeliest byte."""
        text = list(prompt or b"\n")
        start = len(text)
        for _ in range(length):
            window = torch.tensor([text[-self.config.context :]])  # (1, T)
            text.append(sample(self(window)[0, -1], temperature, generator))
        return bytes(text[start:])


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Uninitialised: `GPT._initialise` fills it from its own generator, not from the global one."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False)


def rotary_tables(context: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position times frequency, each (T, D/2)."""
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(0, width, 2) / width)  # (D/2,)
    angles = torch.arange(context)[:, None] * frequencies  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of features by an angle that grows with the position; x is (B, H, T, D)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


def sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature <= 0:
        return int(logits.argmax())
    return int(torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator))
