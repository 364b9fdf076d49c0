"""A point as Toto answers it and its draws: Student-T mixtures, and a draw of each from three uniforms.

Owns the draw twice over, on the host and as tensors that compile, and the stream of a window's uniforms. Knows nothing
of the network that the mixtures come from, of prices or of windows. Dimensions: W windows, N samples, h steps, K
components.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    def rows(self, count: int) -> Mixture:
        """The first of them."""
        return Mixture(probs=self.probs[:count], df=self.df[:count], loc=self.loc[:count], scale=self.scale[:count])

    def mean(self) -> Tensor:
        """Their means, [..., h]; they exist because df > 2."""
        return (self.probs * self.loc).sum(-1)


def mixture_samples(
    probs: np.ndarray, df: np.ndarray, loc: np.ndarray, scale: np.ndarray, uniforms: Iterable[np.ndarray], count: int
) -> np.ndarray:
    """N = count draws of each mixture from three uniforms each in [0, 1): component, radius, angle.

    The mixtures' parameters are [W, h, K], uniforms W of [N, h, 3], looked at one by one; returns [W, N, h].
    T = sqrt(df (U**(-2/df) - 1)) cos(2 pi V): Bailey 1994, Mathematics of Computation 62, 779-781.
    """
    cumulative = np.cumsum(probs, axis=-1)
    of_component = np.stack((df, -2 / df, loc, scale), axis=1).reshape(len(df), 4, -1)  # [W, 4, h * K]
    first = np.arange(df.shape[1])[:, None] * df.shape[2]  # of each step's components
    counts = np.min_scalar_type(df.shape[2])
    samples = np.empty((len(df), count, df.shape[1]))
    # By window and with the samples last, so that all stays in the processor's cache: 4 times as fast.
    for w, of_window in enumerate(uniforms):
        which, radial, angle = np.ascontiguousarray(of_window.transpose(2, 1, 0))  # [h, N] each
        reached = (which * cumulative[w, :, -1:])[:, None] >= cumulative[w, :, :-1, None]  # [h, K - 1, N]
        component = first + np.add.reduce(reached.view(np.uint8), axis=1, dtype=counts)  # of a step, at most K - 1
        df_, power, loc_, scale_ = (each.take(component) for each in of_component[w])
        radius = np.sqrt(df_ * np.expm1(power * np.log1p(-radial)))  # 1 - U is never 0
        cosine = torch.from_numpy(angle).mul_(2 * torch.pi).cos_().numpy()  # numpy's takes 4 times as long
        samples[w] = (loc_ + scale_ * radius * cosine).T
    return samples


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
