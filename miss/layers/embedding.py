"""`nn.Embedding`: its hosts, and the two public classes, `MiSSeEmbedding` and `MiSSEmbedding`."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miss.forms import LayerConfig, MiSS, MiSSe
from miss.functional import scaled
from miss.layers.host import Host
from miss.layers.names import TorchLayer

__all__ = ["CLASSES", "EmbeddingHost", "MiSSEmbedding", "MiSSeEmbedding", "ScaledEmbeddingHost"]
__all__ += ["scales_rows"]


class EmbeddingHost(Host):
    """`nn.Embedding`: a weight ``(in, out)``, whose "in" are the ids, and inputs without features.

    An id is a vector of zeros with a one at that place. So MiSSe's sum of blocks is the id modulo
    the rank, with the sign of its block.
    """

    axes: ClassVar = {"weight": (1, 0)}
    drops = False
    lora = "lora_embedding_A", "lora_embedding_B"

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """Rows of ``d``."""
        return F.embedding(x, d)

    @classmethod
    def add(cls, layer: Any, x: Tensor, y: Tensor, parameter: str, config: LayerConfig) -> Tensor:
        """``y`` plus the delta's rows at the ids ``x``; see `Host.add`."""
        shares_ids = config.form.axis == 1
        rows = cls.product(layer, x % config.rank if shares_ids else x, layer.miss_D, parameter)
        rows = scaled(rows, config.scale, y.dtype)
        if config.form.alternate:
            rows = rows * (1 - 2 * (x // config.rank % 2)).to(y.dtype).unsqueeze(-1)
        if config.blank is not None:
            rows = rows.masked_fill((x == config.blank).unsqueeze(-1), 0)
        if shares_ids:
            return y + rows
        return config.form.add(x, y, rows, 1.0, lambda ids, found: found, config.rank)

    @staticmethod
    def blank(layer: Any, parameter: str) -> int | None:
        """``padding_idx``."""
        found: int | None = layer.padding_idx
        return found

    @staticmethod
    def refusal(layer: Any) -> str | None:
        """Options with which the rows that are read, or their gradients, depend on the batch."""
        if layer.max_norm is not None:
            return "has max_norm, which would rescale the base and not the delta: set it to None"
        for option in ("sparse", "scale_grad_by_freq"):
            if getattr(layer, option):
                return f"has {option}=True, which the gradient of D would not follow: set it False"
        return None


class ScaledEmbeddingHost(EmbeddingHost):
    """An embedding of transformers that multiplies its rows by ``embed_scale``."""

    @staticmethod
    def product(layer: Any, x: Tensor, d: Tensor, parameter: str) -> Tensor:
        """Rows of ``d``, scaled as those of the weight."""
        rows: Tensor = F.embedding(x, d) * layer.embed_scale
        return rows


def scales_rows(module: nn.Module) -> bool:
    """Whether a module is of one of the ``...ScaledWordEmbedding`` classes of transformers."""
    kind = type(module)
    ours = isinstance(module, nn.Embedding) and kind.__module__.startswith("transformers.")
    return ours and kind.__qualname__.endswith("ScaledWordEmbedding")


class _AdaptedEmbedding(TorchLayer, nn.Embedding):
    """What the two classes share."""

    miss_host = EmbeddingHost
    miss_type = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        *,
        scale: float = 1.0,
        dropout: float = 0.0,
        alternate: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        own = {"device": device, "dtype": dtype}
        super().__init__(num_embeddings, embedding_dim, padding_idx, **own)  # type: ignore[arg-type]
        settings = {"scale": scale, "dropout": dropout, "alternate": alternate}
        self._miss_begin(rank, adapter_dtype=adapter_dtype, **settings)


class MiSSeEmbedding(_AdaptedEmbedding):
    r"""An embedding whose delta repeats one block of ``rank`` rows along the ids.

    Row ``i`` of the delta is ``scale * D[i mod rank]``, that of ``padding_idx`` is zero. This is
    MiSS\ :sup:`e` for an input that is a one at the id, and zero elsewhere.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in `nn.Embedding`.
        rank: from 1 to ``num_embeddings``.
        scale, adapter_dtype: as in `MiSSeLinear`.
        dropout: 0.0; an id cannot be dropped.
        alternate: row ``i`` of the delta has the sign ``(-1)^(i // rank)``.

    Shape:
        - Input: ``(...)``, integers
        - Output: ``(..., embedding_dim)``

    Attributes:
        weight: the base layer's, ``(num_embeddings, embedding_dim)``; the constructor freezes it.
        miss_D: ``(rank, embedding_dim)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.

    >>> layer = MiSSeEmbedding(10, 4, rank=3)
    >>> layer(torch.tensor([[0, 3, 9]])).shape, layer.miss_D.shape
    (torch.Size([1, 3, 4]), torch.Size([3, 4]))
    """

    miss_form = MiSSe


class MiSSEmbedding(_AdaptedEmbedding):
    r"""An embedding whose delta repeats each of ``rank`` numbers of a row along one shard of it.

    This is MiSS: element ``o`` of row ``i`` of the delta is ``scale * D[i, k]`` for the shard ``k``
    that ``o`` lies in. Row ``padding_idx`` of the delta is zero.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as in `nn.Embedding`.
        rank: from 1 to ``embedding_dim``.
        scale, dropout, adapter_dtype: as in `MiSSeEmbedding`.
        alternate: False; this form has no blocks of the ids.

    Shape:
        - Input: ``(...)``, integers
        - Output: ``(..., embedding_dim)``

    Attributes:
        weight: the base layer's, ``(num_embeddings, embedding_dim)``; the constructor freezes it.
        miss_D: ``(num_embeddings, rank)``, zero at first; trainable.

    Raises:
        ShapeError: ``rank``, ``scale``, ``dropout``, ``alternate`` or ``adapter_dtype`` is outside
            its rule.

    >>> layer = MiSSEmbedding(10, 4, rank=2)
    >>> layer(torch.tensor([[0, 3, 9]])).shape, layer.miss_D.shape
    (torch.Size([1, 3, 4]), torch.Size([10, 2]))
    """

    miss_form = MiSS


CLASSES: tuple[type[TorchLayer], ...] = (MiSSeEmbedding, MiSSEmbedding)
