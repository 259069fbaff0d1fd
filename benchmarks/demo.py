"""``make demo``: a noisy photo restored on the CPU, with the time of plain PyTorch beside it.

The photo and the weights ship with the package, so nothing is downloaded. Where plain PyTorch would be compared with
itself, because there are no compiled kernels or the reference is demanded, nothing is timed.
"""

import argparse
import importlib.resources
import pathlib
import statistics

import numpy as np
import PIL.Image
import torch

import ipt_fast
from benchmarks.baseline import plain_eager
from benchmarks.measure import seconds
from ipt_fast import _extension
from ipt_fast._files import atomic_write
from ipt_fast.evaluation.figures import side_by_side, to_picture
from ipt_fast.evaluation.metrics import psnr
from ipt_fast.evaluation.protocols import get_protocol
from ipt_fast.ops._select import policy


def not_to_compare() -> str | None:
    """Why the model would run as plain PyTorch, or None."""
    if error := _extension.error():
        return error
    return "IPT_FAST_BACKEND demands the reference" if policy() == "reference" else None


def compare(model: torch.nn.Module, noisy: np.ndarray, rounds: int) -> None:
    """Print the times of plain PyTorch and of the kernels on one image, and how far they are apart."""
    x = torch.from_numpy(noisy).permute(2, 0, 1)[None].contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)

    def plain():
        with plain_eager(), torch.inference_mode():
            return model(x)

    def chosen():
        with torch.inference_mode():
            return model(x)

    for call in (plain, chosen):
        call()
    times = [(seconds(plain), seconds(chosen)) for _ in range(rounds)]
    plain_time, chosen_time = (statistics.median(column) for column in zip(*times, strict=True))
    output = chosen()
    with ipt_fast.use_backend("reference"):
        difference = (output - chosen()).abs().max().item()
    print(f"plain eager PyTorch          {plain_time * 1e3:.0f} ms (float32, channels-last, median of {rounds})")
    print(f"ipt_fast                     {chosen_time * 1e3:.0f} ms, {plain_time / chosen_time:.2f} times as fast")
    print(f"largest difference           {difference:.1e} (from the reference, values in [0, 1])")


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--sigma", type=float, default=25, help="noise added to the photo, on the 0..255 scale")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo_output"), help="folder of the pictures")
    args = parser.parse_args()

    with importlib.resources.files("ipt_fast").joinpath("assets", "chelsea.png").open("rb") as file:
        clean = np.asarray(PIL.Image.open(file).convert("RGB"))
    noisy = get_protocol("rgb").add_noise(clean / 255, args.sigma)
    model = ipt_fast.create_model("ipt_v2_tiny", pretrained=True, merged=True)
    restored = ipt_fast.restore(noisy, model, tile=None, dtype="float32")

    before, after = (psnr(image, clean / 255, data_range=1) for image in (noisy, restored.clip(0, 1)))
    args.out.mkdir(parents=True, exist_ok=True)
    panels = [("Noisy", to_picture(noisy)), ("Restored", to_picture(restored)), ("Original", clean)]
    picture = side_by_side(panels, captions=[f"{before:.2f} dB", f"{after:.2f} dB", ""])
    with atomic_write(args.out / "comparison.png") as path:
        picture.save(path)

    height, width = clean.shape[:2]
    print(f"photo                        {width} x {height}, Gaussian noise σ = {args.sigma:g}")
    print(f"model                        ipt_v2_tiny, {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"PSNR before / after          {before:.2f} dB / {after:.2f} dB")
    if reason := not_to_compare():
        print(f"ipt_fast                     not timed: {reason}")
    else:
        compare(model, noisy, args.rounds)
    print(f"pictures                     {args.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
