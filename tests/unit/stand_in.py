"""A virtual environment with a tiny package called hpsv2: what is spoken over the pipes is real, the score is not.

The package itself is tried in tests/parity.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
from pathlib import Path

from craft_fast.rewards.packages import environments, table
from craft_fast.store.atomic import write_json

# Score: mean of the picture's bytes over 255, where red counts 1/6, green 2/6 and blue 3/6, times the prompt's length,
# times the checkpoint's one number.
IMG_SCORE = """
import torch, types
import numpy as np
print("a print of the package")
model_dict, device, huggingface_hub = {}, "cpu", None

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def encode_image(self, pixels, normalize):
        if len(pixels) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory, says the stand-in")
        return pixels[:, None] * self.scale
    def encode_text(self, tokens, normalize):
        return tokens

def create_model_and_transforms(name, pretrained, **options):
    assert pretrained is None, "no second checkpoint may be fetched"
    return Model(), None, lambda picture: torch.tensor(weigh(np.asarray(picture)), dtype=torch.float32)

def weigh(pixels):
    return (pixels.mean(axis=(0, 1)) * [1, 2, 3]).sum() / 6 / 255

def get_tokenizer(name):
    def tokens(texts):
        if any("fail" in text for text in texts):
            raise ValueError("the tokenizer fails")
        return torch.tensor([[float("nan") if "nan" in text else float(len(text))] for text in texts])
    return tokens
"""
INIT = """
def score(picture, prompt, hps_version="v2.0"):
    from hpsv2 import img_score
    assert img_score.huggingface_hub.hf_hub_download("xswu/HPSv2", "x").endswith(".pt")
    return [len(prompt) + {"v2.0": 0.0, "v2.1": 0.5}[hps_version]]
"""


def make_stand_in(folder: Path, img_score: str = IMG_SCORE) -> Path:
    """Make the environment; its interpreter is this one, its other packages are those of this one."""
    site = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    package = site / "hpsv2"
    for part in (package / "src" / "open_clip", site / "hpsv2x-1.2.0.dist-info", folder / "bin"):
        part.mkdir(parents=True, exist_ok=True)
    base = Path(os.path.realpath(sys.executable))
    (folder / "bin" / "python").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "hpsv2x-1.2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: hpsv2x\nVersion: 1.2.0\n")
    (package / "__init__.py").write_text(INIT)
    (package / "img_score.py").write_text(img_score)
    for name in ("src/__init__.py", "src/open_clip/__init__.py"):
        (package / name).write_text("")
    (package / "src" / "open_clip" / "factory.py").write_text("_MODEL_CONFIGS = {}\n")
    return folder


def finish(folder: Path, *, pins: str | None = None) -> None:
    """Write what makes an environment count as there."""
    versions = {"hpsv2x": "1.2.0", "torch": "2.14.1", "torchvision": "0.29.1", "pillow": "13", "ftfy": "6.3.1"}
    digest = pins or table.pins_digest(table.get("hpsv2"))
    write_json(
        folder / environments.COMPLETE, {"package": "hpsv2", "pins": digest, "versions": versions, "made": time.time()}
    )
