"""SCRL and BYOL: online and target branch, predictor, probe, and the loss of one batch."""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from scrl_fast.config.defaults import BACKBONE, VIEW_SIZE
from scrl_fast.errors import UsageError
from scrl_fast.models.encoder import Encoder
from scrl_fast.models.encoders import build_encoder
from scrl_fast.models.heads import ProjectionHead, classification, projection_head
from scrl_fast.ops import roi_align, two_view_loss


class SCRLOutput(NamedTuple):
    """The loss and statistics of one batch; every tensor stays on its device, nothing is read back."""

    loss: Tensor
    """Scalar float, mean over pairs of both directions' ``2 - 2cos`` (0..8); 0 where there are no pairs."""
    projections: Tensor
    """``[2N, D]`` online projections without gradient, for the monitors."""
    probe_loss: Tensor | None
    """Scalar cross entropy of the probe over labelled views (0 if none is); None without probe or labels."""
    probe_correct: Tensor | None
    """Number of labelled views the probe classified correctly; None without probe or labels."""
    pairs: int
    """N, the box pairs of the batch (BYOL: the images)."""
    probe_count: Tensor | None = None
    """Number of labelled views; None without probe or labels."""


class Branch(nn.Module):
    """Encoder and projector, the modules of both the online and the target network."""

    def __init__(self, encoder: Encoder, projector: ProjectionHead) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector


