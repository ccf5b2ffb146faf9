"""Runs inside a package's own environment and speaks over pipes; knows nothing of craft_fast.

    python -I -u worker.py hpsv2           messages on stdin, answers on stdout, until stdin ends
    python -I -u worker.py --probe hpsv2   import the package, print the versions, exit

A message is one line of JSON with ``op`` and ``bytes``, then that many bytes of safetensors; an answer is the same
with ``ok``. Operations:

* ``hello``: versions of the distributions that decide scores.
* ``load``: ``files`` (weights, config), ``tokenizer`` (folder), ``device``, ``dtype`` (auto: as the package does),
  ``hps_version``, ``architecture`` (sizes of a small network for tests; the published ones where null).
* ``score``: pictures ``0``, ``1``, ... uint8 [3, H, W] and ``prompts``, through the package's network, built once.
* ``score_own``: the same through the package's own ``score()``, literally, picture by picture.
* ``bye``: end.

Nothing here reaches a network: an audit hook refuses connections. Packages print to stdout; so stdout is taken away
from them before they are imported. Only what Python 3.10 knows is used.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import struct
import sys
import time
import traceback
import types
from typing import Any, BinaryIO

PROTOCOL = 1
_DECISIVE = ("torch", "torchvision", "transformers", "timm", "ftfy", "pillow", "numpy", "safetensors")
_DISTRIBUTIONS = {"hpsv2": "hpsv2x", "image-reward": "image-reward"}


class Problem(Exception):
    """Something to be told by name: ``kind`` is what the other side turns into its own error."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def no_network(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook: any connection or look-up of a name is refused, whoever asks."""
    if event == "socket.getaddrinfo" or (event == "socket.connect" and isinstance(args[1], tuple)):
        raise Problem("network", f"the package asked for the network: {event} {args[1:2] or args[:1]}")


class Hpsv2:
    """``hpsv2`` (arXiv 2306.09341): ViT-H/14 built without the pretrained weights that its ``score()`` downloads."""

    def __init__(self) -> None:
        self.img_score: Any = importlib.import_module("hpsv2.img_score")
        self.factory: Any = importlib.import_module("hpsv2.src.open_clip.factory")
        self.package: Any = importlib.import_module("hpsv2")

    def load(self, message: dict[str, Any]) -> None:
        """Build the network; fill the places from which ``score()`` takes its own."""
        import torch

        self.device = torch.device(message["device"])
        self.dtype = message["dtype"]
        self.version = message["hps_version"]
        if message.get("architecture"):
            # Under the name that score() builds: a small network goes the whole way of the large one.
            self.factory._MODEL_CONFIGS["ViT-H-14"] = message["architecture"]
        weights = message["files"]["weights"]
        self.model, _, self.preprocess = self.img_score.create_model_and_transforms(
            "ViT-H-14", None, precision="amp", device=self.device, output_dict=True, light_augmentation=True
        )
        self.tokenizer = self.img_score.get_tokenizer("ViT-H-14")
        stored = torch.load(weights, map_location=self.device, weights_only=True)
        self.model.load_state_dict(stored["state_dict"])
        self.model.eval()
        self.img_score.device = str(self.device)
        self.img_score.model_dict.update(model=self.model, preprocess_val=self.preprocess)
        # score() takes no path: what it would download is the file that was given.
        hub = types.SimpleNamespace(hf_hub_download=lambda repo, file: weights)
        self.img_score.huggingface_hub = hub

    def score(self, pictures: list[Any], prompts: list[str]) -> list[float]:
        """As ``score()``: unit embeddings, their products, no scale; each text once."""
        import torch

        texts = list(dict.fromkeys(prompts))
        with torch.no_grad(), self._precision():
            pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
            image = self.model.encode_image(pixels, normalize=True)
            text = self.model.encode_text(self.tokenizer(texts).to(self.device), normalize=True)
            rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=self.device)
            return [float(score) for score in (image * text[rows]).sum(-1).float().cpu()]

    def _precision(self) -> Any:
        import torch

        if self.dtype == "float32" or (self.dtype == "auto" and self.device.type != "cuda"):
            return contextlib.nullcontext()
        half = torch.bfloat16 if self.dtype == "bfloat16" else torch.float16
        return torch.autocast(self.device.type, half)

    def score_own(self, picture: Any, prompt: str) -> float:
        """``hpsv2.score``, which is v2.0 unless told otherwise; it reads its checkpoint again at every call."""
        return float(self.package.score(picture, prompt, hps_version=self.version)[0])


