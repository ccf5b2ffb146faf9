"""The published reward models: where their files come from, how their inputs are made, what their numbers mean.

No torch here: the catalog is read by ``craft-fast rewards list`` and by the settings.

A sha256 is pinned only where public text states it for that very file; a comment says where. Of any other file the
server's own digest is checked while it is fetched, and what was found is remembered on the shelf
(``craft_fast.rewards.shelf``). Sizes are bytes; ``exact`` tells those that are known from those that are about right.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from craft_fast.config import OFFICIAL_REWARDS
from craft_fast.errors import UsageError
from craft_fast.rewards.base import PICKSCORE, Preprocessing

Role = Literal["weights", "head", "config", "tokenizer"]

# Revisions never change; a branch may. Each is the one that public text names beside the sha256 of its files.
_CLIP_L = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
# Its main branch has a pickle alone; this is the hub's own conversion (pull request 15).
_CLIP_B32 = "openai/clip-vit-base-patch32@b33cedfd0df4e43b8238760678fcc89e1a0d38b3"
_HPS = "xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a"
_PICKSCORE = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
_IMAGE_REWARD = "THUDM/ImageReward@5736be03b2652728fb87788c9797b0570450ab72"
_BERT = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
_LAION = "github:christophschuhmann/improved-aesthetic-predictor@6934dd81792f086e613a121dbce43082cb8be85e"


@dataclass(frozen=True, slots=True)
class Asset:
    """One file of a published model.

    Attributes:
        role: what it is for.
        source: hub id ``owner/name`` or ``owner/name@revision``, or ``github:owner/name@revision``.
        file: its path there, POSIX.
        size: bytes.
        exact: the size is the file's own, so another one is refused.
        sha256: of the content, hex; None: not pinned.
        also: sha256 of the same content written in another way, by other repositories of its publisher.
        why: what it is, one line.
    """

    role: Role
    source: str
    file: str
    size: int
    exact: bool = False
    sha256: str | None = None
    also: tuple[str, ...] = ()
    why: str = ""

    @property
    def repository(self) -> str:
        """``owner/name``, wherever it is."""
        return self.source.removeprefix("github:").partition("@")[0]

    @property
    def revision(self) -> str:
        """Branch or commit; ``main`` unless the source names one."""
        return self.source.partition("@")[2] or "main"

    @property
    def key(self) -> str:
        """``owner--name/FILE``: its place on the shelf, POSIX."""
        return f"{self.repository.replace('/', '--')}/{self.file}"

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.file.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Official:
    """A published reward model.

    Attributes:
        name: as in the settings' ``kind``.
        title: as its authors call it.
        spec: how its inputs are made and how its output becomes a score.
        assets: its files.
        package: the authors' own package, where ``backend: package`` is there: ``hpsv2`` or ``image-reward``.
        licence: as stated publicly.
        paper: arXiv id or address.
        held_out_advised: better kept to judge results than to choose training samples.
        says: what the number means.
        note: what to know before its numbers are compared.
    """

    name: str
    title: str
    spec: Preprocessing
    assets: tuple[Asset, ...]
    package: str | None
    licence: str
    paper: str
    held_out_advised: bool
    says: str
    note: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(asset.size for asset in self.assets)


# The byte pairs of every CLIP are the same; one copy serves all of them. The vocabulary is elsewhere written without
# spaces (openai/clip-vit-base-patch32: 862,328 bytes, two fewer for each of its 49,408 entries but the last) and the
# merges with a longer first line. sha256 of CLIP's files as in concil859856/kunoworld-subnet, image/CVM.md.
_CLIP_TOKENIZER = (
    Asset(
        "tokenizer", _CLIP_L, "vocab.json", 961_143, True,
        "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
        also=("5047b556ce86ccaf6aa22b3ffccfc52d391ea4accdab9c2f2407da5b742d4363",),
        why="CLIP's vocabulary, the same for all CLIP models",
    ),
    Asset(
        "tokenizer", _CLIP_L, "merges.txt", 524_619, True,
        "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
        also=("f526393189112391ce6f9795d4695f704121ce452c3aad1f5335cc41337eba85",),
        why="CLIP's byte pairs",
    ),
)  # fmt: skip
_CLIP_L_FILES = (
    Asset(
        "weights", _CLIP_L, "model.safetensors", 1_710_540_580, True,
        "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb", why="CLIP ViT-L/14, float32",
    ),
    Asset(
        "config", _CLIP_L, "config.json", 4_519, True,
        "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a", why="layer sizes of CLIP ViT-L/14",
    ),
)  # fmt: skip

# The words whose likeness picks a prompt's tokens in MPS's overall score, as its authors' evaluation has them.
MPS_CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)


def _hps(version: str, weights: Asset, says: str, note: str) -> Official:
    return Official(
        name=f"hpsv{version}",
        title=f"Human Preference Score v{version}",
        spec=Preprocessing(family="clip", fit="pad", note="antialias as torchvision has it since 0.17"),
        assets=(weights, *_CLIP_TOKENIZER),
        package="hpsv2",
        licence="Apache-2.0",
        paper="arXiv 2306.09341",
        held_out_advised=False,
        says=says,
        note=note,
    )


_OFFICIALS = (
    _hps(
        "2.1",
        # Size and sha256 at this revision: three public repositories that use the file state them alike.
        Asset(
            "weights", _HPS, "HPS_v2.1_compressed.pt", 1_972_490_005, True,
            "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
            why="CLIP ViT-H/14, float16, open_clip's names",
        ),
        "cosine of picture and prompt, about 0.2 to 0.3; papers print 100 times it",
        "the hpsv2 package's own default is v2.0; this is v2.1",
    ),
    _hps(
        "2.0",
        Asset("weights", _HPS, "HPS_v2_compressed.pt", 1_970_000_000, why="CLIP ViT-H/14, float16, open_clip's names"),
        "as hpsv2.1, but an older model on a scale of its own: to compare with old figures only",
        "its scores are not to be compared with those of hpsv2.1",
    ),
    Official(
        name="pickscore",
        title="PickScore v1",
        spec=PICKSCORE.model_copy(update={"tokenizer": None}),
        assets=(
            Asset("weights", _PICKSCORE, "model.safetensors", 3_944_000_000, why="CLIP ViT-H/14, float32"),
            Asset("config", _PICKSCORE, "config.json", 4_500, why="layer sizes of PickScore"),
            *_CLIP_TOKENIZER,
        ),
        package=None,
        licence="none stated",
        paper="arXiv 2305.01569",
        held_out_advised=False,
        says="scaled cosine of picture and prompt, about 18 to 24; some repositories divide it by 26",
    ),
    Official(
        name="aesthetic-v2",
        title="LAION aesthetic predictor V2 (sac+logos+ava1-l14-linearMSE)",
        spec=Preprocessing(family="aesthetic", crop_rounding="round"),
        assets=(
            *_CLIP_L_FILES,
            # Many public repositories state this sha256; one with the revision and the size.
            Asset(
                "head", _LAION, "sac+logos+ava1-l14-linearMSE.pth", 3_714_759, True,
                "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
                why="five linear layers on the unit image embedding",
            ),
        ),
        package=None,
        licence="Apache-2.0",
        paper="https://laion.ai/blog/laion-aesthetics/",
        held_out_advised=False,
        says="looks alone, the prompt is not read: 1 to 10, most pictures 4 to 7",
    ),
    Official(
        name="image-reward",
        title="ImageReward v1.0",
        spec=Preprocessing(
            family="image_reward",
            crop_rounding="round",
            max_tokens=35,
            text="plain",
            score_mean=0.16717362830052426,
            score_std=1.0333394966054072,
            note="prompts are cut at 35 tokens",
        ),
        assets=(
            # One public repository states both sha256, of the files that it was tested with.
            Asset(
                "weights", _IMAGE_REWARD, "ImageReward.pt", 1_790_000_000, False,
                "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
                why="BLIP ViT-L/16 and BERT with a head",
            ),
            Asset(
                "config", _IMAGE_REWARD, "med_config.json", 485, False,
                "d8b5029cc3c0124313d17009d043f0701bbe497f3721fa4ceb818720fe665326",
                why="layer sizes of its text tower",
            ),
            # Many public repositories state this one, with the size.
            Asset(
                "tokenizer", _BERT, "vocab.txt", 231_508, True,
                "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
                why="BERT's vocabulary",
            ),
        ),
        package="image-reward",
        licence="Apache-2.0",
        paper="arXiv 2304.05977",
        held_out_advised=True,
        says="preference, its training pictures' mean 0 and spread 1: about -2.3 to 2",
    ),
    Official(
        name="mps",
        title="Multi-dimensional Preference Score, overall (a re-upload)",
        spec=Preprocessing(
            family="mps",
            score_scale="logit_scale",
            condition=MPS_CONDITION,
            threshold=0.01,
            note="maximum of each sample, as scored one by one; threshold 0.01",
        ),
        assets=(
            Asset(
                "weights", "RE-N-Y/mpsv1", "model.safetensors", 4_420_000_000,
                why="re-upload of the authors' weights by a third party: CLIP ViT-H/14 and a cross-attention model",
            ),
            *_CLIP_TOKENIZER,
        ),
        package=None,
        licence="see its page",
        paper="arXiv 2405.14705",
        held_out_advised=True,
        says="scaled cosine of the prompt and what it selects in the picture; no fixed range",
        note="the authors' own file is a pickle of a whole program and is never opened; this re-upload has its tensors",
    ),
    Official(
        name="clipscore-l14",
        title="CLIPScore, ViT-L/14, 100 x cosine",
        spec=Preprocessing(family="clip", score_scale=100.0, score_floor=0.0, note="CLIPScore as torchmetrics has it"),
        assets=(*_CLIP_L_FILES, *_CLIP_TOKENIZER),
        package=None,
        licence="see its page",
        paper="arXiv 2103.00020",
        held_out_advised=True,
        says="picture and prompt agree: 100 x cosine, not below 0, as torchmetrics",
        note="shares its image tower with aesthetic-v2, so it is not fully held out where that one filters",
    ),
    Official(
        name="clipscore-b32",
        title="CLIPScore, ViT-B/32, 2.5 x cosine",
        spec=Preprocessing(
            family="clip",
            # The authors' own code (jmhessel/clipscore) crops with torchvision and ends the prefix with one space.
            crop_rounding="round",
            prefix="A photo depicts ",
            score_scale=2.5,
            score_floor=0.0,
            note="CLIPScore as Hessel et al. have it",
        ),
        assets=(
            # Size, revision and sha256 as in devnull03/qrate, scripts/fetch-clip-weights.sh.
            Asset(
                "weights", _CLIP_B32, "model.safetensors", 605_157_884, True,
                "99d28a652e6ec46629ab7047a0ac82c69b1fe11e0ce672c43af65d3a9a3fc05d",
                why="CLIP ViT-B/32, float32",
            ),
            Asset(
                "config", _CLIP_B32, "config.json", 4_186, True,
                "b575ef3c36f2a057fa19e221650105052d61cc9c1a972ec15019c6261ec98770",
                why="layer sizes of CLIP ViT-B/32",
            ),
            *_CLIP_TOKENIZER,
        ),
        package=None,
        licence="see its page",
        paper="arXiv 2104.08718",
        held_out_advised=True,
        says="picture and prompt agree: 2.5 x cosine, not below 0, as its paper",
    ),
)  # fmt: skip
OFFICIALS: dict[str, Official] = {official.name: official for official in _OFFICIALS}
assert tuple(OFFICIALS) == OFFICIAL_REWARDS, "the settings and the catalog name the same models"


def get(name: str) -> Official:
    """The published model of that name.

    Raises:
        UsageError: there is none; the closest name is told.
    """
    if name in OFFICIALS:
        return OFFICIALS[name]
    close = get_close_matches(name.lower(), OFFICIALS, n=1, cutoff=0.4)
    raise UsageError(
        f"{name} is no published reward model",
        why=f"known are {', '.join(OFFICIALS)}",
        hint=f"did you mean {close[0]}?" if close else "craft-fast rewards list",
    )