class SCRL(nn.Module):
    """Spatially Consistent Representation Learning (arXiv 2103.06122); ``method="byol"``: the same without boxes.

    backbone: a name for `build_encoder`, or an encoder, which becomes the online one itself.
    view_size: side of the views, in pixels, by which a network of the user's own is tried.
    hidden_dim, projection_dim: widths of projector and predictor.
    pool_size: RoIAlign gives pool_size x pool_size bins per box; above 1, pool_reduce hands the projector all bins
        side by side ("flatten") or their mean ("average").
    sampling_ratio, aligned: as in `scrl_fast.ops.roi_align`.
    target_init: the target network starts as a copy of the online one or from its own random weights.
    num_classes: width of the linear probe on the pooled feature; 0: no probe.
    Raises ValueError naming the argument and the value.
    """

    def __init__(
        self,
        backbone: str | Encoder = BACKBONE,
        *,
        view_size: int = VIEW_SIZE,
        method: Literal["scrl", "byol"] = "scrl",
        hidden_dim: int = 4096,
        projection_dim: int = 256,
        pool_size: int = 1,
        pool_reduce: Literal["flatten", "average"] = "flatten",
        sampling_ratio: int = -1,
        aligned: bool = False,
        target_init: Literal["online", "random"] = "online",
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        _check_choice("method", method, ("scrl", "byol"))
        _check_choice("pool_reduce", pool_reduce, ("flatten", "average"))
        _check_choice("target_init", target_init, ("online", "random"))
        if pool_size < 1:
            raise ValueError(f"pool_size must be at least 1, got {pool_size}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if isinstance(backbone, Encoder) and target_init == "random":
            raise UsageError(f"model.target_init=random makes a second {backbone.name}: name a function that makes it")
        self.method = method
        self.pool_size = pool_size
        self.pool_reduce = pool_reduce
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

        def branch() -> Branch:
            encoder = backbone if isinstance(backbone, Encoder) else build_encoder(backbone, size=view_size)
            bins = pool_size**2 if method == "scrl" and pool_reduce == "flatten" else 1
            return Branch(encoder, projection_head(bins * encoder.out_channels, hidden_dim, projection_dim))

        self.online = branch()
        self.target = copy.deepcopy(self.online) if target_init == "online" else branch()
        self.target.requires_grad_(False)
        self.predictor = projection_head(projection_dim, hidden_dim, projection_dim)
        self.probe = nn.Linear(self.online.encoder.out_channels, num_classes) if num_classes else None

    def forward(
        self, views: Tensor, boxes: tuple[Tensor, Tensor] | None = None, labels: Tensor | None = None
    ) -> SCRLOutput:
        """Loss of one batch.

        views: ``[2B, 3, S, S]``, view 1 of all images, then view 2.
        boxes: two ``[N, 5]`` of rows (image index into views, x0, y0, x1, y1) in view pixels, row i of both showing
            the same region; N = 0 is fine. BYOL takes none.
        labels: ``[B]``, -1 where unlabelled; only the probe reads them.
        The target network sees batch statistics too: leave it in train mode.
        """
        self._check(views, boxes, labels)
        features = self.online.encoder(views)
        with torch.no_grad():
            target = self.target.projector(self._regions(self.target.encoder(views), boxes))
        projections = self.online.projector(self._regions(features, boxes))
        loss = two_view_loss(self.predictor(projections), target)
        probe = self._probe(features, labels)
        return SCRLOutput(loss, projections.detach(), probe[0], probe[1], projections.shape[0] // 2, probe[2])

    def _regions(self, features: Tensor, boxes: tuple[Tensor, Tensor] | None) -> Tensor:
        """Rows for the projector: one a box, view 1 first; without boxes one a view."""
        if self.method == "byol" or boxes is None:
            return features.mean((2, 3))
        rows = roi_align(
            features,
            torch.cat(boxes),
            self.pool_size,
            spatial_scale=1.0 / self.online.encoder.stride,
            sampling_ratio=self.sampling_ratio,
            aligned=self.aligned,
        )
        return rows.flatten(1) if self.pool_reduce == "flatten" else rows.mean((2, 3))

    def _probe(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.probe is None or labels is None:
            return None, None, None
        logits = self.probe(features.detach().mean((2, 3)))
        return classification(logits, labels.repeat(2))

    def _check(self, views: Tensor, boxes: tuple[Tensor, Tensor] | None, labels: Tensor | None) -> None:
        if views.ndim != 4 or views.shape[0] % 2 or views.shape[0] == 0:
            raise ValueError(f"views must be [2B, 3, S, S] with B >= 1, got {list(views.shape)}")
        if min(views.shape[2:]) < self.online.encoder.stride:
            raise ValueError(
                f"views of {views.shape[2]}x{views.shape[3]} pixels are smaller than the encoder's stride of "
                f"{self.online.encoder.stride}"
            )
        if self.method == "scrl":
            if boxes is None:
                raise ValueError("boxes: method 'scrl' needs the matched boxes of both views, got None")
            if boxes[0].ndim != 2 or boxes[0].shape[1] != 5 or boxes[0].shape != boxes[1].shape:
                raise ValueError(f"boxes must be two [N, 5], got {[list(b.shape) for b in boxes]}")
        if labels is not None and labels.shape != (views.shape[0] // 2,):
            raise ValueError(f"labels must be [{views.shape[0] // 2}], one an image, got {list(labels.shape)}")

    def ema_pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """(targets, sources): parameters of the target branch and, in the same order, of the online branch."""
        return list(self.target.parameters()), list(self.online.parameters())

    def trained_parameters(self) -> list[Tensor]:
        """Parameters of encoder, projector and predictor: all that the loss moves. The probe has a loss of its own."""
        return [p for part in (self.online, self.predictor) for p in part.parameters() if p.requires_grad]

    def state(self) -> dict[str, Any]:
        """State dicts of the parts for checkpoints: ``{online, target, predictor, probe}``, probe None without one."""
        return {name: None if part is None else part.state_dict() for name, part in self._parts().items()}

    def load_state(self, state: dict[str, Any], *, strict: bool = True) -> None:
        """Load the dict that `state` returned. ``strict=False`` keeps a probe that is missing or of another width.

        Raises ValueError naming the part that is missing or does not fit.
        """
        for name, part in self._parts().items():
            weights = state.get(name)
            if name == "probe" and not _fits(part, weights):
                if strict:
                    raise UsageError(f"checkpoint part 'probe' does not fit this model: {part}")
            elif part is not None:
                _load(name, part, weights)

    def _parts(self) -> dict[str, nn.Module | None]:
        return {"online": self.online, "target": self.target, "predictor": self.predictor, "probe": self.probe}


def _fits(part: nn.Module | None, weights: dict[str, Tensor] | None) -> bool:
    if part is None or weights is None:
        return part is None and weights is None
    return {k: v.shape for k, v in part.state_dict().items()} == {k: v.shape for k, v in weights.items()}


def _load(name: str, part: nn.Module, weights: dict[str, Tensor] | None) -> None:
    if weights is None:
        raise UsageError(f"checkpoint has no part {name!r}")
    try:
        part.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(f"checkpoint part {name!r} does not fit this model: {error}") from error


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
