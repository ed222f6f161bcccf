"""Real artwork from the npm registry, as PNG folders: Microsoft's Fluent Emoji (MIT) in three styles of the same names.

`npm` fetches the packages (about 37 MB, nothing runs at install); `resvg` draws the vector icons. The demo and the
pre-training of the nano models read what this writes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import resvg_py
from PIL import Image

PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
}
SKIN_TONES = ("-light", "-medium-light", "-medium", "-medium-dark", "-dark")


def fetch_packages(folder: Path, styles: tuple[str, ...]) -> Path:
    """Install the npm packages of `styles` under `folder`; returns its `node_modules`."""
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("npm is needed to fetch the pictures of the demo: install Node.js, then try again.")
    folder.mkdir(parents=True, exist_ok=True)
    packages = [PACKAGES[style] for style in styles]
    flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--loglevel=error"]
    subprocess.run([npm, "install", "--prefix", str(folder), *flags, *packages], check=True, stdout=sys.stderr)
    return folder / "node_modules"


def read_icons(modules: Path, style: str, *, tones: bool = False) -> Iterator[tuple[str, str]]:
    """Yield `(name, svg)` of a vector style, by name; skin-tone variants only when asked for."""
    package = PACKAGES[style].rpartition("@")[0]
    table = json.loads((modules / package / "icons.json").read_text())
    for name, icon in sorted(table["icons"].items()):
        if tones or not name.endswith(SKIN_TONES):
            width, height = icon.get("width", table["width"]), icon.get("height", table["height"])
            yield name, f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'


def draw(svg: str, size: int) -> Image.Image:
    """The icon in the middle of a white square of `size` pixels, RGB."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    picture = Image.open(BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (size, size), "white")
    canvas.alpha_composite(picture, ((size - picture.width) // 2, (size - picture.height) // 2))
    return canvas.convert("RGB")


def write_folder(modules: Path, style: str, target: Path, *, size: int, most: int | None = None) -> int:
    """Draw a style into `target/<name>.png`, the name being the caption; returns how many."""
    target.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, svg in read_icons(modules, style):
        if most is not None and count >= most:
            break
        draw(svg, size).save(target / f"{name.replace('-', '_')}.png")
        count += 1
    return count
