"""Pre-train a small ViT on rendered letters: a backbone for digits that needs no download.

    python docs/glyphs.py --seed 0 --out inflora/weights/glyph_vit.safetensors

Letters of the Latin, Greek and Cyrillic scripts, never a digit, are rendered in every font that
matplotlib ships. Strokes are then bent, thickened and blurred to look like handwriting, and most
images pass through 8 x 8 pixels, the resolution of scikit-learn's digits. Some fonts are held out:
the accuracy on their glyphs says how well the features carry over to shapes never seen.

Shapes: B batch, S = 64 side of a rendered glyph, P = 32 side of an image the model sees.
"""

import time
import unicodedata
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib
import numpy as np
import PIL
import timm
import torch
import torch.nn.functional as F
import typer
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Generator, Tensor, nn

from inflora.backbone import GLYPH_VIT

GLYPH_SIZE = 64  # rendered twice as large as seen, so that warping does not eat thin strokes
IMAGE_SIZE = 32
SCAN_SIZE = 8  # the digits are 8 x 8 scans: each pixel counts the ink in a block of 4 x 4
REFERENCE_FONT = "DejaVuSans"
HELD_OUT_FONTS = ("DejaVuSerif-Italic", "DejaVuSansMono-BoldOblique", "STIXGeneral", "cmtt10")
# Fonts of mathematical symbols and private code points: what they draw under a letter's code is no letter.
SYMBOL_FONTS = ("cmex", "cmsy", "STIXNonUni", "STIXSiz", "LastResort", "Display")
SAME_LOOK = 0.90  # correlation of two blurred glyphs above which they count as one shape


class Glyphs(NamedTuple):
    """Rendered letters and the classes they belong to."""

    images: Tensor  # (G, 1, S, S) in [0, 1]
    labels: Tensor  # (G,)


def font_paths() -> dict[str, Path]:
    """The text fonts that matplotlib ships, by name."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = {path.stem: path for path in sorted(folder.glob("*.ttf"))}
    return {name: path for name, path in fonts.items() if not any(mark in name for mark in SYMBOL_FONTS)}


def letters() -> list[str]:
    """Letters without accents: a letter that decomposes is another one with a mark on it."""
    blocks = [range(0x41, 0x7B), range(0xC0, 0x180), range(0x391, 0x3CA), range(0x400, 0x460)]
    characters = [chr(code) for block in blocks for code in block]
    return [c for c in characters if unicodedata.category(c) in ("Lu", "Ll") and not unicodedata.decomposition(c)]


def render(character: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One glyph, white on black, scaled to fill a square: size and position carry no class."""
    left, top, right, bottom = font.getbbox(character)
    width, height = int(right - left), int(bottom - top)
    canvas = Image.new("L", (max(width, height), max(width, height)))
    offset = ((canvas.width - width) // 2 - left, (canvas.height - height) // 2 - top)
    ImageDraw.Draw(canvas).text(offset, character, fill=255, font=font)
    return np.asarray(canvas.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.BOX), dtype=np.float32) / 255


def render_all(characters: list[str], path: Path) -> dict[str, np.ndarray]:
    """The glyphs of one font; characters it does not have are left out."""
    font, known = ImageFont.truetype(str(path), 128), FT2Font(str(path)).get_charmap()
    return {c: render(c, font) for c in characters if ord(c) in known and any(font.getbbox(c)[2:])}


def correlation(glyphs: list[np.ndarray]) -> np.ndarray:
    """Likeness of every pair after a little blur, 1 for the same picture."""
    images = F.avg_pool2d(torch.from_numpy(np.stack(glyphs))[:, None], 9, stride=4, padding=4)
    return np.corrcoef(images.flatten(1).numpy())


def classes() -> list[str]:
    """Groups of letters that look alike across scripts and cases, as strings ("AΑА", "Cc").

    A group that looks like a digit is dropped: the digits stay unseen.
    """
    drawn = render_all(letters() + list("0123456789"), font_paths()[REFERENCE_FONT])
    characters, alike = list(drawn), correlation(list(drawn.values())) > SAME_LOOK
    group = list(range(len(characters)))
    for i, j in np.argwhere(alike):  # merge the groups of every pair that looks alike
        group = [group[i] if g == group[j] else g for g in group]
    shapes = {g: "".join(c for c, of in zip(characters, group, strict=True) if of == g) for g in group}
    return [members for members in shapes.values() if not any(c.isdigit() for c in members)]


def load_glyphs(alphabet: list[str], fonts: dict[str, Path]) -> Glyphs:
    """Render every class in every font that has it."""
    label = {c: index for index, members in enumerate(alphabet) for c in members}
    drawn = [(image, label[c]) for path in fonts.values() for c, image in render_all(list(label), path).items()]
    images, labels = zip(*drawn, strict=True)
    return Glyphs(torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels))


def uniform(size: int, low: float, high: float, rng: Generator) -> Tensor:
    """(B, 1, 1, 1) random numbers, one for each image."""
    return torch.empty(size, 1, 1, 1).uniform_(low, high, generator=rng)


def redraw_strokes(images: Tensor, rng: Generator) -> Tensor:
    """Thinner or thicker: blur, then cut at a random level. (B, 1, S, S) -> same."""
    soft = F.avg_pool2d(F.avg_pool2d(images, 5, 1, 2), 5, 1, 2)
    level = uniform(len(images), 0.08, 0.45, rng)
    level = torch.minimum(level, 0.6 * soft.amax((2, 3), keepdim=True))  # never cut a thin glyph away
    paper, ink = torch.sigmoid(-16 * level), torch.sigmoid(16 * (soft - level))
    return (ink - paper) / (1 - paper)


