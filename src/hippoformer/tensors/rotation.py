"""Rotary positions: turning cached keys to new positions, and finding out how a model turns its own.

Su et al. 2021 (arXiv:2104.09864): a key at position p is its content rotated by p times fixed frequencies, so a cached
key moves by `shift` positions when it is rotated once more, by `shift` times the same frequencies.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How one attention layer rotates its keys.

    Attributes:
        frequencies: (F,) radians a position; the first 2F channels of a head rotate, the rest are left alone.
        interleaved: pairs are channels (2i, 2i+1) when True, (i, i+F) when False.
    """

    frequencies: Tensor
    interleaved: bool

    def shift(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Moves keys by a number of positions.

        Args:
            keys: (R, H, C, head size), already rotated.
            positions: (R,) signed distance to move each row by.

        Returns:
            Keys of the same shape and dtype.
        """
        angles = positions.to(torch.float32).unsqueeze(-1) * self.frequencies.to(keys.device)  # (R, F)
        cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]  # (R, 1, 1, F)
        n_rotated = 2 * self.frequencies.shape[0]
        rotated, rest = keys[..., :n_rotated].float(), keys[..., n_rotated:]
        if self.interleaved:
            first, second = rotated[..., 0::2], rotated[..., 1::2]
        else:
            first, second = rotated.chunk(2, dim=-1)
        first, second = first * cos - second * sin, second * cos + first * sin
        if self.interleaved:
            turned = torch.stack((first, second), dim=-1).flatten(-2)
        else:
            turned = torch.cat((first, second), dim=-1)
        return torch.cat((turned.to(keys.dtype), rest), dim=-1)


def explain_shift(
    before: Tensor, after: Tensor, distance: int, frequencies: list[Tensor], noise: float = 0.0
) -> Rotation | None:
    """Finds the rotation that carries one layer's keys from one position to another.

    Args:
        before, after: (1, H, C, head size) keys of the same tokens, `distance` positions apart.
        frequencies: the frequency tables the model owns.
        noise: relative error that is allowed where it is more than rounding.

    Returns:
        The rotation that explains them best, or None when even that one leaves more unexplained.
    """
    best, least = None, max(noise, 0.25 if before.dtype in (torch.float16, torch.bfloat16) else 1e-2)
    size = after.float().norm().clamp_min(1e-12)
    for table in frequencies:
        if 2 * table.shape[0] > before.shape[-1]:
            continue
        for interleaved in (False, True):
            rotation = Rotation(table, interleaved)
            moved = rotation.shift(before, torch.full((before.shape[0],), distance, device=before.device))
            error = ((moved.float() - after.float()).norm() / size).item()
            if error < least:
                best, least = rotation, error
    return best
