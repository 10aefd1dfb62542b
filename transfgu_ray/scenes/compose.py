"""Pictures of one object or of a scene with several, with exact masks."""

import numpy as np
from PIL import Image, ImageFilter

from transfgu_ray.scenes.classes import STUFF_IDS, THING_IDS
from transfgu_ray.scenes.frame import Frame
from transfgu_ray.scenes.textures import CLUTTER, STUFF, paint, random_pair
from transfgu_ray.scenes.things import Layer, draw_thing

SCENE_UNITS = 256
OBJECT_UNITS = 128
_MAX_HIDDEN = 0.25
_MIN_VISIBLE = 0.7
# The object's least share of an object image.
_MIN_FILLED = 0.25


def render_object(rng: np.random.Generator, class_id: int, size_px: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Render a window of half a scene's side around one object.

    Args:
        rng: the only source of randomness.
        class_id: 0-11.
        size_px: side of the picture.

    Returns:
        The picture, uint8 (size, size, 3), and where the object is visible, uint8 (size, size) of 0 and 1.
    """
    scale = size_px / OBJECT_UNITS
    plain = rng.random() < 0.7
    canvas = (
        _stuff_ground(rng, size_px, scale=scale, odds=(0.5, 0.5, 0))[0] if plain else _patchwork(rng, size_px, scale)
    )
    thing = _main_thing(rng, class_id, size_px)
    layers = [thing]
    if rng.random() < 0.25:
        layers.insert(int(rng.integers(2)), _neighbour(rng, thing, size_px=size_px, class_id=class_id))
    label = np.zeros((size_px, size_px), dtype=np.uint8)
    for layer in layers:
        lay(canvas, label, layer=layer, value=int(layer is thing), shadow=rng.uniform(0, 0.5))
    return _photograph(rng, canvas), label


def render_scene(rng: np.random.Generator, size_px: int = SCENE_UNITS) -> tuple[np.ndarray, np.ndarray]:
    """Render a scene of two or three objects of different classes on one to three surfaces.

    Args:
        rng: the only source of randomness.
        size_px: side of the picture.

    Returns:
        The picture, uint8 (size, size, 3), and the class id of each pixel, uint8 (size, size).
    """
    scale = size_px / SCENE_UNITS
    canvas, label = _stuff_ground(rng, size_px, scale=scale, odds=(0.4, 0.5, 0.1))
    count = int(rng.integers(2, 4))
    class_ids = rng.permutation(THING_IDS)[:count].tolist()
    for layer, class_id in zip(_place(rng, class_ids, size_px), class_ids, strict=True):
        lay(canvas, label, layer=layer, value=class_id, shadow=rng.uniform(0, 0.5))
    return _photograph(rng, canvas), label


def lay(canvas: np.ndarray, label: np.ndarray, *, layer: Layer, value: int, shadow: float) -> None:
    """Lay a layer and its soft shadow over a picture, and its value over the label where it covers half a pixel.

    Args:
        canvas: (h, w, 3) float32, changed in place.
        label: (h, w) uint8, changed in place.
        layer: the layer to lay.
        value: written to the label.
        shadow: darkness of the shadow, in [0, 1).
    """
    height, width = label.shape
    if shadow > 0:
        canvas *= 1 - np.float32(shadow) * _soft_shadow(layer, width, height)[..., None]
    rows, columns, inside = _overlap(layer, width, height)
    cover = layer.cover[inside]
    window = canvas[rows, columns]
    window *= 1 - cover[..., None]
    window += layer.colour[inside]
    label[rows, columns][cover >= 0.5] = value


def _overlap(layer: Layer, width: int, height: int) -> tuple[slice, slice, tuple[slice, slice]]:
    """Return the rows and columns of the picture that the layer overlaps, and the same window inside the layer."""
    h, w = layer.cover.shape
    x0, y0 = max(layer.left, 0), max(layer.top, 0)
    x1, y1 = max(min(layer.left + w, width), x0), max(min(layer.top + h, height), y0)
    inside = slice(y0 - layer.top, y1 - layer.top), slice(x0 - layer.left, x1 - layer.left)
    return slice(y0, y1), slice(x0, x1), inside


def _soft_shadow(layer: Layer, width: int, height: int) -> np.ndarray:
    """Return the layer's blurred shape, shifted down, (height, width) float32 in [0, 1]."""
    h, w = layer.cover.shape
    reach = max(1, round(0.04 * max(h, w)))
    shape = Image.fromarray((layer.cover * 255).astype(np.uint8))
    picture = Image.new("L", (width, height))
    picture.paste(shape, (layer.left + reach // 2, layer.top + reach))
    return np.asarray(picture.filter(ImageFilter.BoxBlur(reach)), dtype=np.float32) / np.float32(255)


def _on_picture(layer: Layer, size_px: int) -> np.ndarray:
    """Return where the layer covers at least half a pixel, (size, size) bool."""
    seen = np.zeros((size_px, size_px), dtype=bool)
    rows, columns, inside = _overlap(layer, size_px, size_px)
    seen[rows, columns] = layer.cover[inside] >= 0.5
    return seen


def _main_thing(rng: np.random.Generator, class_id: int, size_px: int) -> Layer:
    """Draw the object of the picture, again and again until it fills enough of it."""
    while True:
        x, y = size_px * (0.5 + rng.uniform(-0.07, 0.07, 2))
        thing = draw_thing(rng, class_id, side_px=size_px * rng.uniform(0.75, 1.15), centre_px=(float(x), float(y)))
        if _on_picture(thing, size_px).mean() >= _MIN_FILLED:
            return thing


def _neighbour(rng: np.random.Generator, thing: Layer, *, size_px: int, class_id: int) -> Layer:
    """Draw another object at the rim; push it out until it hides at most a quarter of the thing and enough is left."""
    other = int(rng.choice([i for i in THING_IDS if i != class_id]))
    direction = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)][int(rng.integers(8))])
    side = size_px * rng.uniform(0.7, 1.0)
    middle = size_px * 0.5 + direction * size_px * rng.uniform(0.45, 0.7) + size_px * rng.uniform(-0.1, 0.1, 2)
    layer = draw_thing(rng, other, side_px=side, centre_px=(float(middle[0]), float(middle[1])))
    seen = _on_picture(thing, size_px)
    step = direction * max(1, size_px // 24)
    may_hide = min(_MAX_HIDDEN * seen.sum(), seen.sum() - _MIN_FILLED * seen.size)
    while (seen & _on_picture(layer, size_px)).sum() > may_hide:
        layer = layer.moved(int(step[0]), int(step[1]))
    return layer


def _place(rng: np.random.Generator, class_ids: list[int], size_px: int) -> list[Layer]:
    """Place objects mostly inside the picture, each at least 70 % visible, the first one at the back."""
    while True:
        layers: list[Layer] = []
        for class_id in class_ids:
            side = size_px * rng.uniform(0.42, 0.6)
            margin = 0.4 * side
            x, y = rng.uniform(margin, size_px - margin, 2)
            layers.append(draw_thing(rng, class_id, side_px=side, centre_px=(float(x), float(y))))
        if _all_visible(layers, size_px):
            return layers


def _all_visible(layers: list[Layer], size_px: int) -> bool:
    hidden = np.zeros((size_px, size_px), dtype=bool)
    for layer in reversed(layers):
        seen = _on_picture(layer, size_px)
        if (seen & ~hidden).sum() < _MIN_VISIBLE * (layer.cover >= 0.5).sum():
            return False
        hidden |= seen
    return True


def _regions(
    rng: np.random.Generator, size_px: int, *, scale: float, odds: tuple[float, ...]
) -> tuple[np.ndarray, list[int]]:
    """Draw which surface each pixel shows, (size, size) uint8, and the class id of each surface."""
    count = 1 + int(rng.choice(len(odds), p=odds))
    kinds = sorted(rng.permutation(STUFF_IDS)[:count].tolist(), reverse=True)
    frame = Frame(size_px, size_px, 1 / scale, 0, 0, 0, 1 / scale, 0)
    region = np.zeros((size_px, size_px), dtype=np.uint8)
    _, v = frame.turned(rng.uniform(-8, 8)).coordinates()
    border = v / np.float32(size_px / scale) + (frame.noise(rng, 45, 45) - 0.5) * rng.uniform(0.05, 0.16)
    # Walls have the higher ids, so they come first, above the ground.
    for i, level in enumerate(np.sort(rng.uniform(0.25, 0.75, count - 1))):
        region[border > level] = i + 1
    return region, kinds


def _stuff_ground(
    rng: np.random.Generator, size_px: int, *, scale: float, odds: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Paint one to three surfaces with wavy borders: (size, size, 3) float32, and class ids (size, size) uint8."""
    region, kinds = _regions(rng, size_px, scale=scale, odds=odds)
    canvas = np.empty((size_px, size_px, 3), dtype=np.float32)
    label = np.empty((size_px, size_px), dtype=np.uint8)
    for i, kind in enumerate(kinds):
        here = region == i
        texture = STUFF[kind - STUFF_IDS[0]]
        frame = Frame(size_px, size_px, 1 / scale, 0, 0, 0, 1 / scale, 0)
        frame = frame.turned(rng.uniform(-10, 10), rng.uniform(1.3, 1.9), *rng.uniform(0, 500, 2))
        canvas[here] = paint(texture(rng, frame)[here], _quiet_pair(rng))
        label[here] = kind
    return canvas, label


def _quiet_pair(rng: np.random.Generator) -> np.ndarray:
    """Draw the colours of a ground, with less contrast than on objects, as in most photographs."""
    middle = rng.uniform(0.28, 0.62)
    return random_pair(rng, (middle - 0.1, middle - 0.04), (middle + 0.04, middle + 0.1))


def _patchwork(rng: np.random.Generator, size_px: int, scale: float) -> np.ndarray:
    """Paint 5 to 11 cells, each with stuff or clutter; (size, size, 3) float32."""
    count = int(rng.integers(5, 12))
    seeds = rng.uniform(0, size_px, (count, 2)).astype(np.float32)
    x = np.arange(size_px, dtype=np.float32)
    distance = np.square(x - seeds[:, :1])[:, None, :] + np.square(x - seeds[:, 1:])[:, :, None]
    region = distance.argmin(0)
    canvas = np.empty((size_px, size_px, 3), dtype=np.float32)
    for i in range(count):
        here = region == i
        rows, columns = np.flatnonzero(here.any(1)), np.flatnonzero(here.any(0))
        if not len(rows):
            continue
        window = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        height, width = here[window].shape
        degrees, zoom = rng.uniform(0, 360), rng.uniform(1.3, 1.9)
        if rng.random() < 0.5:
            texture, degrees = STUFF[int(rng.integers(len(STUFF)))], rng.uniform(-10, 10)
        else:
            texture = CLUTTER[int(rng.integers(len(CLUTTER)))]
        frame = Frame(width, height, 1 / scale, 0, -width / scale / 2, 0, 1 / scale, -height / scale / 2)
        pattern = texture(rng, frame.turned(degrees, zoom, *rng.uniform(-1, 1, 2)))
        canvas[window][here[window]] = paint(pattern[here[window]], _quiet_pair(rng))
    return canvas


def _photograph(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Apply exposure, contrast curve and sensor noise; (h, w, 3) uint8."""
    gain, bend, noise = rng.uniform(0.8, 1.15), rng.uniform(-0.35, 0.35), rng.uniform(0, 0.03)
    light = np.clip(canvas * np.float32(gain), 0, 1)
    # A parabola through 0 and 1 replaces gamma, since powers differ between processors.
    light += np.float32(bend) * light * (1 - light)
    light += np.float32(noise) * rng.standard_normal(light.shape, dtype=np.float32)
    return (np.clip(light, 0, 1) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
