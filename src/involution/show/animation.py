"""The idea in motion: a kernel that is made anew at every position, beside one that stays the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from involution.show.capture import Captured
from involution.show.pictures import footprint

_SIDE, _GAP, _TEXT = 240, 12, 26  # pixels of a panel, between panels, and above them
_FRAMES = 256  # at most
_MILLISECONDS = 90  # a frame
_COLOURS = 128  # in a GIF
_HERE, _OTHER = "#c2334d", "#3b5bdb"


def animate(captured: Captured, picture: Image.Image, mirror: Tensor, group: int, path: Path) -> int:
    """Draw the kernel of one group as it is generated from position to position, and a convolution's beside it.

    Args:
        captured: what a layer did with the image.
        picture: the image.
        mirror: the kernel of the mirrored convolution for every group, (G, k, k).
        group: whose kernel is drawn.
        path: a file that ends in .gif or .webp.

    Returns:
        The number of frames.

    Raises:
        ValueError: if there is no such group.
    """
    kernel = captured.kernel[0]
    if not 0 <= group < len(kernel):
        raise ValueError(f"`group` must be from 0 to {len(kernel) - 1} in {captured.name}; got {group}.")
    own, fixed = kernel[group].numpy(), mirror[group].numpy()
    height, width = own.shape[-2:]
    step = max(1, round((height * width / _FRAMES) ** 0.5))
    places = [(row, column) for row in range(0, height, step) for column in range(0, width, step)]
    scale = _SIDE / max(picture.size)
    small = picture.convert("RGB").resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.NEAREST
    )
    limits = float(np.abs(own).max()) or 1.0, float(np.abs(fixed).max()) or 1.0
    stays = _kernel(fixed, limits[1])
    frames = [
        _frame(small, captured, row, column, fixed.shape[0], (_kernel(own[..., row, column], limits[0]), stays))
        for row, column in tqdm(places, "drawing frames", leave=False, disable=None)
    ]
    if path.suffix == ".gif":  # one palette for all, so that only what moves is stored
        palette = frames[len(frames) // 2].quantize(_COLOURS)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0)
    return len(frames)


def _frame(
    picture: Image.Image,
    captured: Captured,
    row: int,
    column: int,
    mirror_side: int,
    kernels: tuple[Image.Image, Image.Image],
) -> Image.Image:
    frame = Image.new("RGB", (4 * _SIDE + 5 * _GAP, _SIDE + _TEXT + 2 * _GAP), "white")
    draw, font = ImageDraw.Draw(frame), ImageFont.load_default(15)
    left, top, width, height = footprint(captured, row, column, picture.size)
    side = captured.layer.window.kernel_size[0]
    middle = (left + width / 2, top + height / 2)
    sides = ((width, height), (width * mirror_side / side, height * mirror_side / side))
    told = ("involution: a new kernel at every position", "convolution: one kernel for all positions")
    for index, (kernel, reach, text, colour) in enumerate(zip(kernels, sides, told, (_HERE, _OTHER), strict=True)):
        x = _GAP + index * 2 * (_SIDE + _GAP)
        draw.text((x, 5), text, "black", font)
        panel = picture.copy()
        corners = [m + sign * r / 2 for sign in (-1, 1) for m, r in zip(middle, reach, strict=True)]
        ImageDraw.Draw(panel).rectangle(corners, outline=colour, width=3)
        ImageDraw.Draw(panel).circle(middle, 4, colour, "white")
        frame.paste(panel, (x, _TEXT))
        frame.paste(kernel, (x + _SIDE + _GAP, _TEXT))
    return frame


def _kernel(values: NDArray[np.float32], limit: float) -> Image.Image:
    """A kernel in colours, blue where negative, red where positive."""
    shades = colormaps["RdBu_r"](0.5 + values / (2 * limit), bytes=True)[..., :3]
    return Image.fromarray(shades).resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
