"""How ViT reads an image: patches, the class token and positions (the models: vit).

Shapes: B batch, C channels, Y and X pixel rows and columns, P patches, T = P + 1 positions (the
class token first), D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class ViTPatchEmbeddings(nn.Module):
    """Non-overlapping patches, each projected to one vector."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.image_size = _pair(config.image_size)
        self.patch_size = _pair(config.patch_size)
        self.num_channels = config.num_channels
        self.grid = (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )
        self.num_patches = self.grid[0] * self.grid[1]
        self.projection = nn.Conv2d(
            config.num_channels,
            config.hidden_size,
            kernel_size=self.patch_size,
            stride=self.patch_size,
        )

    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None
    ) -> torch.Tensor:
        """Map (B, C, Y, X) to (B, P, D), row by row.

        Raises:
            ValueError: another number of channels; another size, unless positions are interpolated.
        """
        channels, *size = pixel_values.shape[1:]
        if channels != self.num_channels:
            raise ValueError(
                "Make sure that the channel dimension of the pixel values match with the one set "
                f"in the configuration. Expected {self.num_channels} but got {channels}."
            )
        if not interpolate_pos_encoding and tuple(size) != self.image_size:
            raise ValueError(
                f"Input image size ({size[0]}*{size[1]}) doesn't match model "
                f"({self.image_size[0]}*{self.image_size[1]}); interpolate_pos_encoding=True takes "
                "other sizes"
            )
        patches_BDYX = self.projection(pixel_values.to(self.projection.weight.dtype))
        return torch.flatten(patches_BDYX, 2).transpose(1, 2)


class ViTEmbeddings(nn.Module):
    """Class token, patches and positions; with a mask token, masked patches are replaced by it."""

    def __init__(self, config: Any, *, use_mask_token: bool = False) -> None:
        super().__init__()
        width = config.hidden_size
        patch_embeddings = ViTPatchEmbeddings(config)
        num_positions = patch_embeddings.num_patches + 1
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if use_mask_token else None
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_positions, width))
        self.patch_embeddings = patch_embeddings
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        """Map images (B, C, Y, X) to (B, T, D); `bool_masked_pos` (B, P) is True where masked.

        Raises:
            ValueError: masked patches without a mask token; images of another shape.
        """
        patches_BPD = self.patch_embeddings(pixel_values, interpolate_pos_encoding)
        if bool_masked_pos is not None:
            if self.mask_token is None:
                raise ValueError("bool_masked_pos needs a model made with use_mask_token=True")
            masked_BP1 = bool_masked_pos.flatten(1).to(torch.bool)[..., None]
            patches_BPD = torch.where(masked_BP1, self.mask_token, patches_BPD)
        cls_B1D = self.cls_token.expand(len(patches_BPD), -1, -1)
        hidden_BTD = torch.cat((cls_B1D, patches_BPD), dim=1)
        positions_1TD: torch.Tensor = self.position_embeddings
        if interpolate_pos_encoding:
            positions_1TD = self.interpolate_pos_encoding(*pixel_values.shape[-2:])
        dropped: torch.Tensor = self.dropout(hidden_BTD + positions_1TD)
        return dropped

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """Return positions (1, T, D) for an image of this size: the learned grid, bicubically scaled."""
        patch = self.patch_embeddings.patch_size
        rows, columns = height // patch[0], width // patch[1]
        if (rows, columns) == self.patch_embeddings.grid:
            return self.position_embeddings
        cls_11D, grid_1PD = self.position_embeddings[:, :1], self.position_embeddings[:, 1:]
        grid_1DYX = grid_1PD.transpose(1, 2).reshape(1, -1, *self.patch_embeddings.grid)
        scaled_1DYX = functional.interpolate(
            grid_1DYX, size=(rows, columns), mode="bicubic", align_corners=False
        )
        return torch.cat((cls_11D, scaled_1DYX.flatten(2).transpose(1, 2)), dim=1)


def _pair(size: Any) -> tuple[int, int]:
    """Return height and width; a single number means a square."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
