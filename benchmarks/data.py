"""What prepared stores and the loader gain over decoding and cropping the files of a folder.

    python benchmarks/data.py                 a few minutes, in a temporary folder
    python benchmarks/data.py --images 2000 --rounds 9
    python benchmarks/data.py --against ../older/checkout    the loaders of two commits, image for image

Everything runs on one core, alternating in rounds, and only the ratios are worth comparing: machines are noisy. The
pictures are made here, 500 x 375 like ImageNet's, with the spectrum of photos; they stay in the page cache.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.ready_batches import ReadyBatches
from jit_accel.data.reading.decode import decode_row

REPO = Path(__file__).parent.parent
WIDTH, HEIGHT, SIZE, BATCH = 500, 375, 256, 64
# case: (what it is divided by, at least so much)
TARGETS = {
    "uint8 store": ("image folder", 20.0),
    "uint8 loader": ("uint8 store", 0.8),
    "uint8 loader in a thread": ("uint8 store", 0.8),
    "JPEG store": ("image folder", 4.0),
    "JPEG loader": ("JPEG store", 0.8),
}


# Runs beside either checkout: a line in asks for a case, a line out holds its images, CPU seconds and largest worker.
SERVER = """
import json, sys, time, psutil, torch
from jit_accel import data
torch.set_num_threads(1)
open_images = getattr(data, "open_images", None) or data.open_source
loaders, me = {}, psutil.Process()
def cpu_s():
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))
for line in sys.stdin:
    path, num_workers, size, batch, seconds = json.loads(line)
    if line not in loaders:
        how = {"img_size": size, "batch_size": batch, "seed": 0, "num_workers": num_workers, "horizontal_flip": False}
        loaders[line] = data.build_loader(open_images(path), **how)
        next(loaders[line])
    images, start, begun = 0, time.perf_counter(), cpu_s()
    while time.perf_counter() - start < seconds:
        next(loaders[line]).images.float()  # as a training does
        images += batch
    sizes = [memory.rss - memory.shared for memory in (child.memory_info() for child in me.children())]
    print(json.dumps([images, cpu_s() - begun, max(sizes, default=0) / 2**30]), flush=True)
    if num_workers:
        loaders.pop(line).close()
"""


def make_photo(generator: np.random.Generator) -> Image.Image:
    """Noise whose JPEG is as large as a photo's: 57 KiB like matplotlib's portrait of Grace Hopper, scaled likewise."""
    fy, fx = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    radius = np.maximum(np.hypot(fy, fx), 1 / WIDTH)

    def plane(exponent: float) -> np.ndarray:
        noise = np.fft.rfft2(generator.standard_normal((HEIGHT, WIDTH)))
        smooth = np.fft.irfft2(noise / radius**exponent, (HEIGHT, WIDTH))
        return smooth / smooth.std()

    grey = plane(1.45)
    pixels = np.stack([grey + 0.3 * plane(1.8) for _ in range(3)], -1)
    return Image.fromarray(np.clip(128 + 50 * pixels, 0, 255).astype(np.uint8))


def make_folder(folder: Path, count: int) -> int:
    """Write JPEGs into ten class folders. Returns their bytes."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class{number % 10}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_photo(generator).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.glob("*/*.jpg"))


def prepare(folder: Path, store: Path, format: str) -> None:
    flags = ["--data_path", folder, "--output_dir", store, "--img_size", str(SIZE), "--format", format]
    subprocess.run([sys.executable, "-m", "jit_accel.prepare", *flags], check=True, cwd=REPO, stdout=subprocess.DEVNULL)


def image_folder(folder: Path) -> Iterator[int]:
    """As torchvision's ImageFolder with Resize, CenterCrop and PILToTensor does it, without a loader."""
    paths = sorted(folder.glob("*/*.jpg"))
    np.random.default_rng(0).shuffle(paths)
    for path in itertools.cycle(paths):
        with open(path, "rb") as file:
            image = Image.open(file).convert("RGB")
        scale = SIZE / min(image.size)
        width, height = int(image.width * scale), int(image.height * scale)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - SIZE) / 2), round((height - SIZE) / 2)
        image = image.crop((left, top, left + SIZE, top + SIZE))
        torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        yield 1


def store_of_pixels(store: Path) -> Iterator[int]:
    """Batches at random places, into memory that is there already, but not in the processor's cache: four batches."""
    images = open_images(store).images
    buffers = [np.empty((BATCH, 3, SIZE, SIZE), np.uint8) for _ in range(4)]
    generator = np.random.default_rng(0)
    for out in itertools.cycle(buffers):
        images.read(generator.integers(0, len(images), BATCH), out)
        yield BATCH


