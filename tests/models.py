"""Small models with the traps that real ones have."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from miss import adapter_parameters, inject
from tests.strategies import OPTIONS


class Attention(nn.Module):
    """Attention with projections of its own, by the names that transformers uses."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(width, width),
            nn.Linear(width, width),
            nn.Linear(width, width),
        )
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(torch.softmax(q @ k.transpose(-1, -2), -1) @ v)


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.norm, self.self_attn = nn.LayerNorm(width), Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.self_attn(self.norm(x)))


class Decoder(nn.Module):
    """A language model with tied embeddings and an alias.

    It has the method of transformers that names its head.
    """

    def __init__(self, width: int = 8, vocabulary: int = 11, checkpointing: str | None = None):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.alias = self.layers[1].mlp[2]
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        self.lm_head.weight = self.embed.weight
        self.checkpointing = checkpointing

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            if self.checkpointing is None:
                x = layer(x)
            else:
                x = checkpoint(
                    layer, x.requires_grad_(), use_reentrant=self.checkpointing == "reentrant"
                )
        return self.lm_head(x)


TOKENS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def perturb(model: nn.Module) -> None:
    """Random values in every D."""
    for d in adapter_parameters(model):
        nn.init.normal_(d)


def fill(model: nn.Module) -> nn.Module:
    """Other values in all that training changes."""
    perturb(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.rpartition(".")[2] in ("running_mean", "running_var"):
                buffer.uniform_(0.5, 1.5)
    return model


def adapted_decoder(method: str = "misse", **options: object) -> Decoder:
    torch.manual_seed(0)
    model = inject(Decoder(**options), "all-linear", rank=2, **OPTIONS[method])
    perturb(model)
    return model


def switched_on(model: nn.Module) -> set[str]:
    """The Parameters that require grad, without D."""
    named = model.named_parameters()
    return {name for name, p in named if p.requires_grad and not name.endswith("miss_D")}


def snapshot(model: nn.Module) -> dict[str, object]:
    """All that must be as before when something fails or is undone.

    These are types, identities, flags, hooks, attributes and values.
    """
    state: dict[str, object] = {"keys": list(model.state_dict())}
    for name, module in model.named_modules(remove_duplicate=False):
        plain = {}
        for key, value in module.__dict__.items():
            if not key.startswith("_") or key.startswith("_miss"):
                plain[key] = value
        state[name] = (
            type(module),
            id(module),
            plain,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
    for name, p in model.named_parameters(remove_duplicate=False):
        state[f"{name} parameter"] = (
            id(p),
            p.requires_grad,
            p.dtype,
            p.device,
            p._version,
            p.detach().tolist(),
        )
    return state