class ImageReward:
    """``image-reward`` (arXiv 2304.05977) through its own ``load`` with local files."""

    def __init__(self) -> None:
        # Its score needs no clip; only the helpers that are not used here do, and their package needs old setuptools.
        sys.modules.setdefault("clip", types.ModuleType("clip"))
        self.package: Any = importlib.import_module("ImageReward")
        self.network: Any = importlib.import_module("ImageReward.ImageReward")
        self.blip: Any = importlib.import_module("ImageReward.models.BLIP.blip")
        self.pretrain: Any = importlib.import_module("ImageReward.models.BLIP.blip_pretrain")

    def load(self, message: dict[str, Any]) -> None:
        """``ImageReward.load``; its keys are checked, which it does not do itself (strict=False)."""
        import torch

        self.device = torch.device(message["device"])
        self.dtype = message["dtype"]
        tokenizer, bert = message["tokenizer"], self.blip.BertTokenizer
        # It asks for "bert-base-uncased" whatever happens; it gets the folder that was given.
        self.blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda name: bert.from_pretrained(tokenizer))
        if message.get("architecture"):
            self._small(message["architecture"])
        files = message["files"]
        self.model = self.package.load(files["weights"], device=self.device, med_config=files["config"])
        stored = set(
            torch.load(files["weights"], map_location="cpu", weights_only=True, mmap=_zipped(files["weights"]))
        )
        missing = sorted(key for key in set(self.model.state_dict()) - stored if not key.endswith("position_ids"))
        if missing:
            raise Problem("weights", f"missing keys: {missing[:5]}")

    def _small(self, sizes: dict[str, Any]) -> None:
        """A small network in the place of the published one, whose sizes are written into the package."""
        import torch

        vision, whole = sizes["vision"], self.network.MLP

        def create_vit(vit: str, image_size: int, *rest: Any) -> tuple[Any, int]:
            return self.blip.VisionTransformer(img_size=image_size, **vision), vision["embed_dim"]

        def head(width: int) -> Any:
            made = whole(sizes["width"])
            ends = [sizes["width"], *sizes["head"], 1]
            linears = [index for index, layer in enumerate(made.layers) if isinstance(layer, torch.nn.Linear)]
            for place, index in enumerate(linears):
                made.layers[index] = torch.nn.Linear(ends[place], ends[place + 1])
            return made

        self.pretrain.create_vit = create_vit
        self.network.MLP = head

    def score(self, pictures: list[Any], prompts: list[str]) -> list[float]:
        """Its batched form, ``score_gard``, without gradients."""
        import torch

        words = self.model.blip.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
        ).to(self.device)
        with torch.no_grad(), self._precision():
            pixels = torch.stack([self.model.preprocess(picture) for picture in pictures]).to(self.device)
            scores = self.model.score_gard(words.input_ids, words.attention_mask, pixels)
        return [float(score) for score in scores.float().reshape(-1).cpu()]

    def _precision(self) -> Any:
        import torch

        if self.dtype in ("auto", "float32"):  # the package itself knows no other
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.dtype == "bfloat16" else torch.float16)

    def score_own(self, picture: Any, prompt: str) -> float:
        """``model.score``."""
        import torch

        with torch.no_grad():
            return float(self.model.score(prompt, picture))


_ADAPTERS = {"hpsv2": Hpsv2, "image-reward": ImageReward}


def _zipped(path: str) -> bool:
    """Whether a checkpoint is of torch's form since 1.6, of which single tensors can be mapped."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def versions(package: str) -> dict[str, str]:
    """Of the package and of everything that decides its scores."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in (_DISTRIBUTIONS[package], *_DECISIVE):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


