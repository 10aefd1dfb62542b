"""Colours of masks: distinct for every kind of colour vision, and the same in masks, pages and figures."""

import numpy as np
from PIL import Image

# Okabe and Ito's colour-blind-safe palette without its black, which is the background's, then the colours that lie
# farthest from all before them (Glasbey et al., 2007) in whichever of four kinds of colour vision is worst.
# As many as a palette PNG holds; tests/reports/glasbey.py makes them.
_COLOURS = np.frombuffer(
    bytes.fromhex(
        """
        e69f00 56b4e9 009e73 f0e442 0072b2 d55e00 cc79a7 8800ff 663311 444455 aaff88 88bb66 bb55ff 3333bb 00eeaa 662277
        aa5544 ccccdd 885588 dd00bb 114433 aa3300 eebb55 667777 9999ff dd7744 cc9999 552299 7777dd 7744ee aadd88 88ddff
        aaaacc 006655 993399 880033 bb5533 77cc88 66aa66 ccbbbb ddee66 cc9933 eedddd 88ffaa 448855 bb88cc bbeeff 5500cc
        8844cc 446611 bbff00 553366 cccc33 ddeecc 888811 0000ff 55dd55 4488cc 9977aa 889944 884433 bb6688 663399 dd1199
        995566 ee99ff 00bb99 bbdd77 ff88cc 883366 ff11bb cc7777 4477ee 334444 8800cc 00ccdd 992200 88cc66 664477 770088
        aa8855 aabb22 99ff99 9988ff 77bb88 ccaabb ffbbff 007744 881144 771122 8833ff 991177 777733 bb6655 2211dd 0044aa
        99ddbb 5599dd ff9988 666677 eeccaa 995522 cc1166 664422 115544 8855ff 999988 7733bb aa6622 bb66cc 33cc44 bbbb99
        884488 884455 ddddcc 443388 ddaa44 ee77bb dd55aa 0055dd bb9955 226699 00ffdd ccee77 224422 8800aa 880011 667799
        88bbff ee33cc aa9911 bb22aa bbaa77 668888 ddaadd cc5566 998833 ddcc99 2233dd 773388 8855aa aaeeee cceebb 665522
        22ff44 aa7744 dd77dd 99cc77 cc3377 0066dd 99aaaa 886688 99bbaa ddcccc eebbee 8855cc ffcc66 4411aa 99ccaa aaee88
        66ddee 99dd00 cc8866 885533 eeee55 aa00dd cc3311 0088ff ddbbcc 558899 bb55dd 0044cc 99bbee 880066 aa77bb 66ee66
        8899ee 7777bb 7744bb bb55ee aa99bb 8888ee 553333 bb1144 22aa88 991144 aa8899 ffaa77 775566 bb5555 bb0033 7722ee
        cc8833 bb7766 225577 11bb55 dddd44 dddd99 776699 6600ee ccbbff 6611bb 11ee55 bb77dd ff3311 669999 bb44ee 44bbcc
        99ee00 44ffbb 66cc99 aa4455 881199 dd9944 881155 cc99ee 00dd44 eeee99 88ffee ccbb66 5555aa 008800 bb66ff 997766
        ff9933 99bb55 bb8844 99cccc 5599aa 551199 ee7777 66ff77 cc8888 77dddd 004466 88dd99 ff7722 77eebb aa5588 9999dd
        ff5599 996677 bbddee ee8833 3311bb 5533aa ddeeaa ccdd66 ffddff ee99ee dd6633 7799bb 4488aa cc22ff 88aa77 554488
        """
    ),
    dtype=np.uint8,
).reshape(-1, 3)
# What is left of the light where a map is 0.
_DIMMED = 0.25


def class_colours(num_classes: int, background_id: int | None) -> np.ndarray:
    """Return the RGB of each class id, uint8 of shape (num_classes, 3); the background is black.

    Colours repeat beyond 256 classes.
    """
    table = _COLOURS[np.arange(num_classes) % len(_COLOURS)]
    if background_id is not None:
        # The classes after it keep their colours: the background takes none of the palette.
        table = np.insert(table, background_id, 0, axis=0)[:num_classes]
    return table


def palette_image(mask: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Return a mask as an image: with a palette up to 256 classes (void 255 white), plain 16-bit beyond."""
    if len(colours) > 256:
        return Image.fromarray(mask.astype(np.uint16))
    image = Image.fromarray(mask.astype(np.uint8))
    table = np.full((256, 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    image.putpalette(table.tobytes())
    return image


def overlay(photo: Image.Image, mask: np.ndarray, *, colours: np.ndarray, opacity: float = 0.55) -> Image.Image:
    """Return the photograph with the colour of each class laid over it; void (255) is white."""
    table = np.full((max(256, len(colours)), 3), 255, dtype=np.uint8)
    table[: len(colours)] = colours
    return Image.blend(photo, Image.fromarray(table[mask]), opacity)


def spotlight(photo: Image.Image, map_hw: np.ndarray) -> Image.Image:
    """Return the photograph lit where a map is high and dark where it is low, which needs no extra colours.

    Args:
        photo: photograph of any size.
        map_hw: values in [0, 1] on any grid (h, w), scaled so that the highest is fully lit.
    """
    grey = Image.fromarray((map_hw / max(float(map_hw.max()), 1e-6) * 255).astype(np.uint8))
    light = np.asarray(grey.resize(photo.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    pixels = np.asarray(photo, dtype=np.float32)
    dimmed = pixels.mean(-1, keepdims=True) * _DIMMED
    return Image.fromarray((dimmed + (pixels - dimmed) * light).round().clip(0, 255).astype(np.uint8))
