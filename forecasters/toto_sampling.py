"""A point as Toto answers it and its draws: Student-T mixtures, and a draw of each from three uniforms.

Owns the draw twice over, on the host and as tensors that compile, and the stream of a window's uniforms. Knows nothing
of the network that the mixtures come from, of prices or of windows. Dimensions: W windows, N samples, h steps, K
components.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """Student-T mixtures in scaled units, each [..., h, K]: price = affine scale * value + affine loc."""

    probs: Tensor
    df: Tensor
    loc: Tensor
    scale: Tensor

    def mean(self) -> Tensor:
        """Their means, [..., h]; they exist because df > 2."""
        return (self.probs * self.loc).sum(-1)


def mixture_samples(
    probs: np.ndarray, df: np.ndarray, loc: np.ndarray, scale: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    """One draw of each mixture from three uniforms in [0, 1): component, radius, angle.

    The mixtures' parameters broadcast to [W, N, h, K]; uniforms [W, N, h, 3]; returns [W, N, h].
    T = sqrt(df (U**(-2/df) - 1)) cos(2 pi V): Bailey 1994, Mathematics of Computation 62, 779-781.
    """
    cumulative = np.cumsum(probs, axis=-1)
    chosen = uniforms[..., :1] * cumulative[..., -1:] >= cumulative[..., :-1]  # [W, N, h, K - 1]
    component = chosen.sum(-1, keepdims=True)  # at most K - 1
    df, loc, scale = (np.take_along_axis(array, component, -1)[..., 0] for array in (df, loc, scale))
    radius = np.sqrt(df * np.expm1(-2 / df * np.log1p(-uniforms[..., 1])))  # 1 - U is never 0
    return loc + scale * radius * np.cos(2 * np.pi * uniforms[..., 2])


def drawn(mixture: Mixture, uniforms: Tensor) -> Tensor:
    """`mixture_samples` on the device: float64 [..., h] for mixtures [..., h, K] and uniforms [..., h, 3].

    The last bits may differ, and here they depend on the shape too; the first patch, whose shape is that of the
    number of samples, is drawn by the other.
    """
    cumulative = mixture.probs.double().cumsum(-1)
    component = (uniforms[..., :1] * cumulative[..., -1:] >= cumulative[..., :-1]).sum(-1, keepdim=True)
    df, loc, scale = (
        torch.take_along_dim(each.double(), component, -1)[..., 0] for each in (mixture.df, mixture.loc, mixture.scale)
    )
    radius = (df * torch.expm1(-2 / df * torch.log1p(-uniforms[..., 1]))).sqrt()
    return loc + scale * radius * torch.cos(2 * torch.pi * uniforms[..., 2])


def stream(seed: int) -> np.random.Generator:
    """Counter-based and keyed by the window's seed, so no window's samples depend on another's."""
    return np.random.Generator(np.random.Philox(key=seed))