class Worker:
    """Answers messages.

    Args:
        package: which one.
        source: where messages come from.
        sink: where answers go; nobody else may write there.
    """

    def __init__(self, package: str, source: BinaryIO, sink: BinaryIO) -> None:
        self.package = package
        self.source = source
        self.sink = sink
        self.adapter: Any = None

    def serve(self) -> None:
        """Answer until told to end, or until nobody is left who could ask."""
        while line := self.source.readline():
            message = json.loads(line)
            data = self.source.read(int(message.get("bytes", 0)))
            if message["op"] == "bye":
                return
            try:
                answer = self.answer(message, data)
            except Exception as error:  # a package may raise anything: all of it is told, by name
                traceback.print_exc(file=sys.stderr)
                kind = error.kind if isinstance(error, Problem) else _kind(error)
                answer = {"ok": False, "kind": kind, "error": f"{type(error).__name__}: {error}"[:2000]}
            self.sink.write(json.dumps({"bytes": 0, **answer}, allow_nan=True).encode() + b"\n")
            self.sink.flush()

    def answer(self, message: dict[str, Any], data: bytes) -> dict[str, Any]:
        """Carry out one operation."""
        if message["op"] == "hello":
            return {"ok": True, "protocol": PROTOCOL, "package": self.package, "versions": versions(self.package)}
        if message["op"] == "load":
            if message["dtype"] == "float32":
                _full_float32()
            self.adapter = _ADAPTERS[self.package]()
            self.adapter.load(message)
            return {"ok": True}
        if message["op"] in ("score", "score_own"):
            if self.adapter is None:
                raise Problem("order", "score before load")
            pictures, prompts = _pictures(data), message["prompts"]
            if len(pictures) != len(prompts):
                raise Problem("order", f"{len(pictures)} pictures, {len(prompts)} prompts")
            began = time.perf_counter()
            if message["op"] == "score":
                scores = self.adapter.score(pictures, prompts)
            else:
                scores = [self.adapter.score_own(*pair) for pair in zip(pictures, prompts, strict=True)]
            return {"ok": True, "scores": scores, "seconds": time.perf_counter() - began, "peak_bytes": _peak()}
        raise Problem("order", f"no such operation: {message['op']}")


def _kind(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error):
        return "memory"
    return "import" if isinstance(error, ImportError) else "package"


def _full_float32() -> None:
    """Float32 in full on a GPU: PyTorch's own setting cuts a convolution's inputs to TF32's 10 bits."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _peak() -> int:
    """Most memory that torch has held on the GPU since the last answer; 0 without one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0
    peak = int(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return peak


def _pictures(data: bytes) -> list[Any]:
    """Safetensors with ``0``, ``1``, ... uint8 [3, H, W] to PIL pictures in RGB."""
    from PIL import Image

    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    body = memoryview(data)[8 + size :]
    pictures = []
    for index in range(len(header)):
        entry = header[str(index)]
        begin, end = entry["data_offsets"]
        three, height, width = entry["shape"]
        if entry["dtype"] != "U8" or three != 3:
            raise Problem("order", f"picture {index} is {entry['dtype']} {entry['shape']}, wanted uint8 [3, H, W]")
        planes = [Image.frombytes("L", (width, height), bytes(plane)) for plane in _thirds(body[begin:end])]
        pictures.append(Image.merge("RGB", planes))
    return pictures


def _thirds(view: memoryview) -> list[memoryview]:
    third = len(view) // 3
    return [view[:third], view[third : 2 * third], view[2 * third :]]


def main() -> None:
    """See the module's docstring."""
    # The real stdout is for answers alone; whatever a package prints goes where its errors go.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    sys.stdout = io.TextIOWrapper(os.fdopen(os.dup(2), "wb"), encoding="utf-8", errors="replace", line_buffering=True)
    sys.addaudithook(no_network)
    if sys.argv[1] == "--probe":
        _ADAPTERS[sys.argv[2]]()
        answers.write(json.dumps(versions(sys.argv[2])).encode() + b"\n")
        answers.flush()
        return
    Worker(sys.argv[1], sys.stdin.buffer, answers).serve()


if __name__ == "__main__":
    main()