def store_of_files(store: Path) -> Iterator[int]:
    """Rows in their order, decoded one by one into the memory of batches."""
    stream = open_images(store).images
    places = itertools.cycle(np.empty((4 * BATCH, 3, SIZE, SIZE), np.uint8))
    for unit in itertools.cycle(range(stream.num_units)):
        for row, place in zip(stream.rows(unit), places):
            place[:] = decode_row(row[stream.columns.image], stream.columns, SIZE)
            yield 1


def loader(store: Path, opened: list, in_thread: bool = False) -> Iterator[int]:
    # mirrored on the device: here that would be this core
    batches = build_loader(open_images(store), img_size=SIZE, batch_size=BATCH, seed=0, horizontal_flip=False)
    batches = ReadyBatches(batches, "cpu", depth=2) if in_thread else batches
    opened.append(batches)
    for _ in batches:
        yield BATCH


def rate(case: Iterator[int], seconds: float) -> float:
    """Images/s while `case` runs for `seconds`."""
    images, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        images += next(case)
    return images / (time.perf_counter() - start)


def measure(cases: dict[str, Iterator[int]], rounds: int, seconds: float) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):  # the first one warms up
        for name, case in cases.items():
            found = rate(case, seconds)
            if number:
                rates[name].append(found)
    return rates


def make_tars(folder: Path, images: Path) -> None:
    folder.mkdir()
    files = sorted(images.glob("*/*.jpg"))
    for shard in range(8):
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number, file in enumerate(files[shard::8]):
                for ending, content in (("jpg", file.read_bytes()), ("cls", b"0")):
                    member = tarfile.TarInfo(f"{number:05d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def compare(checkouts: list[Path], cases: dict[str, tuple[Path, int]], rounds: int, seconds: float) -> None:
    """Print images a CPU second of the loaders of two checkouts, alternating, and the memory of their workers."""
    servers = [
        subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(checkout.resolve())},
        )
        for checkout in checkouts
    ]
    print("| case | images a CPU second | the other's | ratio | GiB of a worker | the other's |\n" + "| --- " * 6 + "|")
    for name, (path, num_workers) in cases.items():
        found: list[list[list[float]]] = [[], []]
        for _ in range(rounds + 1):  # the first one warms up
            for server, of_one in zip(servers, found):
                print(json.dumps([str(path), num_workers, SIZE, BATCH, seconds]), file=server.stdin, flush=True)
                of_one.append(json.loads(server.stdout.readline()))
        rates = [[images / cpu_s for images, cpu_s, _ in of_one[1:]] for of_one in found]
        ratio = statistics.median(ours / other for ours, other in zip(*rates))
        memory = " | ".join(f"{max(row[-1] for row in of_one):.2f}" for of_one in found)
        medians = " | ".join(f"{statistics.median(some):,.0f}" for some in rates)
        print(f"| {name} | {medians} | {ratio:.2f} | {memory} |", flush=True)
    for server in servers:
        server.stdin.close()
        server.wait()


def report(rates: dict[str, list[float]], say: Callable[[str], None] = print) -> None:
    say("| case, one core | images/s | ratio | of | target | met |\n" + "| --- " * 6 + "|")
    for name, found in rates.items():
        base, target = TARGETS.get(name, (None, None))
        row = f"| {name} | {statistics.median(found):,.0f} "
        if base is None:
            say(row + "| | | | |")
            continue
        ratio = statistics.median(a / b for a, b in zip(found, rates[base]))
        say(f"{row}| {ratio:.2f} | {base} | {target:g} | {'yes' if ratio >= target else 'no'} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case and round")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="compare with the loaders of this one")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder, pixels, files = (Path(root) / name for name in ("folder", "pixels", "files"))
        num_bytes = make_folder(folder, args.images)
        print(f"{args.images} JPEGs of {WIDTH} x {HEIGHT}, {num_bytes / args.images / 1024:.0f} KiB each; {SIZE} px")
        prepare(folder, pixels, "uint8")
        prepare(folder, files, "jpeg")
        if args.against:
            make_tars(Path(root) / "tars", folder)
            paths = {"folder": folder, "uint8 store": pixels, "JPEG store": files, "tars": Path(root) / "tars"}
            cases = {name: (path, 0) for name, path in paths.items()}
            cases |= {f"{name}, 2 workers": (paths[name], 2) for name in ("folder", "JPEG store", "tars")}
            compare([REPO, args.against], cases, args.rounds, args.seconds)
            return
        opened: list = []
        cases = {
            "image folder": image_folder(folder),
            "uint8 store": store_of_pixels(pixels),
            "uint8 loader": loader(pixels, opened),
            "uint8 loader in a thread": loader(pixels, opened, in_thread=True),
            "JPEG store": store_of_files(files),
            "JPEG loader": loader(files, opened),
        }
        try:
            report(measure(cases, args.rounds, args.seconds))
        finally:
            for each in opened:
                each.close()


if __name__ == "__main__":
    main()