def random_affine(size: int, rng: Generator) -> Tensor:
    """Rotation, shear, unequal scales and shift as (B, 2, 3) matrices from image to glyph coordinates."""
    angle, shear = (uniform(size, -m, m, rng).flatten() for m in (0.3, 0.3))
    # A scale above 1 shrinks the glyph. Scans fill their frame in height but not in width.
    wide, high = uniform(size, 1.0, 1.7, rng).flatten(), uniform(size, 0.9, 1.2, rng).flatten()
    right, down = (uniform(size, -0.12, 0.12, rng).flatten() for _ in range(2))
    cos, sin = angle.cos(), angle.sin()
    rows = [wide * cos, wide * (shear * cos - sin), right, high * sin, high * (shear * sin + cos), down]
    return torch.stack(rows, 1).view(size, 2, 3)


def elastic_field(size: int, rng: Generator) -> Tensor:
    """A smooth random displacement (B, P, P, 2), as an unsteady hand would make."""
    coarse = torch.randn(size, 2, 4, 4, generator=rng) * uniform(size, 0.0, 0.13, rng)
    return F.interpolate(coarse, IMAGE_SIZE, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


def rescan(images: Tensor, rng: Generator, share: float = 0.75) -> Tensor:
    """Pass a share of the images through 8 x 8 pixels; blur the others at random."""
    scanned = F.interpolate(F.avg_pool2d(images, IMAGE_SIZE // SCAN_SIZE), IMAGE_SIZE, mode="bilinear")
    blurred = torch.lerp(images, F.avg_pool2d(images, 5, 1, 2), uniform(len(images), 0, 1, rng))
    return torch.where(uniform(len(images), 0, 1, rng) < share, scanned, blurred)


def augment(images: Tensor, rng: Generator) -> Tensor:
    """Printed glyphs (B, 1, S, S) -> as if written by hand and scanned (B, 1, P, P) in [0, 1]."""
    size = len(images)
    grid = F.affine_grid(random_affine(size, rng), [size, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False)
    warped = F.grid_sample(redraw_strokes(images, rng), grid + elastic_field(size, rng), align_corners=False)
    scanned = rescan(warped, rng) * uniform(size, 0.8, 1.4, rng)
    noise = torch.randn(scanned.shape, generator=rng) * uniform(size, 0, 0.05, rng)
    return (scanned + noise).clamp(0, 1)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 %, then a half cosine to zero."""
    warm = max(1, steps // 20)
    return peak * min((step + 1) / warm, (1 + np.cos(np.pi * step / steps)) / 2)


@torch.no_grad()
def accuracy(model: nn.Module, glyphs: Glyphs, repeats: int = 4) -> float:
    """Share of augmented glyphs named rightly; the same augmentations at every call."""
    rng = Generator().manual_seed(0)
    model.eval()
    guesses = [model(augment(glyphs.images, rng)).argmax(1) for _ in range(repeats)]
    hits = [(guess == glyphs.labels).float().mean() for guess in guesses]
    return torch.stack(hits).mean().item()


def pretrain(
    model: nn.Module, train: Glyphs, held_out: Glyphs, rng: Generator, *, epochs: int, steps: int, batch: int, lr: float
) -> float:
    """Cross-entropy over the letters; returns the accuracy on the held-out fonts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    reached, start = 0.0, time.monotonic()
    # Every class equally often: a class of three scripts' letters has three times the glyphs.
    weights = 1.0 / train.labels.bincount().float()[train.labels]
    for epoch in range(epochs):
        model.train()
        total = 0.0
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(epoch * steps + step, epochs * steps, lr)
            chosen = torch.multinomial(weights, batch, replacement=True, generator=rng)
            loss = F.cross_entropy(model(augment(train.images[chosen], rng)), train.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        reached = accuracy(model, held_out)
        line = f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.3f}  held-out fonts {reached:.3f}"
        print(f"{line}  {time.monotonic() - start:.0f} s", flush=True)
    return reached


def main(
    out: Annotated[Path, typer.Option(help="Where the weights go (safetensors).")],
    seed: int = 0,
    epochs: int = 6,
    steps: Annotated[int, typer.Option(help="Steps per epoch.")] = 300,
    batch: int = 64,
    lr: float = 1e-3,
) -> None:
    """Render the glyphs, train, and write the backbone without its classifier."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # sums in the same order on every machine
    alphabet, fonts = classes(), font_paths()
    held_out = load_glyphs(alphabet, {name: fonts.pop(name) for name in HELD_OUT_FONTS})
    train = load_glyphs(alphabet, fonts)
    print(f"{len(alphabet)} classes, {len(train.labels)} glyphs in {len(fonts)} fonts")
    print(f"held out: {len(held_out.labels)} glyphs in {len(HELD_OUT_FONTS)} fonts", flush=True)
    model = VisionTransformer(**GLYPH_VIT, num_classes=len(alphabet))  # the classifier of letters is not shipped
    rng = Generator().manual_seed(seed)
    reached = pretrain(model, train, held_out, rng, epochs=epochs, steps=steps, batch=batch, lr=lr)
    model.reset_classifier(0)
    options = f"--seed {seed} --epochs {epochs} --steps {steps} --batch {batch} --lr {lr}"
    versions = {library.__name__: library.__version__ for library in (torch, timm, matplotlib, PIL)}
    metadata = {"command": f"python docs/glyphs.py {options}", "seed": str(seed), **versions}
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, out, {**metadata, "held_out_accuracy": f"{reached:.4f}"})


if __name__ == "__main__":
    typer.run(main)
